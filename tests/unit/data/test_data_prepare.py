"""Data sets known by name through tensorflow-datasets, without network: miniature originals in the layout of the real ones.

They are placed by hand or served from the loopback, with the registered checksums and counts replaced.
"""

import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import struct
import sys
import tarfile
import threading

import numpy as np
import pytest
import scipy.io

from e2sad_jax import data
from e2sad_jax.data import KNOWN, Known, builders, tfds
from e2sad_jax.data.__main__ import main
from e2sad_jax.errors import DataError

MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")
FILES = {
    "mnist": MNIST_FILES,
    "svhn": SVHN_FILES,
    "svhn_extra": (*SVHN_FILES, "extra_32x32.mat"),
    "cifar10": ("cifar-10-binary.tar.gz",),
    "cifar100": ("cifar-100-binary.tar.gz",),
}


pytestmark = pytest.mark.usefixtures("offline")


def files_of(folder):
    # os.walk passes over a folder that a thread of the library, still downloading, takes away.
    return sorted(os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names)


class Mini:
    """A data set of a known name with a few images: original files in a folder, registered under some base URL."""

    def __init__(self, name, origin, monkeypatch, base="http://data.invalid/"):
        rng = np.random.default_rng(1)
        self.name, self.origin, self.monkeypatch = name, origin, monkeypatch
        self.builder, self.files, classes = builders.BUILDERS[name], FILES[name], KNOWN[name].num_classes
        shape = KNOWN[name].image_shape
        origin.mkdir()
        self.images, self.labels = {}, {}
        for split, count in (("train", 13), ("test", 7), *[("extra", 5)] * (name == "svhn_extra")):
            self.images[split] = rng.integers(0, 256, (count, *shape), np.uint8)
            self.labels[split] = rng.permutation(count) * 7 % classes
        write = {"mnist": self.write_mnist, "cifar10": self.write_cifar10, "cifar100": self.write_cifar100}
        write.get(name, self.write_svhn)()
        for kept in (self.images, self.labels):
            kept["train"] = np.concatenate([kept["train"], kept.pop("extra", kept["train"][:0])])
        self.sha256 = {file: hashlib.sha256((origin / file).read_bytes()).hexdigest() for file in self.files}
        self.register(base)
        monkeypatch.setitem(KNOWN, name, Known(len(self.images["train"]), 7, shape, classes))

    def write_mnist(self):
        for split, (images, labels) in {"train": MNIST_FILES[:2], "test": MNIST_FILES[2:]}.items():
            count = len(self.labels[split])
            header = struct.pack(">4i", 2051, count, 28, 28)
            (self.origin / images).write_bytes(gzip.compress(header + self.images[split].tobytes()))
            header = struct.pack(">2i", 2049, count)
            (self.origin / labels).write_bytes(gzip.compress(header + self.labels[split].astype(np.uint8).tobytes()))

    def write_svhn(self):
        for split, images in self.images.items():
            labels = np.where(self.labels[split] == 0, 10, self.labels[split]).astype(np.uint8)[:, None]
            scipy.io.savemat(self.origin / f"{split}_32x32.mat", {"X": np.moveaxis(images, 0, -1), "y": labels})

    def write_cifar10(self):
        """Rows of a label and 3 x 1024 pixels, the training images in five files."""
        files = {f"data_batch_{i + 1}.bin": ("train", i, 5) for i in range(5)} | {"test_batch.bin": ("test", 0, 1)}
        names = {"batches.meta.txt": "\n".join(f"kind{k}" for k in range(10)).encode() + b"\n\n"}
        self.write_cifar("cifar-10-batches-bin", files, lambda label: bytes([label]), names)

    def write_cifar100(self):
        """The same with two labels, the coarse one first."""
        names = {
            f"{kind}_label_names.txt": "".join(f"{kind}_{k}\n" for k in range(count)).encode()
            for kind, count in (("coarse", 20), ("fine", 100))
        }
        files = {"train.bin": ("train", 0, 1), "test.bin": ("test", 0, 1)}
        self.write_cifar("cifar-100-binary", files, lambda label: bytes([(label + 3) % 20, label]), names)

    def write_cifar(self, folder, files, labels_of, names):
        contents = {**names, "readme.html": b"<html>"}
        for file, (split, part, parts) in files.items():
            rows = zip(self.images[split], self.labels[split], strict=True)
            encoded = [labels_of(label) + image.transpose(2, 0, 1).tobytes() for image, label in rows]
            contents[file] = b"".join(encoded[i] for i in np.array_split(np.arange(len(encoded)), parts)[part])
        with tarfile.open(self.origin / self.files[0], "w:gz") as archive:
            for file, content in contents.items():
                info = tarfile.TarInfo(f"{folder}/{file}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))

    def register(self, base):
        from tensorflow_datasets.core.download import checksums

        infos = {base + file: checksums.compute_url_info(self.origin / file) for file in self.files}
        assert len(infos) == len(self.builder.url_infos)
        self.monkeypatch.setattr(self.builder, "url_infos", infos)

    def place(self, root):
        manual = root / "downloads" / "manual"
        manual.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            shutil.copy(self.origin / file, manual / file)
        return manual

    def check(self, dataset):
        """All images with their labels are there, in whatever order the records have."""
        assert (dataset.name, dataset.num_classes) == (self.name, 100 if self.name == "cifar100" else 10)
        assert dataset.version == str(self.builder.VERSION)
        assert dict(dataset.source_sha256) == self.sha256
        for split in ("train", "test"):
            x, y = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
            assert (x.dtype, y.dtype) == (np.uint8, np.int32)
            got = sorted((image.tobytes(), int(label)) for image, label in zip(x, y, strict=True))
            expected = zip(self.images[split], self.labels[split], strict=True)
            assert got == sorted((image.tobytes(), int(label)) for image, label in expected)


@pytest.fixture(params=["mnist", "svhn"])
def mini(request, tmp_path, monkeypatch):
    return Mini(request.param, tmp_path / "origin", monkeypatch)


@pytest.fixture
def mini_mnist(tmp_path, monkeypatch):
    return Mini("mnist", tmp_path / "origin", monkeypatch)


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/origin; `server.broken` files end in the middle, `server.asked` lists the requests."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "origin")

        def do_GET(self):
            asked.append(self.path.strip("/"))
            if asked[-1] not in broken:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"only this")
            return None

        def log_message(self, *args):
            pass

    asked, broken = [], set()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked, running.broken, running.base = asked, broken, f"http://127.0.0.1:{running.server_port}/"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def error_of(name, root, *words):
    with pytest.raises(DataError) as caught:
        data.load(name, root)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message
    return message


def assert_nothing_prepared(root):
    kept = [name for name in files_of(root) if not name.startswith("downloads/") and not name.endswith(".lock")]
    assert kept == []


@pytest.mark.parametrize("name", FILES)
def test_from_manual_files(name, tmp_path, monkeypatch, offline, caplog, capsys):
    mini, root = Mini(name, tmp_path / "origin", monkeypatch), tmp_path / "root"
    mini.place(root)
    mini.check(data.load(mini.name, root))
    assert "Decoding" not in capsys.readouterr().err, "a bar in a log"
    assert offline == []  # no network was asked for anything
    assert (root / "decoded" / f"{mini.name}.npz").is_file()
    monkeypatch.setattr(tfds, "prepare", None)
    mini.check(data.load(mini.name, root))
    assert not caplog.records or "rebuilt" not in caplog.text
    assert "tensorflow" not in sys.modules


def test_svhn_leaves_the_extra_split_out(tmp_path, monkeypatch):
    known = {info.filename: info.checksum for info in builders.SvhnBuilder.url_infos.values()}
    assert sorted(known) == sorted(SVHN_FILES)
    source = (builders.SvhnBuilder.pkg_dir_path / "checksums.tsv").read_text()
    assert all(checksum in source for checksum in known.values())
    assert "extra_32x32.mat" in source
    mini = Mini("svhn", tmp_path / "origin", monkeypatch)
    mini.place(tmp_path / "root")
    dataset = data.load("svhn", tmp_path / "root")
    assert set(np.unique(dataset.y_train)) == set(range(10))  # 10 in the file is digit 0
    info = json.loads((tmp_path / "root" / "array_record" / "svhn_cropped" / "3.1.0" / "dataset_info.json").read_text())
    assert sorted(split["name"] for split in info["splits"]) == ["test", "train"]


def test_svhn_and_svhn_extra_lie_beside_each_other(tmp_path, monkeypatch, server):
    """The files that both have are downloaded once, and the records of neither are taken for the other's."""
    root, counts = tmp_path / "root", {}
    for name, count in (("svhn_extra", 18), ("svhn", 13), ("svhn_extra", 18)):
        if not counts:
            extra = Mini("svhn_extra", tmp_path / "origin", monkeypatch, server.base)
            known = {file: extra.sha256[file] for file in SVHN_FILES}
            infos = {url: info for url, info in extra.builder.url_infos.items() if info.filename in known}
            monkeypatch.setattr(builders.SvhnBuilder, "url_infos", infos)
            monkeypatch.setitem(KNOWN, "svhn", Known(13, 7, (32, 32, 3)))
        counts[name] = len(data.load(name, root).x_train)
        assert counts[name] == count
        shutil.rmtree(root / "decoded")
    assert sorted(server.asked) == sorted(
        [*FILES["svhn_extra"], FILES["svhn_extra"][0]]
    )  # the probe asks for the first


def test_cifar100_has_the_fine_labels(tmp_path, monkeypatch):
    Mini("cifar100", tmp_path / "origin", monkeypatch).place(tmp_path / "root")
    assert data.load("cifar100", tmp_path / "root").y_train.max() == 84  # 12 * 7; coarse ones end at 19
    (records,) = (tmp_path / "root" / "array_record" / "cifar100").glob("3.*")
    assert (records / "label.labels.txt").read_text().split() == [f"fine_{k}" for k in range(100)]


def test_the_library_s_name_of_a_known_set_is_prepared_alike(tmp_path, monkeypatch):
    root = tmp_path / "root"
    mini = Mini("cifar10", tmp_path / "origin", monkeypatch)
    mini.place(root)
    dataset = data.load("tfds:cifar10", root)
    assert (dataset.name, dataset.version) == ("cifar10", str(mini.builder.VERSION))
    assert dataset.sha256 == data.load("cifar10", root).sha256
    mini.check(data.load("cifar10", root))


def test_svhn_with_a_label_out_of_range(tmp_path, monkeypatch):
    mini = Mini("svhn", tmp_path / "origin", monkeypatch)
    scipy.io.savemat(
        mini.origin / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 7), np.uint8), "y": np.arange(7)[:, None]}
    )
    mini.register("http://data.invalid/")
    mini.place(tmp_path / "root")
    error_of("svhn", tmp_path / "root", "test_32x32.mat", "labels from 0 to 6")
    assert_nothing_prepared(tmp_path / "root")


def test_download(mini, tmp_path, server, caplog):
    mini.register(server.base)
    root = tmp_path / "root"
    mini.check(data.load(mini.name, root))
    assert set(server.asked) == set(mini.files)
    # What was downloaded is kept, and used when the rest is removed.
    del server.asked[:]
    shutil.rmtree(root / "array_record")
    shutil.rmtree(root / "decoded")
    mini.check(data.load(mini.name, root))
    assert server.asked == []


def test_manual_files_come_first_and_only_the_rest_is_downloaded(mini_mnist, tmp_path, server):
    mini_mnist.register(server.base)
    manual = mini_mnist.place(tmp_path / "root")
    (manual / MNIST_FILES[3]).unlink()
    mini_mnist.check(data.load("mnist", tmp_path / "root"))
    assert set(server.asked) == {MNIST_FILES[3]}


@pytest.mark.parametrize("name", FILES)
def test_offline(name, tmp_path, offline):
    root = tmp_path / "nothing" / "here"
    error_of(name, root, f"{name}: not in {root}", "cannot be fetched", "Name or service not known", *FILES[name])
    error_of(name, root, root / "downloads" / "manual", "--data=digits", "--data=PATH.npz", "can be reached")
    assert len(offline) == 2  # one attempt for each of the two loads: no retries
    assert not root.parent.exists()  # and nothing was made


def test_offline_names_only_the_files_that_are_missing(mini_mnist, tmp_path):
    manual = mini_mnist.place(tmp_path / "root")
    (manual / MNIST_FILES[0]).unlink()
    message = error_of("mnist", tmp_path / "root", MNIST_FILES[0])
    assert MNIST_FILES[1] not in message


def test_offline_where_packets_vanish(mini_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds, "PROBE_SECONDS", 0.2)
    assert tfds.PROBE_SECONDS < 10
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        mini_mnist.register(f"http://127.0.0.1:{silent.getsockname()[1]}/")
        error_of("mnist", tmp_path / "root", "cannot be fetched", "--data=digits")
    # Nor does a name server that never answers, which no timeout of requests bounds, hold it up.
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(30))
    mini_mnist.register("http://data.invalid/")
    error_of("mnist", tmp_path / "root", "no answer within 0.2 s")
    release.set()


def test_the_probe_is_short():
    assert tfds.PROBE_SECONDS <= 7


def test_server_without_the_file(mini_mnist, tmp_path, server):
    mini_mnist.register(server.base + "elsewhere/")
    error_of("mnist", tmp_path / "root", "404", MNIST_FILES[0], "--data=digits")
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_manual_file(mini, tmp_path, damage):
    root = tmp_path / "root"
    file = mini.place(root) / mini.files[0]
    content = file.read_bytes()
    file.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    error_of(mini.name, root, file, f"expected {mini.sha256[file.name]}", f"found {found}")
    assert_nothing_prepared(root)
    file.write_bytes(content)
    mini.check(data.load(mini.name, root))


def test_damaged_download(mini_mnist, tmp_path, server):
    root, file = tmp_path / "root", mini_mnist.origin / MNIST_FILES[2]
    mini_mnist.register(server.base)
    content = file.read_bytes()
    file.write_bytes(b"<html>log in first</html>")
    error_of("mnist", root, server.base + file.name, "has wrong checksum", root / "downloads" / "manual")
    assert_nothing_prepared(root)
    file.write_bytes(content)
    mini_mnist.check(data.load("mnist", root))


def test_download_that_breaks_off(mini_mnist, tmp_path, server):
    root = tmp_path / "root"
    mini_mnist.register(server.base)
    server.broken.add(MNIST_FILES[1])
    error_of("mnist", root, "cannot be prepared", root, MNIST_FILES[1], "--data=digits")
    assert_nothing_prepared(root)
    server.broken.clear()
    mini_mnist.check(data.load("mnist", root))


def test_download_altered_later(mini_mnist, tmp_path, server):
    root = tmp_path / "root"
    mini_mnist.register(server.base)
    data.load("mnist", root)
    shutil.rmtree(root / "array_record")
    shutil.rmtree(root / "decoded")
    (cached,) = [path for path in (root / "downloads").rglob("*t10k-lab*") if path.suffix == ".gz"]
    content = cached.read_bytes()
    cached.write_bytes(content[:-3])
    message = error_of("mnist", root, cached, f"expected {mini_mnist.sha256[MNIST_FILES[3]]}", "delete it")
    assert f"found {hashlib.sha256(content[:-3]).hexdigest()}" in message
    assert_nothing_prepared(root)
    cached.unlink()
    mini_mnist.check(data.load("mnist", root))


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_interrupted_preparation(mini, tmp_path, monkeypatch, error):
    root, count = tmp_path / "root", [0]
    mini.place(root)
    original = builders._pil

    def pil(image):
        count[0] += 1
        if count[0] == 15:  # in the second split
            raise error
        return original(image)

    with monkeypatch.context() as patch:
        patch.setattr(builders, "_pil", pil)
        with pytest.raises(DataError if isinstance(error, RuntimeError) else KeyboardInterrupt):
            data.load(mini.name, root)
    assert_nothing_prepared(root)
    mini.check(data.load(mini.name, root))


def test_what_others_and_killed_processes_left_is_not_taken_for_the_data_set(mini_mnist, tmp_path):
    root = tmp_path / "root"
    mini_mnist.place(root)
    left = {
        # What tensorflow-datasets itself leaves in this folder for somebody who uses TensorFlow.
        "mnist/3.0.1/dataset_info.json": '{"name": "mnist", "version": "3.0.1", "fileFormat": "tfrecord"}',
        "mnist/3.0.1/mnist-test.tfrecord-00000-of-00001": "not ours",
        # What is left of a process that was killed: in the download, in the records, in the decoded copy.
        "downloads/mnist/t10k-labels.tmp.0123/t10k-labels-idx1-ubyte.gz": "half",
        "array_record/mnist/incomplete.AI9CRU_3.0.1/mnist-train.array_record-00000-of-00001": "half",
        "decoded/.mnist.npz.0123456789ab.tmp": "half",
    }
    for name, content in left.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    mini_mnist.check(data.load("mnist", root))
    mini_mnist.check(data.load("mnist", root))
    info = json.loads((root / "array_record" / "mnist" / "3.0.1" / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    for name, content in left.items():
        if name.startswith("mnist/"):
            assert (root / name).read_text() == content


@pytest.mark.parametrize("damage", ["truncated", "flipped", "altered", "other", "missing"])
def test_unusable_decoded_copy_is_rebuilt(mini_mnist, tmp_path, caplog, monkeypatch, damage):
    root = tmp_path / "root"
    mini_mnist.place(root)
    data.load("mnist", root)
    copy = root / "decoded" / "mnist.npz"
    content = copy.read_bytes()
    if damage == "truncated":
        copy.write_bytes(content[:3000])
    elif damage == "flipped":
        copy.write_bytes(content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])
    elif damage == "altered":  # a sound zip file with other pixels
        with np.load(copy) as members:
            np.savez(copy, **{**members, "x_train": members["x_train"] ^ 1})
    elif damage == "other":
        data.write_npz(data.load("digits"), copy)
    else:
        copy.unlink()
    shutil.rmtree(root / "downloads")  # the records suffice
    caplog.clear()
    mini_mnist.check(data.load("mnist", root))
    assert ("rebuilt" in caplog.text) == (damage != "missing")
    assert copy.read_bytes() == content
    monkeypatch.setattr(tfds, "prepare", None)
    mini_mnist.check(data.load("mnist", root))


@pytest.mark.parametrize("damage", ["truncated", "gone", "no info", "bad info", "empty folder"])
def test_damaged_records(mini_mnist, tmp_path, damage):
    root = tmp_path / "root"
    mini_mnist.place(root)
    data.load("mnist", root)
    shutil.rmtree(root / "decoded")
    folder = root / "array_record" / "mnist" / "3.0.1"
    (shard,) = folder.glob("*train*")
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "gone":
        shard.unlink()
    elif damage == "no info":
        (folder / "dataset_info.json").unlink()
    elif damage == "bad info":
        (folder / "dataset_info.json").write_text("{")
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    error_of("mnist", root, root / "array_record" / "mnist", "cannot be read", "delete that folder")
    assert not (root / "decoded").exists()
    shutil.rmtree(root / "array_record")
    mini_mnist.check(data.load("mnist", root))


def test_wrong_number_of_examples(mini_mnist, tmp_path, monkeypatch):
    mini_mnist.place(tmp_path / "root")
    monkeypatch.setitem(KNOWN, "mnist", Known(14, 7, (28, 28, 1)))
    error_of("mnist", tmp_path / "root", "(13, 7) train and test examples instead of (14, 7)")
    assert not (tmp_path / "root" / "decoded").exists()


def test_no_room_for_the_decoded_copy(mini_mnist, tmp_path, caplog):
    root = tmp_path / "root"
    mini_mnist.place(root)
    (root / "decoded").write_text("a file where the folder should be")
    mini_mnist.check(data.load("mnist", root))
    assert "no decoded copy" in caplog.text


def test_data_dir_is_a_file(mini_mnist, tmp_path, server):
    mini_mnist.register(server.base)
    (tmp_path / "root").write_text("")
    error_of("mnist", tmp_path / "root", tmp_path / "root", "cannot be prepared")


def test_two_processes_prepare_it_once(mini_mnist, tmp_path, monkeypatch):
    root, waiting, results, prepared = tmp_path / "root", threading.Event(), [], []
    mini_mnist.place(root)
    prepare = tfds._prepare
    monkeypatch.setattr(tfds, "_prepare", lambda *args: (prepared.append(1), prepare(*args)))
    monkeypatch.setattr(tfds.logging, "warning", lambda *_: waiting.set())
    second = threading.Thread(target=lambda: results.append(data.load("mnist", root)))
    with tfds._locked("mnist", root):
        second.start()
        assert waiting.wait(30)  # the second one says that it waits
        tfds._prepare(tfds._builder("mnist", root), root)
    second.join()
    mini_mnist.check(results[0])
    assert prepared == [1]


def test_prepared_and_exported_standard_output_is_one_line(mini_mnist, tmp_path, capsys):
    mini_mnist.place(tmp_path / "root")
    to = tmp_path / "m.npz"
    assert main(["mnist", f"--to={to}", f"--data_dir={tmp_path / 'root'}"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    mini_mnist.check(data.load(str(to)))
