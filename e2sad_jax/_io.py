"""Files: atomic writing, bounded reading, strict JSON, digests of content, and locks."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import socket
import stat
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from e2sad_jax.errors import BusyError

LOCK = ".lock"
SEAL = "sha256"
JSON_BYTES = 16 * 2**20  # more than any file of ours has, but for outcomes of attacks
INTEGERS = 2**63  # what every other program can read


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is a pipe or a device, which might never end, or larger.
    """
    with open(path, "rb", opener=_without_waiting) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size:,} bytes, more than the {limit:,} that are read")
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than the {limit:,} bytes that are read")
    return content


def read_json(path: str | os.PathLike[str], limit: int = JSON_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
      OSError: if it cannot be read.
      ValueError: as `read_bytes`, `parse_json`.
    """
    return parse_json(read_bytes(path, limit))


def parse_json(content: bytes | str) -> Any:
    """What a JSON text says, where all programs agree on it.

    Raises:
      ValueError: if it is not JSON in UTF-8, is nested too deeply, gives a name twice, or holds NaN, infinity, an integer
        of more than 64 bits, or half of a surrogate pair.
    """
    text = content if isinstance(content, str) else content.decode()
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_finite, parse_constant=_finite
        )
        if "\\u" in text:  # else there are no halves
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


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe that nobody writes to at once, too; what it is shows afterwards."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def walk(folder: pathlib.Path, limit: int) -> Iterator[tuple[pathlib.Path, os.stat_result]]:
    """All regular files below a folder; what disappears meanwhile is left out.

    Raises:
      ValueError: at a link, which may lead anywhere, at what is neither file nor folder, and beyond `limit` entries.
    """
    left, folders = limit, [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as scan:
                entries = list(itertools.islice(scan, left + 1))
        except FileNotFoundError:
            continue
        left -= len(entries)
        if left < 0:
            raise ValueError(f"it holds more than {limit:,} files and folders")
        for entry in entries:
            path = pathlib.Path(entry.path)
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(status.st_mode):
                folders.append(path)
            elif stat.S_ISREG(status.st_mode):
                yield path, status
            else:
                kind = "a link" if stat.S_ISLNK(status.st_mode) else "neither file nor folder"
                raise ValueError(f"{path.relative_to(folder)} is {kind}")


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file atomically: whoever reads it sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process may write the same file
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: pathlib.Path, value: Any) -> None:
    """`write_text` of indented JSON; NaN is refused, no other program could read it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with a digest of all of them, by which `unsealed` tells a file that was damaged."""
    return {**values, SEAL: hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}


def unsealed(values: Any) -> dict[str, Any]:
    """What `sealed` was given; files of earlier versions have no digest and are taken as they are.

    Raises:
      ValueError: if it is something else.
    """
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__} instead of named values")
    content = {name: value for name, value in values.items() if name != SEAL}
    if SEAL in values and sealed(content) != values:
        raise ValueError("its content is not what was written: it was damaged, or edited")
    return content


def read_sealed(path: pathlib.Path, limit: int = JSON_BYTES) -> dict[str, Any]:
    """`unsealed` of a JSON file of at most `limit` bytes.

    Raises:
      OSError, ValueError: if it cannot be read, or was damaged.
    """
    return unsealed(read_json(path, limit))


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Keeps other processes out of a folder that is there already; the lock file says which process has it.

    Where the file system has locks, the system drops them with their process. Elsewhere the file alone counts: what a
    dead process of this host left is taken over, what one of another host left is for people to remove.

    Raises:
      BusyError: if another process has it.
      OSError: if the folder cannot be written.
    """
    path = folder / LOCK
    with open(path, "a+", encoding="utf-8", errors="replace") as lock:
        lock.seek(0)
        owner = lock.read(200).strip()
        who = f" ({owner})" if owner else ""
        busy = f"another process is at work in {folder}{who}; wait for it to end, or choose another --workdir"
        try:
            if fcntl is None:
                raise OSError
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(busy) from error
        except OSError as error:  # a file system without locks
            if owner and not _dead(owner):
                raise BusyError(f"{busy}; if it is gone, delete {path}") from error
        try:
            _write_owner(lock, f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            with contextlib.suppress(OSError):
                _write_owner(lock, "")


def _write_owner(lock: TextIO, owner: str) -> None:
    lock.seek(0)
    lock.truncate()
    lock.write(owner)
    lock.flush()


def _dead(owner: str) -> bool:
    """Whether a lock file names a process of this host that has ended."""
    match = re.fullmatch(r"process (\d{1,9}) on (.+)", owner)
    if match is None or match[2] != socket.gethostname() or int(match[1]) == os.getpid():
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
