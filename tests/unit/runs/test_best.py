"""The best checkpoint beside the last: which it is, what chose it, and that its numbers are its own."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

import e2sad_jax
from e2sad_jax import data
from e2sad_jax.runs import run, trainer
from e2sad_jax.training.config import Config
from tests.unit.training.test_train import standard_promotion  # noqa: F401

ATTACKS = ["clean", "FGSM 0.3"]


@pytest.fixture(autouse=True)
def short(monkeypatch, tiny, unoptimized):
    """`run.run` on the data set above with two attacks."""
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    monkeypatch.setitem(run.SUITES, "mnist", run.SUITES["mnist"][:2])
    monkeypatch.setattr("e2sad_jax.reporting.plots.examples", lambda *args, **kwargs: None)


@pytest.fixture
def scores(monkeypatch):
    """Scores of checkpoints by step, in place of an attack's."""
    scores: dict[int, float] = {}
    monkeypatch.setattr(trainer, "validate", lambda run, state, stop: {"score": scores[int(state.step)]})
    return scores


@pytest.fixture
def attacked(monkeypatch):
    """Steps of the states that were attacked after training, as they are."""
    steps, evaluate = [], run._evaluate

    def counting(job, state, suite):
        steps.append(int(state.step))
        return evaluate(job, state, suite)

    monkeypatch.setattr(run, "_evaluate", counting)
    return steps


def config(tmp_path, **changes) -> Config:
    settings = {"steps": 6, "checkpoint_every": 2, "batch_size": 16, "defense": "fgsm", "learning_rate": 1e-2}
    return Config(**{"data": "tiny.npz", "model": "digits_cnn", "workdir": str(tmp_path / "w"), **settings, **changes})


def predictions(workdir, images, which):
    return np.asarray(e2sad_jax.load(workdir, which)(images)).argmax(-1)


def test_both_are_attacked_and_each_has_its_own_numbers(scores, attacked, tiny, tmp_path, capsys):
    scores.update({2: 5.0, 4: 3.0, 6: 4.0})
    run.train_with_baseline([config(tmp_path)], "mnist")
    assert attacked == [6, 2]
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    outcomes = np.load(tmp_path / "w" / "outcomes.npz")
    assert (results["steps"], results["best"]["step"], results["best"]["chosen_on"]) == (6, 2, "50 training images")
    last, best = (predictions(tmp_path / "w", tiny.x_test, which) for which in ("last", "best"))
    assert (last != best).any(), "four steps of training make a difference"
    np.testing.assert_array_equal(outcomes["prediction"][0], last)
    np.testing.assert_array_equal(outcomes["best_prediction"][0], best)
    for measured, prefix in ((results, ""), (results["best"], "best_")):
        assert [row["name"] for row in measured["attacks"]] == ATTACKS
        right = outcomes[f"{prefix}prediction"] == tiny.y_test
        np.testing.assert_array_equal(outcomes[f"{prefix}correct"], right)
        assert [row["correct"] for row in measured["attacks"]] == list(right.sum(1))
        assert [row["accuracy"] for row in measured["attacks"]] == pytest.approx(list(right.mean(1)))
        assert measured["worst_case_accuracy"] == pytest.approx(right.all(0).mean())
    a, b = (measured["attacks"][0]["accuracy"] for measured in (results, results["best"]))
    out, page = capsys.readouterr().out, (tmp_path / "w" / "results.md").read_text()
    assert " fgsm  fgsm, best (step 2)\n" in out
    assert f"clean {a:>26.4f} {b:>20.4f}".split() in [line.split() for line in out.splitlines()]
    assert "\nfgsm: step 2 is the best checkpoint by PGD-10 on 50 training images; the column" in out
    assert "| attack | fgsm | fgsm, best (step 2) |\n| --- | ---: | ---: |\n" in page
    assert f"| clean | {a:.4f} | {b:.4f} |" in page
    assert "- fgsm: step 2 is the best checkpoint" in page


def test_a_last_that_is_the_best_is_attacked_once_and_named(scores, attacked, tmp_path, capsys):
    scores.update({2: 1.0, 4: 3.0, 6: 3.0})  # of equals the later
    run.train_with_baseline([config(tmp_path, validation_examples=10)], "mnist")
    assert attacked == [6]
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["best"] == {
        "step": 6,
        "chosen_on": "10 held-out images",
        "attacks": [{k: v for k, v in row.items() if k != "paper"} for row in results["attacks"]],
        "worst_case_accuracy": results["worst_case_accuracy"],
    }
    assert set(np.load(tmp_path / "w" / "outcomes.npz")) == {"attacks", "correct", "prediction"}
    out = capsys.readouterr().out
    assert "\nfgsm: the last is also the best checkpoint by PGD-10 on 10 held-out images\n" in out
    assert "(step" not in out


def test_a_resumed_run_keeps_the_best_of_before(scores, attacked, tiny, tmp_path):
    scores.update({2: 5.0, 4: 3.0, 6: 1.0, 8: 2.0})
    before = run.train_and_report(config(tmp_path, steps=4), "mnist")["best"]
    kept = predictions(tmp_path / "w", tiny.x_test, "best")
    results = run.train_and_report(config(tmp_path, steps=8), "mnist")
    assert (results["steps"], results["best"]) == (8, before)
    assert before["step"] == 2
    np.testing.assert_array_equal(np.load(tmp_path / "w" / "outcomes.npz")["best_prediction"][0], kept)
    again = run.train_and_report(config(tmp_path, steps=8), "mnist")
    assert attacked == [4, 2, 8, 2, 8, 2]
    assert (again["attacks"], again["best"]) == (results["attacks"], results["best"])
    scores[10] = 6.0
    assert run.train_and_report(config(tmp_path, steps=10), "mnist")["best"]["step"] == 10


def test_what_a_stop_saved_does_not_compete_and_the_report_says_so(scores, tmp_path, monkeypatch):
    scores.update({2: 1.0, 4: 3.0})
    take = trainer.Recorder.__call__
    for steps, every in ((5, 2), (1, 2)):  # with and without a judged one before it

        def interrupting(self, step, metrics, count, steps=steps):
            take(self, step, metrics, count)
            if step == steps:
                os.kill(os.getpid(), signal.SIGINT)

        stopped = config(tmp_path, steps=steps, checkpoint_every=every, workdir=str(tmp_path / str(steps)))
        with monkeypatch.context() as patch:
            patch.setattr(trainer.Recorder, "__call__", interrupting)
            with pytest.raises(run.Stopped):
                run.train_and_report(stopped, "mnist")
        best = run.train_and_report(stopped, "mnist")["best"]
        if steps == 5:
            assert best["step"] == 4
            assert best["chosen_on"] == "50 training images (the last, saved when the run was stopped, did not compete)"
        else:
            assert best is None
            assert "best checkpoint" not in (tmp_path / "1" / "results.md").read_text()


def test_interrupted_between_the_two_nothing_is_reported_yet(scores, tmp_path, monkeypatch):
    scores.update({2: 5.0, 4: 3.0, 6: 4.0})
    evaluate = run._evaluate

    def interrupted(job, state, suite):
        if int(state.step) == 2:
            raise KeyboardInterrupt
        return evaluate(job, state, suite)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.train_and_report(config(tmp_path), "mnist")
    assert not (tmp_path / "w" / "results.json").exists()
    assert run.train_and_report(config(tmp_path), "mnist")["best"]["step"] == 2


def test_the_test_set_has_no_say_in_which_is_best(tiny, tmp_path, monkeypatch):
    """Test labels that are all wrong: judged on them, who has learnt most would be the worst."""
    wrong = dataclasses.replace(tiny, y_test=(tiny.y_test + 1) % 3)
    monkeypatch.setattr(data, "load", lambda name, data_dir: wrong)
    results = run.train_and_report(
        config(tmp_path, steps=30, checkpoint_every=15, defense="natural", eps1=0.02), "mnist"
    )
    best, lines = results["best"]["step"], (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
    judged = {line["step"]: line for line in map(json.loads, lines) if "validation_score" in line}
    assert best == max(judged, key=lambda step: (judged[step]["validation_score"], step))
    right = predictions(tmp_path / "w", tiny.x_train, "best") == tiny.y_train
    assert right.mean() > 0.7
    assert judged[best]["validation_clean"] == pytest.approx(right.mean())
    assert results["best"]["attacks"][0]["accuracy"] < 0.2


def test_a_restored_state_is_attacked_by_the_program_of_a_trained_one(scores, tmp_path, caplog):
    """Else all attacks are compiled again for the best checkpoint."""
    scores.update({2: 5.0, 4: 3.0, 6: 4.0})
    with jax.log_compiles():
        run.train_and_report(config(tmp_path, eval_batch_size=30), "mnist")  # which no other test here has compiled
    made = [r.getMessage() for r in caplog.records if "Compiling jit(attack_batch)" in r.getMessage()]
    assert len(made) == len(ATTACKS)
