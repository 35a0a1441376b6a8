"""Data sets through tensorflow-datasets, without TensorFlow.

Importing this module imports tensorflow-datasets (a second or so), so `e2sad_jax.data` does it only to prepare or decode a set.

Those of `builders.BUILDERS` are prepared from their original files. Other sets are read where the library has prepared them
as array_record.

Layout under the data folder:
    downloads/, downloads/manual/   the library's usual places for original files
    array_record/<set>/<version>/   the prepared records; a root of our own, so that a set which somebody prepared with
                                    the library in another format at <data folder>/<set> is neither read nor touched
    decoded/<name>.npz              the decoded copy that later loads read; decoded/tfds/ for sets not known by name
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources.abc
import importlib.util
import itertools
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.core import dataset_builder
from tensorflow_datasets.core.download import resource as tfds_resource

from e2sad_jax import _io
from e2sad_jax.data import in_file, prepared
from e2sad_jax.data.builders import BUILDERS, TRAIN, UrlInfos, check_sha256
from e2sad_jax.data.dataset import Dataset, check_claim, checked
from e2sad_jax.data.known import KNOWN
from e2sad_jax.data.npz import load_npz, warned, write_npz
from e2sad_jax.errors import DataError, first_line, similar

# The library takes the backport of this module of Python's, which it does not declare for any Python of today.
dataset_builder.importlib_resources = importlib.resources

PROBE_SECONDS = 6.0  # the library itself would retry for minutes, and has no timeout


def prepare(name: str, root: pathlib.Path, copy: pathlib.Path) -> Dataset:
    """Prepares a data set unless it is prepared already, decodes it, and keeps the decoded copy.

    Args:
      name: of `BUILDERS`.
      root: the data folder; made when missing, but only once there is something to put into it.
      copy: where to keep the decoded copy.

    Returns:
      The data set, read from the prepared records.

    Raises:
      DataError: if the original files are neither there nor to be had, a file is not the registered one, or the folder
        cannot be used. Nothing is left that a later call would take for a prepared data set.
    """
    known, infos = KNOWN[name], BUILDERS[name].url_infos
    try:
        builder = _prepared(name, root, functools.partial(_builder, name, root))
    except DataError:
        raise
    except Exception as err:  # a wrong checksum, a broken connection, a full disk, ...
        raise DataError(
            f"{name}: cannot be prepared in {root} ({type(err).__name__}: {first_line(err)}); "
            f"{_ways_out(name, root, infos)}"
        ) from err
    try:
        arrays = _decode(name, builder, TRAIN.get(name, "train"), "test", ("image", "label"), copy.parent)
        if (counts := (len(arrays["x_train"]), len(arrays["x_test"]))) != known[:2]:
            raise ValueError(f"{counts} train and test examples instead of {known[:2]}")
    except Exception as err:  # whatever the record reader raises on damaged files
        raise _unreadable(name, builder.data_path, err) from err
    sources = {str(info.filename): info.checksum for info in infos.values()}
    dataset = Dataset(name, str(builder.version), **arrays, num_classes=known.num_classes, source_sha256=sources)
    return _kept(dataset, copy)


def read(wanted: prepared.Wanted, root: pathlib.Path, copy: pathlib.Path) -> Dataset:
    """Reads a set that the library has prepared as array_record, or has it prepared; keeps the decoded copy.

    Args:
      wanted: which set, and which splits of it.
      root: the data folder, in whose `array_record` the set is looked for first.
      copy: where to keep the decoded copy.

    Returns:
      The data set: uint8 images `[N, H, W, C]` with C of 1 or 3, and the classes of its label. Its name is
      `wanted.reported`, its source the SHA-256 of the description of the records.

    Raises:
      DataError: if there is no such set, it cannot be prepared here, is not array_record, lacks one of the splits, has not
        one image and one label, or has images of several shapes.
    """
    asked, places = prepared.PREFIX + wanted.asked, prepared.folders(root)
    folder = prepared.find(wanted, places) or _prepare_other(wanted, root)
    try:
        builder = tfds.builder_from_directory(folder)
        splits, formats = builder.info.splits, builder.info.available_file_formats()
    except Exception as err:  # a damaged description
        raise _unreadable(asked, folder, err, "prepare the set again") from err
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        raise DataError(
            f"{asked}: {folder} holds {' and '.join(sorted(each.value for each in formats))}, which cannot be read without "
            f"TensorFlow; where TensorFlow is installed, `tfds convert_format --dataset_version_dir={folder} "
            "--out_file_format=array_record` adds records that can"
        )
    keys = _keys(asked, builder.info)
    train, test = wanted.train or "train", wanted.test or ("test" if "test" in splits else "validation")
    for split in (train, test):
        try:
            empty = not splits[split].num_examples
        except Exception as err:  # of several kinds
            raise DataError(
                f"{asked}: has no split {split!r}; it has {', '.join(sorted(splits))}: choose two by "
                f"--data={asked}@TRAIN,TEST"
            ) from err
        if empty:
            raise DataError(f"{asked}: the split {split!r} holds no images; choose two by --data={asked}@TRAIN,TEST")
    try:
        arrays = _decode(asked, builder, train, test, keys, copy.parent)
    except DataError:
        raise
    except MemoryError as err:
        raise DataError(
            f"{asked}: needs more memory than there is ({first_line(err)}); choose parts of the splits, such as "
            f"--data='{asked}@train[:10%],{test}'"
        ) from err
    except Exception as err:  # whatever the record reader raises on damaged files
        raise _unreadable(asked, folder, err, "prepare the set again") from err
    arrays, count = checked(asked, arrays, builder.info.features[keys[1]].num_classes)
    source = prepared.source(folder)
    dataset = Dataset(wanted.reported, str(builder.version), **arrays, num_classes=count, source_sha256=source)
    check_claim(asked, dataset)
    return warned(asked, _kept(dataset, copy), True)


def _keys(asked: str, info: Any) -> tuple[str, str]:
    """Returns the names of a set's image and label: those that it is supervised by, else those that are there once."""
    features = info.features if isinstance(info.features, tfds.features.FeaturesDict) else {}
    images, labels = (
        sorted(key for key, feature in features.items() if type(feature) is kind)
        for kind in (tfds.features.Image, tfds.features.ClassLabel)
    )
    if info.supervised_keys in itertools.product(images, labels):
        image, label = info.supervised_keys
    elif len(images) == len(labels) == 1:
        image, label = images[0], labels[0]
    else:
        raise DataError(
            f"{asked}: its examples have the images ({', '.join(images)}) and the class labels ({', '.join(labels)}), and no "
            "supervised keys among them; one of each is needed: write them to a .npz file of your own"
        )
    shape, dtype = features[image].shape, np.dtype(features[image].np_dtype)
    if dtype != np.uint8 or len(shape) != 3 or shape[-1] not in (1, 3):
        raise DataError(
            f"{asked}: {image!r} is {dtype} of shape {shape}; images must be uint8 of 1 or 3 channels: write them to a .npz "
            "file of your own"
        )
    return image, label


def _prepare_other(wanted: prepared.Wanted, root: pathlib.Path) -> pathlib.Path:
    """Has the library prepare one of its sets, and returns the folder of the records."""
    asked, (folder, other) = prepared.PREFIX + wanted.asked, prepared.folders(root)
    _check_known(wanted, (folder, other))
    own = next((builder for builder in BUILDERS.values() if builder.name == wanted.name and not wanted.config), None)

    def make() -> Any:
        if own:
            return own(data_dir=folder, version=wanted.version or None, file_format="array_record")
        return tfds.builder(wanted.asked, data_dir=folder, file_format="array_record")

    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder = make()
            _keys(asked, builder.info)
            if not own and builder.url_infos and not importlib.util.find_spec("tensorflow"):
                # It opens what it downloads by TensorFlow, but says so only after the download.
                raise ImportError("tensorflow-datasets needs TensorFlow to open its original files")
            return pathlib.Path(_prepared(asked, root, make).data_path)
    except DataError:
        raise
    except Exception as err:
        raise DataError(
            f"{asked}: not prepared in {folder} or {other}, and cannot be prepared here ({type(err).__name__}: "
            f"{first_line(err)}); where TensorFlow is installed, `tfds build {wanted.asked} --file_format=array_record "
            f"--data_dir=DIR` prepares it: put DIR/{wanted.name} into {folder}"
        ) from err


def _check_known(wanted: prepared.Wanted, places: Sequence[pathlib.Path]) -> None:
    """Refuses a name that the library does not know, with those that are like it; a set prepared elsewhere may be meant."""
    there: dict[str, list[str]] = {}
    for found in prepared.found(places):
        there.setdefault(re.split("[/:]", found)[0], []).append(found)
    known = set(tfds.list_builders(with_community_datasets=False))
    if wanted.name in known:
        return
    close = similar(wanted.name, sorted({*known, *there}))
    meant = [prepared.PREFIX + name for match in close for name in there.get(match, [match])]
    hint = f"did you mean {' or '.join(meant)}?" if meant else "see https://www.tensorflow.org/datasets/catalog"
    raise DataError(
        f"{prepared.PREFIX}{wanted.asked}: neither prepared in {' or '.join(map(str, places))}, nor a set of "
        f"tensorflow-datasets; {hint}"
    )


def _kept(dataset: Dataset, copy: pathlib.Path) -> Dataset:
    """Keeps the decoded copy of a data set, if that can be done, and returns the data set; in that file if it is large."""
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_npz(dataset, copy)
    except (OSError, DataError) as err:
        # A read-only or full folder: slow, yet no reason to stop.
        logging.warning("%s: no decoded copy is kept, so each load decodes the records: %s", dataset.name, err)
        return dataset
    return load_npz(copy) if in_file.is_in_file(dataset.x_train) else dataset


def _unreadable(name: str, folder: pathlib.Path, err: Exception, then: str = "run again") -> DataError:
    remedy = f"delete that folder and {then}"
    if isinstance(err, ImportError):
        remedy = "install what is missing: pip install 'e2sad_jax[data]'"
    elif isinstance(err, PermissionError):
        remedy = "make them readable"
    return DataError(
        f"{name}: the prepared records in {folder} cannot be read ({type(err).__name__}: {first_line(err)}); {remedy}"
    )


def _builder(name: str, root: pathlib.Path) -> Any:
    folder = root / "array_record"
    try:
        return BUILDERS[name](data_dir=folder, file_format="array_record")
    except Exception as err:  # a prepared folder whose description is damaged
        raise _unreadable(name, folder / BUILDERS[name].name, err) from err


def _prepared(name: str, root: pathlib.Path, make: Callable[[], Any]) -> Any:
    """Returns the builder that `make` makes, after it has prepared its records, once for all processes."""
    builder = make()
    if not builder.data_path.exists():
        if missing := _missing(builder, root):
            _probe(name, root, missing)
        with _locked(name, root):
            builder = make()
            if not builder.data_path.exists():  # else another process was faster
                _prepare(builder, root)
    return builder


def _prepare(builder: Any, root: pathlib.Path) -> None:
    config = tfds.download.DownloadConfig(try_download_gcs=False, force_checksums_validation=True)
    # The library prints what it does; standard output is left to the caller's results.
    with contextlib.redirect_stdout(sys.stderr):
        builder.download_and_prepare(download_dir=root / "downloads", download_config=config)


def _locked(name: str, root: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Lets one process at a time prepare a data set."""
    root.mkdir(parents=True, exist_ok=True)
    lock = f".{name.replace('/', '-')}.lock"
    return _io.locked(root, lock, lambda who: logging.warning("%s: %s; waiting for it", name, who))


def _decode(
    name: str, builder: Any, train: str, test: str, keys: tuple[str, str], folder: pathlib.Path
) -> dict[str, np.ndarray]:
    """Decodes two splits to the arrays of a `Dataset`; `keys` are the names of image and label, `folder` is for large ones."""
    from tqdm import auto as tqdm_auto

    features = tfds.features.FeaturesDict({key: builder.info.features[key] for key in keys})  # no other is decoded
    kind, skipped = features[keys[0]], {keys[0]: tfds.decode.SkipDecoding()}

    def decoded(record: bytes) -> tuple[np.ndarray, int]:
        example = features.deserialize_example_np(record, decoders=skipped)
        # The library would take OpenCV where it is installed, which decodes a JPEG to slightly other pixels.
        return kind.decode_example_np_with_pil(example[keys[0]], kind.shape[-1]), example[keys[1]]

    arrays: dict[str, np.ndarray] = {}
    shape: tuple[int, ...] = ()
    for part, split in (("train", train), ("test", test)):
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        source = builder.as_data_source(split=split, deserialize_method=raw, file_format="array_record")
        shape = shape or decoded(source[0])[0].shape
        images = in_file.empty((len(source), *shape), np.uint8, folder)
        labels = np.empty(len(source), np.int32)
        title = f"Decoding {name} {split}"
        # None: nothing in a log.
        with tqdm_auto.tqdm(total=len(source), desc=title, unit=" images", leave=False, disable=None) as bar:
            for start in range(0, len(source), 1000):
                indices = range(start, min(start + 1000, len(source)))
                for index, record in zip(indices, source.__getitems__(indices), strict=True):
                    image, labels[index] = decoded(record)
                    if image.shape != shape:
                        raise DataError(
                            f"{name}: has images of shapes {shape} and {image.shape} ({split}, {index}); images of one size "
                            "are needed: resize them and write a .npz file of your own"
                        )
                    images[index] = image
                bar.update(len(indices))
        arrays |= {f"x_{part}": images, f"y_{part}": labels}
    return arrays


def _manual_dir(root: pathlib.Path) -> pathlib.Path:
    return root / "downloads" / "manual"


def _missing(builder: Any, root: pathlib.Path) -> UrlInfos:
    """Returns the original files that must be downloaded, after verifying those that were placed by hand."""
    missing: UrlInfos = {}
    for url, info in (builder.url_infos or {}).items():  # a user's builder may register none
        manual = _manual_dir(root) / str(info.filename)
        if manual.exists():
            check_sha256(manual, info.checksum, f"put the original file there (from {url}), or remove it")
            continue
        cached, downloads = tfds_resource.get_dl_fname(url, info.checksum), root / "downloads"
        folders = (downloads, downloads / builder.name)
        if not any(tfds_resource.is_locally_cached(epath.Path(folder) / cached) for folder in folders):
            missing[url] = info
    return missing


def _ways_out(name: str, root: pathlib.Path, infos: UrlInfos) -> str:
    files = ", ".join(str(info.filename) for info in infos.values())
    folder = next(iter(infos)).rsplit("/", 1)[0]
    return (
        f"either (1) run again where {folder} can be reached, or (2) put {files} from there into {_manual_dir(root)}, or "
        f"(3) use other data: --data=digits needs no files, --data=PATH.npz takes a file of your own or one that "
        f"`python -m e2sad_jax.data {name} --to=PATH.npz` exported elsewhere"
    )


def _probe(name: str, root: pathlib.Path, missing: UrlInfos) -> None:
    """Asks for the first missing file before the library does, which would retry for minutes without a network.

    In a thread: no timeout of requests bounds the name server's answer, or a host with many addresses.
    """
    url = next(iter(missing))
    problems: list[str] = []

    def ask() -> None:
        try:
            with requests.get(url, stream=True, timeout=PROBE_SECONDS) as response:
                response.raise_for_status()
            problems.append("")
        except Exception as err:  # of requests, or of whatever it calls
            reason = getattr(err.args[0], "reason", err) if err.args else err  # what urllib3 wraps
            problems.append(f"{type(err).__name__}: {first_line(reason)}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if problem := problems[0] if problems else f"no answer within {PROBE_SECONDS:g} s":
        raise DataError(
            f"{name}: not in {root}, and {url} cannot be fetched ({problem}); {_ways_out(name, root, missing)}"
        )
