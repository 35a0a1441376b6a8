"""Training of runs: opened, resumed bit for bit, validated, together."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal

import chex
import jax
import numpy as np
import pytest

from e2sad_jax.errors import (
    BusyError,
    ConfigError,
    DataError,
    WorkdirError,
)
from e2sad_jax.evaluation import Attack, masking
from e2sad_jax.runs import checkpoint, opening, signals, trainer
from e2sad_jax.runs.classifier import load
from e2sad_jax.runs.folder import read_training, steps_in
from tests.helpers import count_compilations
from tests.unit.runs.helpers import config_of, losses, members, never, same, stop_after, train, train_together

# Opening.


def test_a_run_is_opened_with_everything_that_fits_together(tiny, tmp_path):
    config = config_of(tmp_path / "w", validation_examples=10, eval_examples=7)
    with opening.open_run(config, tiny) as run:
        assert (run.step, run.steps, run.mesh) == (0, 12, None)
        assert (len(run.train_set.x_train), len(run.validation_set.x_test)) == (40, 10)
        assert run.chosen_on == "10 held-out images"
        assert len(run.test_set().x_test) == 7
        assert (run.workdir / "config.json").exists()
        with pytest.raises(BusyError, match="another process is at work in"), opening.open_run(config, tiny):
            pass
    with opening.open_run(dataclasses.replace(config, workdir=str(tmp_path / "v"), validation_examples=0), tiny) as run:
        assert run.chosen_on == "50 training images"


def test_of_a_file_sorted_by_class_every_class_is_evaluated(tiny, tmp_path):
    order = np.argsort(tiny.y_test, kind="stable")
    in_order = dataclasses.replace(tiny, x_test=tiny.x_test[order], y_test=tiny.y_test[order])
    with opening.open_run(config_of(tmp_path / "w", eval_examples=6), in_order) as run:
        counts, share = np.bincount(run.test_set().y_test), 6 * np.bincount(tiny.y_test) / 50
        assert (np.abs(counts - share) < 1).all()
        same = [tiny.x_test[i].tobytes() for i in range(50)]
        assert all(image.tobytes() in same for image in run.test_set().x_test)


def test_images_of_one_class_are_refused_before_the_workdir_is_made(tiny, tmp_path):
    one = dataclasses.replace(tiny, y_train=np.full(50, 2, np.int32))
    words = "tiny: every label of the 50 training images is 2; it must have images of at least two classes"
    with pytest.raises(DataError, match=words), opening.open_run(config_of(tmp_path / "w"), one):
        pass
    assert not (tmp_path / "w").exists()


def test_of_several_runs_all_are_found_possible_before_any_folder_is_taken(tiny, tmp_path):
    first, second = (config_of(tmp_path / name) for name in ("first", "second"))
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "thesis.txt").write_text("precious")
    with pytest.raises(WorkdirError, match="is not empty"), opening.open_runs([first, second], tiny):
        pass
    (tmp_path / "second" / "thesis.txt").unlink()
    other = dataclasses.replace(first, delta=0.2)  # the first one's workdir was not taken
    with opening.open_runs([other, second], tiny) as runs:
        assert [run.config for run in runs] == [other, second]


def test_settings_that_the_data_makes_wrong_are_refused_and_nothing_is_made(tiny, tmp_path):
    for changes, words in [
        ({"batch_size": 51}, r"--batch_size=51: must be at most the 50 training images"),
        ({"eval_examples": 51}, r"--eval_examples=51: must be at most the 50 test images"),
        ({"validation_examples": 50}, r"--validation_examples=50: must be below the 50"),
        ({"steps": 2**28}, r"--steps=268435456: steps \* batch_size must be below"),
    ]:
        with pytest.raises(ConfigError, match=words), opening.open_run(config_of(tmp_path / "w", **changes), tiny):
            pass
    assert not (tmp_path / "w").exists()


@pytest.fixture
def workdir(trained, tmp_path) -> pathlib.Path:
    """A copy of a finished run."""
    shutil.copytree(trained, tmp_path / "w")
    return tmp_path / "w"


def test_a_refused_start_changes_nothing(workdir, tiny):
    before = (workdir / "config.json").read_text()
    for changes, words in [
        ({"steps": 11}, r"--steps=11: .* is at step 12 already"),
        ({"resume": False}, r"holds a run at step 12 and --resume is off"),
        ({"seed": 7}, r"holds another run \(--seed: 0 there, 7 here\)"),
        ({"schedule": "cyclic"}, r"holds another run \(--schedule: constant there, cyclic here\)"),
        ({"augment": "flip"}, r"holds another run \(--augment: none there, flip here\)"),
        ({"defense": "fgsm"}, r"--defense: natural there, fgsm here; --alpha: not read there, 0.6 here"),
    ]:
        with (
            pytest.raises((ConfigError, WorkdirError), match=words),
            opening.open_run(config_of(workdir, **changes), tiny),
        ):
            pass
        assert (workdir / "config.json").read_text() == before


def test_a_disk_that_takes_no_config_json_is_named_and_what_was_left_is_no_obstacle(
    workdir, tiny, tmp_path, monkeypatch
):
    """Of a new run and of one that is there."""

    def read_only(source, target):
        raise PermissionError(13, os.strerror(13), str(target))

    for folder, step in ((tmp_path / "new", 0), (workdir, 12)):
        config = config_of(folder)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", read_only)
            words = rf"cannot use .*{folder.name} as workdir: Permission denied"
            with pytest.raises(WorkdirError, match=words), opening.open_run(config, tiny):
                pass
        with opening.open_run(config, tiny) as run:
            assert run.step == step


def test_a_damaged_last_checkpoint_is_trained_again_to_the_same_numbers(workdir, trained, tiny, scores, capsys):
    path = workdir / "checkpoints/12/default/manifest.ocdbt"
    path.write_bytes(path.read_bytes()[:20])
    train(config_of(workdir), tiny)
    said = capsys.readouterr().err
    assert "the checkpoint of step 12 is damaged" in said
    assert f"Resuming from step 10 in {workdir}\n" in said
    chex.assert_trees_all_equal(load(workdir).params, load(trained).params)
    assert losses(workdir) == losses(trained)


# Training.


@pytest.mark.parametrize(
    "changes",
    [
        {"defense": "natural"},
        {"defense": "e2sad", "second_step": "noise"},
        pytest.param(
            {"defense": "pgd", "attack_steps": 2, "memory": "int8", "eps_warmup": 7, "ema": 0.9}, marks=pytest.mark.slow
        ),
        pytest.param({"defense": "free", "replays": 3, "eps_warmup": 7, "schedule": "cyclic"}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: changes["defense"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(changes, scores, tiny, tmp_path, monkeypatch):
    """Stopped before the first checkpoint, within a replay and a warm-up, and between checkpoints; each compiles once."""
    made = count_compilations(monkeypatch)
    config = config_of(tmp_path / "whole", eps1=0.1, **changes)
    whole = train(config, tiny)
    parts = dataclasses.replace(config, workdir=str(tmp_path / "parts"))
    for stop, step in ((stop_after(4), 4), (stop_after(4), 7), (never, 12)):
        resumed = train(parts, tiny, stop)
        assert int(resumed.step) == step
        assert steps_in(parts.workdir)[-1] == step
    same(whole, resumed)
    assert [step._cache_size() for step in made] == [1] * 4, "a restored state is what the step was compiled for"
    assert losses(config.workdir) == losses(parts.workdir), "the curves are those of one run"
    segments = read_training(tmp_path / "parts")
    assert [(s["from_step"], s["to_step"], s["runs_together"]) for s in segments] == [(0, 4, 1), (4, 7, 1), (7, 12, 1)]
    same(train(config, tiny), whole)  # finished: only read


def test_a_stretching_run_may_not_change_its_length(scores, tiny, tmp_path):
    config = config_of(tmp_path, schedule="cosine")
    train(config, tiny, stop_after(2))
    with (
        pytest.raises(WorkdirError, match="--steps: 12 there, 20 here"),
        opening.open_run(dataclasses.replace(config, steps=20), tiny),
    ):
        pass


def test_every_whole_checkpoint_is_noted_and_timed(trained, tiny, tmp_path):
    (segment,) = read_training(trained)
    assert (segment["from_step"], segment["to_step"]) == (0, 12)
    assert {"command", "commit", "date", "hardware", "jax"} <= set(segment)
    shutil.copytree(trained, tmp_path / "w")
    with opening.open_run(config_of(tmp_path / "w"), tiny) as run:
        assert run.checkpoints.seconds(12) > run.checkpoints.seconds(10) > 0
        assert trainer.train(run, never)[1] == run.checkpoints.seconds(12)


def test_metrics_hold_losses_at_intervals_and_the_validation_of_each_checkpoint(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    validated = {line["step"]: line["validation_score"] for line in lines if "validation_score" in line}
    assert validated == {5: 1.0, 10: 2.0, 12: 1.5}
    assert load(trained, "best").step == max(validated, key=validated.get)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_state_is_restored_on_the_devices_of_the_run(devices, workdir, tiny):
    with opening.open_run(config_of(workdir, devices=devices), tiny) as run:
        for state in (run.restore(), run.restore(10), run.init_state()):
            assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {devices}
        assert (int(run.restore().step), int(run.restore(10).step)) == (12, 10)
    assert {s.get("devices") for s in read_training(workdir)} == {None}


@pytest.mark.slow
def test_a_run_may_be_resumed_on_another_number_of_devices(scores, tiny, tmp_path):
    one = train(config_of(tmp_path / "one"), tiny)
    for devices in ((8, 1), (1, 8), (2, 4)):
        name = "to".join(map(str, devices))
        train(config_of(tmp_path / name, steps=5, devices=devices[0]), tiny)
        state = train(config_of(tmp_path / name, devices=devices[1]), tiny)
        assert [s.get("devices", 1) for s in read_training(tmp_path / name)] == list(devices)
        np.testing.assert_allclose(
            [loss for _, loss in losses(tmp_path / name)], [loss for _, loss in losses(tmp_path / "one")], atol=1e-4
        )
        chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(one.params), atol=1e-3)
        assert load(tmp_path / name).step == 12


def test_an_evaluation_on_eight_devices_is_that_on_one(workdir, tiny):
    suite, outcomes = [Attack("clean", "clean"), Attack("pgd", "pgd", 0.05, 3)], []
    for devices in (1, 8):
        with opening.open_run(config_of(workdir, devices=devices, eval_batch_size=24), tiny) as run:
            outcomes.append(run.attack(run.restore().params, tiny, suite))
    np.testing.assert_array_equal(outcomes[0].prediction, outcomes[1].prediction)


@pytest.mark.parametrize(
    ("devices", "batch_size", "message"),
    [
        (8, 12, r"--batch_size=12: must be a multiple of the 8 devices; the next are 8 or 16"),
        (8, 3, r"--batch_size=3: must be a multiple of the 8 devices; the next are 8$"),
        (0, 12, r"multiple of the 8 devices"),
        (9, 18, r"--devices=9: must be at most 8, .* that JAX sees; on the CPU, XLA_FLAGS=.*count=N makes N"),
    ],
)
def test_what_does_not_fit_the_devices_is_refused(devices, batch_size, message, tiny, tmp_path):
    config = config_of(tmp_path / "w", devices=devices, batch_size=batch_size)
    with pytest.raises(ConfigError, match=message), opening.open_run(config, tiny):
        pass
    assert not (tmp_path / "w").exists()


# The best checkpoint.


def test_validation_is_pgd_on_the_validation_set_and_robust_comes_before_clean(workdir, tiny):
    with opening.open_run(config_of(workdir), tiny) as run:
        state = run.restore()
        values = trainer.validate(run, state, never)
        suite = [Attack("clean", "clean"), Attack("robust", "pgd", 0.3, 10, 0.075)]
        want = run.attack(state.params, run.validation_set, suite)
    assert values["clean"] == pytest.approx(want["clean"].correct.mean())
    assert values["robust"] == pytest.approx(want["robust"].correct.mean())
    assert values["score"] == want["robust"].correct.sum() + want["clean"].correct.sum() / 51
    assert values["clean"] > 0.5


def test_fgsm_on_a_linear_network_misleads_nobody(tiny, tmp_path, monkeypatch):
    """Its gradient is nearly the same everywhere: FGSM and PGD agree."""
    config = config_of(tmp_path / "w", defense="fgsm", eps1=0.05)
    with opening.open_run(config, tiny) as run:
        trainer.train(run, never)
        state = run.restore()
        robust = trainer.validate(run, state, never)["robust"]
        found = trainer.overfitting(run, state.params, robust)
        fgsm = run.attack(state.params, run.validation_set, [Attack("a", "fgsm", 0.05, 1)])["a"].accuracy
    lines = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "validation_alignment" in line]
    assert [line["step"] for line in validated] == [5, 10, 12]
    assert validated[-1]["validation_fgsm"] == found["fgsm"] == fgsm
    assert found["alignment"] == pytest.approx(validated[-1]["validation_alignment"], abs=1e-6)
    assert found["alignment"] > 0.9
    assert found["collapsed"] == 0
    with opening.open_run(config, tiny) as run:
        low = fgsm / 2 - 0.01
        assert trainer.overfitting(run, state.params, low)["collapsed"] == 0, "its gradients are aligned"
        monkeypatch.setattr(masking, "alignment", lambda *_: 0.1)
        assert trainer.overfitting(run, state.params, low)["collapsed"] == float(fgsm > 0.4) == 1
        assert trainer.overfitting(run, state.params, fgsm / 2 + 0.01)["collapsed"] == 0


def test_catastrophic_overfitting_is_said_once(tiny, tmp_path, monkeypatch, capfd):
    found = {"fgsm": 0.95, "alignment": -0.02, "collapsed": 1.0}
    monkeypatch.setattr(trainer, "overfitting", lambda run, params, robust: found)
    for defense in ("fgsm", "pgd", "natural"):
        with opening.open_run(config_of(tmp_path / defense, defense=defense, eps1=0.05), tiny) as run:
            trainer.train(run, never)
    said = [line for line in capfd.readouterr().err.splitlines() if "overfitting" in line]
    assert len(said) == 2
    assert said[0].endswith("an attack of several steps (--defense=pgd), or a lower --eps1")
    assert said[1].endswith("a larger --attack_steps, or a lower --eps1")
    assert said[0].startswith(
        "step 5: catastrophic overfitting. Accuracy on 50 training images is 0.950 under FGSM and"
    )
    assert "--eps_warmup=0.5" in said[0]
    lines = (tmp_path / "fgsm" / "metrics.jsonl").read_text()
    assert lines.count('"validation_collapsed": 1.0') == 3
    assert "collapsed" not in (tmp_path / "natural" / "metrics.jsonl").read_text()


def test_a_rise_longer_than_the_run_is_warned_of(tiny, tmp_path, capsys):
    for name, rises in {"long": {"eps_warmup": 24.0, "lr_warmup": 48.0}, "whole": {"eps_warmup": 12.0}}.items():
        with opening.open_run(config_of(tmp_path / name, defense="fgsm", eps1=0.05, **rises), tiny):
            pass
    assert capsys.readouterr().err.splitlines() == [
        "warning: --eps_warmup=24: the rise of every budget is cut off at 0.5 of it, for the run has 12 steps; give at most "
        "12, or a fraction below 1",
        "warning: --lr_warmup=48: the rise of the learning rate is cut off at 0.25 of it, for the run has 12 steps; give at "
        "most 12, or a fraction below 1",
    ]


def test_a_network_is_not_watched_while_the_budget_rises(tiny, tmp_path):
    with opening.open_run(config_of(tmp_path, defense="fgsm", eps1=0.05, eps_warmup=0.7), tiny) as run:
        trainer.train(run, never)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_robust" in line] == [5, 10, 12]
    assert [line["step"] for line in lines if "validation_alignment" in line] == [10, 12]


def test_the_test_set_has_no_say_in_which_is_best(workdir, tiny, tmp_path):
    """Test labels that are all wrong: judged on them, who has learnt most would be the worst."""
    wrong = dataclasses.replace(tiny, y_test=(tiny.y_test + 1) % 3)
    with (
        opening.open_run(config_of(tmp_path / "new"), wrong) as other,
        opening.open_run(config_of(workdir), tiny) as run,
    ):
        state = run.restore()
        assert trainer.validate(other, state, never) == trainer.validate(run, state, never)


def test_who_stops_a_run_does_not_wait_for_the_attack_on_a_checkpoint(tiny, tmp_path, monkeypatch):
    made, real = [], opening.evaluate

    def telling(*args, progress, **kwargs):
        def signalled(name, gradients):
            made.append(name)
            signal.raise_signal(signal.SIGTERM)
            progress(name, gradients)

        return real(*args, progress=signalled, **kwargs)

    monkeypatch.setattr(opening, "evaluate", telling)
    config = config_of(tmp_path, eval_batch_size=10)
    with opening.open_run(config, tiny) as run, signals.stopping() as stop:
        state, _ = trainer.train(run, stop)
        assert (int(state.step), stop()) == (6, signal.SIGTERM)
        assert made == ["clean"], "one batch of one attack"
        assert {run.checkpoints.score(step) for step in steps_in(tmp_path)} == {checkpoint.UNJUDGED}
        assert run.best() is None
    assert "score" not in (tmp_path / "metrics.jsonl").read_text()


def test_the_best_is_named_with_what_chose_it(scores, tiny, tmp_path):
    scores.update({5: 1.0, 10: 1.0, 12: 0.5})
    config = config_of(tmp_path / "w", validation_examples=10)
    with opening.open_run(config, tiny) as run:
        trainer.train(run, stop_after(13))
        assert run.best() == (10, "10 held-out images (the last, saved when the run was stopped, did not compete)")
        trainer.train(run, never)
        assert run.best() == (10, "10 held-out images"), "of equals the later"


# Several runs in one step.


@pytest.mark.slow
def test_runs_train_together_and_one_left_behind_catches_up(scores, tiny, tmp_path):
    """As after a kill between two members' checkpoints: they end where separate runs end, with curves without gaps."""
    train(dataclasses.replace(members(tmp_path)[0], steps=5), tiny)
    states = train_together(members(tmp_path), tiny)
    for i, (state, config) in enumerate(zip(states, members(tmp_path / "alone"), strict=True)):
        single = train(config, tiny)
        assert int(state.step) == 12
        chex.assert_trees_all_close(state.params, single.params, atol=2e-5)
        together, alone = (losses(tmp_path / f"{folder}run{i}") for folder in ("", "alone/"))
        assert [step for step, _ in together] == [step for step, _ in alone]
        np.testing.assert_allclose([loss for _, loss in together], [loss for _, loss in alone], atol=1e-5)
    segments = read_training(tmp_path / "run0")
    assert [(s["from_step"], s["to_step"], s["runs_together"]) for s in segments] == [(0, 5, 1), (5, 12, 3)]
