"""MNIST and SVHN through tensorflow-datasets, without TensorFlow.

Importing this module imports tensorflow-datasets (a second or so), so `e2sad_jax.data` does it only to prepare a set.

The library's own builders open the original files with `tf.io.gfile`. The subclasses here keep everything else of
them (URLs, registered checksums, features, version) and open the files with plain Python.

Layout under the data folder:
    downloads/, downloads/manual/   the library's usual places for original files
    array_record/<set>/<version>/   the prepared records; a root of our own, so that a set which somebody prepared with
                                    the library in another format at <data folder>/<set> is neither read nor touched
    decoded/<name>.npz              the decoded copy that later loads read
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import pathlib
import sys
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import requests
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.core.download import resource as tfds_resource
from tensorflow_datasets.datasets.svhn_cropped import svhn_cropped_dataset_builder as tfds_svhn
from tensorflow_datasets.image_classification import mnist as tfds_mnist

from e2sad_jax import _io
from e2sad_jax.data.dataset import Dataset
from e2sad_jax.data.known import KNOWN
from e2sad_jax.data.npz import write_npz
from e2sad_jax.errors import DataError, first_line

PROBE_SECONDS = 6.0  # the library itself would retry for minutes, and has no timeout

_UrlInfos = dict[str, checksums.UrlInfo]


def _registered(path: epath.Path, base: str, files: Mapping[str, str]) -> _UrlInfos:
    """Returns what the library registers for these files: size, SHA-256 and name, by URL."""
    known = checksums.load_url_infos(path)
    return {url: known[url] for url in (urllib.parse.urljoin(base, file) for file in files.values())}


def _pil(image: np.ndarray) -> PIL.Image.Image:
    # The library needs TensorFlow to encode an array, but not to encode a PIL image (as PNG, so without loss).
    return PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


class _NoBucket:
    """Mixed into a builder of the library: sizes are not looked up in a cloud bucket, for which each try leaves a folder."""

    def _info(self) -> Any:
        info = super()._info()  # type: ignore[misc]
        info.initialize_from_bucket = lambda: None
        return info


class MnistBuilder(_NoBucket, tfds_mnist.MNIST, skip_registration=True):  # type: ignore[misc, call-arg]
    """The library's `mnist`, with the files opened by `gzip`."""

    name = "mnist"
    FILES: ClassVar = {
        "train_images": "train-images-idx3-ubyte.gz",
        "train_labels": "train-labels-idx1-ubyte.gz",
        "test_images": "t10k-images-idx3-ubyte.gz",
        "test_labels": "t10k-labels-idx1-ubyte.gz",
    }
    # A plain attribute: the library's property looks for a file in this module's folder, and needs importlib_resources.
    url_infos = _registered(tfds.core.tfds_path() / "url_checksums" / "mnist.txt", tfds_mnist.MNIST.URL, FILES)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        paths = _download(self, dl_manager)
        return {
            split: self._generate_examples(paths[f"{split}_images"], paths[f"{split}_labels"])
            for split in ("train", "test")
        }

    def _generate_examples(
        self, images_path: pathlib.Path, labels_path: pathlib.Path
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        with gzip.open(images_path) as stream:
            images = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, *tfds_mnist.MNIST_IMAGE_SHAPE)
        with gzip.open(labels_path) as stream:
            labels = np.frombuffer(stream.read(), np.uint8, offset=8).astype(np.int64)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": _pil(image), "label": label}


class SvhnBuilder(_NoBucket, tfds_svhn.Builder, skip_registration=True):  # type: ignore[misc, call-arg]
    """The library's `svhn_cropped` without its `extra` split (1.3 GB), with the files opened by scipy."""

    name = "svhn_cropped"
    pkg_dir_path = epath.Path(tfds_svhn.__file__).parent  # description and citation
    FILES: ClassVar = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
    url_infos = _registered(pkg_dir_path / "checksums.tsv", tfds_svhn.URL, FILES)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        paths = _download(self, dl_manager)
        return {split: self._generate_examples(split, paths[split]) for split in ("train", "test")}

    def _generate_examples(self, split: str, path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
        import scipy.io

        data = scipy.io.loadmat(path)
        labels = data["y"].reshape(-1)
        if labels.min() < 1 or labels.max() > 10:
            raise DataError(f"{path}: labels from {labels.min()} to {labels.max()}; expected 1 to 10 (10 is digit 0)")
        for index, (image, label) in enumerate(zip(np.moveaxis(data["X"], -1, 0), labels, strict=True)):
            yield index, {"image": _pil(image), "label": int(label) % 10, "id": f"{split}_{index:06d}"}


BUILDERS: dict[str, type[Any]] = {"mnist": MnistBuilder, "svhn": SvhnBuilder}


def prepare(name: str, root: pathlib.Path, copy: pathlib.Path) -> Dataset:
    """Prepares a data set unless it is prepared already, decodes it, and keeps the decoded copy.

    Args:
      name: `mnist` or `svhn`.
      root: the data folder; made when missing, but only once there is something to put into it.
      copy: where to keep the decoded copy.

    Returns:
      The data set, read from the prepared records.

    Raises:
      DataError: if the original files are neither there nor to be had, a file is not the registered one, or the folder
        cannot be used. Nothing is left that a later call would take for a prepared data set.
    """
    with _errors(name, root):
        builder = _builder(name, root)
        if not builder.data_path.exists():
            if missing := _missing(name, root):
                _probe(name, root, missing)
            with _locked(name, root):
                builder = _builder(name, root)
                if not builder.data_path.exists():  # else another process was faster
                    _prepare(builder, root)
        dataset = _decode(name, builder)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_npz(dataset, copy)
    except (OSError, DataError) as err:
        # A read-only or full folder: slow, yet no reason to stop.
        logging.warning("%s: no decoded copy is kept, so each load decodes the records: %s", name, err)
    return dataset


def _builder(name: str, root: pathlib.Path) -> Any:
    folder = root / "array_record"
    try:
        return BUILDERS[name](data_dir=folder, file_format="array_record")
    except Exception as err:  # a prepared folder whose description is damaged
        raise _unreadable(name, folder / BUILDERS[name].name, err) from err


def _unreadable(name: str, folder: pathlib.Path, err: Exception) -> DataError:
    return DataError(
        f"{name}: the prepared records in {folder} cannot be read ({type(err).__name__}: {first_line(err)}); delete "
        "that folder and run again"
    )


def _prepare(builder: Any, root: pathlib.Path) -> None:
    config = tfds.download.DownloadConfig(try_download_gcs=False, force_checksums_validation=True)
    # The library prints what it does; standard output is left to the caller's results.
    with contextlib.redirect_stdout(sys.stderr):
        builder.download_and_prepare(download_dir=root / "downloads", download_config=config)


def _locked(name: str, root: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Lets one process at a time prepare a data set."""
    root.mkdir(parents=True, exist_ok=True)
    return _io.locked(root, f".{name}.lock", lambda who: logging.warning("%s: %s; waiting for it", name, who))


def _decode(name: str, builder: Any) -> Dataset:
    from tqdm import auto as tqdm_auto

    arrays: dict[str, np.ndarray] = {}
    try:
        for split in ("train", "test"):
            source = builder.as_data_source(split=split)
            images = np.empty((len(source), *KNOWN[name].image_shape), np.uint8)
            labels = np.empty(len(source), np.int32)
            title = f"Decoding {name} {split}"
            # None: nothing in a log.
            with tqdm_auto.tqdm(total=len(source), desc=title, unit=" images", leave=False, disable=None) as bar:
                for start in range(0, len(source), 1000):
                    indices = range(start, min(start + 1000, len(source)))
                    for index, example in zip(indices, source.__getitems__(indices), strict=True):
                        images[index], labels[index] = example["image"], example["label"]
                    bar.update(len(indices))
            arrays |= {f"x_{split}": images, f"y_{split}": labels}
        sources = {str(info.filename): info.checksum for info in builder.url_infos.values()}
        dataset = Dataset(name, str(builder.version), **arrays, num_classes=10, source_sha256=sources)
        if (found := (len(dataset.x_train), len(dataset.x_test))) != KNOWN[name][:2]:
            raise ValueError(f"{found} train and test examples instead of {KNOWN[name][:2]}")
    except Exception as err:  # whatever the record reader raises on damaged files
        raise _unreadable(name, builder.data_path, err) from err
    return dataset


def _manual_dir(root: pathlib.Path) -> pathlib.Path:
    return root / "downloads" / "manual"


def _missing(name: str, root: pathlib.Path) -> _UrlInfos:
    """Returns the original files that must be downloaded, after verifying those that were placed by hand."""
    missing: _UrlInfos = {}
    for url, info in BUILDERS[name].url_infos.items():
        manual = _manual_dir(root) / info.filename
        if manual.exists():
            _check_sha256(manual, info.checksum, f"put the original file there (from {url}), or remove it")
            continue
        cached, downloads = tfds_resource.get_dl_fname(url, info.checksum), root / "downloads"
        folders = (downloads, downloads / BUILDERS[name].name)
        if not any(tfds_resource.is_locally_cached(epath.Path(folder) / cached) for folder in folders):
            missing[url] = info
    return missing


def _download(builder: Any, dl_manager: Any) -> dict[str, pathlib.Path]:
    """Has the library find or fetch the original files, by their role in `FILES`."""
    roles = dict(zip(builder.FILES, builder.url_infos, strict=True))  # in the order of `_registered`
    paths: dict[str, pathlib.Path] = dl_manager.download(roles)
    for role, url in roles.items():
        # The library verifies what it fetches now and what lies in `manual`, but trusts what it fetched earlier.
        _check_sha256(paths[role], builder.url_infos[url].checksum, "delete it, so that it is fetched again")
    return paths


def _check_sha256(path: pathlib.Path, expected: str, remedy: str) -> None:
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise DataError(f"{path}: wrong SHA-256: expected {expected}, found {found}; {remedy}")


def _ways_out(name: str, root: pathlib.Path, infos: _UrlInfos) -> str:
    files = ", ".join(str(info.filename) for info in infos.values())
    folder = next(iter(infos)).rsplit("/", 1)[0]
    return (
        f"either (1) run again where {folder} can be reached, or (2) put {files} from there into {_manual_dir(root)}, or "
        f"(3) use other data: --data=digits needs no files, --data=PATH.npz takes a file of your own or one that "
        f"`python -m e2sad_jax.data {name} --to={name}.npz` exported elsewhere"
    )


def _probe(name: str, root: pathlib.Path, missing: _UrlInfos) -> None:
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


@contextlib.contextmanager
def _errors(name: str, root: pathlib.Path) -> Iterator[None]:
    """Turns what the library raises into one DataError: a wrong checksum, a broken connection, a full disk, ..."""
    try:
        yield
    except DataError:
        raise
    except Exception as err:
        raise DataError(
            f"{name}: cannot be prepared in {root} ({type(err).__name__}: {first_line(err)}); "
            f"{_ways_out(name, root, BUILDERS[name].url_infos)}"
        ) from err
