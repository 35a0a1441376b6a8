"""What a folder of checkpoints claims, found to be what a run writes before Orbax reads it and memory is taken."""

import itertools
import math
import mmap
import os
import pathlib
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from e2sad_jax import _io

ENTRIES = 10_000  # files and folders of all checkpoints of a run
FREE = 64 * 2**20  # bytes that any checkpoint may take in memory
RATIO = 64  # beyond that: how many times its size on disk; trained parameters hardly compress
PIECES = 4096  # of an array: one for each device that wrote
_BLOCK = 128 * 2**10  # bytes that one block of zstd may become
_JSON = ("default/_METADATA", "default/_sharding")
_INDEX = re.compile(
    rb"\x0c\xdb(?:\x3a\x2a|\x20\xde|\x12\x34)"
)  # how parts of OCDBT's index begin, alone or between pieces
_VARINT = rb"[\x80-\xff]{0,9}[\x00-\x7f]"
_HEADER = re.compile(rb"(.{8})" + _VARINT + rb"(" + _VARINT + rb")", re.DOTALL)  # length, version, compression


def check_folder(folder: pathlib.Path) -> None:
    """Makes sure that nothing in a folder of checkpoints leads out of it.

    Raises:
      ValueError: at a link, a pipe, or too many files.
      OSError: if it cannot be read.
    """
    if folder.is_symlink():
        raise ValueError("it is a link; let the workdir be one instead")
    for _ in walk(folder, ENTRIES):
        pass


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


def check_metrics(values: Mapping[str, Any]) -> None:
    """Makes sure that what was noted beside a checkpoint is what a run notes.

    Raises:
      ValueError: if the score is missing, or something is no number.
    """
    if "score" not in values:
        raise ValueError("misses the score")
    for name, value in values.items():
        if type(value) not in ((str,) if name == "state_sha256" else (int, float)):
            raise ValueError(f"{name[:60]!r} is no number")


def check_step(folder: pathlib.Path, expected: Mapping[str, Any]) -> None:
    """Makes sure that a checkpoint holds arrays of these shapes and dtypes, and that reading it takes no more memory.

    Args:
      folder: of one step.
      expected: a tree of shapes and dtypes.

    Raises:
      ValueError: naming what differs, with value and bound.
      OSError: if it cannot be read.
    """
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    needed = sum(_bytes(leaf) for leaf in leaves.values())
    sizes = {path.relative_to(folder).as_posix(): status.st_size for path, status in walk(folder, ENTRIES)}
    for name, size in sizes.items():
        if size > (bound := 2 * needed + FREE):
            raise ValueError(f"{name} has {size:,} bytes; at most {bound:,} are read for this network")
        if name in _JSON or name.startswith("default/array_metadatas/"):
            try:
                _io.read_json(folder / name)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    if needed > (bound := max(FREE, RATIO * sum(sizes.values()))):
        raise ValueError(
            f"it has {sum(sizes.values()):,} bytes and would become {needed:,}; at most {bound:,} are read of so few"
        )
    indexes = sum(_index_inflates_to(folder / name) for name in sizes if name.startswith("default/") and sizes[name])
    if indexes > FREE:
        raise ValueError(f"its index may become more than the {FREE:,} bytes that are read for it")
    _check_tree(folder / "default" / "_METADATA", leaves)
    base = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder / 'default'}/"}}
    store = ts.KvStore.open(base).result()
    opened = {
        name: ts.open({"driver": "zarr", "kvstore": {**base, "path": name}}, open=True, read=True) for name in leaves
    }
    for name, leaf in leaves.items():
        chunks = _check_array(name, opened[name].result(), leaf)
        bound = 4 * math.prod(chunks) * leaf.dtype.itemsize + _BLOCK  # blocks may be shorter than they can be
        # Their keys are known, and so never listed: a crafted tree of keys may have no end.
        for place in np.ndindex(*(-(-side // chunk) for side, chunk in zip(leaf.shape, chunks, strict=True))):
            found = store.read(f"{name}/{'.'.join(map(str, place)) or '0'}").result()
            if found.state != "value":
                raise ValueError(f"{name} is not there as a whole")
            if inflates_to(found.value, bound) > bound:
                raise ValueError(f"{name} may become more than the {bound:,} bytes that are read for it in a piece")


def _name(path: tuple[Any, ...]) -> str:
    """How Orbax names a leaf: `params.params.Dense_0.kernel`."""
    return ".".join(str(next(getattr(key, a) for a in ("key", "name", "idx") if hasattr(key, a))) for key in path)


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _check_tree(path: pathlib.Path, leaves: Mapping[str, Any]) -> None:
    """Makes sure that what Orbax goes by names arrays, in the format that runs write, and just those expected."""
    metadata = _io.read_json(path)
    if not isinstance(metadata, dict) or not isinstance(metadata.get("tree_metadata"), dict):
        raise ValueError(f"{path.name} describes no checkpoint")
    if metadata.get("use_ocdbt", True) is not True or metadata.get("use_zarr3") or metadata.get("value_metadata_tree"):
        raise ValueError(f"{path.name} describes a format that runs do not write")
    found = set()
    for entry in metadata["tree_metadata"].values():
        try:
            name = ".".join(str(key["key"]) for key in entry["key_metadata"])
            kind, empty = entry["value_metadata"]["value_type"], entry["value_metadata"]["skip_deserialize"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path.name} describes no checkpoint") from error
        if empty is True and name not in leaves:  # a node of the tree without arrays
            continue
        if kind != "jax.Array" or empty is not False or name not in leaves:
            raise ValueError(f"{path.name} holds {name[:100]!r}, which this network has not, or as no array")
        found.add(name)
    if missing := sorted(leaves.keys() - found):
        raise ValueError(f"{path.name} misses {missing[0]}, which this network has")


def _check_array(name: str, array: ts.TensorStore, leaf: Any) -> tuple[int, ...]:
    """Makes sure that an array is the one expected, without reading it; returns the shape of the pieces it lies in."""
    dtype, shape = array.dtype.numpy_dtype, tuple(array.shape)
    if shape != leaf.shape or dtype != np.dtype(leaf.dtype):
        raise ValueError(f"{name} is {dtype} {shape}, but {leaf.dtype} {leaf.shape} in this network")
    metadata = array.spec().to_json()["metadata"]
    chunks = tuple(metadata["chunks"])
    if any(chunk > max(1, side) for chunk, side in zip(chunks, shape, strict=True)):
        raise ValueError(f"{name} is {shape} in pieces of {chunks}, larger than itself")
    if math.prod(-(-side // chunk) for side, chunk in zip(shape, chunks, strict=True)) > PIECES:
        raise ValueError(f"{name} is {shape} in pieces of {chunks}, more than the {PIECES:,} that are read")
    if metadata["filters"] is not None or (metadata["compressor"] or {}).get("id") != "zstd":
        raise ValueError(f"{name} is compressed by {metadata['compressor']}; runs write zstd")
    if metadata.get("dimension_separator", ".") != ".":
        raise ValueError(f"{name} has pieces of other names than runs write")
    return chunks


def _index_inflates_to(path: pathlib.Path) -> int:
    """The most bytes that parts of OCDBT's index in a file can become, but for those of a block at most.

    Raises:
      ValueError: if one of them is damaged.
    """
    total = 0
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for begin in _INDEX.finditer(content):
            header = _HEADER.match(content, begin.end())
            if header is None or header[2].rstrip(b"\x00\x80") not in (b"\x01", b"\x81"):
                continue  # it is not compressed, or only looks like a part
            end = begin.start() + int.from_bytes(header[1], "little") - 4  # a checksum follows
            if end > len(content) - 4:
                continue
            if (inflated := inflates_to(content[header.end() : end], FREE)) > _BLOCK:
                total += inflated
    return total


def inflates_to(content: bytes, enough: float = math.inf) -> int:
    """The most bytes that frames of zstd can become, by their blocks' headers; nothing is inflated.

    Beyond `enough` they are not counted any further.

    Raises:
      ValueError: if it is not zstd, or damaged.
    """
    total, at = 0, 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        if at > len(content):
            raise ValueError("its zstd frame ends early")
        return content[at - count : at]

    while at < len(content):
        if take(4) != b"\x28\xb5\x2f\xfd":
            raise ValueError("it is not compressed by zstd")
        (flags,) = take(1)
        single = flags >> 5 & 1
        take(not single)  # window
        take((0, 1, 2, 4)[flags & 3])  # dictionary
        take((single, 2, 4, 8)[flags >> 6])  # content size: may lie
        last = 0
        while not last:
            header = int.from_bytes(take(3), "little")
            last, kind, size = header & 1, header >> 1 & 3, header >> 3
            if kind == 3:
                raise ValueError("its zstd frame has a block of no kind")
            take(1 if kind == 1 else size)  # one byte, repeated; else the block as it is
            total += _BLOCK if kind == 2 else size
            if total > enough:
                return total
        take(4 * (flags >> 2 & 1))  # checksum
    return total
