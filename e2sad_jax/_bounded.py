"""Reads files that anyone may have made: regular ones, of bounded size, and JSON that means one thing only."""

import itertools
import json
import math
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any

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
