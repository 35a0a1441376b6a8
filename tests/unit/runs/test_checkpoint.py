"""Checkpoints: the last and the best are kept, whole; and the classifier that a user loads."""

import fcntl
import functools
import json
import pathlib
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import e2sad_jax
from e2sad_jax import data, networks, training
from e2sad_jax._io import LOCK
from e2sad_jax.errors import DataError, WorkdirError
from e2sad_jax.runs import run
from e2sad_jax.runs.checkpoint import Checkpoints
from e2sad_jax.runs.folder import read_config
from e2sad_jax.training.config import Config

SHAPE = (8, 8, 1)
CONFIG = Config(data="tiny.npz", model="digits_cnn", steps=4, batch_size=8)


@functools.cache
def fresh_state() -> training.TrainState:
    return training.init_state(CONFIG, networks.create("digits_cnn", 3, SHAPE), SHAPE)


def state_at(step: int) -> training.TrainState:
    copy = jax.tree.map(jnp.copy, fresh_state())
    return copy.replace(step=jnp.int32(step), params=jax.tree.map(lambda a: a + step, copy.params))


def first_leaf(state: training.TrainState) -> np.ndarray:
    return np.asarray(jax.tree.leaves(state.params)[0])


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_last_and_best_are_kept_and_nothing_else(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last_step is None
        for step, score in [(1, 5.0), (2, 9.0), (3, 7.0), (4, 8.0)]:
            checkpoints.save(step, state_at(step), {"score": score, "seconds": 1.5})
        checkpoints.wait()
        assert (checkpoints.last_step, checkpoints.best_step) == (4, 2)
    with Checkpoints(tmp_path) as checkpoints:  # another process later
        assert sorted(p.name for p in checkpoints.folder.iterdir() if p.name.isdigit()) == ["2", "4"]
        assert checkpoints.seconds(4) == 1.5
        for step in (2, 4):
            restored = checkpoints.restore(state_at(0), step)
            assert int(restored.step) == step
            np.testing.assert_array_equal(first_leaf(restored), first_leaf(state_at(step)))
            chex.assert_trees_all_equal(jax.random.key_data(restored.key), jax.random.key_data(state_at(step).key))


def test_a_checkpoint_of_an_orbax_that_did_not_name_its_format_is_read(tmp_path):
    """Orbax 0.11.30, the earliest that is allowed, writes no `use_ocdbt`, and goes by the files."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1), {"score": 1.0})
    path = tmp_path / "checkpoints/1/default/_METADATA"
    metadata = json.loads(path.read_text())
    metadata.pop("use_ocdbt", None)
    path.write_text(json.dumps(metadata))
    with Checkpoints(tmp_path) as checkpoints:
        np.testing.assert_array_equal(first_leaf(checkpoints.restore(state_at(0))), first_leaf(state_at(1)))


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The write goes on in the background: it must not see what the next steps make of the buffers."""
    state = state_at(1)
    before = first_leaf(state).copy()
    scramble = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"score": 0.0})
        params = state.params
        for _ in range(20):
            params = scramble(params)
        checkpoints.wait()
        np.testing.assert_array_equal(first_leaf(checkpoints.restore(state_at(0))), before)


def test_a_half_written_checkpoint_is_not_trusted(tmp_path):
    """What a killed process leaves: Orbax's temporary folder beside the last whole one."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1), {"score": 0.0})
    torn = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "default").write_bytes(b"torn")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last_step == 1
        assert int(checkpoints.restore(state_at(0)).step) == 1


def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1), {"score": 0.0})
    for path in (tmp_path / "checkpoints" / "1").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:500])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(WorkdirError, match=r"cannot read the checkpoint .*1: "):
        checkpoints.restore(state_at(0))


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1), {"score": 0.0})
        other = training.init_state(CONFIG, networks.create("digits_cnn", 5, SHAPE), SHAPE)
        with pytest.raises(WorkdirError, match=r"checkpoints/1"):
            checkpoints.restore(other)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A trained run, evaluation included, on a tiny data set."""
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.int32) % 3
    images = (rng.integers(0, 100, (40, 8, 8, 1)) + 50 * labels[:, None, None, None]).astype(np.uint8)
    dataset = data.Dataset("tiny", "", images, labels, images[:9], labels[:9], num_classes=3, source_sha256={})
    folder = tmp_path_factory.mktemp("run") / "w"
    suite = {"tiny": run.SUITES["mnist"][:2]}
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(data, "load", lambda name, data_dir: dataset)
        patch.setattr(run, "SUITES", suite)
        config = Config(
            data="tiny.npz", model="digits_cnn", steps=4, batch_size=8, checkpoint_every=2, workdir=str(folder)
        )
        run.train_and_report(config, "tiny")
    return folder


def test_a_run_leaves_all_its_files(workdir):
    names = {path.name for path in workdir.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "results.json",
        "results.md",
        "model_card.md",
        "outcomes.npz",
        "examples.png",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (workdir / "examples.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((workdir / "results.json").read_text())
    outcomes = np.load(workdir / "outcomes.npz")
    assert [row["name"] for row in results["attacks"]] == list(outcomes["attacks"]) == ["clean", "FGSM 0.3"]
    for row, correct in zip(results["attacks"], outcomes["correct"], strict=True):
        assert row["correct"] == correct.sum()
        assert row["accuracy"] == pytest.approx(correct.mean())
    for name in ("date", "hardware", "jax", "commit"):
        assert name in results["environment"]
    assert not [name for name in names if name.endswith(".tmp")]


def test_tensorboard_events_hold_the_curves(workdir):
    from tensorboardX.proto import event_pb2

    values = {}
    for path in workdir.glob("events.out.tfevents*"):
        content, at = path.read_bytes(), 0
        while at < len(content):  # TFRecord framing: length, crc, payload, crc
            length = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            values.update({(event.step, v.tag): v.simple_value for v in event.summary.value})
    assert (2, "validation/robust") in values
    assert (4, "validation/clean") in values


def test_load_gives_probabilities_of_the_trained_network(workdir):
    """The three lines that the documentation promises."""
    classifier = e2sad_jax.load(workdir)
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
    probabilities = classifier(images)
    assert classifier.step == 4
    chex.assert_shape(probabilities, (5, 3))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    logits = classifier.model.apply(classifier.params, jnp.asarray(images).astype(jnp.float32) / 255)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-5)
    np.testing.assert_allclose(classifier((images / 255).astype(np.float32)), probabilities, rtol=1e-5)
    np.testing.assert_allclose(classifier(images[..., 0]), probabilities, rtol=1e-6)
    np.testing.assert_allclose(classifier.logits(classifier.transform.apply(jnp.asarray(images))), logits, rtol=1e-5)
    fresh = training.init_state(CONFIG, classifier.model, SHAPE)
    assert not np.allclose(first_leaf(fresh), jax.tree.leaves(classifier.params)[0]), "trained, not initial"


def test_best_may_be_loaded_too(workdir):
    best = e2sad_jax.load(workdir, which="best")
    assert best.step in (2, 4)
    with pytest.raises(ValueError, match="which='first'"):
        e2sad_jax.load(workdir, which="first")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 9, 8, 1), np.uint8), r"shape \(2, 9, 8, 1\).*\[N, 8, 8, 1\]"),
        (np.zeros((8, 8), np.uint8), r"shape \(8, 8\)"),
        (np.zeros((2, 8, 8, 1), np.int32), r"int32.*uint8"),
        (np.full((2, 8, 8, 1), 255, np.float32), r"pixels from 255 to 255.*\[0, 1\]"),
        (np.full((2, 8, 8, 1), np.nan, np.float32), r"pixels from nan to nan"),
    ],
)
def test_a_classifier_refuses_other_images(workdir, images, words):
    with pytest.raises(DataError, match=words):
        e2sad_jax.load(workdir)(images)


def test_a_classifier_may_be_compiled_and_differentiated(workdir):
    classifier = e2sad_jax.load(workdir)
    images = jnp.full((2, 8, 8, 1), 0.5)
    np.testing.assert_allclose(jax.jit(classifier)(images), classifier(images), rtol=1e-5)
    assert jnp.abs(jax.grad(lambda x: classifier(x)[:, 0].sum())(images)).max() > 0


def test_load_leaves_a_run_under_way_alone(workdir):
    """Orbax's folder of a checkpoint that is being written is not swept away, nor is the lock in the way."""
    unfinished = workdir / "checkpoints" / "5.orbax-checkpoint-tmp"
    unfinished.mkdir()
    try:
        config, dataset = read_config(workdir)
        with open(workdir / LOCK, "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert e2sad_jax.load(workdir).step == 4
        assert unfinished.is_dir()
        assert dataset["num_classes"] == 3
        assert config.steps == 4
    finally:
        unfinished.rmdir()


def test_load_follows_a_run_that_replaces_its_checkpoint_meanwhile(workdir, tmp_path, monkeypatch):
    shutil.copytree(workdir, tmp_path / "w")
    folder, restore, tries = tmp_path / "w" / "checkpoints", Checkpoints.restore, []

    def late(self, like, step):
        tries.append(step)
        if len(tries) == 1:
            (folder / "4").rename(folder / "7")
        return restore(self, like, step)

    monkeypatch.setattr(Checkpoints, "restore", late)
    assert e2sad_jax.load(tmp_path / "w").step == 4
    assert tries == [4, 7]


def test_load_says_nothing(workdir):
    code = f"import e2sad_jax; print(e2sad_jax.load({str(workdir)!r}).step)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("4\n", "")


def test_load_refuses_what_is_no_run(tmp_path):
    with pytest.raises(WorkdirError, match="is not the workdir of a run"):
        e2sad_jax.load(tmp_path)
    for content, words in [
        ("{", "cannot read"),
        ('{"format": 99}', "has format 99, this version reads 1"),
        ("[]", "cannot read .*: holds a list"),
    ]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(WorkdirError, match=words):
            e2sad_jax.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "dataset": {}, "config": {}}))
    with pytest.raises(WorkdirError, match="dataset without image_shape, name, num_classes, sha256"):
        e2sad_jax.load(tmp_path)
    known = dict.fromkeys(("image_shape", "name", "num_classes", "sha256"))
    config = {"format": 1, "dataset": known, "config": {"defence": "e2sad"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WorkdirError, match="unknown setting 'defence'"):
        e2sad_jax.load(tmp_path)
