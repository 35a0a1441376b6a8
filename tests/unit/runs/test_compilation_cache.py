"""Commands keep what they compile, unless the user has settings of their own or the folder is not theirs alone."""

import os
import pathlib
import stat

import jax
import jax.monitoring
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from e2sad_jax import data
from e2sad_jax.runs import _compilation_cache

SETTINGS = {
    "jax_compilation_cache_dir": None,
    "jax_compilation_cache_max_size": -1,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
    "jax_enable_compilation_cache": True,
}


@pytest.fixture(autouse=True)
def as_for_a_user(tmp_path, monkeypatch):
    """A cache folder of its own, and JAX's defaults in place of the tests' settings."""
    monkeypatch.setenv("E2SAD_DATA_DIR", str(tmp_path / "cache"))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_once(monkeypatch):
    """Compiles a program that is new to JAX's memory, as its function is; how many were found on disk."""
    found = []

    def note(event, **kwargs):
        found.extend([event] if event == "/jax/compilation_cache/cache_hits" else [])

    jax.monitoring.register_event_listener(note)
    try:
        assert jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((3, 3))) == pytest.approx(9 * 0.99505475)
    finally:
        jax.monitoring.unregister_event_listener(note)
    return len(found)


def test_a_program_is_compiled_once(monkeypatch):
    monkeypatch.setattr(_compilation_cache, "_LEAST_SECONDS", 0.0)
    folder = _compilation_cache.keep_compiled()
    assert folder.parent == data.default_data_dir() / "compiled"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert jax.config.jax_compilation_cache_max_size == 256 * 2**20
    assert compile_once(monkeypatch) == 0
    assert list(folder.glob("*-cache"))
    assert compile_once(monkeypatch) >= 1


@pytest.mark.parametrize(
    ("name", "value"), [("jax_compilation_cache_dir", "/elsewhere"), ("jax_enable_compilation_cache", False)]
)
def test_settings_of_the_user_have_precedence(name, value):
    jax.config.update(name, value)
    assert _compilation_cache.keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir == (value or None)
    assert not data.default_data_dir().exists()


def test_a_folder_that_others_can_write_to_is_not_used():
    folder = _compilation_cache.keep_compiled()
    jax.config.update("jax_compilation_cache_dir", None)
    folder.chmod(0o777)
    assert _compilation_cache.keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert _compilation_cache.keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_what_a_killed_process_left_half_written_goes(monkeypatch):
    """Else JAX would fail to read it in every later process, and would not write it anew."""
    monkeypatch.setattr(_compilation_cache, "_LEAST_SECONDS", 0.0)
    folder = _compilation_cache.keep_compiled()
    compile_once(monkeypatch)
    whole = {path.name for path in folder.glob("*-cache")}
    torn, being_written = folder / "jit_a-cache", folder / "jit_b-cache"
    for path in (torn, being_written):
        path.write_bytes(b"half")
    os.utime(torn, (0, 0))
    jax.config.update("jax_compilation_cache_dir", None)
    _compilation_cache.keep_compiled()
    assert {path.name for path in folder.glob("*-cache")} == whole | {being_written.name}


def test_another_processor_has_a_folder_of_its_own(monkeypatch):
    first = _compilation_cache._processor()
    assert first == _compilation_cache._processor()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(999))
    fewer = _compilation_cache._processor()
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: "flags\t\t: one two\n")
    assert len({first, fewer, _compilation_cache._processor()}) == 3
