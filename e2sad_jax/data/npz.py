"""A data set and its one-file form: reading without unpickling, checking every array, writing atomically."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import secrets
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from e2sad_jax import _io
from e2sad_jax.errors import DataError, printable

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
FORMAT = "e2sad_jax.data/1"
MAX_CLASSES = 2**31 - 1  # labels are int32
SMALL = 2**20  # bytes of a member that only describes the others
INFLATED = 2**28  # bytes that any compressed member may become
RATIO = 100  # beyond that: how many times its own size in the file


class Official(NamedTuple):
    """What a data set of a known name must hold."""

    train: int
    test: int
    image_shape: tuple[int, int, int]
    num_classes: int = 10


# A file that claims one of these names must hold all of it, so that no report shows a part of MNIST as MNIST.
OFFICIAL: dict[str, Official] = {
    "mnist": Official(60_000, 10_000, (28, 28, 1)),
    "svhn": Official(73_257, 26_032, (32, 32, 3)),
    "digits": Official(1_442, 355, (28, 28, 1)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels in host memory, with what a report says about them.

    The arrays are kept as read-only views, because `sha256` is the identity of their content.

    Attributes:
        name: `mnist`, `svhn` or `digits`; for a user's file its stem. Every report shows it.
        version: The tensorflow-datasets version, or "".
        x_train: [N, H, W, C] uint8 in 0..255, or float32 in [0, 1] when the user's file holds floats.
        y_train: [N] int32 in [0, num_classes).
        x_test: [M, H, W, C], of the dtype of `x_train`.
        y_test: [M] int32 in [0, num_classes).
        num_classes: Number of classes, at least 2.
        source_sha256: SHA-256 of each original file by its name (`mnist`, `svhn`), else empty.
    """

    name: str
    version: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    source_sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for member in ARRAYS:
            view = np.asarray(getattr(self, member)).view()
            view.flags.writeable = False
            object.__setattr__(self, member, view)

    @functools.cached_property
    def sha256(self) -> str:
        """One digest over dtype, shape and bytes of the four arrays and `num_classes`; the name is not part of it."""
        digest = hashlib.sha256(f"num_classes={self.num_classes}\n".encode())
        for member in ARRAYS:
            array = getattr(self, member)
            digest.update(f"{member} {array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (H, W, C) of one image."""
        height, width, channels = self.x_train.shape[1:]
        return height, width, channels


def one_line(error: object, limit: int = 240) -> str:
    """Returns an error's text in one line of about `limit` characters: its two ends, where it is longer."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def read_members(path: pathlib.Path, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Reads arrays out of an npz file and never unpickles.

    Args:
        path: The file.
        required: Members that must be there.
        optional: Members that are read when they are there. No other member is touched.

    Returns:
        The arrays by member.

    Raises:
        DataError: No such file, not an npz, a member missing, there twice, pickled, damaged, or one that would become
            far larger than the file.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; give the path of an existing .npz file")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give the path of a .npz file")
    if not path.is_file():
        raise DataError(f"{path}: is a pipe or a device; give the path of a .npz file")
    try:
        archive = zipfile.ZipFile(path)
    except OSError as err:
        raise DataError(f"{path}: cannot be opened ({one_line(err)})") from err
    except Exception as err:
        raise DataError(
            f"{path}: not an npz file, or a truncated one ({one_line(err)}); write it with numpy.savez"
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
            _check_header(stream, info.file_size)
            stream.seek(0)
            array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
            rest = stream.read(1)  # also makes zipfile compare the CRC
    except DataError:
        raise
    except Exception as err:
        if isinstance(err, ValueError) and "allow_pickle" in str(err):
            raise DataError(
                f"{path}: member {member} is a pickled (object) array, which is never loaded because it can run code; "
                "store a plain numeric array"
            ) from err
        raise DataError(
            f"{path}: member {member} cannot be read ({type(err).__name__}: {one_line(err)}); the file is damaged: "
            "write or copy it again"
        ) from err
    if rest:
        raise DataError(f"{path}: member {member} goes on after its array; the file is damaged: write or copy it again")
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


def _check_header(stream: IO[bytes], size: int) -> None:
    """Refuses a header that is not for the bytes that follow, before memory is taken for what it announces."""
    version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its header has version {version}; numbers have 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)  # type: ignore[no-untyped-call]
    if dtype.hasobject:
        return  # numpy says so
    needed, found = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if needed != found:
        raise ValueError(f"its header announces {dtype} {shape}, {needed:,} bytes, but {found:,} follow")


def check_images(where: str, member: str, images: np.ndarray) -> np.ndarray:
    """Returns images as [N, H, W, C] uint8, or float32 in [0, 1].

    Args:
        where: What the error names: usually the file.
        member: Which array this is.
        images: [N, H, W] or [N, H, W, C], uint8 or floating.

    Raises:
        DataError: Another rank or dtype, no images, or pixels that are not finite and in [0, 1].
    """
    if images.ndim not in (3, 4):
        raise DataError(f"{where}: {member} has shape {images.shape}; expected [N, H, W] or [N, H, W, C]")
    if images.shape[0] == 0:
        raise DataError(f"{where}: {member} holds no images (shape {images.shape}); it needs at least one")
    if 0 in images.shape:
        raise DataError(f"{where}: {member} has shape {images.shape}; height, width and channels must be at least 1")
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        remedy = "store 0..255 as uint8 (images.astype(numpy.uint8)), or floats in [0, 1]"
        raise DataError(f"{where}: {member} is {images.dtype}; pixels must be uint8 or floating: {remedy}")
    low, high = float(images.min()), float(images.max())
    with np.errstate(over="ignore"):  # judged after rounding to float32, so that a float64 1 + 1e-12 is still 1
        inside = np.float32(low) >= 0 and np.float32(high) <= 1
    if not inside:  # NaN is never inside
        if np.isnan(low) or np.isinf(low) or np.isinf(high):
            bad = int(images.size - np.count_nonzero(np.isfinite(images)))
            remedy = f"{bad} of its {images.size} values are NaN or infinite: remove or repair them"
        elif low >= 0 and high <= 255:
            remedy = "the values look like 0..255: store them as uint8, or divide them by 255"
        else:
            remedy = "rescale them to [0, 1]"
        raise DataError(f"{where}: {member} holds pixels from {low:.6g} to {high:.6g}, outside [0, 1]; {remedy}")
    return np.ascontiguousarray(images, dtype=np.float32)


def check_labels(where: str, member: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Returns labels as a flat array of integers that fit int32; the upper bound K is for the caller to check.

    Args:
        where: What the error names.
        member: Which array this is.
        labels: [N] or [N, 1] integers.
        count: The number of images they belong to.

    Raises:
        DataError: Another rank, dtype or length, or a negative or huge label.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        remedy = "; one-hot labels: use labels.argmax(axis=1)" if labels.ndim == 2 else ""
        raise DataError(f"{where}: {member} has shape {labels.shape}; expected [N] or [N, 1]{remedy}")
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: {member} is {labels.dtype}; labels must be integers in [0, K): use labels.astype(numpy.int32)"
        )
    if len(labels) != count:
        images = member.replace("y_", "x_")
        raise DataError(
            f"{where}: {member} holds {len(labels)} labels but {images} {count} images; "
            "each image needs exactly one label"
        )
    if labels.min() < 0:
        index = int(labels.argmin())
        raise DataError(f"{where}: {member}[{index}] is {labels[index]}; labels must be integers in [0, K)")
    if labels.max() >= MAX_CLASSES:
        index = int(labels.argmax())
        raise DataError(f"{where}: {member}[{index}] is {labels[index]}; labels must be below {MAX_CLASSES}")
    return labels.astype(np.int32)


def check_num_classes(where: str, value: Any) -> int:
    """Returns the number of classes as an int.

    Raises:
        DataError: Not one integer, or out of [2, 2**31 - 1].
    """
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{where}: num_classes has dtype {array.dtype}, shape {array.shape}; expected one integer")
    count = int(array.reshape(()))
    if not 2 <= count <= MAX_CLASSES:
        raise DataError(f"{where}: num_classes is {count}; it must be between 2 and {MAX_CLASSES}")
    return count


def check_arrays(
    where: str, arrays: Mapping[str, np.ndarray], num_classes: Any | None
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], int]:
    """Checks the four arrays against each other.

    Args:
        where: What the errors name.
        arrays: `x_train`, `y_train`, `x_test`, `y_test`.
        num_classes: K, or None for max(y_train) + 1 (at least 2).

    Returns:
        The four arrays in that order, in the form that `Dataset` describes, and K.

    Raises:
        DataError: Anything that `Dataset` does not allow.
    """
    checked: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        x, y = f"x_{split}", f"y_{split}"
        checked[x] = check_images(where, x, arrays[x])
        checked[y] = check_labels(where, y, arrays[y], len(checked[x]))
    train, test = checked["x_train"], checked["x_test"]
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"{where}: images of x_train are {train.shape[1:]} but of x_test {test.shape[1:]}; make them equal"
        )
    if train.dtype != test.dtype:
        raise DataError(
            f"{where}: x_train is {train.dtype} but x_test {test.dtype}; store both as uint8, or both as floats in [0, 1]"
        )
    if num_classes is None:
        count, bound = max(2, int(checked["y_train"].max()) + 1), "max(y_train) + 1; set num_classes for more"
        if count > max(2, len(checked["y_train"])):  # a stray label would make a last layer of that many classes
            raise DataError(
                f"{where}: y_train[{int(checked['y_train'].argmax())}] is {count - 1}, more classes than the "
                f"{len(checked['y_train'])} training images; set num_classes={count} if it is meant"
            )
    else:
        count, bound = check_num_classes(where, num_classes), "the file's num_classes"
    for member in ("y_train", "y_test"):
        index = int(checked[member].argmax())
        if checked[member][index] >= count:
            raise DataError(
                f"{where}: {member}[{index}] is {checked[member][index]}; labels must be integers in [0, {count}) "
                f"({count} is {bound})"
            )
    return (checked["x_train"], checked["y_train"], checked["x_test"], checked["y_test"]), count


def _check_claim(where: str, dataset: Dataset) -> None:
    official = OFFICIAL.get(dataset.name.strip().casefold())
    if official is None:
        return
    found = Official(len(dataset.x_train), len(dataset.x_test), dataset.image_shape, dataset.num_classes)
    if found != official or dataset.x_train.dtype != np.uint8:
        raise DataError(
            f"{where}: claims to be {dataset.name}, but holds {_describe(found)} ({dataset.x_train.dtype}) where the "
            f"official {dataset.name} holds {_describe(official)} (uint8); drop the member metadata, or give it another "
            "name, to use the file as a data set of your own"
        )


def _describe(what: Official) -> str:
    shape = "x".join(str(size) for size in what.image_shape)
    return f"{what.train} train and {what.test} test images of {shape} in {what.num_classes} classes"


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
        raise DataError(f"{where}: member metadata is not JSON of e2sad_jax ({one_line(err)}); {remedy}") from err
    if metadata.get("format") != FORMAT:
        raise DataError(
            f"{where}: member metadata has format {one_line(repr(metadata.get('format')), 60)}, expected {FORMAT!r}; "
            f"export the file again with this version, or {remedy}"
        )
    name, arrays, sources = metadata.get("name"), metadata.get("arrays"), metadata.get("source_sha256")
    complete = (
        isinstance(name, str)
        and bool(name)
        and name.isprintable()
        and isinstance(metadata.get("version"), str)
        and isinstance(sources, dict)
        and all(isinstance(value, str) for value in sources.values())
        and isinstance(arrays, dict)
        and all(isinstance(arrays.get(key), dict) for key in ARRAYS)
    )
    if not complete:
        raise DataError(f"{where}: member metadata misses a field, or has one of a wrong type; {remedy}")
    return metadata


def _array_record(array: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": digest}


def load_npz(path: str | os.PathLike[str]) -> Dataset:
    """Loads a data set from one npz file: a user's own, or one that `write_npz` wrote.

    Args:
        path: File with `x_train`, `y_train`, `x_test`, `y_test` and optionally `num_classes` (one integer) and
            `metadata` (written by `write_npz`). Images are [N, H, W] or [N, H, W, C], uint8 or floats in [0, 1];
            labels are integers [N] or [N, 1].

    Returns:
        The data set. With metadata it has the name, version and source checksums given there, after the checksum of
        each array is verified. Without, its name is the file's stem, or the whole file name where the stem is a
        known name (an unverified `mnist.npz` is reported as `mnist.npz`, not as `mnist`).

    Raises:
        DataError: The file is missing, damaged, pickled, altered, not what it claims to be, or holds images or labels
            that the type above does not allow.
    """
    path = pathlib.Path(path)
    where = str(path)
    members = read_members(path, ARRAYS, ("num_classes", "metadata"))
    if "metadata" not in members:
        arrays, count = check_arrays(where, members, members.get("num_classes"))
        name = path.name if path.stem.lower() in OFFICIAL else path.stem
        return Dataset(name, "", *arrays, num_classes=count)
    metadata = _parse_metadata(where, members["metadata"])
    for member in ARRAYS:
        expected, found = metadata["arrays"][member], _array_record(members[member])
        for key in ("sha256", "dtype", "shape"):
            if expected.get(key) != found[key]:
                raise DataError(
                    f"{where}: {member} was altered: its {key} should be {expected.get(key)} but is {found[key]}; export "
                    "or copy the file again, or drop the member metadata to use it as a data set of your own"
                )
    if "num_classes" not in members:
        raise DataError(f"{where}: misses num_classes, which goes with its metadata; export the file again")
    arrays, count = check_arrays(where, members, members["num_classes"])
    if metadata.get("num_classes") != count:
        raise DataError(
            f"{where}: num_classes was altered: it should be {metadata.get('num_classes')} but is {count}; export or "
            "copy the file again"
        )
    sources = dict(metadata["source_sha256"])
    dataset = Dataset(metadata["name"], metadata["version"], *arrays, num_classes=count, source_sha256=sources)
    _check_claim(where, dataset)
    return dataset


def write_npz(dataset: Dataset, path: str | os.PathLike[str]) -> None:
    """Writes a data set as one uncompressed npz file that `load_npz` reads back with its name, atomically.

    An existing file is replaced, in one step: a reader sees the old file or the new one, and a crash leaves the old.

    Args:
        dataset: What to write.
        path: A file name ending in .npz, in an existing folder.

    Raises:
        DataError: The data set is not valid, the path is not usable, or writing fails.
    """
    path = pathlib.Path(path)
    where = f"data set {dataset.name!r}"
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path}: the file name must end in .npz")
    checked, count = check_arrays(where, {member: getattr(dataset, member) for member in ARRAYS}, dataset.num_classes)
    _check_claim(where, dataset)
    arrays = dict(zip(ARRAYS, checked, strict=True))
    metadata = {
        "format": FORMAT,
        "name": dataset.name,
        "version": dataset.version,
        "num_classes": count,
        "source_sha256": dict(dataset.source_sha256),
        "arrays": {member: _array_record(array) for member, array in arrays.items()},
    }
    text = json.dumps(metadata, sort_keys=True)
    _parse_metadata(where, np.array(text))
    try:
        with atomic_file(path) as temporary, open(temporary, "xb") as stream:
            np.savez(stream, num_classes=np.array(count), metadata=np.array(text), **arrays)  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as err:
        raise DataError(f"{path}: cannot be written ({one_line(err)})") from err


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a hidden name beside `path`; what was written there replaces `path` at the end, or is removed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
