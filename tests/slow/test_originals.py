"""Data sets from their original files: all of MNIST through tensorflow-datasets, and a part of SVHN from one npz file."""

import gzip
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from e2sad_jax import data
from e2sad_jax.data.__main__ import main

WITHOUT_TFDS = """
import sys
for name in ("tensorflow_datasets", "array_record", "tqdm", "PIL", "requests"):
    sys.modules[name] = None
from e2sad_jax import data
for path in sys.argv[1:]:
    dataset = data.load(path) if path.endswith(".npz") else data.load("mnist", path)
    print(dataset.name, dataset.version, dataset.sha256, len(dataset.x_train), len(dataset.source_sha256))
"""


@pytest.fixture(scope="module")
def originals(shared):
    return shared("data/mnist")


@pytest.fixture(scope="module")
def root(tmp_path_factory, originals):
    """A data folder in which MNIST is prepared from its original files."""
    root = tmp_path_factory.mktemp("mnist")
    manual = root / "downloads" / "manual"
    manual.mkdir(parents=True)
    for path in originals.glob("*.gz"):
        shutil.copy(path, manual)
    data.load("mnist", root)
    return root


def test_mnist_by_the_library_s_name_and_splits(root):
    whole, part = data.load("mnist", root), data.load("tfds:mnist:3.0.1@train[:5%],test[:500]", root)
    assert (part.name, part.version, part.num_classes) == ("mnist@train[:5%],test[:500]", "3.0.1", 10)
    for member, count in {"x_train": 3000, "y_train": 3000, "x_test": 500, "y_test": 500}.items():
        np.testing.assert_array_equal(getattr(part, member), getattr(whole, member)[:count])


def test_mnist_has_all_images_with_their_labels(root, originals, monkeypatch):
    from e2sad_jax.data import tfds

    monkeypatch.setattr(tfds, "prepare", None)  # a second load reads neither records nor original files
    dataset = data.load("mnist", str(root))
    assert (dataset.name, dataset.version, dataset.num_classes) == ("mnist", "3.0.1", 10)
    assert dataset.image_shape == (28, 28, 1)
    # The digest that results made with these images name.
    assert dataset.sha256 == "66ecc48e8c088ff37a73f70ce761ae8ca1115b50e29df7436a40211dc5a8e872"
    known = pathlib.Path(sys.modules["tensorflow_datasets"].__file__).parent / "url_checksums" / "mnist.txt"
    registered = {line.split("\t")[3]: line.split("\t")[2] for line in known.read_text().splitlines()}
    assert dict(dataset.source_sha256) == registered
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = gzip.decompress((originals / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((originals / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        expected = sorted((images[i * 784 : (i + 1) * 784], label) for i, label in enumerate(labels))
        x, y = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
        assert sorted((image.tobytes(), int(label)) for image, label in zip(x, y, strict=True)) == expected


def test_mnist_is_kept_as_array_record_and_needs_no_tensorflow(root):
    folder = root / "array_record" / "mnist"
    assert [path.name for path in folder.iterdir()] == ["3.0.1"]
    assert json.loads((folder / "3.0.1" / "dataset_info.json").read_text())["fileFormat"] == "array_record"
    assert list((folder / "3.0.1").glob("mnist-train.array_record-*"))
    assert "tensorflow" not in sys.modules


def test_exported_and_decoded_mnist_are_read_without_tensorflow_datasets(root, tmp_path, capsys):
    to = tmp_path / "mnist.npz"
    assert main(["mnist", f"--to={to}", f"--data_dir={root}"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for word in (str(to), "mnist 3.0.1", "60000 train", "10000 test", "28x28x1", "MB"):
        assert word in out
    argv = [sys.executable, "-c", WITHOUT_TFDS, str(to), str(root)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sha256 = data.load("mnist", root).sha256
    assert done.stdout.splitlines() == [f"mnist 3.0.1 {sha256} 60000 4"] * 2


def test_a_part_of_svhn_is_a_data_set_of_its_own_name(shared):
    dataset = data.load(str(shared("data/svhn_10k.npz")))
    assert (dataset.name, dataset.num_classes, dataset.image_shape) == ("svhn_10k", 10, (32, 32, 3))
    assert dataset.x_train.dtype == np.uint8
    # The digest that results made with these images name.
    assert dataset.sha256 == "0c00d57f42a9e6bc9611e773ecfddeab2fcc1623ede806503f694f8351bf2469"
