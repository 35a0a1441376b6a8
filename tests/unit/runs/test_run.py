"""A whole run and its report: the best checkpoint beside the last, the baseline, and what stops it."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

import e2sad_jax
from e2sad_jax.errors import ConfigError, DeviceError, NonFiniteError, OutOfMemoryError, Stopped, WorkdirError
from e2sad_jax.runs import opening, run
from e2sad_jax.runs.run import train_and_report, train_with_baseline
from tests.unit.runs.helpers import config_of, fit_with

ATTACKS = ["clean", "FGSM 0.3"]

pytestmark = pytest.mark.usefixtures("little_attacks")


@pytest.fixture
def attacked(monkeypatch):
    """Steps of the states that were attacked after training, as they are."""
    steps, attack = [], opening.Run.attack

    def counting(self, params, dataset, suite, **kwargs):
        if dataset is not self.validation_set:
            known = {int(self.restore(s).step): self.restore(s).params for s in {self.step, self.checkpoints.best_step}}
            steps.append(next(s for s, p in known.items() if np.array_equal(*map(first, (p, params)))))
        return attack(self, params, dataset, suite, **kwargs)

    monkeypatch.setattr(opening.Run, "attack", counting)
    return steps


def first(params):
    return np.asarray(jax.tree.leaves(params)[-1])


def predictions(workdir, images, which):
    return np.asarray(e2sad_jax.load(workdir, which)(images)).argmax(-1)


def saved(path):
    with np.load(path) as arrays:
        return dict(arrays)


def test_a_run_leaves_all_its_files(scores, tmp_path, monkeypatch):
    monkeypatch.setattr("e2sad_jax.reporting.plots.examples", lambda path, *args, **kwargs: path.write_bytes(b"PNG"))
    config = config_of(tmp_path)
    train_and_report(config, "mnist")
    names = {path.name for path in tmp_path.iterdir()}
    files = {"config.json", "training.json", "metrics.jsonl", "results.json", "results.md", "model_card.md"}
    assert files | {"outcomes.npz", "examples.png", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"date", "hardware", "jax", "commit"} <= set(results["environment"])
    assert run.summary({"natural": results}, config).endswith(f"training curves: {tmp_path / 'metrics.jsonl'}")


def test_both_checkpoints_are_attacked_and_each_has_its_own_numbers(scores, attacked, tiny, tmp_path):
    scores.update({5: 5.0, 10: 3.0, 12: 4.0})
    config = config_of(tmp_path, defense="fgsm")
    everything = train_with_baseline([config], "mnist")
    assert attacked == [12, 5]
    results = json.loads((tmp_path / "results.json").read_text())
    outcomes = saved(tmp_path / "outcomes.npz")
    assert (results["steps"], results["best"]["step"], results["best"]["chosen_on"]) == (12, 5, "50 training images")
    last, best = (predictions(tmp_path, tiny.x_test, which) for which in ("last", "best"))
    assert (last != best).any(), "seven steps of training make a difference"
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
    out, page = run.summary(everything, config), (tmp_path / "results.md").read_text()
    assert f"clean {a:.4f} {b:.4f}".split() in [line.split() for line in out.splitlines()]
    assert "fgsm: the checkpoint of step 5 is the best by PGD-10 on 50 training images." in out
    assert "| attack | fgsm | fgsm, best (step 5) |" in page
    assert f"| clean | {a:.4f} | {b:.4f} |" in page


def test_a_last_that_is_the_best_is_attacked_once_and_named(scores, attacked, tmp_path):
    scores.update({5: 1.0, 10: 3.0, 12: 3.0})
    config = config_of(tmp_path, validation_examples=10)
    results = train_and_report(config, "mnist")
    assert attacked == [12]
    assert results["best"] == {
        "step": 12,
        "averaged": False,
        "chosen_on": "10 held-out images",
        "attacks": [{k: v for k, v in row.items() if k != "paper"} for row in results["attacks"]],
        "worst_case_accuracy": results["worst_case_accuracy"],
    }
    assert set(saved(tmp_path / "outcomes.npz")) == {"attacks", "correct", "prediction"}
    out = run.summary({"natural": results}, config)
    assert "natural: the last checkpoint is also the best by PGD-10 on 10 held-out images." in out
    assert "(step" not in out


def test_a_resumed_run_keeps_the_best_of_before(scores, attacked, tiny, tmp_path):
    scores.update({5: 5.0, 10: 3.0, 12: 2.0})
    before = train_and_report(config_of(tmp_path, steps=10), "mnist")["best"]
    kept = predictions(tmp_path, tiny.x_test, "best")
    results = train_and_report(config_of(tmp_path), "mnist")
    assert (results["steps"], results["best"]) == (12, before)
    assert before["step"] == 5
    np.testing.assert_array_equal(saved(tmp_path / "outcomes.npz")["best_prediction"][0], kept)
    again = train_and_report(config_of(tmp_path), "mnist")
    assert attacked == [10, 5, 12, 5, 12, 5]
    assert (again["attacks"], again["best"]) == (results["attacks"], results["best"])
    scores[15] = 6.0
    assert train_and_report(config_of(tmp_path, steps=15), "mnist")["best"]["step"] == 15


def test_without_a_validated_checkpoint_no_best_is_reported(scores, tmp_path, monkeypatch):
    config = config_of(tmp_path, steps=1)
    with monkeypatch.context() as patch:
        fit_with(patch, 1, lambda metrics: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Stopped):
            train_and_report(config, "mnist")
    assert train_and_report(config, "mnist")["best"] is None
    assert "the best by" not in (tmp_path / "results.md").read_text()


def test_a_baseline_stands_beside_the_run_in_its_table(scores, tmp_path):
    scores[12] = 1.0
    natural, chosen = (config_of(tmp_path / name, defense=name) for name in ("natural", "fgsm"))
    results = train_with_baseline([natural, chosen], "mnist")
    assert list(results) == ["natural", "fgsm"]
    assert "| attack | natural | fgsm |" in (tmp_path / "fgsm" / "results.md").read_text()
    assert "| attack | natural |\n" in (tmp_path / "natural" / "results.md").read_text()
    assert "  natural    fgsm" in run.summary(results, chosen)


def test_a_seed_that_diverges_is_left_out_of_the_seeds_table(scores, tmp_path, monkeypatch, capsys):
    by_seed = [[config_of(tmp_path / str(seed)).replace(seed=seed)] for seed in range(3)]
    train = run.train_with_baseline

    def diverging(configs, suite):
        if configs[0].seed == 1:
            raise NonFiniteError("step 7: loss=nan")
        return train(configs, suite)

    monkeypatch.setattr(run, "train_with_baseline", diverging)
    with pytest.raises(NonFiniteError, match="1 of 3 seeds diverged: 1"):
        run.train_seeds(by_seed, "mnist")
    page = (tmp_path / "0" / "seeds.md").read_text()
    assert "over 2 runs, of seeds 0, 2." in page
    accuracies = [
        json.loads((tmp_path / str(seed) / "results.json").read_text())["worst_case_accuracy"] for seed in (0, 2)
    ]
    assert f"{np.mean(accuracies):.4f} ± {np.std(accuracies, ddof=1):.4f}" in page
    printed = capsys.readouterr()
    assert "Seed 0" in printed.err
    assert "seed 1: step 7: loss=nan" in printed.err
    assert f"table of the seeds: {tmp_path / '0' / 'seeds.md'}" in printed.out
    with pytest.raises(NonFiniteError, match="step 7: loss=nan"):
        run.train_seeds(by_seed[1:2], "mnist")


def test_runs_that_do_not_go_together_are_refused(tmp_path):
    one = config_of(tmp_path / "one")
    with pytest.raises(ConfigError, match="--defense=natural: is the baseline's too"):
        train_with_baseline([one, config_of(tmp_path / "two")], "mnist")
    with pytest.raises(ConfigError, match=r"--workdir=.*one: is the baseline's too"):
        train_with_baseline([one, config_of(tmp_path / "one", defense="fgsm")], "mnist")
    with pytest.raises(ConfigError, match=r"suite='minst': must be one of mnist, digits, svhn"):
        train_and_report(one, "minst")
    assert not (tmp_path / "one").exists()


# Stopped.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_the_last_step_is_not_forgotten(number, code, scores, tmp_path, monkeypatch):
    """Training is complete and saved, but who pressed Ctrl-C does not want to wait for the attacks."""
    with monkeypatch.context() as patch:
        fit_with(patch, 12, lambda metrics: signal.raise_signal(number))
        with pytest.raises(
            Stopped, match=r"Stopped at step 12 of 12; everything is saved in .*\. The same command"
        ) as stopped:
            train_and_report(config_of(tmp_path), "mnist")
    assert stopped.value.exit_code == code
    assert not (tmp_path / "results.json").exists()

    restore = (
        opening.Run.restore
    )  # the same while the finished run is read back; and a repeat within a second counts once

    def interrupted_restore(self, *args):
        for _ in range(2):
            signal.raise_signal(number)
        return restore(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(opening.Run, "restore", interrupted_restore)
        with pytest.raises(Stopped, match="Stopped at step 12 of 12"):
            train_and_report(config_of(tmp_path), "mnist")
    assert train_and_report(config_of(tmp_path), "mnist")["steps"] == 12
    assert (tmp_path / "results.json").exists()


def test_the_command_that_resumes_leaves_noresume_out(scores, tmp_path, monkeypatch):
    fit_with(monkeypatch, 1, lambda metrics: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stopped, match="The same command without --noresume resumes"):
        train_and_report(config_of(tmp_path, steps=1, resume=False), "mnist")


def test_interrupted_between_the_two_evaluations_nothing_is_reported_yet(scores, tmp_path, monkeypatch):
    scores.update({5: 5.0, 10: 3.0, 12: 4.0})
    attack, calls = opening.Run.attack, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attack(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(opening.Run, "attack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_and_report(config_of(tmp_path), "mnist")
    assert not (tmp_path / "results.json").exists()
    assert train_and_report(config_of(tmp_path), "mnist")["best"]["step"] == 5


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (
            "RESOURCE_EXHAUSTED: out",
            OutOfMemoryError,
            r"in the attacks on step 12 .*a lower --eval_batch_size \(now 250",
        ),
        (
            "INTERNAL: illegal",
            DeviceError,
            r"in the attacks on step 12 \(INTERNAL: illegal\); the checkpoints are intact",
        ),
    ],
)
def test_memory_and_devices_are_named_in_the_attacks_too(raised, kind, words, scores, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise jax.errors.JaxRuntimeError(raised)

    monkeypatch.setattr(opening.Run, "attack", fail)
    with pytest.raises(kind, match=words):
        train_and_report(config_of(tmp_path), "mnist")


def test_without_a_budget_there_is_nothing_to_attack_with_and_no_error(tmp_path):
    for defense, changes in {"natural": {}, "pgd": {}, "e2sad": {"eps2": 0.0}}.items():
        config = config_of(tmp_path / defense, defense=defense, steps=2, eps1=0.0, **changes)
        assert train_and_report(config, "mnist")["best"]["step"] == 2


def test_a_restored_state_is_attacked_by_the_program_of_a_trained_one(scores, tmp_path, caplog):
    """Else all attacks are compiled again for the best checkpoint."""
    scores.update({5: 5.0, 10: 3.0, 12: 4.0})
    with jax.log_compiles():
        train_and_report(config_of(tmp_path, eval_batch_size=30), "mnist")  # which no other test here has compiled
    made = [r.getMessage() for r in caplog.records if "Compiling jit(run)" in r.getMessage()]
    assert len(made) == len(ATTACKS)


def test_other_data_in_the_same_folder_is_refused(scores, tiny, tmp_path, monkeypatch):
    train_and_report(config_of(tmp_path, steps=2), "mnist")
    other = dataclasses.replace(tiny, x_train=255 - tiny.x_train)
    monkeypatch.setattr("e2sad_jax.data.load", lambda name, data_dir: other)
    with pytest.raises(WorkdirError, match=r"tiny there, tiny here, with other content"):
        train_and_report(config_of(tmp_path, steps=2), "mnist")
