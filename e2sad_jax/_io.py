"""Files: atomic writing, bounded reading, strict JSON, seals, locks, and the digest of arrays."""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import secrets
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import filelock
import numpy as np

from e2sad_jax.errors import BusyError, ConfigError, printable

LOCK = ".lock"
SEAL = "sha256"
JSON_BYTES = 16 * 2**20  # larger than any JSON file of this package, the outcomes of attacks excepted
INTEGERS = 2**63  # beyond it, JSON readers disagree


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Replaces a file in one step by what is written to the stream that it yields.

    The bytes go to a hidden file in the same folder and reach the disk before the file takes its name: a reader sees the
    old content or the new one, and a failure or a crash leaves the old one.

    Args:
      path: the file, in an existing folder.

    Raises:
      OSError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def check_folder(folder: pathlib.Path, flag: str, make: bool = False) -> None:
    """Finds out whether files can be written in a folder, before what is to be written there is computed.

    Args:
      folder: the folder; where there is none, the nearest above it counts.
      flag: the flag that names it, with its value.
      make: whether to make it.

    Raises:
      ConfigError: if it cannot be written or made.
    """
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{flag}: cannot be written ({error.strerror}); choose another folder") from error


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file through `atomic_file`."""
    with atomic_file(path) as stream:
        stream.write(content)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text in UTF-8 through `atomic_file`."""
    write_bytes(path, text.encode())


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes indented JSON through `atomic_file`; refuses NaN, which other programs cannot read."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """Reads a regular file of at most `limit` bytes.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is larger, or a pipe or a device, which might never end.
    """
    with open(path, "rb", opener=_open_without_waiting) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size:,} bytes, more than the {limit:,} that are read")
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than the {limit:,} bytes that are read")
    return content


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens a file; a pipe that nobody writes to opens at once, too."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_json(path: str | os.PathLike[str], limit: int = JSON_BYTES) -> Any:
    """Reads a JSON file of at most `limit` bytes.

    Raises:
      OSError: if it cannot be read.
      ValueError: if `read_bytes` or `parse_json` refuses it.
    """
    return parse_json(read_bytes(path, limit))


def parse_json(content: bytes | str) -> Any:
    """Parses a JSON text on whose meaning all programs agree.

    Raises:
      ValueError: if it is not JSON in UTF-8, is nested too deeply, gives a name twice, or holds NaN, infinity, an integer
        of more than 64 bits, or half of a surrogate pair.
    """
    text = content if isinstance(content, str) else content.decode()
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_finite, parse_constant=_finite
        )
        if "\\u" in text:  # without escapes there are no halves
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"it gives {name[:60]!r} twice")
        value[name] = item
    return value


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -INTEGERS <= int(digits) < INTEGERS:
        raise ValueError(f"it holds the integer {digits[:24]}, of more than 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"it holds {digits[:24]}, which is not a finite number")
    return value


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values and their digest, by which `unsealed` recognises a damaged file."""
    return {**values, SEAL: hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}


def unsealed(values: Any) -> dict[str, Any]:
    """Returns the values that `sealed` was given.

    Raises:
      ValueError: if they are not what `sealed` returned.
    """
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__} instead of named values")
    content = {name: value for name, value in values.items() if name != SEAL}
    if sealed(content) != values:
        raise ValueError("its content is not what was written: it was damaged, or edited")
    return content


def read_sealed(path: pathlib.Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON file that holds what `sealed` returned.

    Raises:
      OSError: if it cannot be read.
      ValueError: if `read_json` or `unsealed` refuses it.
    """
    return unsealed(read_json(path, limit))


@contextlib.contextmanager
def locked(folder: pathlib.Path, name: str = LOCK, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Keeps other processes out of a folder until the block ends; the lock ends with the process at the latest.

    On a file system without locks `filelock` uses the existence of the file, and takes over what a dead process of this
    host left.

    Args:
      folder: the folder; made when missing.
      name: of the lock file; it says which process holds the lock.
      waiting: called with the holder of the lock, then the call waits; None raises instead.

    Raises:
      BusyError: if another process holds the lock and `waiting` is None.
      OSError: if the folder cannot be written.
    """
    path = folder / name
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        busy = f"another process is at work in {folder}{_holder(path)}"
        if waiting is None:
            raise BusyError(f"{busy}; wait for it to end, or choose another --workdir") from error
        waiting(busy)
        lock.acquire()
    try:
        with contextlib.suppress(OSError):
            text = path.read_text(errors="replace")
            if not text or text.startswith(_HOLDER):  # any other text is filelock's own, and names the process too
                path.write_text(f"{_HOLDER} {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()


_HOLDER = "process"


def _holder(path: pathlib.Path) -> str:
    """Returns who holds a lock, in words; "" if nothing says so."""
    try:
        text = path.read_text(errors="replace")[:200]
    except OSError:
        return ""
    if text.startswith(_HOLDER) or not text.strip():
        return f" ({printable(text)})" if text.strip() else ""
    number, *host = text.split()[:2]  # of filelock, where there are no locks
    return printable(f" ({_HOLDER} {number} on {' '.join(host)}; if it is gone, delete {path})")


def digest(arrays: Mapping[str, Any], header: str = "") -> str:
    """Returns the SHA-256 of named arrays: of name, dtype, shape and bytes of each, in the order given.

    Args:
      arrays: what `numpy.asarray` takes, by name.
      header: text that is part of the digest.

    Returns:
      64 hexadecimal digits.
    """
    sha256 = hashlib.sha256(header.encode())
    for name, value in arrays.items():
        array = np.asarray(value)
        dtype = array.dtype.name if array.dtype.kind == "V" else array.dtype.str  # bfloat16 and float8 are kind V
        sha256.update(f"{name} {dtype} {array.shape}\n".encode())
        sha256.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()
