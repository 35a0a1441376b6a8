"""Data sets: the embedded digits, real MNIST through tensorflow-datasets, the command line.

Real MNIST is prepared once, from the original files where they are at hand; `test_data_prepare.py` has the rest of the
preparation, in miniature.
"""

import gzip
import json
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from e2sad_jax import data
from e2sad_jax.data import npz
from e2sad_jax.errors import DataError

MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Names do not resolve, and nothing of the user's is read or written."""

    def getaddrinfo(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("E2SAD_DATA_DIR", str(tmp_path / "default"))


def python(code, *args, **kwargs):
    """Runs code in a fresh interpreter."""
    argv = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def error_of(name, root, *words):
    with pytest.raises(DataError) as caught:
        data.load(name, root)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return message


# Digits ---------------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    with np.load(pathlib.Path(data.__file__).with_name("digits.npz")) as members:
        np.testing.assert_array_equal(members["images"], original.images)
        np.testing.assert_array_equal(members["labels"], original.target)
        assert members["images"].dtype == np.uint8


def test_digits():
    digits = data.load("digits")
    assert (digits.name, digits.version, digits.num_classes, digits.image_shape) == ("digits", "", 10, (28, 28, 1))
    assert (len(digits.x_train), len(digits.x_test)) == (1442, 355) == npz.OFFICIAL["digits"][:2]
    assert digits.x_train.dtype == np.uint8
    assert (digits.x_train.min(), digits.x_train.max()) == (0, 255)
    share = np.bincount(digits.y_test) / np.bincount(np.concatenate([digits.y_train, digits.y_test]))
    assert (np.abs(share - 0.2) < 0.01).all()
    assert digits.sha256 == data.load("digits").sha256
    # The split and the pixels stay what they are: results under the name "digits" must remain comparable.
    assert digits.sha256 == "ce370adddaa4b0b53dc8fcc60a6ebe1d7ab45ccb8a6ca3fa9b75e1c66df3d3ad"


def test_digits_keep_their_shape_when_resampled():
    digits = data.load("digits")
    with np.load(pathlib.Path(data.__file__).with_name("digits.npz")) as members:
        small, labels = members["images"].astype(float), members["labels"]
    fifth = [index for label in range(10) for index in np.flatnonzero(labels == label)[4::5]]
    fifth.sort()
    np.testing.assert_array_equal(digits.y_test, labels[fifth])
    means = digits.x_test[..., 0].astype(float).reshape(-1, 4, 7, 4, 7).mean((2, 4)) * 16 / 255
    expected = small[fifth].reshape(-1, 4, 2, 4, 2).mean((2, 4))
    assert np.corrcoef(means.ravel(), expected.ravel())[0, 1] > 0.99


# Names, folders, imports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MNIST", "cifar10", "", "mnist.npy", "svhn_cropped"])
def test_unknown_name(name, tmp_path):
    error_of(name, tmp_path, repr(name), "mnist", "svhn", "digits", ".npz")


def test_default_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("E2SAD_DATA_DIR", "~/here")
    assert data.default_data_dir() == tmp_path / "here"
    monkeypatch.delenv("E2SAD_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.default_data_dir() == tmp_path / "xdg" / "e2sad_jax"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert data.default_data_dir() == tmp_path / ".cache" / "e2sad_jax"


def test_import_is_cheap_and_no_device_is_touched():
    out = python(
        "import sys, e2sad_jax; before = set(sys.modules)\n"
        "from e2sad_jax import data\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'tensorflow_datasets', 'tensorflow', 'scipy', 'tqdm', 'absl', 'PIL', 'requests', 'sklearn'}))\n"
        "data.load('digits')\n"
        "print('sklearn' in sys.modules)\n"
        "from jax._src import xla_bridge; print(dict(xla_bridge._backends))\n"
    )
    assert out.split("\n")[:3] == ["[]", "False", "{}"]


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow_datasets", "array_record", "tqdm", "PIL", "requests"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from e2sad_jax import data
"""


def test_without_tensorflow_datasets_the_error_says_what_to_do(tmp_path):
    out = python(
        BLOCK + "try: data.load('mnist', sys.argv[1])\nexcept data.DataError as err: print(err)", tmp_path / "none"
    )
    for word in ("pip install 'e2sad_jax[data]'", "--data=mnist.npz", "--data=digits", str(tmp_path / "none")):
        assert word in out


# Real MNIST -----------------------------------------------------------------------------------------------------------


DIE = """
import os, sys
from e2sad_jax import data
from e2sad_jax.data import tfds
original, count = tfds._pil, 0
def pil(image):
    global count
    count += 1
    return original(image) if count < 200 else os._exit(7)
tfds._pil = pil
data.load("mnist", sys.argv[1])
"""


@pytest.fixture(scope="module")
def mnist_originals(shared):
    return shared("data/mnist")


@pytest.fixture(scope="module")
def mnist_root(tmp_path_factory, mnist_originals):
    """Real MNIST, prepared after a process died in the middle of preparing it, beside a set of somebody else's."""
    root = tmp_path_factory.mktemp("mnist")
    manual = root / "downloads" / "manual"
    manual.mkdir(parents=True)
    for file in MNIST_FILES:
        shutil.copy(mnist_originals / file, manual / file)
    # What tensorflow-datasets itself would have left in this folder for somebody who uses TensorFlow.
    foreign = root / "mnist" / "3.0.1"
    foreign.mkdir(parents=True)
    (foreign / "dataset_info.json").write_text('{"name": "mnist", "version": "3.0.1", "fileFormat": "tfrecord"}')
    (foreign / "mnist-test.tfrecord-00000-of-00001").write_bytes(b"not ours")
    argv = [sys.executable, "-c", DIE, str(root)]
    died = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert died.returncode == 7, died.stderr
    assert [path for path in (root / "array_record" / "mnist").iterdir() if "incomplete" in path.name]
    data.load("mnist", root)
    return root


def test_real_mnist(mnist_root, mnist_originals, monkeypatch):
    from e2sad_jax.data import tfds

    # A second load reads neither records nor original files.
    monkeypatch.setattr(tfds, "prepare", None)
    dataset = data.load("mnist", str(mnist_root))
    assert (dataset.name, dataset.version, dataset.num_classes) == ("mnist", "3.0.1", 10)
    assert dataset.image_shape == (28, 28, 1)
    known = pathlib.Path(sys.modules["tensorflow_datasets"].__file__).parent / "url_checksums" / "mnist.txt"
    registered = {line.split("\t")[3]: line.split("\t")[2] for line in known.read_text().splitlines()}
    assert dict(dataset.source_sha256) == registered
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = gzip.decompress((mnist_originals / f"{prefix}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((mnist_originals / f"{prefix}-labels-idx1-ubyte.gz").read_bytes())[8:]
        expected = sorted((images[i * 784 : (i + 1) * 784], label) for i, label in enumerate(labels))
        x, y = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
        assert sorted((image.tobytes(), int(label)) for image, label in zip(x, y, strict=True)) == expected


def test_real_mnist_is_array_record_and_needs_no_tensorflow(mnist_root):
    folder = mnist_root / "array_record" / "mnist"
    assert [path.name for path in folder.iterdir()] == ["3.0.1"]  # nothing is left of the process that died
    assert json.loads((folder / "3.0.1" / "dataset_info.json").read_text())["fileFormat"] == "array_record"
    assert list((folder / "3.0.1").glob("mnist-train.array_record-*"))
    assert "tensorflow" not in sys.modules


def test_foreign_preparation_is_left_alone(mnist_root):
    assert files_of(mnist_root / "mnist") == ["3.0.1/dataset_info.json", "3.0.1/mnist-test.tfrecord-00000-of-00001"]
    assert (mnist_root / "mnist" / "3.0.1" / "mnist-test.tfrecord-00000-of-00001").read_bytes() == b"not ours"


def test_exported_mnist_is_mnist_where_tensorflow_datasets_is_not(mnist_root, tmp_path, capsys):
    to = tmp_path / "mnist.npz"
    assert data.main(["mnist", f"--to={to}", f"--data_dir={mnist_root}"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for word in (str(to), "mnist 3.0.1", "60000 train", "10000 test", "28x28x1", "MB"):
        assert word in out
    code = (
        BLOCK + "d = data.load(sys.argv[1]); print(d.name, d.version, d.sha256, len(d.x_train), len(d.source_sha256))"
    )
    dataset = data.load("mnist", mnist_root)
    assert python(code, to).split() == ["mnist", "3.0.1", dataset.sha256, "60000", "4"]
    # The prepared folder alone is enough as well.
    assert python(BLOCK + "print(data.load('mnist', sys.argv[1]).name)", mnist_root).strip() == "mnist"


# Command line ---------------------------------------------------------------------------------------------------------


def test_export_of_digits(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "e2sad_jax.data", "digits", "--to=d.npz"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(pathlib.Path(data.__file__).parents[3]), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("wrote d.npz: digits, 1442 train and 355 test images of 28x28x1 uint8, 10 classes")
    assert data.load(str(tmp_path / "d.npz")).sha256 == data.load("digits").sha256
    assert data.load(str(tmp_path / "d.npz")).name == "digits"


def test_export_to_an_existing_file(tmp_path, capsys):
    to = tmp_path / "d.npz"
    to.write_text("mine")
    assert data.main(["digits", "--to", str(to)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--overwrite" in err
    assert str(to) in err
    assert to.read_text() == "mine"
    assert data.main(["--overwrite", "--to", str(to), "digits"]) == 0
    assert data.load(str(to)).name == "digits"


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "expected one DATA"),
        (["digits"], "--to=FILE.npz is missing"),
        (["--to=a.npz"], "expected one DATA"),
        (["digits", "svhn", "--to=a.npz"], "expected one DATA, got 2"),
        (["digits", "--to=a.npz", "--two=b"], "two"),
        (["digits", "--to"], "to"),
        (["digits", "--to=a.npz", "--overwrite=maybe"], "overwrite"),
        (["digits", "--to=a.npy"], "must end in .npz"),
        (["digits", "--to=no/such/folder/a.npz"], "does not exist"),
        (["cifar10", "--to=a.npz"], "choose mnist, svhn, digits"),
        (["missing.npz", "--to=a.npz"], "no such file"),
        (["mnist", "--to=a.npz", "--data_dir=empty"], "cannot be fetched"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert data.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag, capsys):
    assert data.main([flag]) == 0
    out = capsys.readouterr().out
    for word in ("python -m e2sad_jax.data", "--to", "--data_dir", "--overwrite", "downloads/manual", "E2SAD_DATA_DIR"):
        assert word in out
