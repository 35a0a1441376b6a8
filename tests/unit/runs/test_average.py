"""Averaged weights of a run on disk: validated, chosen, loaded, exported, evaluated, reported; refused where there are none."""

import json
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from e2sad_jax import export
from e2sad_jax.errors import ConfigError
from e2sad_jax.runs import checkpoint, evaluate, opening, run, trainer, validation
from e2sad_jax.runs.checkpoint import Checkpoints
from e2sad_jax.runs.classifier import load
from e2sad_jax.runs.folder import write_config
from e2sad_jax.runs.run import train_and_report
from tests.unit.runs.helpers import config_of, never, same, stop_after, train
from tests.unit.runs.test_run import predictions, saved

EMA = 0.9
KEYS = {"clean", "robust", "average_clean", "average_robust", "averaged", "score"}


@pytest.fixture(scope="module")
def judged():
    """Replaces the attack of validation: `judged(patch, raw, average, ...)`, robust accuracies in the order of asking."""

    def replace(patch, *accuracies):
        left = list(accuracies)

        def validated(run, params, stop):
            robust = left.pop(0)
            return {"clean": 0.9, "robust": robust, "score": 50 * robust + 0.9}

        patch.setattr(validation, "_validated", validated)
        return left

    return replace


@pytest.fixture(scope="module")
def averaged(judged, tiny, tmp_path_factory, linear) -> pathlib.Path:
    """A run of 12 steps; of steps 5, 10 and 12 the average of step 10 is best, of step 12 the raw weights are better."""
    workdir = tmp_path_factory.mktemp("averaged") / "w"
    with pytest.MonkeyPatch.context() as patch:
        left = judged(patch, 0.1, 0.2, 0.3, 0.8, 0.6, 0.5)
        train(config_of(workdir, ema=EMA), tiny)
        assert not left, "both are validated at each checkpoint"
    return workdir


def state_at(workdir, dataset, step):
    with opening.open_run(config_of(workdir, ema=EMA), dataset) as opened:
        return opened.restore(step)


# Chosen and loaded.


def test_both_are_validated_and_the_score_is_that_of_the_better(averaged):
    lines = [json.loads(line) for line in (averaged / "metrics.jsonl").read_text().splitlines()]
    said = {line["step"]: line for line in lines if "validation_score" in line}
    assert {f"validation_{key}" for key in KEYS} <= set(said[10])
    assert [(said[s]["validation_robust"], said[s]["validation_average_robust"]) for s in (5, 10, 12)] == [
        (0.1, 0.2),
        (0.3, 0.8),
        (0.6, 0.5),
    ]
    assert [said[s]["validation_averaged"] for s in (5, 10, 12)] == [1, 1, 0]
    assert [said[s]["validation_score"] for s in (5, 10, 12)] == pytest.approx([10.9, 40.9, 30.9])
    with Checkpoints(averaged, read_only=True) as checkpoints:
        assert (checkpoints.best_step, checkpoints.averaged(10), checkpoints.averaged(12)) == (10, True, False)


def test_what_is_loaded_is_what_was_asked_for(averaged, tiny):
    last, best = state_at(averaged, tiny, 12), state_at(averaged, tiny, 10)
    for which, step, params, is_average in (
        ("last", 12, last.params, False),
        ("average", 12, last.average, True),
        ("best", 10, best.average, True),
    ):
        classifier = load(averaged, which)
        assert (classifier.step, classifier.averaged) == (step, is_average)
        chex.assert_trees_all_equal(classifier.params, params)
    assert not np.allclose(*(jax.tree.leaves(params)[-1] for params in (last.params, last.average)))


def test_a_best_whose_raw_weights_were_better_is_loaded_raw(averaged, tiny, monkeypatch):
    monkeypatch.setattr(Checkpoints, "averaged", lambda self, step: step != 10)
    classifier = load(averaged, "best")
    assert (classifier.step, classifier.averaged) == (10, False)
    chex.assert_trees_all_equal(classifier.params, state_at(averaged, tiny, 10).params)


def test_validation_attacks_both(tiny, tmp_path):
    """By themselves: broken raw weights beside those of a class that is always said."""
    config = config_of(tmp_path / "w", ema=EMA, eps1=0.01)
    with opening.open_run(config, tiny) as opened:
        state = opened.init_state()
        always = jax.tree.map(lambda a: 0 * a, state.params)

        def saying(k):
            bias = always["params"]["Dense_0"]["bias"].at[k].set(1.0)
            return {"params": {"Dense_0": {**always["params"]["Dense_0"], "bias": bias}}}

        counts = np.bincount(tiny.y_train, minlength=3) / 50
        fewest, most = counts.argmin(), counts.argmax()
        for raw, average, is_average in ((fewest, most, 1), (most, fewest, 0)):
            found = trainer.validate(opened, state.replace(params=saying(raw), average=saying(average)), never)
            shares = {"clean": counts[raw], "robust": counts[raw]}
            shares |= {"average_clean": counts[average], "average_robust": counts[average], "averaged": is_average}
            assert set(found) == KEYS
            assert {key: found[key] for key in shares} == pytest.approx(shares)
            assert found["score"] == pytest.approx(50 * counts[most] + counts[most] * 50 / 51)
        raw_only = trainer.validate(opened, state.replace(average=None), never)
        assert set(raw_only) == {"clean", "robust", "score"}
        assert trainer.validate(opened, state, stop_after(1)) == {"score": checkpoint.UNJUDGED}


def test_of_equals_the_raw_weights_are_the_better_and_stopped_between_the_two_nothing_is(judged, monkeypatch):
    state = type("State", (), {"params": 1, "average": 2})()
    judged(monkeypatch, 0.5, 0.5)
    assert trainer.validate(None, state, never)["averaged"] == 0
    found = [{"clean": 0.9, "robust": 0.5, "score": 25.9}, {"score": checkpoint.UNJUDGED}]
    monkeypatch.setattr(validation, "_validated", lambda run, params, stop: found.pop(0))
    assert trainer.validate(None, state, never) == {"score": checkpoint.UNJUDGED}
    assert not found


@pytest.mark.slow
def test_a_resumed_run_has_the_same_averages_bit_for_bit(scores, averaged, tiny, tmp_path):
    config = config_of(tmp_path / "w", ema=EMA)
    assert int(train(config, tiny, stop_after(4)).step) == 4
    same(train(config, tiny), state_at(averaged, tiny, 12))


# Exported, evaluated, reported.


def test_averaged_weights_are_exported_with_a_card_that_says_so(averaged, tmp_path):
    request = export.Request(workdir=str(averaged), which="average", to=str(tmp_path), format="safetensors")
    card = export.run(request)
    assert (card["checkpoint"], card["averaged"], card["step"]) == ("average", True, 12)
    back = export.load_safetensors(tmp_path / "model.safetensors")
    assert back.averaged
    chex.assert_trees_all_equal(back.params, load(averaged, "average").params)


def test_averaged_weights_are_what_evaluation_attacks(averaged, tiny, monkeypatch):
    monkeypatch.setattr("e2sad_jax.data.load", lambda name, data_dir: tiny)
    for which, words in (("last", "natural (w)"), ("average", "natural (w, averaged weights)")):
        asked = evaluate._asked(evaluate.Request(workdir=str(averaged), which=which, examples=10))
        assert asked.model.name == words
        chex.assert_trees_all_equal(asked.model.params, load(averaged, which).params)


@pytest.mark.usefixtures("little_attacks")
def test_the_report_names_averaged_weights_though_they_are_those_of_the_last_step(
    judged, tiny, tmp_path, monkeypatch, capsys
):
    judged(monkeypatch, 0.5, 0.8)
    config = config_of(tmp_path, ema=EMA, steps=5)
    results = train_and_report(config, "mnist")
    best, outcomes = results["best"], saved(tmp_path / "outcomes.npz")
    assert (results["steps"], best["step"], best["averaged"]) == (5, 5, True)
    assert json.loads((tmp_path / "results.json").read_text())["best"]["averaged"] is True
    for prefix, which, measured in (("", "last", results), ("best_", "average", best)):
        np.testing.assert_array_equal(outcomes[f"{prefix}prediction"][0], predictions(tmp_path, tiny.x_test, which))
        right = (outcomes[f"{prefix}prediction"] == tiny.y_test).sum(1)
        assert [row["correct"] for row in measured["attacks"]] == list(right)
    chex.assert_trees_all_equal(load(tmp_path, "best").params, load(tmp_path, "average").params)
    page, card = ((tmp_path / name).read_text() for name in ("results.md", "model_card.md"))
    said = "natural: the averaged weights of step 5 are the best by PGD-10 on 50 training images."
    assert said in page
    assert said in run.summary({"natural": results}, config)
    assert "| attack | natural | natural, best (step 5, averaged weights) |" in page
    assert "| accuracy | best checkpoint, step 5, averaged weights |" in card
    assert f"--ema={EMA}" in card
    assert "attack natural on tiny, averaged weights" in capsys.readouterr().err


# Refused.


@pytest.fixture
def without(tiny, tmp_path) -> str:
    """The folder of a run without averages."""
    (tmp_path / "w").mkdir()
    write_config(tmp_path / "w", config_of(tmp_path / "w"), tiny)
    return str(tmp_path / "w")


def test_a_run_without_averages_refuses_them_in_one_line(without, tmp_path):
    words = (
        r"^--which=average: .*/w was trained without averaged weights; choose last or best, or train with --ema=0.999$"
    )
    flags = {"workdir": without, "which": "average"}
    for ask in (
        lambda: load(without, "average"),
        lambda: evaluate.run(evaluate.Request(**flags)),
        lambda: export.run(export.Request(**flags, to=str(tmp_path / "there"))),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            ask()
        assert caught.value.exit_code == 2
    assert not (tmp_path / "there").exists()
    assert not (tmp_path / "w" / "evaluation").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_the_command_says_it_and_ends_with_2(command, without):
    words = [sys.executable, "-m", "e2sad_jax", command, without, "--which=average"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert line.endswith("/w was trained without averaged weights; choose last or best, or train with --ema=0.999")
    assert (done.returncode, done.stdout) == (2, "")
