"""Checkpoints that somebody else made: shapes and paths are looked at before anything is read, and nothing runs."""

import dataclasses
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

import e2sad_jax
from e2sad_jax import networks, training
from e2sad_jax.errors import WorkdirError
from e2sad_jax.runs import _stored
from e2sad_jax.runs.checkpoint import Checkpoints
from e2sad_jax.training.config import Config

SHAPE = (8, 8, 1)
CONFIG = Config(data="tiny.npz", model="digits_cnn", steps=4, batch_size=8)
DATASET = {"name": "tiny", "sha256": "0" * 64, "image_shape": list(SHAPE), "num_classes": 3}


def write_config(folder, **changes):
    about = {"format": 1, "config": dataclasses.asdict(CONFIG), "dataset": DATASET | changes}
    (folder / "config.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A run's workdir with one checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder)
    state = training.init_state(CONFIG, networks.create("digits_cnn", 3, SHAPE), SHAPE)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(4, state.replace(step=state.step + 4), {"score": 1.5, "seconds": 2.0})
    return folder


@pytest.fixture
def copy(trained, tmp_path, monkeypatch) -> pathlib.Path:
    """Another such workdir, which Orbax must not come to restore."""
    shutil.copytree(trained, tmp_path / "w")
    monkeypatch.setattr(ocp.CheckpointManager, "restore", lambda *args, **kwargs: pytest.fail("Orbax was asked"))
    return tmp_path / "w"


def store(folder):
    base = {"driver": "file", "path": f"{folder / 'checkpoints/4/default'}/"}
    return ts.KvStore.open({"driver": "ocdbt", "base": base}).result()


def refused(folder, *words):
    with pytest.raises(WorkdirError) as caught:
        e2sad_jax.load(folder)
    message = str(caught.value)
    assert message.isprintable()
    for word in words:
        assert word in message, message


def test_a_good_checkpoint_is_read(trained):
    assert e2sad_jax.load(trained).step == 4


def test_names_are_orbaxs(trained):
    """And so every array of the state is looked at."""
    keys = {key.decode().rpartition("/")[0] for key in store(trained).list().result()}
    state = jax.eval_shape(lambda: training.init_state(CONFIG, networks.create("digits_cnn", 3, SHAPE), SHAPE))
    from e2sad_jax.runs.checkpoint import _storable

    stored = jax.eval_shape(_storable, state)
    assert {_stored._name(path) for path, _ in jax.tree_util.tree_leaves_with_path(stored)} == keys


KERNEL = "params.params.Dense_0.kernel"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [10**6, 10**6], "chunks": [10**6, 10**6]}, "(1000000, 1000000), but float32"),
        ({"dtype": "<f8"}, "is float64"),
        ({"dtype": "<i4"}, "is int32"),
        ({"chunks": [10**5, 10**5]}, "larger than itself"),
        ({"chunks": [1, 1]}, "more than the 4,096"),
        ({"compressor": {"id": "gzip", "level": 1}}, "runs write zstd"),
        ({"compressor": None}, "runs write zstd"),
    ],
)
def test_arrays_of_other_shapes_or_forms_are_refused_before_orbax_reads_any(copy, changes, words):
    kv = store(copy)
    values = json.loads(kv.read(f"{KERNEL}/.zarray").result().value)
    kv.write(f"{KERNEL}/.zarray", json.dumps(values | changes).encode()).result()
    refused(copy, KERNEL, words)


def frame(blocks, content=b""):
    """Of zstd: without window or checksum, of a content that it claims to have."""
    return b"\x28\xb5\x2f\xfd\xa0" + len(content).to_bytes(4, "little") + blocks


def test_a_piece_that_would_inflate_is_refused(copy):
    """What the bomb holds is a block of one byte repeated, as often as it fits."""
    block = (2**17 << 3 | 1 << 1).to_bytes(3, "little") + b"\x00"
    last = (2**17 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\x00"
    kv = store(copy)
    kv.write(f"{KERNEL}/0.0", frame(block * 50_000 + last)).result()
    refused(copy, KERNEL, "may become more than the 655,360 bytes that are read for it in a piece")
    kv.write(f"{KERNEL}/0.0", b"not zstd").result()
    refused(copy, "not compressed by zstd")
    kv.delete_range(ts.KvStore.KeyRange(f"{KERNEL}/0.0", f"{KERNEL}/0.1")).result()
    refused(copy, KERNEL, "not there as a whole")


def test_an_index_that_would_inflate_is_refused_before_tensorstore_reads_it(copy, tmp_path, monkeypatch):
    """Beside all that the network needs: values of zeros within the index itself, 80 MiB of them in a few thousand bytes."""
    base = {"driver": "file", "path": f"{tmp_path / 'bomb'}/"}
    config = {"max_inline_value_bytes": 2**20, "max_decoded_node_bytes": 2**30}
    kv, there = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": config}).result(), store(copy)
    values = {key: there[key] for key in there.list().result()}
    with ts.Transaction() as together:
        writing = kv.with_transaction(together)
        for key, value in {**values, **{f"z{i}": bytes(2**20) for i in range(80)}}.items():
            writing[key] = value
    folder = copy / "checkpoints/4/default"
    for name in ("d", "ocdbt.process_0"):
        shutil.rmtree(folder / name)
    shutil.copytree(tmp_path / "bomb", folder, dirs_exist_ok=True)
    left = store(copy)
    assert left["z7"] == bytes(2**20)
    assert all(left[key] == value for key, value in values.items())
    monkeypatch.setattr(ts.KvStore, "open", lambda *args, **kwargs: pytest.fail("TensorStore was asked"))
    refused(copy, "its index may become more than the 67,108,864 bytes")


KIND = b"\x0c\xdb\x20\xde"


def part(compression, content, kind=KIND):
    """Of an index; nobody looks at its checksum."""
    length = 4 + 8 + 1 + len(compression) + len(content) + 4
    return kind + length.to_bytes(8, "little") + b"\x00" + compression + content + bytes(4)


@pytest.mark.parametrize("kind", [b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde", b"\x0c\xdb\x12\x34"], ids=bytes.hex)
@pytest.mark.parametrize("compression", [b"\x01", b"\x81\x00", b"\x81\x80\x80\x00"], ids=bytes.hex)
@pytest.mark.parametrize("before", [b"", KIND, KIND + b"\xff\xff\xff", bytes(9), part(b"\x00", b"ab")], ids=bytes.hex)
def test_parts_of_an_index_are_found_wherever_they_are(tmp_path, before, compression, kind):
    more, last = (((2**17 << 3 | 1 << 1 | end).to_bytes(3, "little") + b"\x00") for end in (0, 1))
    (tmp_path / "d").write_bytes(before + part(compression, frame(9 * more + last), kind) + b"after")
    assert _stored._index_inflates_to(tmp_path / "d") == 10 * 2**17
    (tmp_path / "d").write_bytes(before + part(compression, frame(9_999 * more), kind))  # which fails, but late
    assert _stored._index_inflates_to(tmp_path / "d") > _stored.FREE
    old = b"\x25\xb5\x2f\xfd"  # of zstd before its format was settled
    (tmp_path / "d").write_bytes(before + part(compression, old + bytes(50), kind))
    with pytest.raises(ValueError, match="not compressed by zstd"):
        _stored._index_inflates_to(tmp_path / "d")


def test_what_only_looks_like_part_of_an_index_is_none(tmp_path):
    for content in (KIND, part(b"\x01", frame(b""))[:-1], part(b"\x02", b""), part(b"\x80\x02", b"")):
        (tmp_path / "d").write_bytes(b"a" + content)
        assert _stored._index_inflates_to(tmp_path / "d") == 0


@pytest.mark.parametrize("kind", ["zeros", "noise", "text", "one"])
@pytest.mark.parametrize("level", [1, 9])
def test_the_bound_of_a_zstd_frame_is_one(tmp_path, kind, level):
    """Of frames that TensorStore writes, from one block to many."""
    rs = np.random.RandomState(0)
    for n in (1, 1000, 200_000, 3_000_000):
        content = {"zeros": np.zeros(n), "noise": rs.rand(n), "text": np.arange(n) // 7 % 50, "one": np.ones(n)}[kind]
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "memory"},
            "metadata": {"compressor": {"id": "zstd", "level": level}},
        }
        array = ts.open(
            spec, create=True, dtype="uint8", shape=[n], chunk_layout=ts.ChunkLayout(chunk_shape=[n])
        ).result()
        data = (255 * content).astype(np.uint8) if kind == "noise" else content.astype(np.uint8)
        data[-1] = 7  # else zeros are not written
        array.write(data).result()
        bound = _stored.inflates_to(array.kvstore.read("0").result().value)
        assert n <= bound <= 4 * n + 2**17


@pytest.mark.parametrize(
    "content", [b"\x28\xb5\x2f\xfd", frame(b"\x07\x00\x00"), frame(b"\x05\xff\xff"), b"\x28\xb5\x2f\xfd\x00"]
)
def test_damaged_frames_are_refused(content):
    with pytest.raises(ValueError, match="zstd"):
        _stored.inflates_to(content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics/metrics", b"{}", "misses the score"),
        ("metrics/metrics", b'{"score": "1"}', "'score' is no number"),
        ("metrics/metrics", b'{"score": NaN}', "NaN"),
        ("metrics/metrics", b"[" * 10_000, "too deeply"),
        ("default/_METADATA", b"{}", "describes no checkpoint"),
        ("default/_METADATA", b"[]", "describes no checkpoint"),
        ("default/_METADATA", b'{"tree_metadata": {}, "use_ocdbt": true}', "misses key, which"),
        ("default/_METADATA", b'{"tree_metadata": {}, "use_ocdbt": false}', "format that runs do not write"),
        ("default/_METADATA", b'{"tree_metadata": {}, "use_ocdbt": null}', "format that runs do not write"),
        ("default/_METADATA", b'{"tree_metadata": {}}', "misses key, which"),
        ("default/_METADATA", b'{"tree_metadata": {"a": 3}, "use_ocdbt": true}', "describes no checkpoint"),
        ("_CHECKPOINT_METADATA", b"\xff", "_CHECKPOINT_METADATA"),
        ("default/manifest.ocdbt", b"", "cannot read the checkpoint"),
    ],
)
def test_damaged_descriptions_are_refused(copy, name, content, words):
    (copy / "checkpoints" / "4" / name).write_bytes(content)
    refused(copy, words)


def test_another_kind_of_value_than_an_array_is_refused(copy):
    path = copy / "checkpoints/4/default/_METADATA"
    values = json.loads(path.read_text())
    entry = next(e for e in values["tree_metadata"].values() if e["value_metadata"]["value_type"] == "jax.Array")
    entry["value_metadata"]["value_type"] = "string"
    path.write_text(json.dumps(values))
    refused(copy, "_METADATA holds", "as no array")


@pytest.mark.parametrize("name", ["default", "default/manifest.ocdbt", "metrics/metrics", ""])
def test_nothing_in_a_checkpoint_may_lead_elsewhere(copy, trained, name):
    path = copy / "checkpoints/4" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(trained / "checkpoints/4" / name)
    refused(copy, "is a link")
    with pytest.raises(WorkdirError, match="is a link"):
        Checkpoints(copy)  # which would also delete there
    path.unlink()
    os.mkfifo(path)
    refused(copy, "neither file nor folder")


def test_the_folder_of_checkpoints_may_not_be_a_link_but_the_workdir_may(trained, tmp_path):
    (tmp_path / "linked").symlink_to(trained)
    assert e2sad_jax.load(tmp_path / "linked").step == 4
    (tmp_path / "w").mkdir()
    shutil.copy(trained / "config.json", tmp_path / "w")
    (tmp_path / "w" / "checkpoints").symlink_to(trained / "checkpoints")
    refused(tmp_path / "w", "is a link")


def test_files_far_larger_than_the_network_and_too_many_of_them_are_refused(copy, monkeypatch):
    with open(copy / "checkpoints/4/default/manifest.ocdbt", "r+b") as file:
        file.truncate(2**33)
    refused(copy, "default/manifest.ocdbt has 8,589,934,592 bytes; at most")
    monkeypatch.setattr(_stored, "ENTRIES", 5)
    refused(copy, "more than 5 files")


def test_a_network_far_larger_than_its_checkpoint_is_refused(copy):
    """Missing pieces would be filled up by zeros: config.json may ask for any number of them."""
    write_config(copy, num_classes=10**7)
    refused(copy, "and would become", "are read of so few")
    write_config(copy, image_shape=[65536, 65536, 1])
    refused(copy)


def test_steps_in_other_digits_are_no_steps(copy):
    (copy / "checkpoints" / "²").mkdir()
    (copy / "checkpoints" / "٣").mkdir()
    with Checkpoints(copy, read_only=True) as checkpoints:
        assert checkpoints.last_step == 4


# --- no file runs code

HEARD = """
import io, json, os, pathlib, pickle, sys, zipfile
import numpy as np
import e2sad_jax
from e2sad_jax import data
from e2sad_jax.runs import folder
from e2sad_jax.errors import Error

class Canary:
    def __reduce__(self):
        return os.mkdir, (str(folder / "ran"),)

folder, good = map(pathlib.Path, sys.argv[1:])
e2sad_jax.load(good)  # imports whatever it needs
data.load("digits")
heard = []
own = str(pathlib.Path(e2sad_jax.__file__).parent)
allowed = (str(folder), str(good), sys.prefix, sys.base_prefix, own, "/usr", "/proc", "/sys")

def hear(event, args):
    if event in ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "os.mkdir"):
        heard.append((event, str(args)))
    if event == "exec" and not args[0].co_filename.startswith(allowed):
        heard.append((event, args[0].co_filename))
    if event == "open" and isinstance(args[0], str) and not os.path.realpath(args[0]).startswith(allowed):
        heard.append((event, args[0]))

x, y = np.zeros((4, 2, 2), np.uint8), np.arange(4) % 2
arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
for name in (*arrays, "num_classes", "metadata"):
    np.savez(folder / f"{name}.npz", **{**arrays, name: np.array([Canary()], object)})
(folder / "pickle.npz").write_bytes(pickle.dumps(Canary()))
with zipfile.ZipFile(folder / "code.npz", "w") as archive:
    text = "{'descr': __import__('os').mkdir('ran'), 'fortran_order': False, 'shape': ()}".ljust(118).encode()
    for name in arrays:
        archive.writestr(name + ".npy", b"\\x93NUMPY\\x01\\x00" + len(text).to_bytes(2, "little") + text)
sys.addaudithook(hear)
refused = 0
for path in sorted(folder.glob("*.npz")):
    try:
        data.load(str(path))
    except Error:
        refused += 1
for path in sorted(folder.glob("w*")):
    try:
        e2sad_jax.load(path)
    except Error:
        refused += 1
    folder.read_training(path)
silent = list(heard)
pickle.loads(pickle.dumps(Canary()))  # that the hook hears at all
print(json.dumps([refused, silent, [event for event, _ in heard]]))
"""


def test_no_file_runs_code_or_opens_another(trained, tmp_path):
    for i, (name, content) in enumerate(
        [
            ("checkpoints/4/default/_METADATA", pickle.dumps(print)),
            ("checkpoints/4/default/manifest.ocdbt", pickle.dumps(print)),
            ("checkpoints/4/metrics/metrics", b'{"score": "__import__(\'os\')"}'),
            ("config.json", pickle.dumps(print)),
            ("training.json", pickle.dumps(print)),
        ]
    ):
        shutil.copytree(trained, tmp_path / f"w{i}")
        (tmp_path / f"w{i}" / name).write_bytes(content)
    command = [sys.executable, "-c", HEARD, str(tmp_path), str(trained)]
    elsewhere = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=elsewhere)
    refusals, heard, control = json.loads(done.stdout.splitlines()[-1])
    assert refusals == 8 + 4
    assert heard == []
    assert control == ["pickle.find_class", "os.mkdir"]
