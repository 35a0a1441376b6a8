"""Builders of tensorflow-datasets that open original files with plain Python, where the library's own need TensorFlow.

The library's own open them with `tf.io.gfile`. The subclasses keep everything else of them: URLs, registered checksums,
features, version.
"""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import tarfile
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.datasets.svhn_cropped import svhn_cropped_dataset_builder as tfds_svhn
from tensorflow_datasets.image_classification import cifar as tfds_cifar
from tensorflow_datasets.image_classification import mnist as tfds_mnist

from e2sad_jax.errors import DataError

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"

UrlInfos = dict[str, checksums.UrlInfo]


def _registered(path: epath.Path, base: str, files: Mapping[str, str]) -> UrlInfos:
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
        return {split: self._generate_examples(split, path) for split, path in paths.items()}

    def _generate_examples(self, split: str, path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
        import scipy.io

        data = scipy.io.loadmat(path)
        labels = data["y"].reshape(-1)
        if labels.min() < 1 or labels.max() > 10:
            raise DataError(f"{path}: labels from {labels.min()} to {labels.max()}; expected 1 to 10 (10 is digit 0)")
        for index, (image, label) in enumerate(zip(np.moveaxis(data["X"], -1, 0), labels, strict=True)):
            yield index, {"image": _pil(image), "label": int(label) % 10, "id": f"{split}_{index:06d}"}


class SvhnExtraBuilder(SvhnBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The library's `svhn_cropped` with its `extra` split, as a configuration: the records of `svhn` stay beside it."""

    name = "svhn_cropped"
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="extra", version=tfds_svhn.Builder.VERSION)]
    FILES: ClassVar = SvhnBuilder.FILES | {"extra": "extra_32x32.mat"}
    url_infos = _registered(SvhnBuilder.pkg_dir_path / "checksums.tsv", tfds_svhn.URL, FILES)


class _Cifar(_NoBucket):
    """Opens the archive of one of the library's two CIFAR builders by `tarfile`."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        about = self._cifar_info  # type: ignore[attr-defined]
        wanted = {about.prefix + file for file in (*about.train_files, *about.test_files, *about.label_files)}
        with tarfile.open(_download(self, dl_manager)["archive"]) as archive:
            # In the order of the archive: going back in it means decompressing it again.
            files = {member.name: archive.extractfile(member) for member in archive if member.name in wanted}
            content = {name.removeprefix(about.prefix): file.read() for name, file in files.items() if file}
        for key, file in zip(about.label_keys, about.label_files, strict=True):
            self.info.features[key].names = content[file].decode().split()  # type: ignore[attr-defined]
        return {
            split: self._generate_examples(split, b"".join(content[file] for file in files))
            for split, files in (("train", about.train_files), ("test", about.test_files))
        }

    def _generate_examples(self, split: str, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
        keys = self._cifar_info.label_keys  # type: ignore[attr-defined]
        rows = np.frombuffer(content, np.uint8).reshape(-1, len(keys) + 3 * 32 * 32)  # labels, then red, green and blue
        for index, row in enumerate(rows):
            image = row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
            labels = dict(zip(keys, map(int, row), strict=False))
            yield index, {"image": _pil(image), "id": f"{split}_{index:05d}", **labels}


class Cifar10Builder(_Cifar, tfds_cifar.Cifar10, skip_registration=True):  # type: ignore[misc, call-arg]
    """The library's `cifar10`, with the archive opened by `tarfile`."""

    name = "cifar10"
    FILES: ClassVar = {"archive": "cifar-10-binary.tar.gz"}
    url_infos = _registered(tfds.core.tfds_path() / "url_checksums" / "cifar10.txt", CIFAR_URL, FILES)


class Cifar100Builder(_Cifar, tfds_cifar.Cifar100, skip_registration=True):  # type: ignore[misc, call-arg]
    """The library's `cifar100`, with the archive opened by `tarfile`. `label` is the fine label."""

    name = "cifar100"
    FILES: ClassVar = {"archive": "cifar-100-binary.tar.gz"}
    url_infos = _registered(tfds.core.tfds_path() / "url_checksums" / "cifar100.txt", CIFAR_URL, FILES)


BUILDERS: dict[str, type[Any]] = {
    "mnist": MnistBuilder,
    "svhn": SvhnBuilder,
    "svhn_extra": SvhnExtraBuilder,
    "cifar10": Cifar10Builder,
    "cifar100": Cifar100Builder,
}
TRAIN = {"svhn_extra": "train+extra"}  # splits that the training images are, else "train"


def _download(builder: Any, dl_manager: Any) -> dict[str, pathlib.Path]:
    """Has the library find or fetch the original files, by their role in `FILES`."""
    roles = dict(zip(builder.FILES, builder.url_infos, strict=True))  # in the order of `_registered`
    paths: dict[str, pathlib.Path] = dl_manager.download(roles)
    for role, url in roles.items():
        # The library verifies what it fetches now and what lies in `manual`, but trusts what it fetched earlier.
        check_sha256(paths[role], builder.url_infos[url].checksum, "delete it, so that it is fetched again")
    return paths


def check_sha256(path: pathlib.Path, expected: str, remedy: str) -> None:
    """Refuses a file of another SHA-256 than the hexadecimal one that is expected.

    Raises:
      DataError: with both, and the remedy.
    """
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise DataError(f"{path}: wrong SHA-256: expected {expected}, found {found}; {remedy}")
