"""The loop: order of images, one compilation, donation, resuming, and stopping for good reasons."""

import dataclasses
import errno
import json
import os
import pathlib
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import e2sad_jax
from e2sad_jax import data, networks, training
from e2sad_jax._io import read_sealed, sealed, write_json
from e2sad_jax.errors import CheckpointError, ConfigError, LostProcessError, NonFiniteError, WorkdirError
from e2sad_jax.evaluation import Outcome
from e2sad_jax.runs import run, trainer
from e2sad_jax.runs.checkpoint import Checkpoints
from e2sad_jax.runs.folder import open_workdir
from e2sad_jax.training import Config
from tests.helpers import change_loss, count_compilations, tiny_config

N = 50

pytestmark = pytest.mark.usefixtures("little")


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam mixes float and int32; everything of ours in the step is held to strict promotion elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def no_last_evaluation(monkeypatch, tiny):
    """`run.run` up to the end of training: the data set above, no attacks after it."""
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    outcome = Outcome(np.ones(N, bool), np.zeros(N, np.int32))
    names = [attack.name for attack in run.SUITES["mnist"]]
    monkeypatch.setattr(run, "_evaluate", lambda *args: dict.fromkeys(names, outcome))
    monkeypatch.setattr("e2sad_jax.reporting.plots.examples", lambda *args, **kwargs: None)


@pytest.fixture
def no_evaluation(no_last_evaluation, monkeypatch):
    """Nor before: checkpoints are all alike."""
    monkeypatch.setattr(trainer, "validate", lambda run, state, stop: {"score": 0.0})


@pytest.mark.parametrize(("defense", "second_step"), [("natural", "total"), ("e2sad", "noise"), ("free", "total")])
def test_resumed_run_equals_uninterrupted_one_bit_for_bit(defense, second_step, no_evaluation, tmp_path, monkeypatch):
    """Through the checkpoints on disk, stopped at and between them, with random numbers in the defense."""
    config = tiny_config(defense=defense, second_step=second_step, workdir=str(tmp_path / "whole"))
    steps = count_compilations(monkeypatch)
    run.train_and_report(config, "mnist")
    parts = dataclasses.replace(config, workdir=str(tmp_path / "parts"))
    for stop in (5, 8, config.steps):
        run.train_and_report(dataclasses.replace(parts, steps=stop), "mnist")
    whole, resumed = (load_state(c, tmp_path / name) for c, name in ((config, "whole"), (parts, "parts")))
    chex.assert_trees_all_equal(jax.random.key_data(whole.key), jax.random.key_data(resumed.key))
    chex.assert_trees_all_equal(whole.replace(key=None), resumed.replace(key=None))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts"), "the curves are those of one run"
    assert [step._cache_size() for step in steps] == [1] * 4, "one compilation a run, resumed ones too"


def load_state(config: Config, workdir: pathlib.Path) -> training.TrainState:
    model = networks.create(config.model, 3, (8, 8, 1))
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(training.init_state(config, model, (8, 8, 1)))


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_non_finite_loss_stops_and_names_step_and_last_good_checkpoint(no_evaluation, tmp_path, monkeypatch):
    """The loss breaks in step 8; the checkpoint of step 5 stays and is the one to go on from."""

    def breaking(loss, parts, arguments):
        at_step_8 = (jax.random.key_data(arguments["key"]) == jax.random.key_data(key_8)).all()
        return jnp.where(at_step_8, jnp.nan, loss), parts

    config = tiny_config(workdir=str(tmp_path / "w"))
    model = networks.create(config.model, 3, (8, 8, 1))
    key_8 = jax.random.fold_in(training.init_state(config, model, (8, 8, 1)).key, 7)
    change_loss(monkeypatch, "e2sad", breaking)
    with pytest.raises(NonFiniteError, match=r"step 8: .*loss=nan.*checkpoint of step 5 stays"):
        run.train_and_report(config, "mnist")
    assert int(load_state(config, tmp_path / "w").step) == 5


@pytest.mark.parametrize("learning_rate", [1e20, 1e35])
def test_no_checkpoint_of_a_broken_update_replaces_a_good_one(learning_rate, no_evaluation, tmp_path):
    """The first update already ruins the network, and its loss, taken before, is finite."""
    config = tiny_config(workdir=str(tmp_path / "w"), steps=1)
    run.train_and_report(config, "mnist")
    broken = dataclasses.replace(config, steps=4, checkpoint_every=1, learning_rate=learning_rate)
    values = read_sealed(tmp_path / "w" / "config.json")
    values["config"]["learning_rate"] = learning_rate  # as if it had got there by itself
    write_json(tmp_path / "w" / "config.json", sealed(values))
    with pytest.raises(NonFiniteError, match=r"step \d.*checkpoint of step 1 stays"):
        run.train_and_report(broken, "mnist")
    images = np.zeros((2, 8, 8, 1), np.uint8)
    assert np.isfinite(e2sad_jax.load(tmp_path / "w")(images)).all()


def test_interrupted_in_the_last_step_is_not_forgotten(no_evaluation, tmp_path, monkeypatch):
    """Training is complete and saved, but who pressed Ctrl-C does not want to wait for the attacks."""
    config = tiny_config(workdir=str(tmp_path / "w"), steps=3)
    take = trainer.Recorder.__call__

    def interrupting(self, step, metrics, count):
        take(self, step, metrics, count)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Recorder, "__call__", interrupting)
        with pytest.raises(run.Stopped, match="Stopped at step 3 of 3") as stopped:
            run.train_and_report(config, "mnist")
    assert stopped.value.exit_code == 130
    assert not (tmp_path / "w" / "results.json").exists()
    assert "score" not in (tmp_path / "w" / "metrics.jsonl").read_text(), (
        "no validation was made, none is in the curves"
    )

    restore = (
        Checkpoints.restore
    )  # the same while the finished run is read back; and a repeat within a second counts once

    def interrupted_restore(self, like, **kwargs):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return restore(self, like, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore", interrupted_restore)
        with pytest.raises(run.Stopped, match="Stopped at step 3 of 3"):
            run.train_and_report(config, "mnist")
    assert run.train_and_report(config, "mnist")["steps"] == 3
    assert (tmp_path / "w" / "results.json").exists()


def test_the_command_that_goes_on_leaves_noresume_out(no_evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Recorder, "flush", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(run.Stopped, match="The same command without --noresume goes on"):
        run.train_and_report(tiny_config(workdir=str(tmp_path / "w"), steps=1, resume=False), "mnist")


def test_a_full_disk_is_an_error_of_the_system_and_keeps_what_was_saved(no_evaluation, tmp_path, monkeypatch):
    config = tiny_config(workdir=str(tmp_path / "w"), steps=4, checkpoint_every=2)
    save = ocp.CheckpointManager.save

    def full(self, step, **kwargs):
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(self, step, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            run.train_and_report(config, "mnist")
    assert caught.value.exit_code == 1
    assert int(load_state(config, tmp_path / "w").step) == 2
    assert run.train_and_report(config, "mnist")["steps"] == 4


def test_without_budget_there_is_nothing_to_attack_with_and_no_error(no_last_evaluation, tmp_path):
    for defense in ("natural", "e2sad", "pgd"):
        run.train_and_report(
            tiny_config(workdir=str(tmp_path / defense), defense=defense, steps=2, eps1=0.0, eps2=0.0), "mnist"
        )


def test_a_second_process_is_kept_out_while_one_is_at_work(no_evaluation, tiny, tmp_path):
    config = tiny_config(workdir=str(tmp_path / "w"), steps=2)
    with open_workdir(tmp_path / "w", config, tiny), pytest.raises(WorkdirError, match="another process is at work in"):
        run.train_and_report(config, "mnist")
    run.train_and_report(config, "mnist")


def test_a_refused_start_changes_nothing(no_evaluation, tmp_path, monkeypatch):
    config = tiny_config(workdir=str(tmp_path / "w"), steps=2)
    run.train_and_report(config, "mnist")
    before = (tmp_path / "w" / "config.json").read_text()
    for changes in ({"steps": 1}, {"resume": False}, {"lam": 0.7}):
        with pytest.raises((ConfigError, WorkdirError)):
            run.train_and_report(config.replace(**changes), "mnist")
        assert (tmp_path / "w" / "config.json").read_text() == before
    with pytest.raises(ConfigError, match=r"suite='minst': must be one of mnist, digits, svhn"):
        run.train_and_report(dataclasses.replace(config, workdir=str(tmp_path / "new")), "minst")
    assert not (tmp_path / "new").exists()

    def read_only(source, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", read_only)
        for name in ("w", "new"):
            with pytest.raises(WorkdirError, match=rf"cannot use .*{name} as workdir: Permission denied"):
                run.train_and_report(dataclasses.replace(config, workdir=str(tmp_path / name)), "mnist")
    run.train_and_report(
        dataclasses.replace(config, workdir=str(tmp_path / "new")), "mnist"
    )  # what that start left is no obstacle


def test_all_runs_are_found_possible_before_the_first_is_trained(no_evaluation, tmp_path):
    first, second = (tiny_config(workdir=str(tmp_path / name), steps=2) for name in ("first", "second"))
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "thesis.txt").write_text("precious")
    with pytest.raises(WorkdirError, match="is not empty"):
        run.train_with_baseline([first.replace(defense="natural"), second], "mnist")
    assert not list((tmp_path / "first" / "checkpoints").iterdir())
    (tmp_path / "second" / "thesis.txt").unlink()
    natural = first.replace(defense="natural", delta=0.2)  # the first one's workdir was not taken
    run.train_with_baseline([natural, second], "mnist")
    assert "| natural | e2sad |" in (tmp_path / "second" / "results.md").read_text()
    with pytest.raises(ConfigError, match="--defense=e2sad: runs beside each other must each have another one"):
        run.train_with_baseline([first, second], "mnist")


def test_settings_that_the_data_makes_wrong_are_refused_before_training(no_evaluation, tmp_path):
    for changes, words in [
        ({"batch_size": 51}, r"--batch_size=51: must be at most the 50 training images"),
        ({"eval_examples": 51}, r"--eval_examples=51: must be at most the 50 test images"),
        ({"validation_examples": 50}, r"--validation_examples=50: must be below the 50"),
        ({"steps": 2**28}, r"--steps=268435456: steps \* batch_size must be below"),
    ]:
        with pytest.raises(ConfigError, match=words):
            run.train_and_report(tiny_config(workdir=str(tmp_path / "w"), **changes), "mnist")
    assert not (tmp_path / "w").exists()


def test_a_workdir_of_other_settings_or_data_is_refused_naming_what_differs(no_evaluation, tiny, tmp_path, monkeypatch):
    config = tiny_config(workdir=str(tmp_path / "w"), steps=2)
    run.train_and_report(config, "mnist")
    with pytest.raises(WorkdirError, match=r"--alpha: 0.6 there, 0.5 here; --lam: 0.1 there, 0.3 here"):
        run.train_and_report(config.replace(lam=0.3, alpha=0.5), "mnist")
    with pytest.raises(WorkdirError, match=r"--resume is off"):
        run.train_and_report(dataclasses.replace(config, resume=False), "mnist")
    with pytest.raises(ConfigError, match=r"--steps=1: .* is at step 2 already"):
        run.train_and_report(dataclasses.replace(config, steps=1), "mnist")
    other = dataclasses.replace(tiny, x_train=255 - tiny.x_train)
    monkeypatch.setattr(data, "load", lambda name, data_dir: other)
    with pytest.raises(WorkdirError, match=r"tiny there, tiny here, with other content"):
        run.train_and_report(config, "mnist")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(WorkdirError, match=r"is not empty and holds no config.json"):
        run.train_and_report(dataclasses.replace(config, workdir=str(tmp_path / "other")), "mnist")


def test_held_out_images_are_not_trained_on(tiny):
    for count, watched_size in ((10, 10), (0, N)):
        train_set, watched = data.hold_out(tiny, tiny_config(validation_examples=count).validation_examples)
        assert len(train_set.x_train) == N - count
        assert len(watched.x_test) == watched_size
        trained_on = {image.tobytes() for image in train_set.x_train}
        assert sum(image.tobytes() in trained_on for image in watched.x_test) == (0 if count else N)
        assert np.array_equal(train_set.x_test, tiny.x_test)


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
    with trainer.open_run(tiny_config(workdir=str(tmp_path / "w")), tiny) as job, pytest.raises(kind):
        trainer.train(job, lambda: 0)
