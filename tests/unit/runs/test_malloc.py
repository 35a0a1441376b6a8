"""What a step frees is not mapped anew for the next one."""

import ctypes
import json
import os
import pathlib
import platform
import subprocess
import sys
import types

import pytest

from e2sad_jax.runs import _malloc

LIBRARY, VERSION = platform.libc_ver()
ROOT = pathlib.Path(__file__).resolve().parents[3]

PROGRAM = """
import json, resource, sys, threading
from e2sad_jax.runs import _malloc

def work():
    for _ in range(20):
        b"1" * (64 * 2**20)  # as large as the buffers of a step, in a thread, as JAX's are

taken = _malloc.keep_freed() if sys.argv[1] == "kept" else None
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps([taken, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def faults(how: str) -> tuple[bool, int]:
    """Whether the setting was taken, and the page faults of twenty times 64 MiB."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, check=True)
    taken, count = json.loads(done.stdout)
    return taken, count


@pytest.mark.skipif(LIBRARY != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_kept():
    taken, kept = faults("kept")
    _, mapped_anew = faults("plain")
    assert mapped_anew >= 20 * 32  # each of them, each time, even if a page has 2 MiB
    if tuple(map(int, VERSION.split("."))) >= (2, 36):
        assert taken
    assert kept < mapped_anew / (5 if taken else 0.9), "never worse than nothing"


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
