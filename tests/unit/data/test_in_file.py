"""Images that stay in their file: the same bytes, splits and steps, and memory that does not grow with them."""

import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from e2sad_jax import data
from e2sad_jax.data import in_file, npz
from e2sad_jax.data.npz import read_members
from e2sad_jax.errors import DataError
from tests.helpers import fit, tiny_config
from tests.unit.training.test_stream import CASES, bits


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    images = {f"x_{part}": rng.integers(0, 256, (n, 16, 16, 3), np.uint8) for part, n in (("train", 90), ("test", 20))}
    return images | {f"y_{part}": rng.integers(0, 10, n) for part, n in (("train", 90), ("test", 20))}


@pytest.fixture
def mapped(arrays, tmp_path, monkeypatch):
    """The data set of `arrays` whose training images are mapped, and the file."""
    monkeypatch.setattr(in_file, "LARGE", 50_000)
    path = tmp_path / "large.npz"
    np.savez(path, **arrays, num_classes=10)
    return data.load(str(path)), path


def test_a_large_array_of_a_file_is_mapped_and_holds_the_same(mapped, arrays, monkeypatch):
    dataset, path = mapped
    assert in_file.is_in_file(dataset.x_train)
    assert not any(in_file.is_in_file(array) for array in (dataset.x_test, dataset.y_train))
    monkeypatch.setattr(in_file, "LARGE", 2**31)
    read = data.load(str(path))
    assert not in_file.is_in_file(read.x_train)
    assert (dataset.x_train == read.x_train).all()
    assert dataset.sha256 == read.sha256
    with pytest.raises(ValueError, match="read-only"):
        dataset.x_train[0] = 0


def test_a_file_that_write_npz_wrote_is_mapped_after_its_checksums(mapped, tmp_path):
    copy = tmp_path / "copy.npz"
    data.write_npz(mapped[0], copy)
    again = data.load(str(copy))
    assert (again.name, again.sha256, in_file.is_in_file(again.x_train)) == ("large", mapped[0].sha256, True)


@pytest.mark.parametrize("damage", ["a byte", "the end"])
def test_a_damaged_file_is_refused(damage, mapped, arrays):
    path = mapped[1]
    content = bytearray(path.read_bytes())
    place = content.index(arrays["x_train"][40].tobytes())
    content = content[: place + 1] if damage == "the end" else content
    content[place] ^= 1
    path.with_suffix(".tmp").write_bytes(content)
    os.replace(path.with_suffix(".tmp"), path)  # a file that is mapped is not written over
    with pytest.raises(DataError, match=r"damaged|truncated"):
        data.load(str(path))


@pytest.mark.parametrize("kind", ["compressed", "columns first", "float64"])
def test_what_cannot_be_mapped_is_read(kind, arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(in_file, "LARGE", 50_000)
    x = arrays["x_train"]
    changed = {"columns first": np.asfortranarray(x), "float64": x / 255.0}.get(kind, x)
    tests = arrays["x_test"] / 255.0 if kind == "float64" else arrays["x_test"]
    save = np.savez_compressed if kind == "compressed" else np.savez
    save(tmp_path / "other.npz", **arrays | {"x_train": changed, "x_test": tests}, num_classes=10)
    dataset = data.load(str(tmp_path / "other.npz"))
    assert not in_file.is_in_file(dataset.x_train)
    assert (dataset.x_train == changed.astype(dataset.x_train.dtype)).all()


def test_an_array_of_objects_is_refused_before_it_is_mapped(tmp_path, monkeypatch):
    """Its bytes would be taken for addresses."""
    monkeypatch.setattr(in_file, "LARGE", 1000)
    with zipfile.ZipFile(tmp_path / "hostile.npz", "w") as archive, archive.open("x_train.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|O", "fortran_order": False, "shape": (200,)})
        member.write(b"A" * 1600)
    with pytest.raises(DataError, match=r"pickled \(object\) array"):
        read_members(tmp_path / "hostile.npz", ["x_train"])


def test_a_file_that_is_replaced_while_it_is_read_stays_the_one_that_was_checked(mapped, arrays, tmp_path, monkeypatch):
    other = arrays | {"x_train": 255 - arrays["x_train"]}
    np.savez(tmp_path / "other.npz", **other, num_classes=10)
    start = npz._start
    monkeypatch.setattr(npz, "_start", lambda *a: os.replace(tmp_path / "other.npz", mapped[1]) or start(*a))
    assert (data.load(str(mapped[1])).x_train == arrays["x_train"]).all()
    monkeypatch.undo()
    assert (data.load(str(mapped[1])).x_train == other["x_train"]).all()


def test_a_pickled_part_is_the_part_alone(mapped):
    part = data.hold_out(mapped[0], 85)[0]
    content = pickle.dumps(part)
    assert len(content) < 2 * part.x_train.nbytes + mapped[0].x_test.nbytes + 10_000
    assert (pickle.loads(content).x_train == part.x_train[:]).all()


def test_parts_of_it_are_read_when_they_are_asked_for(mapped, arrays):
    dataset, x = mapped[0], arrays["x_train"]
    train, validation = data.hold_out(dataset, 25)
    assert isinstance(train.x_train, in_file.Rows)
    order = np.random.default_rng(0).permutation(90)
    assert (validation.x_test == x[order[:25]]).all()
    rows, left = train.x_train, x[order[25:]]
    assert (rows.shape, rows.dtype, rows.nbytes, len(rows)) == (left.shape, left.dtype, left.nbytes, 65)
    places = np.array([[3, 1], [64, 3]])
    assert (rows[places] == left[places]).all()
    assert rows[places].shape == (2, 2, 16, 16, 3)
    assert (rows[2:9] == left[2:9]).all()
    mask = np.arange(65) % 4 == 0
    part = data.subset(train, train=mask)
    assert isinstance(part.x_train, in_file.Rows)
    assert (np.asarray(part.x_train) == left[mask]).all()
    assert np.asarray(rows, np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(rows, copy=False)
    assert (data.subset(dataset, train=slice(3, 7)).x_train == x[3:7]).all()


@pytest.mark.parametrize("case", ["robust2", "augmented"])
@pytest.mark.usefixtures("little", "standard_promotion")
def test_the_steps_are_those_of_images_on_the_device_to_the_bit(case, mapped, monkeypatch):
    config = tiny_config(**CASES[case], steps=8, checkpoint_every=5, batch_size=24, validation_examples=10)
    ends = []
    for large in (50_000, 2**31):
        monkeypatch.setattr(in_file, "LARGE", large)
        train, _ = data.hold_out(data.load(str(mapped[1])), 10)
        assert isinstance(train.x_train, in_file.Rows) == (large == 50_000)
        ends.append(fit(config, train, steps_per_dispatch=3))
    assert bits(ends[0]) == bits(ends[1])
    train, _ = data.hold_out(mapped[0], 10)
    assert bits(fit(config.replace(resident="device"), train)) == bits(ends[0])


def test_an_array_to_be_filled_takes_a_file_where_there_is_space(tmp_path, monkeypatch):
    monkeypatch.setattr(in_file, "LARGE", 100)
    folder = tmp_path / "decoded" / "tfds"
    array = in_file.empty((10, 10), np.uint8, folder)
    assert in_file.is_in_file(array)
    assert not list(folder.iterdir()), "the file has no name"
    array[:] = 7
    assert (array == 7).all()
    assert not in_file.is_in_file(in_file.empty((9, 11), np.uint8, folder))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert not in_file.is_in_file(in_file.empty((10, 10), np.uint8, folder))
    (tmp_path / "file").write_text("")
    assert not in_file.is_in_file(in_file.empty((10, 10), np.uint8, tmp_path / "file" / "folder"))


MEASURED = """
import pathlib, sys
import jax
import numpy as np
from e2sad_jax import data
from e2sad_jax.data import in_file
from e2sad_jax.training.stream import Stream
from tests.helpers import tiny_config

def anonymous():  # bytes that are no pages of files
    status = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))

in_file.LARGE = int(sys.argv[2])
jax.block_until_ready(jax.device_put(np.ones((4, 100, 32, 32, 3), np.uint8)).sum(dtype="uint32"))
before = anonymous()
train, _ = data.hold_out(data.load(sys.argv[1]), 100)
config = tiny_config(defense="natural", batch_size=100)
order, most = np.random.default_rng(0).permutation(len(train.x_train)), 0
with Stream(config, train.x_train, 4, None) as stream:
    for step in range(0, len(order) // 100 - 4, 4):
        stream.ask(step, 4, order)
        most = max(most, anonymous() - before)
        assert int(stream.take()[0].sum(dtype="uint32")) > 0
print(train.x_train.nbytes, most)
"""


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/status").exists(), reason="only Linux tells in /proc what memory is anonymous"
)
def test_memory_does_not_grow_with_the_images(tmp_path):
    """Over loading, splitting and an epoch, of 200 MB; what the process itself takes is a quarter of that."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64_000, 32, 32, 3), np.uint8)
    np.savez(
        tmp_path / "a.npz", x_train=images, y_train=rng.integers(0, 10, 64_000), x_test=images[:9], y_test=np.arange(9)
    )

    def measured(large):
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "a.npz"), str(large)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return map(int, done.stdout.split())

    size, most = measured(2**25)
    assert size > 1.9e8
    assert most < size / 2, most
    _, most = measured(2**31)
    assert most > size, "the measure sees images in memory"
