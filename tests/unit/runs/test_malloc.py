"""glibc is asked to keep freed memory, unless the user has settings of their own."""

import ctypes
import os
import types

import pytest

from e2sad_jax.runs import _malloc


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_settings_of_the_user_have_precedence(name, monkeypatch):
    """With and without the underscore at the end; no call is made."""
    calls = with_mallopt(monkeypatch, limit=2**62)
    monkeypatch.setenv(name, "glibc.malloc.arena_max=2" if name == "GLIBC_TUNABLES" else "2")
    assert not _malloc.keep_freed()
    assert calls == []


def test_where_the_limit_is_refused_nothing_is_changed(monkeypatch):
    """As in older glibc: the other settings alone would switch off what it does by itself."""
    calls = with_mallopt(monkeypatch, limit=32 * 2**20)
    assert not _malloc.keep_freed()
    assert calls == [(-3, 2**30, 0)]
    calls = with_mallopt(monkeypatch, limit=2**62)
    assert _malloc.keep_freed()
    assert set(calls) == {(-3, 2**30, 1), (-1, 2**30, 1), (-8, 1, 1)}


def test_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert not _malloc.keep_freed()


def with_mallopt(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[tuple[int, int, int]]:
    """Stands in for that of glibc, in a clean environment; the calls and what they return."""
    calls = []
    for name in [*os.environ]:
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)

    def mallopt(option: int, value: int) -> int:
        calls.append((option, value, int(option != -3 or value <= limit)))
        return calls[-1][-1]

    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    return calls
