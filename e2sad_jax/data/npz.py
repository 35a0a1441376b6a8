"""A data set in one npz file: reading that trusts nothing in the file, and atomic writing.

Whoever made the file, `load_npz` unpickles nothing, takes no more memory than the file's size allows, and returns arrays
that `Dataset` allows, or raises `DataError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import struct
import sys
import warnings
import zipfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from e2sad_jax import _io
from e2sad_jax.data import in_file
from e2sad_jax.data.dataset import ARRAYS, Dataset, check_claim, checked, doubts
from e2sad_jax.data.known import KNOWN
from e2sad_jax.errors import DataError, first_line, printable, quoted

FORMAT = "e2sad_jax.data/1"
SMALL = 2**20  # bytes of a member that only describes the others
INFLATED = 2**28  # bytes that any compressed member may become
CHUNK = 2**24  # bytes of a member that are read at once
RATIO = 100  # beyond that: how many times its own size in the file
_warnings: set[str] = set()  # those printed


def load_npz(path: str | os.PathLike[str], *, test_only: bool = False) -> Dataset:
    """Loads a data set from one npz file: a user's own, or one that `write_npz` wrote.

    Args:
      path: file with `x_train`, `y_train`, `x_test`, `y_test` and optionally `num_classes` (one integer) and `metadata`
        (written by `write_npz`). Images are `[N, H, W]` or `[N, H, W, C]`, uint8 or floats in [0, 1]; labels are
        integers `[N]` or `[N, 1]`.
      test_only: whether `x_test` and `y_test` are enough; of such a file they are the training images too.

    Returns:
      The data set. With metadata it has the name, version and source checksums given there, after the checksum of each
      array is verified. Without, its name is the file's stem; the whole file name where the stem is a known name (an
      unverified `mnist.npz` is reported as `mnist.npz`, not as `mnist`).

    Raises:
      DataError: if the file is missing, damaged, pickled, altered, not what it claims to be, or holds images or labels
        that the types above do not allow.
    """
    path = pathlib.Path(path)
    where = str(path)
    if test_only and not has_member(path, "x_train"):
        members = read_members(path, ARRAYS[2:], ("num_classes",))
        members |= {"x_train": members["x_test"], "y_train": members["y_test"]}
    else:
        members = read_members(path, ARRAYS, ("num_classes", "metadata"))
    if "metadata" not in members:
        arrays, count = checked(where, members, members.get("num_classes"))
        name = path.name if path.stem.lower() in KNOWN else path.stem
        return warned(where, Dataset(name, "", **arrays, num_classes=count), "num_classes" in members)
    metadata = _parse_metadata(where, members["metadata"])
    for member in ARRAYS:
        expected, found = metadata["arrays"][member], _described(members[member])
        for key in ("sha256", "dtype", "shape"):
            if expected.get(key) != found[key]:
                raise DataError(
                    f"{where}: {member} was altered: its {key} should be {expected.get(key)} but is {found[key]}; export "
                    "or copy the file again, or drop the member metadata to use it as a data set of your own"
                )
    if "num_classes" not in members:
        raise DataError(f"{where}: misses num_classes, which goes with its metadata; export the file again")
    arrays, count = checked(where, members, members["num_classes"])
    if metadata["num_classes"] != count:
        raise DataError(
            f"{where}: num_classes was altered: it should be {metadata['num_classes']} but is {count}; export or copy "
            "the file again"
        )
    sources = dict(metadata["source_sha256"])
    dataset = Dataset(metadata["name"], metadata["version"], **arrays, num_classes=count, source_sha256=sources)
    check_claim(where, dataset)
    return warned(where, dataset, True)


def warned(where: str, dataset: Dataset, stated: bool) -> Dataset:
    """Prints what is most likely wrong with a data set, in one line, once a process and once for all processes of a run."""
    line = f"warning: {printable(where)}: {'; '.join(found)}" if (found := doubts(dataset, stated)) else ""
    if line and line not in _warnings:
        _warnings.add(line)
        several = "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()
        if not several or sys.modules["jax"].process_index() == 0:
            print(line, file=sys.stderr, flush=True)
    return dataset


def write_npz(dataset: Dataset, path: str | os.PathLike[str]) -> None:
    """Writes a data set as one uncompressed npz file that `load_npz` reads back with its name.

    An existing file is replaced in one step: a reader sees the old file or the new one, and a crash leaves the old one.

    Args:
      dataset: what to write.
      path: a file name ending in .npz, in an existing folder.

    Raises:
      DataError: if the data set is not valid, the path is not usable, or writing fails.
    """
    path = pathlib.Path(path)
    where = f"data set {dataset.name!r}"
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path}: the file name must end in .npz")
    arrays, count = checked(
        where, {member: np.asarray(getattr(dataset, member)) for member in ARRAYS}, dataset.num_classes
    )
    check_claim(where, dataset)
    metadata = {
        "format": FORMAT,
        "name": dataset.name,
        "version": dataset.version,
        "num_classes": count,
        "source_sha256": dict(dataset.source_sha256),
        "arrays": {member: _described(array) for member, array in arrays.items()},
    }
    text = np.array(json.dumps(metadata, sort_keys=True))
    _parse_metadata(where, text)
    try:
        with _io.atomic_file(path) as stream:
            np.savez(stream, num_classes=np.array(count), metadata=text, **arrays)  # type: ignore[arg-type]
    except OSError as err:
        raise DataError(f"{path}: cannot be written ({first_line(err)})") from err


def _described(array: np.ndarray) -> dict[str, Any]:
    sha256 = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": sha256}


def _parse_metadata(where: str, member: np.ndarray) -> dict[str, Any]:
    remedy = "drop or rename that member to use the file as a data set of your own"
    try:
        if member.dtype == np.uint8:
            text = member.tobytes().decode()
        elif member.dtype.kind == "U" and member.ndim == 0:
            text = str(member)
        else:
            raise ValueError(f"dtype {member.dtype}, shape {member.shape}")
        metadata = _io.parse_json(text)
        if not isinstance(metadata, dict):
            raise ValueError(f"a JSON {type(metadata).__name__}")
    except ValueError as err:
        raise DataError(f"{where}: member metadata is not JSON of e2sad_jax ({first_line(err)}); {remedy}") from err
    if metadata.get("format") != FORMAT:
        raise DataError(
            f"{where}: member metadata has format {quoted(metadata.get('format'))}, expected {FORMAT!r}; "
            f"export the file again with this version, or {remedy}"
        )
    types = {"name": str, "version": str, "num_classes": int, "source_sha256": dict, "arrays": dict}
    complete = (
        all(isinstance(metadata.get(key), kind) for key, kind in types.items())
        and bool(metadata["name"])
        and metadata["name"].isprintable()
        and all(isinstance(value, str) for value in metadata["source_sha256"].values())
        and all(isinstance(metadata["arrays"].get(key), dict) for key in ARRAYS)
    )
    if not complete:
        raise DataError(f"{where}: member metadata misses a field, or has one of a wrong type; {remedy}")
    return metadata


def has_member(path: pathlib.Path, member: str) -> bool:
    """Whether a file is an npz with that member; nothing of it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{member}.npy" in archive.namelist()
    except Exception:  # whatever a damaged file raises: `read_members` says what is wrong
        return False


def read_members(path: pathlib.Path, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Reads arrays out of an npz file and never unpickles.

    Args:
      path: the file.
      required: members that must be there.
      optional: members, of at most `SMALL` bytes, that are read if they are there. No other member is touched.

    Returns:
      The arrays by member.

    Raises:
      DataError: if the file is missing or not an npz, or a member is missing, there twice, pickled, damaged, or would
        become far larger than the file.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "no such file"
        raise DataError(f"{path}: {what}; give the path of an existing .npz file")
    try:
        archive = zipfile.ZipFile(path)
    except OSError as err:
        raise DataError(f"{path}: cannot be opened ({first_line(err)})") from err
    except Exception as err:
        raise DataError(
            f"{path}: not an npz file, or a truncated one ({first_line(err)}); write it with numpy.savez"
        ) from err
    with archive:
        present = archive.namelist()
        missing = [member for member in required if f"{member}.npy" not in present]
        if missing:
            found = printable(", ".join(sorted(name.removesuffix(".npy") for name in present))) or "nothing"
            raise DataError(
                f"{path}: misses {', '.join(missing)} (it holds {found[:200]}); write it with "
                f"numpy.savez(path, {', '.join(f'{member}=...' for member in required)})"
            )
        wanted = [member for member in (*required, *optional) if f"{member}.npy" in present]
        for member in wanted:
            if (count := present.count(f"{member}.npy")) > 1:
                raise DataError(f"{path}: member {member} is there {count} times; write each array once")
        return {member: _read_member(path, archive, member, small=member in optional) for member in wanted}


def _read_member(path: pathlib.Path, archive: zipfile.ZipFile, member: str, *, small: bool) -> np.ndarray:
    # A hostile or damaged file can raise nearly anything here (zlib.error, struct.error, MemoryError, SyntaxError from
    # the header, RuntimeError for an encrypted member, ...), hence the broad clause.
    try:
        info = archive.getinfo(f"{member}.npy")
        _check_size(path, member, info, small)
        with archive.open(info) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Python thinks of the header's text
            shape, in_columns, dtype = _check_header(stream, info.file_size)
            large = info.compress_type == zipfile.ZIP_STORED and info.file_size >= in_file.LARGE
            if large and not (in_columns or dtype.hasobject):
                offset = _start(archive, info) + stream.tell()
                while stream.read(CHUNK):  # to its end, where zipfile compares the CRC
                    pass
                assert archive.fp is not None
                # Of the file that was checked, whatever lies at its path now.
                return np.memmap(archive.fp, dtype, "r", offset, shape)
            stream.seek(0)
            array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
            stream.read(1)  # makes zipfile compare the CRC
    except DataError:
        raise
    except Exception as err:
        if isinstance(err, ValueError) and "allow_pickle" in str(err):
            raise DataError(
                f"{path}: member {member} is a pickled (object) array, which is never loaded because it can run code; "
                "store a plain numeric array"
            ) from err
        raise DataError(
            f"{path}: member {member} cannot be read ({type(err).__name__}: {first_line(err)}); the file is damaged: "
            "write or copy it again"
        ) from err
    return array


def _check_size(path: pathlib.Path, member: str, info: zipfile.ZipInfo, small: bool) -> None:
    """Refuses a member before any of it is inflated; zipfile never gives more bytes than are announced."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{path}: member {member} is compressed by method {info.compress_type}; only what numpy.savez (0) and "
            "numpy.savez_compressed (8) write is read"
        )
    stored = min(info.compress_size, path.stat().st_size)
    bound = stored if info.compress_type == zipfile.ZIP_STORED else max(INFLATED, RATIO * stored)
    bound = min(bound, SMALL) if small else bound
    if info.file_size > bound:
        raise DataError(
            f"{path}: member {member} would become {info.file_size:,} bytes out of {stored:,} in the file; at most "
            f"{bound:,} are read; write it with numpy.savez"
        )


def _start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin in the file: after its local header, which has a name and an extra field."""
    assert archive.fp is not None
    archive.fp.seek(info.header_offset)
    name, extra = struct.unpack("<26x2H", archive.fp.read(30))
    return info.header_offset + 30 + int(name) + int(extra)


def _check_header(stream: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Refuses a header that is not for the bytes that follow, before memory is taken for what it announces.

    Returns:
      Shape, whether the columns follow each other instead of the rows, and dtype.
    """
    version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its header has version {version}; numbers have 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read(stream)  # type: ignore[no-untyped-call]
    if not dtype.hasobject:  # else numpy refuses it
        needed, found = math.prod(shape) * dtype.itemsize, size - stream.tell()
        if needed != found:
            raise ValueError(f"its header announces {dtype} {shape}, {needed:,} bytes, but {found:,} follow")
    return shape, in_columns, dtype
