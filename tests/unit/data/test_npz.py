"""One-file data sets: what is accepted, what is refused and how, metadata, atomic writing."""

import dataclasses
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from e2sad_jax.data import KNOWN, Dataset, load, load_npz, npz, write_npz
from e2sad_jax.errors import DataError


def arrays(**changes):
    rng = np.random.default_rng(0)
    base = {
        "x_train": rng.integers(0, 256, (12, 6, 5, 3), np.uint8),
        "y_train": np.arange(12, dtype=np.int32) % 4,
        "x_test": rng.integers(0, 256, (5, 6, 5, 3), np.uint8),
        "y_test": np.arange(5, dtype=np.int32) % 4,
    }
    merged = {**base, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def save(path, **changes):
    np.savez(path, **arrays(**changes))
    return path


def dataset(**changes):
    fields = {"name": "mine", "version": "1.0", **arrays(), "num_classes": 4, "source_sha256": {"a.gz": "00ff"}}
    return Dataset(**{**fields, **changes})


def refusal(path, *words):
    with pytest.raises(DataError) as caught:
        load(str(path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def test_user_file(tmp_path):
    got = load(str(save(tmp_path / "birds.npz")))
    assert (got.name, got.version, got.num_classes, dict(got.source_sha256)) == ("birds", "", 4, {})
    assert got.image_shape == (6, 5, 3)
    assert got.x_train.dtype == np.uint8
    assert got.y_train.dtype == got.y_test.dtype == np.int32
    for member, array in arrays().items():
        np.testing.assert_array_equal(getattr(got, member), array)


def test_file_of_compressed_members_and_a_home_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez_compressed(tmp_path / "c.npz", **arrays())
    assert load("~/c.npz").sha256 == load(str(save(tmp_path / "d.npz"))).sha256


def test_grey_images_without_channel_and_column_labels(tmp_path):
    x = np.zeros((12, 6, 5), np.uint8)
    got = load_npz(save(tmp_path / "a.npz", x_train=x, x_test=x[:5], y_train=np.arange(12)[:, None] % 4))
    assert got.x_train.shape == (12, 6, 5, 1)
    assert got.y_train.shape == (12,)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.longdouble])
def test_floats_become_float32(tmp_path, dtype):
    x = np.linspace(0, 1, 12 * 30).reshape(12, 6, 5).astype(dtype)
    got = load_npz(save(tmp_path / "a.npz", x_train=x, x_test=np.asfortranarray(x[:5])))
    assert got.x_train.dtype == got.x_test.dtype == np.float32
    assert got.x_train.dtype.isnative
    assert got.x_test.flags.c_contiguous
    np.testing.assert_array_equal(got.x_train[..., 0], x.astype(np.float32))


def test_one_plus_rounding_is_one(tmp_path):
    x = np.full((12, 2, 2), 1 + 1e-12)
    assert load_npz(save(tmp_path / "a.npz", x_train=x, x_test=x[:5])).x_train.max() == 1


@pytest.mark.parametrize("labels", [np.uint8, np.int16, np.uint64])
def test_num_classes(tmp_path, labels):
    assert load_npz(save(tmp_path / "a.npz", y_train=np.arange(12).astype(labels))).num_classes == 12
    zeros = {"y_train": np.zeros(12, labels), "y_test": np.zeros(5, labels)}
    assert load_npz(save(tmp_path / "a.npz", **zeros)).num_classes == 2
    assert load_npz(save(tmp_path / "a.npz", num_classes=np.array([9]))).num_classes == 9


def test_other_members_are_left_alone(tmp_path):
    # A pickle that nobody asks for is never opened.
    save(tmp_path / "a.npz", notes=np.array([print, {}], object))
    assert load_npz(tmp_path / "a.npz").name == "a"


def test_an_unverified_file_of_a_known_name_does_not_pass_for_it(tmp_path):
    assert load_npz(save(tmp_path / "mnist.npz")).name == "mnist.npz"
    assert load_npz(save(tmp_path / "SVHN.npz")).name == "SVHN.npz"


X12 = np.zeros((12, 6, 5, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_test": None, "y_train": None}, ["y_train, x_test", "numpy.savez"]),
        ({"y_train": np.arange(11)}, ["y_train holds 11 labels", "x_train 12 images"]),
        ({"y_test": np.arange(6)}, ["y_test holds 6 labels", "x_test 5 images"]),
        ({"x_train": X12 * np.nan}, ["x_train", "nan", "1080 of its 1080", "[0, 1]"]),
        ({"x_train": X12 + np.inf}, ["x_train", "inf", "NaN or infinite"]),
        ({"x_train": X12 - 0.5}, ["x_train", "from -0.5 to -0.5", "rescale"]),
        ({"x_train": X12 + 255.0}, ["x_train", "to 255", "uint8", "divide them by 255"]),
        ({"x_train": X12 + 1e300}, ["x_train", "1e+300", "rescale"]),
        ({"x_train": X12.astype(np.int64)}, ["x_train is int64", "astype(numpy.uint8)"]),
        ({"x_train": X12.astype(bool)}, ["x_train is bool"]),
        ({"x_train": X12.astype(complex)}, ["x_train is complex128"]),
        ({"x_train": X12}, ["x_train is float32 but x_test uint8"]),
        ({"x_train": np.zeros((12, 7, 5, 3), np.uint8)}, ["(7, 5, 3)", "(6, 5, 3)"]),
        ({"x_train": np.zeros((12, 30), np.uint8)}, ["x_train has shape (12, 30)", "[N, H, W]"]),
        ({"x_train": np.zeros((12, 6, 0, 3), np.uint8)}, ["x_train has shape (12, 6, 0, 3)"]),
        ({"x_train": np.zeros((1, 12, 6, 5, 3), np.uint8)}, ["x_train has shape (1, 12, 6, 5, 3)"]),
        ({"x_test": np.zeros((0, 6, 5, 3), np.uint8), "y_test": np.zeros(0, int)}, ["x_test holds no images"]),
        ({"y_train": np.zeros(12)}, ["y_train is float64", "astype(numpy.int32)"]),
        ({"y_train": np.zeros(12, bool)}, ["y_train is bool"]),
        ({"y_train": np.eye(12, dtype=int)}, ["y_train has shape (12, 12)", "argmax"]),
        ({"y_train": np.arange(12) - 1}, ["y_train[0] is -1", "[0, K)"]),
        ({"y_train": np.full(12, 2**64 - 1, np.uint64)}, ["y_train[0] is 18446744073709551615", "2147483647"]),
        ({"y_train": np.array([0] * 11 + [2_000_000_000])}, ["y_train[11] is 2000000000", "12 training images"]),
        ({"y_test": np.arange(5)}, ["y_test[4] is 4", "[0, 4)", "max(y_train) + 1", "num_classes"]),
        ({"num_classes": np.array(3)}, ["y_train[3] is 3", "[0, 3)", "the file's num_classes"]),
        ({"num_classes": np.array(1)}, ["num_classes is 1", "between 2 and"]),
        ({"num_classes": np.array(10.0)}, ["num_classes has dtype float64"]),
        ({"num_classes": np.array([10, 10])}, ["num_classes", "one integer"]),
        ({"metadata": np.array("hello")}, ["metadata is not JSON", "drop or rename"]),
        ({"metadata": np.array("[1]")}, ["metadata is not JSON", "list"]),
        ({"metadata": np.array("[" * 100_000)}, ["metadata is not JSON"]),
        ({"metadata": np.zeros(3)}, ["metadata", "float64"]),
        ({"metadata": np.array('{"format": "x/2"}')}, ["metadata has format 'x/2'", npz.FORMAT]),
        ({"metadata": np.array(json.dumps({"format": npz.FORMAT, "name": "n"}))}, ["misses a field"]),
    ],
)
def test_refused(tmp_path, changes, words):
    refusal(save(tmp_path / "a.npz", **changes), *words)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("member", ["x_train", "y_test", "num_classes", "metadata"])
def test_pickles_are_never_loaded(tmp_path, monkeypatch, member):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.npz", **{member: np.array([Bomb()], object)})
    refusal(tmp_path / "a.npz", member, "pickled")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
    refusal(tmp_path / "b.npz", "not an npz")
    assert not (tmp_path / "unpickled").exists()


def test_no_such_file_folder_or_not_npz(tmp_path):
    refusal(tmp_path / "none.npz", "no such file")
    (tmp_path / "folder.npz").mkdir()
    refusal(tmp_path / "folder.npz", "folder")
    np.save(tmp_path / "array.npy", np.zeros(3))
    refusal((tmp_path / "array.npy").rename(tmp_path / "array.npz"), "not an npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    refusal(tmp_path / "empty.npz", "not an npz")


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_no_damage_escapes(tmp_path, writer):
    """Truncations and single altered bytes anywhere: a DataError, or (in unused zip fields) the right content."""
    writer(tmp_path / "good.npz", **arrays())
    good, content = (tmp_path / "good.npz").read_bytes(), load_npz(tmp_path / "good.npz").sha256
    path, refused = tmp_path / "a.npz", 0
    steps = range(0, len(good), max(1, len(good) // 150))
    for cut in steps:
        path.write_bytes(good[:cut])
        refusal(path)
    for position in steps:
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
        try:
            assert load_npz(path).sha256 == content
        except DataError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\x10\x00" + b"{'descr': '(((((",
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999,), }".ljust(118),
        b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (-3,), }".ljust(118),
        b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (2,), }".ljust(118) + b"abc",
        b"\x93NUMPY\x09\x00" + b" " * 100,
        b"not numpy at all",
    ],
)
def test_bad_array_headers(tmp_path, body):
    save(tmp_path / "a.npz", y_test=None)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("y_test.npy", body)
    refusal(tmp_path / "a.npz", "member y_test", "damaged")


def test_round_trip_keeps_everything(tmp_path):
    original = dataset()
    write_npz(original, tmp_path / "other-name.npz")
    got = load_npz(tmp_path / "other-name.npz")
    for field in ("name", "version", "num_classes", "source_sha256", "sha256"):
        assert getattr(got, field) == getattr(original, field)
    with np.load(tmp_path / "other-name.npz", allow_pickle=False) as members:  # readable with numpy alone
        metadata = json.loads(str(members["metadata"]))
        assert metadata["name"] == "mine"
        assert len(metadata["arrays"]["x_train"]["sha256"]) == 64
    write_npz(dataset(x_train=X12 + 0.5, x_test=X12[:5]), tmp_path / "floats.npz")
    assert load_npz(tmp_path / "floats.npz").x_train.dtype == np.float32


def rewrite(path, **changes):
    with np.load(path) as members:
        np.savez(path, **{**members, **changes})
    return path


def test_altered_export_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    for member in npz.ARRAYS:
        write_npz(dataset(), path)
        changed = getattr(dataset(), member).copy()
        changed[0] = 1 if changed.flat[0] != 1 else 2
        message = refusal(rewrite(path, **{member: changed}), f"{member} was altered", "sha256 should be", "export")
        assert sum(len(word.strip(";")) == 64 for word in message.split()) == 2  # expected and found
    write_npz(dataset(), path)
    refusal(rewrite(path, x_train=dataset().x_train.reshape(12, 5, 6, 3)), "x_train was altered", "shape")
    write_npz(dataset(), path)
    refusal(rewrite(path, num_classes=np.array(7)), "num_classes was altered", "should be 4 but is 7")


@pytest.mark.parametrize("name", ["mnist", "svhn", "digits"])
def test_a_part_does_not_pass_for_the_whole(tmp_path, monkeypatch, name):
    with pytest.raises(DataError, match=f"claims to be {name}"):
        write_npz(dataset(name=name), tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.delitem(KNOWN, name)
        write_npz(dataset(name=name), tmp_path / "a.npz")
    whole = f"{KNOWN[name].train} train"
    refusal(tmp_path / "a.npz", f"claims to be {name}", "12 train", whole, "drop the member metadata")


def test_write_refuses_what_load_would_refuse(tmp_path):
    for bad in (dataset(num_classes=3), dataset(x_train=X12 - 1), dataset(name="")):
        with pytest.raises(DataError):
            write_npz(bad, tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"must end in \.npz"):
        write_npz(dataset(), tmp_path / "a.npy")
    with pytest.raises(DataError, match="cannot be written"):
        write_npz(dataset(), tmp_path / "missing" / "a.npz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["savez", "replace"])
def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch, error, where):
    path = tmp_path / "a.npz"
    write_npz(dataset(version="old"), path)

    def savez(stream, **_):
        stream.write(b"PK half a file")
        raise error

    def replace(*_):
        raise error

    monkeypatch.setattr(*((np, "savez", savez) if where == "savez" else (os, "replace", replace)))
    with pytest.raises(DataError if isinstance(error, OSError) else KeyboardInterrupt):
        write_npz(dataset(version="new"), path)
    monkeypatch.undo()
    assert load_npz(path).version == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_dataset_is_immutable_and_its_digest_is_its_content():
    one = dataset()
    with pytest.raises(ValueError, match="read-only"):
        one.x_train[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = "x"
    assert one.sha256 == dataset(name="other", version="2", source_sha256={}).sha256
    others = [
        dataset(num_classes=5),
        dataset(y_test=(np.arange(5) + 1) % 4),
        dataset(x_train=one.x_train.reshape(12, 5, 6, 3)),
        dataset(y_train=one.y_train.astype(np.uint32)),
    ]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 5


def test_uint8_metadata_is_read(tmp_path):
    write_npz(dataset(), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as members:
        text = str(members["metadata"]).encode()
    rewrite(tmp_path / "a.npz", metadata=np.frombuffer(text, np.uint8))
    assert load_npz(tmp_path / "a.npz").name == "mine"


def test_encrypted_or_unknown_compression(tmp_path):
    save(tmp_path / "a.npz")
    data = bytearray((tmp_path / "a.npz").read_bytes())
    for flag_offset, value, signature in ((6, 1, b"PK\x03\x04"), (8, 1, b"PK\x01\x02")):
        start = 0
        while (start := data.find(signature, start)) >= 0:
            data[start + flag_offset] |= value
            start += 4
    (tmp_path / "a.npz").write_bytes(data)
    refusal(tmp_path / "a.npz", "x_train", "cannot be read")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x_train.npy", b"123")
    (tmp_path / "b.npz").write_bytes(buffer.getvalue())
    refusal(tmp_path / "b.npz", "misses y_train")


# Files that load, and are most likely not what is meant -----------------------------------------------------------------


def images(n, *shape, top=256):
    return np.random.default_rng(0).integers(0, top, (n, *shape), np.uint8)


def cycle(n, classes, start=0):
    return np.arange(n) % classes + start


DIVIDED = {m: arrays()[m].astype(np.float32) / 255**2 for m in ("x_train", "x_test")}
FIRST = {"x_train": images(12, 3, 32, 32), "x_test": images(5, 3, 32, 32)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"x_train": images(40, 6, 5, 3), "y_train": cycle(40, 10, 1), "y_test": cycle(5, 10, 1)},
            "no label is 0, so class 0 of 11 is empty: subtract 1 from labels that count from 1, or set num_classes=11",
        ),
        (
            {"y_train": cycle(12, 4) * 2},
            "classes 1, 3, 5 of 7 have no training image: renumber the labels without gaps",
        ),
        (
            {"y_train": cycle(12, 3), "num_classes": np.array(4)},
            "class 3 of 4 has test images but no training image: add some",
        ),
        (DIVIDED, "where 1 is white: they were divided by 255 twice: multiply them by 255"),
        (
            {"x_train": images(12, 6, 5, 3, top=17)},
            "the largest pixel of x_train is 16, where 255 is white: scale them to the whole range",
        ),
        (
            FIRST,
            "images of 3x32x32 are read as height x width x channels: if channels come first, store x.transpose(0, 2",
        ),
        ({"y_train": np.full(12, 3)}, "every label of y_train is 3: store training images of all classes"),
        (
            {"x_test": images(10, 6, 5, 3), "y_test": cycle(10, 1, 2)},
            "every label of y_test is 2: store test images of",
        ),
    ],
)
def test_what_is_surely_wrong_is_one_warning(changes, said, tmp_path, capsys):
    path = save(tmp_path / "mine.npz", **changes)
    load(str(path))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"warning: {path}: ")
    assert said in err
    assert err.count("\n") == 1
    load(str(path))
    assert capsys.readouterr().err == "", "once a process"


def test_all_that_is_doubtful_is_said_in_one_line(tmp_path, capsys):
    load(str(save(tmp_path / "mine.npz", **FIRST, y_train=cycle(12, 4) * 2)))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "height x width x channels" in err
    assert "; classes 1, 3, 5 of 7" in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_train": images(12, 6, 5, 3, top=2)}, ["x_train is uint8 and holds 0 and 1 alone", "store 255 * x_train"]),
        ({"x_test": images(5, 6, 5, 3, top=2)}, ["x_test is uint8 and holds 0 and 1 alone"]),
        ({"y_train": cycle(12, 4, 1), "num_classes": np.array(4)}, ["is 4; labels must", "count from 1, subtract 1"]),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, words, tmp_path):
    refusal(save(tmp_path / "mine.npz", **changes), *words)


@pytest.mark.parametrize(
    "changes",
    [
        {"y_test": np.zeros(5, int)},  # few test images may be of one class
        {"x_train": 255 * images(12, 6, 5, 3, top=2), "x_test": 255 * images(5, 6, 5, 3, top=2)},  # black and white
        {"x_train": images(12, 6, 5, 3, top=2).astype(np.float32), "x_test": np.ones((5, 6, 5, 3), np.float32)},
        {"y_train": cycle(12, 2) * 3, "y_test": cycle(5, 2) * 3, "num_classes": np.array(9)},  # a part of nine classes
        {
            "x_train": images(4, 6, 5, 3),
            "y_train": np.array([0, 9, 3, 3]),
            "num_classes": np.array(10),
        },  # too few for all
        {
            "x_train": np.zeros((1, 6, 5, 3), np.uint8),
            "y_train": np.array([3]),
            "num_classes": np.array(4),
        },  # to attack
        {"x_train": images(12, 1, 9, 5), "x_test": images(5, 1, 9, 5)},  # sequences of five channels
    ],
)
def test_what_may_be_meant_loads_without_a_word(changes, tmp_path, capsys):
    load(str(save(tmp_path / "mine.npz", **changes)))
    assert capsys.readouterr().err == ""


def test_the_digits_raise_no_doubt():
    from e2sad_jax.data.dataset import doubts

    assert doubts(load("digits"), stated=False) == []
