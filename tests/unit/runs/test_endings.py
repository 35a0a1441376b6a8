"""What ends a run names the step, the checkpoint that stays, and the remedy."""

import dataclasses
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from e2sad_jax import errors
from e2sad_jax._io import LOCK, read_sealed, sealed, write_json
from e2sad_jax.errors import (
    CheckpointError,
    DeviceError,
    Error,
    GoneError,
    LostProcessError,
    NonFiniteError,
    OutOfMemoryError,
)
from e2sad_jax.runs import opening, trainer
from e2sad_jax.runs.classifier import load
from e2sad_jax.runs.folder import steps_in
from tests.unit.runs.helpers import config_of, fit_with, members, never, train, train_together
from tests.unit.runs.test_checkpoint import full


def test_a_loss_that_is_not_finite_names_step_checkpoint_and_remedy(scores, tiny, tmp_path, monkeypatch):
    fit_with(monkeypatch, 8, lambda metrics: {**metrics, "loss": jnp.float32(jnp.nan)})
    words = r"step 8: loss=nan; training stopped, the checkpoint of step 5 stays in .* Try a lower --learning_rate"
    with pytest.raises(NonFiniteError, match=words) as caught:
        train(config_of(tmp_path), tiny)
    assert caught.value.exit_code == 3
    assert load(tmp_path).step == 5


def test_no_checkpoint_of_a_broken_update_replaces_a_good_one(scores, tiny, tmp_path):
    """The first update already ruins the network, and its loss, taken before, is finite."""
    config = config_of(tmp_path, steps=1)
    train(config, tiny)
    broken = dataclasses.replace(config, steps=4, checkpoint_every=1, learning_rate=1e38)
    values = read_sealed(tmp_path / "config.json")
    values["config"]["learning_rate"] = 1e38  # as if it had got there by itself
    write_json(tmp_path / "config.json", sealed(values))
    with pytest.raises(NonFiniteError, match=r"step 2.*not finite.*checkpoint of step 1 stays"):
        train(broken, tiny)
    assert np.isfinite(load(tmp_path)(np.zeros((2, 8, 8, 1), np.uint8))).all()


def test_a_full_disk_keeps_what_was_saved_and_with_room_again_the_run_resumes(scores, tiny, tmp_path, monkeypatch):
    config, save = config_of(tmp_path), ocp.CheckpointManager.save
    with monkeypatch.context() as patch:
        patch.setattr(
            ocp.CheckpointManager, "save", lambda self, step, **k: full() if step > 5 else save(self, step, **k)
        )
        with pytest.raises(CheckpointError, match=errors.FULL) as caught:
            train(config, tiny)
    assert caught.value.exit_code == 1
    assert load(tmp_path).step == 5
    assert int(train(config, tiny).step) == 12


def between_checkpoints(workdir, do):
    """Does something when the checkpoint of step 5 is whole."""

    def doing(metrics):
        while not steps_in(workdir):
            time.sleep(0.01)
        do()

    return doing


def test_a_workdir_that_is_deleted_is_named_and_not_made_anew(scores, tiny, tmp_path, monkeypatch):
    workdir = tmp_path / "w"
    fit_with(monkeypatch, 8, between_checkpoints(workdir, lambda: shutil.rmtree(workdir)))
    with pytest.raises(GoneError, match="was deleted or moved while the run was at work in it"):
        train(config_of(workdir), tiny)
    assert not workdir.exists()


def test_a_lock_file_deleted_under_a_run_does_not_end_it(scores, tiny, tmp_path, monkeypatch):
    fit_with(monkeypatch, 8, between_checkpoints(tmp_path, (tmp_path / LOCK).unlink))
    assert int(train(config_of(tmp_path), tiny).step) == 12


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), OutOfMemoryError, r"--batch_size \(now 16\)"),
        (MemoryError(), OutOfMemoryError, r"--eval_batch_size \(now 250\)"),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: lost"), DeviceError, "look at the device .* JAX_PLATFORMS=cpu"),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: a bug"), jax.errors.JaxRuntimeError, "INVALID_ARGUMENT: a bug"),
    ],
)
def test_memory_and_devices_are_named_with_step_checkpoint_and_remedy(
    raised, kind, words, scores, tiny, tmp_path, monkeypatch
):
    def fail(metrics):
        raise raised

    with monkeypatch.context() as patch:
        fit_with(patch, 8, fail)
        with pytest.raises(kind, match=words) as caught:
            train(config_of(tmp_path), tiny)
    if isinstance(caught.value, Error):
        assert caught.value.exit_code == {OutOfMemoryError: 6, DeviceError: 7}[kind]
        assert caught.match(r"in training, after step [567] \(.*\); the checkpoint of step 5 is intact in")
    assert load(tmp_path).step == 5


@pytest.mark.parametrize(
    ("several", "cause", "kind"),
    [
        (True, jax.errors.JaxRuntimeError("AllGather failed"), LostProcessError),
        (False, jax.errors.JaxRuntimeError("AllGather failed"), CheckpointError),
        (True, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), CheckpointError),
        (True, OSError("no space left on device"), CheckpointError),
    ],
)
def test_a_process_lost_while_a_checkpoint_is_written_is_a_lost_process(
    several, cause, kind, tiny, tmp_path, monkeypatch
):
    def fit(*args, **kwargs):
        monkeypatch.setattr("e2sad_jax.distributed.is_multiprocess", lambda: several)
        raise CheckpointError("cannot write a checkpoint") from cause

    monkeypatch.setattr(trainer, "fit", fit)
    with opening.open_run(config_of(tmp_path), tiny) as run, pytest.raises(kind):
        trainer.train(run, never)


@pytest.mark.slow
def test_one_of_several_that_diverges_is_named_by_its_place_among_all(scores, tiny, tmp_path, monkeypatch):
    train_together(members(tmp_path, steps=5)[:2], tiny)  # the third is left behind
    with monkeypatch.context() as patch:
        fit_with(patch, 2, lambda metrics: {**metrics, "loss": jnp.full_like(metrics["loss"], jnp.nan)})
        with pytest.raises(NonFiniteError, match=r"step 2: loss=nan") as caught:
            train_together(members(tmp_path), tiny)
        assert caught.value.member == 2
    train_together(members(tmp_path, steps=5), tiny)
    fit_with(monkeypatch, 7, lambda metrics: {**metrics, "loss": metrics["loss"].at[1].set(jnp.inf)})
    with pytest.raises(NonFiniteError, match=r"step 7 of run1: loss=inf") as caught:
        train_together(members(tmp_path), tiny)
    assert caught.value.member == 1
