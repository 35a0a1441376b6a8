"""JAX's compilation cache in the user's cache folder: a command that is run again does not compile again."""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import time

import jax

from e2sad_jax import data
from e2sad_jax.errors import DataError

LIMIT = 256 * 2**20  # bytes; the programs that were not used for longest go first
_LEAST_SECONDS = 0.1  # of compiling: faster programs are not kept
_TORN_AFTER = 60  # seconds: nobody writes an entry for so long


def keep_compiled() -> pathlib.Path | None:
    """Lets JAX keep compiled programs on disk, beside the prepared data sets.

    This is for the whole process, so commands call it, not the library. JAX's own settings have precedence
    (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE). A compiled program is code: a folder that others can write
    to is not used.

    Returns:
      The folder; None where none is used.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    try:
        folder = data.default_data_dir() / "compiled" / _processor()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022 or not os.access(folder, os.W_OK):
            return None
        _remove_torn(folder)
    except (OSError, DataError, AttributeError):  # read-only, no home folder, no POSIX
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LIMIT)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
    return folder


def _processor() -> str:
    """A name for what XLA compiles for: the processor's instructions and the number of cores.

    JAX's key for a program of the CPU has neither.
    """
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        flags = None
    kind = " ".join(sorted(flags[1].split())) if flags else platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}-{cores}"


def _remove_torn(folder: pathlib.Path) -> None:
    """Removes entries that a killed process left half-written: JAX writes their time of use last, and never writes twice."""
    for entry in folder.glob("*-cache"):
        used = entry.with_name(entry.name.removesuffix("-cache") + "-atime")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if not used.exists() and entry.stat().st_mtime < time.time() - _TORN_AFTER:
                entry.unlink()
