"""Data sets: the embedded digits, known names, splits, the command line."""

import pathlib
import runpy
import socket
import subprocess
import sys

import numpy as np
import pytest

from e2sad_jax import data
from e2sad_jax.data import KNOWN
from e2sad_jax.data.__main__ import main
from e2sad_jax.data.dataset import VALIDATION_EXAMPLES, in_words
from e2sad_jax.errors import ConfigError, DataError


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
    assert (len(digits.x_train), len(digits.x_test)) == (1442, 355) == KNOWN["digits"][:2]
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


@pytest.mark.parametrize("name", ["MNIST", "cifar", "", "mnist.npy", "svhn_cropped"])
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


def test_import_is_light_and_the_error_without_tensorflow_datasets_helps(tmp_path):
    """Neither importing nor loading touches a device."""
    out = python(
        "import sys, e2sad_jax; before = set(sys.modules)\n"
        "from e2sad_jax import data\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'tensorflow_datasets', 'tensorflow', 'scipy', 'tqdm', 'absl', 'PIL', 'requests', 'sklearn'}))\n"
        "data.load('digits')\n"
        "print('sklearn' in sys.modules)\n"
        "from jax._src import xla_bridge; print(dict(xla_bridge._backends))\n"
        "sys.modules['tensorflow_datasets'] = None\n"
        "try: data.load('mnist', sys.argv[1])\n"
        "except ValueError as error: print(error)\n",
        tmp_path / "none",
    )
    *first, message, _ = out.split("\n")
    assert first == ["[]", "False", "{}"]
    for word in ("pip install 'e2sad_jax[data]'", "--data=mnist.npz", "--data=digits", str(tmp_path / "none")):
        assert word in message


# Splits ---------------------------------------------------------------------------------------------------------------


def numbered(train=700, test=5):
    """A data set whose images and labels hold their own number; labels of test images go on where those of training end."""
    labels = np.arange(train + test, dtype=np.int32)
    images = np.broadcast_to(labels[:, None, None, None] / 1000, (len(labels), 2, 2, 1)).astype(np.float32)
    return data.Dataset("n", "", images[:train], labels[:train], images[train:], labels[train:], num_classes=1000)


def check_pairs(dataset):
    for x, y in ((dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)):
        np.testing.assert_array_equal(np.round(x[:, 0, 0, 0] * 1000), y)


def test_held_out_images_train_nothing_and_test_images_are_never_among_them():
    dataset = numbered()
    train, validation = data.hold_out(dataset, 100)
    check_pairs(train)
    check_pairs(validation)
    assert (len(train.x_train), len(validation.x_test)) == (600, 100)
    np.testing.assert_array_equal(np.sort(np.concatenate([train.y_train, validation.y_test])), np.arange(700))
    assert train.x_test is not None
    np.testing.assert_array_equal(train.y_test, dataset.y_test)
    assert (np.diff(validation.y_test) != 1).any(), "not simply the first"
    again = data.hold_out(dataset, 100)[1]
    np.testing.assert_array_equal(again.y_test, validation.y_test)
    # A larger validation set holds the smaller one.
    assert set(validation.y_test) < set(data.hold_out(dataset, 200)[1].y_test)


def test_without_held_out_images_training_images_choose_and_all_train():
    dataset = numbered()
    train, validation = data.hold_out(dataset, 0)
    assert train is dataset
    check_pairs(validation)
    assert len(validation.x_test) == VALIDATION_EXAMPLES
    assert set(validation.y_test) < set(range(700))
    assert len(data.hold_out(numbered(20), 0)[1].x_test) == 20


def test_some_images_must_be_left_to_train():
    with pytest.raises(ConfigError, match=r"--validation_examples=700: must be below the 700 training images of n"):
        data.hold_out(numbered(), 700)


def test_parts_keep_images_with_their_labels():
    dataset = numbered()
    part = data.subset(dataset, train=np.array([3, 1]), test=slice(1, 3))
    check_pairs(part)
    assert (part.y_train.tolist(), part.y_test.tolist()) == ([3, 1], [701, 702])
    assert (part.name, part.num_classes) == ("n", 1000)
    check_pairs(data.sample_tests(dataset, 2))
    assert len(data.sample_tests(dataset, 2).x_test) == 2
    assert data.sample_tests(dataset, 0) is dataset


@pytest.mark.parametrize("n", [0, 1, 3, 7, 20, 199, 500, 999, 1000, 2000])
def test_a_sample_has_every_class_with_its_share(n):
    """Of a file sorted by class, whose classes have from 10 to 400 images."""
    counts = np.array([400, 300, 150, 90, 40, 10, 10])
    labels = np.repeat(np.arange(7), counts)
    places = data.sample(labels, n)
    assert len(places) == min(n, 1000)
    assert (np.diff(places) > 0).all()
    taken, share = np.bincount(labels[places], minlength=7), min(n, 1000) * counts / 1000
    if n >= 7:
        assert taken.min() >= 1
    if n == 7:
        assert taken.tolist() == [1] * 7
    else:
        assert (np.abs(taken - share) <= 1).all()
    np.testing.assert_array_equal(places, data.sample(labels.copy(), n))
    if 20 <= n < 999:
        assert (places != data.sample(labels, n, seed=1)).any()
        assert not np.isin(np.arange(20), places).all(), "not simply the first of each class"


def test_a_sample_takes_the_rest_by_largest_remainder():
    """Shares of 10 are 4.6, 3.3 and 2.1: the one that is left goes to the first class."""
    labels = np.random.default_rng(0).permutation(np.repeat([3, 5, 8], [46, 33, 21]))
    assert np.unique(labels[data.sample(labels, 10)], return_counts=True)[1].tolist() == [5, 3, 2]
    with pytest.raises(ValueError, match="n=-1; it must be at least 0, a whole number"):
        data.sample(labels, -1)


def test_the_images_of_a_measurement_in_words():
    assert in_words(500, 10_000, 10, 10) == "500 of 10,000 test images, 10 of 10 classes"
    assert in_words(355, 355, 10, 10) == "all 355 test images"
    assert in_words(5, 5, 3, 10) == "all 5 test images, 3 of 10 classes"
    assert in_words(500, 10_000, None, 10) == "the first 500 of 10,000 test images"


# Command line ---------------------------------------------------------------------------------------------------------


def test_export_of_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data", "digits", "--to=d.npz"])
    monkeypatch.delitem(sys.modules, "e2sad_jax.data.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("e2sad_jax.data", run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("wrote d.npz: digits, 1442 train and 355 test images of 28x28x1 uint8, 10 classes")
    assert data.load(str(tmp_path / "d.npz")).sha256 == data.load("digits").sha256
    assert data.load(str(tmp_path / "d.npz")).name == "digits"


def test_export_to_an_existing_file(tmp_path, capsys):
    to = tmp_path / "d.npz"
    to.write_text("mine")
    assert main(["digits", "--to", str(to)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--overwrite" in err
    assert str(to) in err
    assert to.read_text() == "mine"
    assert main(["--overwrite", "--to", str(to), "digits"]) == 0
    assert data.load(str(to)).name == "digits"


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "required: DATA, --to"),
        (["digits"], "required: --to"),
        (["--to=a.npz"], "required: DATA"),
        (["digits", "svhn", "--to=a.npz"], "unrecognized arguments: svhn"),
        (["digits", "--to=a.npz", "--two=b"], "two"),
        (["digits", "--to"], "to"),
        (["digits", "--to=a.npz", "--overwrite=maybe"], "overwrite"),
        (["digits", "--to=a.npy"], "must end in .npz"),
        (["digits", "--to=no/such/folder/a.npz"], "does not exist"),
        (["cifar", "--to=a.npz"], "choose mnist, svhn, svhn_extra, cifar10, cifar100, digits, tfds:NAME"),
        (["missing.npz", "--to=a.npz"], "no such file"),
        (["mnist", "--to=a.npz", "--data_dir=empty"], "cannot be fetched"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(argv, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        main([flag])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for word in ("python -m e2sad_jax.data", "--to", "--data_dir", "--overwrite", "downloads/manual", "E2SAD_DATA_DIR"):
        assert word in out
