"""The classifier that a user loads."""

import fcntl
import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import e2sad_jax
from e2sad_jax._io import LOCK
from e2sad_jax.errors import DamagedError, DataError, WorkdirError
from e2sad_jax.runs.checkpoint import Checkpoints
from e2sad_jax.runs.classifier import load
from tests.unit.runs.helpers import config_of, state_of


def test_load_gives_probabilities_of_the_trained_network(trained):
    """The three lines that the documentation promises."""
    classifier = e2sad_jax.load(trained)
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
    probabilities = classifier(images)
    assert classifier.step == 12
    chex.assert_shape(probabilities, (5, 3))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    logits = classifier.model.apply(classifier.params, jnp.asarray(images).astype(jnp.float32) / 255)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-5)
    np.testing.assert_allclose(classifier((images / 255).astype(np.float32)), probabilities, rtol=1e-5)
    np.testing.assert_allclose(classifier(images[..., 0]), probabilities, rtol=1e-6)
    np.testing.assert_allclose(classifier.logits(classifier.transform.apply(jnp.asarray(images))), logits, rtol=1e-5)
    fresh = state_of(config_of(trained)).params
    assert not np.allclose(jax.tree.leaves(fresh)[-1], jax.tree.leaves(classifier.params)[-1]), "trained, not initial"


def test_the_best_may_be_loaded_too_and_the_workdir_may_be_a_link(trained, tmp_path):
    (tmp_path / "linked").symlink_to(trained)
    assert load(tmp_path / "linked", which="best").step == 10
    with pytest.raises(ValueError, match="which='first'"):
        load(trained, which="first")


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
def test_other_images_are_refused(trained, images, words):
    with pytest.raises(DataError, match=words):
        load(trained)(images)


def test_a_classifier_may_be_compiled_and_differentiated(trained):
    classifier = load(trained)
    images = jnp.full((2, 8, 8, 1), 0.5)
    np.testing.assert_allclose(jax.jit(classifier)(images), classifier(images), rtol=1e-5)
    assert jnp.abs(jax.grad(lambda x: classifier(x)[:, 0].sum())(images)).max() > 0


@pytest.fixture
def copy(trained, tmp_path) -> pathlib.Path:
    shutil.copytree(trained, tmp_path / "w")
    return tmp_path / "w"


def test_load_leaves_a_run_under_way_alone(copy, capfd):
    """Orbax's folder of a checkpoint that is being written is not swept away, nor is the lock in the way."""
    unfinished = copy / "checkpoints" / "15.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with open(copy / LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert load(copy).step == 12
    assert unfinished.is_dir()
    assert capfd.readouterr() == ("", ""), "nor is there a word of it"


def test_load_follows_a_run_that_replaces_its_checkpoint_meanwhile(copy, monkeypatch):
    folder, restore, tries = copy / "checkpoints", Checkpoints.restore, []

    def late(self, like, step):
        tries.append(step)
        if len(tries) == 1:
            (folder / "12").rename(folder / "15")
        return restore(self, like, step)

    monkeypatch.setattr(Checkpoints, "restore", late)
    assert load(copy).step == 12
    assert tries == [12, 15]


def test_load_refuses_what_is_no_run_or_damaged(copy, tmp_path):
    with pytest.raises(WorkdirError, match="is not the workdir of a run"):
        load(tmp_path)
    export = tmp_path / "export" / "model.safetensors"
    export.parent.mkdir()
    export.touch()
    for asked in (export, export.parent):
        with pytest.raises(WorkdirError, match=rf"config.json; export.load_safetensors\('{export}'\) reads an export"):
            load(asked)
    for path in (copy / "checkpoints" / "12").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DamagedError, match=r"cannot read the checkpoint .*checkpoints/12: .*delete that folder"):
        load(copy)
    assert load(copy, "best").step == 10
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(WorkdirError, match="holds no checkpoint yet"):
        load(copy)
    assert json.loads((copy / "config.json").read_text())["format"] == 1
