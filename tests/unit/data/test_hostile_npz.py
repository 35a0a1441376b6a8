"""Data sets that somebody else made: sizes are looked at before anything is read."""

import io
import os
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from e2sad_jax.data import load_npz, npz
from e2sad_jax.errors import DataError


def npy(array):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array))
    return stream.getvalue()


def members(**changes):
    x, y = np.zeros((12, 6, 5), np.uint8), np.arange(12) % 3
    return {key: npy(value) for key, value in {"x_train": x, "y_train": y, "x_test": x, "y_test": y}.items()} | changes


def zipped(path, method=zipfile.ZIP_DEFLATED, **changes):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members(**changes).items():
            archive.writestr(f"{name}.npy", content)
    return path


def header(text, data=b"", version=b"\x01\x00"):
    text = f"{text:<117}\n".encode("latin1")  # spaces before the newline, as NumPy writes it
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def test_a_member_that_would_inflate_beyond_its_bound_is_refused_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "INFLATED", 2**20)
    path = zipped(tmp_path / "a.npz", x_train=npy(np.zeros((4, 1024, 1024), np.uint8)))
    assert path.stat().st_size < 10_000
    tracemalloc.start()
    with pytest.raises(
        DataError, match=r"member x_train would become 4,194,432 bytes out of 4,\d\d\d in .*at most 1,048,576"
    ):
        load_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert load_npz(zipped(tmp_path / "b.npz", x_train=npy(np.zeros((12, 6, 5), np.uint8)))).image_shape == (6, 5, 1)


def test_incompressible_members_of_any_size_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "INFLATED", 2**10)
    noise = np.random.RandomState(0).randint(0, 256, (12, 60, 50)).astype(np.uint8)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert len(load_npz(zipped(tmp_path / "a.npz", method, x_train=npy(noise), x_test=npy(noise))).x_train) == 12


@pytest.mark.parametrize("signature", [b"PK\x03\x04", b"PK\x01\x02"])
@pytest.mark.parametrize("size", [2**31 - 1, 2**32 - 2])
def test_sizes_that_lie_are_refused(tmp_path, signature, size):
    content = bytearray(zipped(tmp_path / "a.npz", zipfile.ZIP_STORED).read_bytes())
    start = 0
    while (start := content.find(signature, start)) >= 0:
        for offset in (18, 22) if signature[2] == 3 else (20, 24):
            content[start + offset : start + offset + 4] = size.to_bytes(4, "little")
        start += 4
    (tmp_path / "a.npz").write_bytes(content)
    tracemalloc.start()
    if signature[2] == 1:  # the directory is what counts
        with pytest.raises(DataError, match=r"member x_train would become|not an npz"):
            load_npz(tmp_path / "a.npz")
    else:
        assert len(load_npz(tmp_path / "a.npz").x_train) == 12
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000, 1, 1)}", b"123"), "announces uint8 "),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (1, 2, 2)}", b"123"), "32 bytes, but 3 follow"),
        (header("{'descr': '|V2000000000', 'fortran_order': False, 'shape': (9, 9, 9)}"), "but 0 follow"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1)}", b"1", b"\x03\x00"), "version"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1)}", pickle.dumps([1])), "pickled"),
        (header("__import__('os').abort()"), "cannot be read"),
    ],
)
def test_headers_are_held_against_what_follows(tmp_path, body, words):
    with pytest.raises(DataError, match="member x_train") as caught:
        load_npz(zipped(tmp_path / "a.npz", x_train=body))
    assert words in str(caught.value)


def test_a_header_of_python_2_is_read_without_a_word(tmp_path):
    body = header("{'descr': '|u1', 'fortran_order': False, 'shape': (12L, 6L, 5L), }", bytes(360))
    assert load_npz(zipped(tmp_path / "a.npz", x_train=body)).x_train.shape == (12, 6, 5, 1)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_whose_memory_nothing_bounds_is_refused(tmp_path, method):
    with pytest.raises(DataError, match=f"compressed by method {method}"):
        load_npz(zipped(tmp_path / "a.npz", method))


def test_members_given_twice_small_ones_that_are_large_and_names_that_are_paths(tmp_path):
    path = zipped(tmp_path / "a.npz")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("x_train.npy", npy(np.ones((12, 6, 5), np.uint8)))
    with pytest.raises(DataError, match="x_train is there 2 times"):
        load_npz(path)
    with pytest.raises(DataError, match="member metadata would become 2,000,1"):
        load_npz(zipped(path, zipfile.ZIP_STORED, metadata=npy(np.zeros(2_000_000, np.uint8))))
    before = set(tmp_path.parent.iterdir())
    assert load_npz(zipped(path, **{"../out": npy(3), "/out": npy(3)})).name == "a"
    assert set(tmp_path.parent.iterdir()) == before
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("\x1b[2J.npy", b"")
    with pytest.raises(DataError) as caught:
        load_npz(path)
    assert str(caught.value).isprintable()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(DataError, match="pipe"):
        load_npz(tmp_path / "a.npz")
