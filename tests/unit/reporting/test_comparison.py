"""The comparison of defenses: what is asked, and its runs; one small one from training to picture."""

import contextlib
import dataclasses
import json
import pathlib
import random
import types

import jax
import numpy as np
import pytest

from e2sad_jax import data, defenses, training
from e2sad_jax._io import read_sealed, sealed
from e2sad_jax.comparison import evaluate_model, flops, show
from e2sad_jax.comparison import run as comparison
from e2sad_jax.comparison.request import FASTAT, PARTS, Request, entries, position
from e2sad_jax.comparison.run import run
from e2sad_jax.errors import ConfigError, NonFiniteError, WorkdirError
from e2sad_jax.reporting import provenance
from e2sad_jax.runs import opening, trainer
from e2sad_jax.runs.classifier import load
from e2sad_jax.runs.weights import note_source
from tests.unit.reporting.helpers import LITTLE, no_more, quiet
from tests.unit.runs.test_folder import damages


def without_origins(rows):
    """The rows, whose runs say by which command they were measured once they are read again."""
    return [
        {**row, "runs": [{key: value for key, value in one.items() if key != "origin"} for one in row["runs"]]}
        for row in rows
    ]


FILES = ("compare.md", "compare.json", "compare.png", "compare_card.md")


@pytest.mark.slow
def test_models_are_trained_attacked_once_and_shown(little, tiny_data, tmp_path, monkeypatch, standard_promotion):
    scores = {"natural": {1: 0.0, 2: 1.0, 3: 1.0}, "rs_fgsm": {1: 0.0, 2: 2.0, 3: 1.0}}
    monkeypatch.setattr(
        trainer, "validate", lambda run, state, stop: {"score": scores[run.config.defense][int(state.step)]}
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    request = Request(
        entry=("RS-FGSM", "natural"), data="tiny.npz", workdir="~/runs", results=str(tmp_path / "out"), **LITTLE
    )
    said, attacked, auto, train = [], [], evaluate_model.auto, trainer.train

    def counting(apply, params, *args, **kwargs):
        attacked.append(params)
        return auto(apply, params, *args, **kwargs)

    monkeypatch.setattr(evaluate_model, "auto", counting)
    result = run(request, said.append)
    natural, rs_fgsm = result["rows"]
    assert (natural["name"], rs_fgsm["name"]) == ("natural", "RS-FGSM"), "in the order of their price"
    assert rs_fgsm["step_flops"] == pytest.approx(1.7 * natural["step_flops"], rel=0.15)
    assert natural["flops"] == 3 * natural["step_flops"] == 3 * result["natural_step_flops"]
    for row in result["rows"]:
        (one,) = row["runs"]
        for which in ("last", "best"):
            own, mean = one[which], row[which]
            assert 0 <= mean["robust"] == own["robust"] <= own["after"]["APGD-CE"] <= mean["clean"] == own["clean"]
            assert mean["lowest"] == mean["highest"] == mean["robust"]
        kept = read_sealed(evaluate_model.outcome_path(one["workdir"], one["asked"]))
        assert {**kept, "trained": [provenance.commit()]} == one
        assert load(one["workdir"]).config.validation_examples == 10
    assert [row[which]["steps"] for row in result["rows"] for which in ("last", "best")] == [[3], [3], [3], [2]]
    kept = [(natural, "last"), (rs_fgsm, "last"), (rs_fgsm, "best")]
    assert len(attacked) == 3, "once where the best is the last"
    for params, (row, which) in zip(attacked, kept, strict=True):
        saved = load(row["runs"][0]["workdir"], which).params
        for ours, theirs in zip(*map(jax.tree.leaves, (params, saved)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert ["best checkpoint" in line for line in said[:2]] == [False, True]
    assert said[2:] == [str(tmp_path / "out" / name) for name in FILES]
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "out" / "compare.md").read_text() == show.markdown(result)
    assert (tmp_path / "out" / "compare_card.md").read_text() == show.card(result)
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000

    monkeypatch.setattr(evaluate_model.trainer, "train", no_more)
    monkeypatch.setattr(evaluate_model, "auto", no_more)
    assert without_origins(run(request, quiet)["rows"]) == without_origins(result["rows"])
    for other in ({"examples": 5}, {"judge": "held_out"}):
        with pytest.raises(AssertionError, match="done before"):
            run(Request(**{**LITTLE, **other}, data="tiny.npz", workdir="~/runs"), quiet)
    monkeypatch.setattr(evaluate_model.trainer, "train", train)
    monkeypatch.setattr(evaluate_model, "auto", counting)
    fewer = dataclasses.replace(request, examples=5)
    assert [row["runs"][0]["images"] for row in run(fewer, quiet)["rows"]] == [5, 5]
    monkeypatch.setattr(evaluate_model, "auto", no_more)
    assert without_origins(run(request, quiet)["rows"]) == without_origins(result["rows"]), (
        "a run keeps its outcome of each question"
    )
    run(fewer, quiet)


def test_an_outcome_counts_for_its_own_question_alone(tiny, tmp_path, capsys):
    request = Request(entry=("natural",), data="a.npz", workdir=str(tmp_path), **LITTLE)
    asked = evaluate_model.question(request, tiny)
    path = evaluate_model.outcome_path(tmp_path, asked)
    last, best = ({"step": step, "clean": 1.0, "robust": 0.5} for step in (3, 2))
    done = {"asked": asked, "last": last, "best": best, "seed": 0, "eps": 0.3, "images": 10, "chosen_on": "10 images"}
    done["train_seconds"] = 1.0
    assert evaluate_model.known_outcome(path, asked, 3) == {}, "no such file"
    path.write_text(json.dumps(sealed(done)))
    assert evaluate_model.known_outcome(path, asked, 3) == done
    assert evaluate_model.known_outcome(path, asked, 4) == {}, "of another length"
    other_images = dataclasses.replace(tiny, x_test=tiny.x_test[::-1].copy())
    for question in (
        evaluate_model.question(request, other_images),
        evaluate_model.question(dataclasses.replace(request, judge="held_out"), tiny),
        evaluate_model.question(dataclasses.replace(request, queries=6), tiny),
    ):
        assert evaluate_model.known_outcome(path, question, 3) == {}
    path.write_text(json.dumps(sealed({"asked": asked, "last": last})))
    assert evaluate_model.known_outcome(path, asked, 3) == {"asked": asked, "last": last}, "the first of two attacks"
    assert capsys.readouterr().err == ""
    path.write_text(json.dumps(sealed(done)))
    for damaged in damages(random.Random(0), path.read_bytes(), 100):
        path.write_bytes(damaged)
        assert evaluate_model.known_outcome(path, asked, 3) in ({}, done), damaged
    path.write_text(json.dumps({**sealed(done), "seed": 1}))
    capsys.readouterr()
    assert evaluate_model.known_outcome(path, asked, 3) == {}
    assert f"{path} is unusable" in capsys.readouterr().err
    for damaged in (b"", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000):
        path.write_bytes(damaged)
        assert evaluate_model.known_outcome(path, asked, 3) == {}


def test_an_outcome_counts_for_the_weights_that_its_run_began_with(tiny, tmp_path):
    given = tmp_path / "given.safetensors"
    given.write_bytes(b"one")
    request = Request(entry=("natural",), workdir=str(tmp_path), init_from=str(given), last_only=True, **LITTLE)
    (config,), asked = request.configs("natural"), evaluate_model.question(request, tiny)
    path = evaluate_model.outcome_path(config.workdir, asked)
    path.parent.mkdir(parents=True)
    note_source(config, path.parent)
    last = {"step": 3, "clean": 1.0, "robust": 0.5}
    done = {"asked": asked, "last": last, "seed": 0, "eps": 0.3, "images": 10, "chosen_on": "", "train_seconds": 1.0}
    path.write_text(json.dumps(sealed(done)))
    assert evaluate_model.evaluate_model(request, config, tiny) == done
    given.write_bytes(b"two")
    with pytest.raises(WorkdirError, match=r"began with other weights than .*given\.safetensors holds now"):
        evaluate_model.evaluate_model(request, config, tiny)
    given.unlink()
    assert evaluate_model.evaluate_model(request, config, tiny) == done, "the weights may be gone"


def test_rows_that_began_with_other_weights_are_left_out():
    def row(name, **run):
        return {"name": name, "runs": [{"asked": {"eps": 0.3}, **run}]}

    said = []
    earlier = [row("same", begun_with={"sha256": "a"}), row("other", begun_with={"sha256": "b"}), row("unknown")]
    mine = row("mine", begun_with={"sha256": "a"})
    kept = comparison._same_question(earlier, mine, said.append)
    assert [one["name"] for one in kept] == ["same", "unknown"]
    assert said == ["other: an earlier row, begun with other weights; left out"]
    assert comparison._same_question(earlier, row("from random weights"), said.append) == earlier


def test_other_data_makes_other_runs(tmp_path):
    request = Request(entry=("natural",), data="a.npz", workdir=str(tmp_path), **LITTLE)
    (a,), (b,) = (dataclasses.replace(request, data=name).configs("natural") for name in ("a.npz", "b.npz"))
    assert a.workdir != b.workdir


def test_held_out_images_must_be_new_to_the_given_weights(tmp_path, monkeypatch):
    def seen(*given):
        raise ConfigError(str(given))

    monkeypatch.setattr(comparison, "check_unseen", seen)
    request = Request(entry=("natural",), workdir=str(tmp_path), init_from="w", judge="held_out", **LITTLE)
    with pytest.raises(ConfigError, match=rf"^\('w', '{request.data}', {request.validation_examples}\)$"):
        run(request)


def test_every_entry_begins_with_the_given_weights(tmp_path):
    request = Request(entry=("natural", "PGD-3", "e2SAD, robust2"), workdir=str(tmp_path), **LITTLE)
    given = dataclasses.replace(request, init_from="runs/natural")
    assert given.question() != request.question()
    for name in request.entry:
        (without,), (config,) = request.configs(name), given.configs(name)
        assert (without.init_from, config.init_from) == ("", "runs/natural")
        assert config.workdir != without.workdir


def test_held_out_images_are_attacked_to_choose_settings(
    tiny_data, tmp_path, prices, monkeypatch, little, standard_promotion
):
    seen = []

    def attacked(config, which, images, labels, stages):
        seen.append(images)
        if len(seen) == 2:
            raise KeyboardInterrupt
        step = {"last": 3, "best": 2}[which]
        state = evaluate_model.state_digest(pathlib.Path(config.workdir), step)
        return {"step": step, "state": state, "clean": 1.0, "after": {}, "robust": 0.5}

    monkeypatch.setattr(evaluate_model, "_attacked", attacked)
    monkeypatch.setattr(trainer, "validate", lambda run, state, stop: {"score": float(int(state.step) == 2)})
    request = Request(entry=("natural",), data="tiny.npz", judge="held_out", workdir=str(tmp_path / "runs"), **LITTLE)
    alone = dataclasses.replace(request, last_only=True)
    assert "best" not in run(alone, quiet)["rows"][0]
    assert len(seen) == 1
    with pytest.raises(KeyboardInterrupt):  # while the best is attacked
        run(request, quiet)
    result = run(request, quiet)
    assert [result["rows"][0][which]["steps"] for which in ("last", "best")] == [[3], [2]]
    assert len(seen) == 3, "the last is not attacked again"
    train_set, validation_set = data.hold_out(tiny_data, 10)
    np.testing.assert_array_equal(seen[0], validation_set.x_test)
    assert not any((image == train_set.x_train).all((1, 2, 3)).any() for image in seen[0])
    written = (tmp_path / "runs" / "compare.md").read_text()
    assert "10 images held out of the training set" in written
    assert "best" in written
    run(alone, quiet)
    assert len(seen) == 3, "what other checkpoints have is kept"
    assert "best" not in (tmp_path / "runs" / "compare.md").read_text()
    run(request, quiet)
    assert len(seen) == 3


def test_a_sample_is_the_same_for_every_model_and_has_every_class(tiny, tmp_path, monkeypatch):
    """Of a file sorted by class; an outcome on the first images, as they once were taken, counts for nothing."""
    order = np.argsort(tiny.y_test, kind="stable")
    in_order = dataclasses.replace(tiny, x_test=tiny.x_test[order], y_test=tiny.y_test[order])
    seen = []

    def attacked(config, which, images, labels, stages):
        seen.append(labels)
        return {"step": 3, "state": None, "clean": 1.0, "after": {}, "robust": 0.5}

    @contextlib.contextmanager
    def opened(config, dataset):
        pathlib.Path(config.workdir).mkdir(parents=True)
        yield types.SimpleNamespace(best=lambda: None, validation_set=dataset)

    monkeypatch.setattr(evaluate_model, "_attacked", attacked)
    monkeypatch.setattr(opening, "open_run", opened)
    monkeypatch.setattr(trainer, "train", lambda run, stop: (None, 1.0))
    request = Request(entry=("natural", "RS-FGSM"), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    for name in request.entry:
        outcome = evaluate_model.evaluate_model(request, request.configs(name)[0], in_order)
        assert (outcome["images"], outcome["of"], outcome["classes"]) == (10, 50, 3)
    np.testing.assert_array_equal(*seen)
    assert (np.abs(np.bincount(seen[0]) - 10 * np.bincount(tiny.y_test) / 50) < 1).all()
    part, whole = (evaluate_model.question(dataclasses.replace(request, examples=n), tiny) for n in (10, 50))
    assert {key for key in part if key not in whole} == {"drawn"}
    about = {"request": {"judge": "test"}, "num_classes": 3}
    assert show._images({**about, **outcome}) == "10 of 50 test images, 3 of 3 classes"


def test_a_folder_of_results_that_is_none_is_refused_before_anything_is_trained(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "evaluate_model", no_more)
    (tmp_path / "file").write_text("")
    request = Request(entry=("natural",), data="tiny.npz", results=str(tmp_path / "file"), **LITTLE)
    with pytest.raises(
        ConfigError, match=r"--results=.*file: cannot be written \(Not a directory\); choose another folder"
    ):
        run(request, quiet)


def test_every_run_diverged(tiny_data, tmp_path, made_up, monkeypatch):
    def diverged(*args):
        raise NonFiniteError("step 1: loss=nan")

    monkeypatch.setattr(comparison, "evaluate_model", diverged)
    with pytest.raises(NonFiniteError, match="every run diverged"):
        run(Request(entry=("natural",), data="tiny.npz", workdir=str(tmp_path), **LITTLE), quiet)


def test_with_equal_flops_all_spend_what_e2sad_does(prices, monkeypatch):
    request, folders = Request(steps=1000, batch_size=8, equal_flops=True), set()
    names = {"natural": 3000, "RS-FGSM": 1765, "e2SAD, robust": 1000, "IFGSM-30 (Eq. 3)": 150}
    for name, steps in names.items():
        (config,) = request.configs(name)
        own = flops.match_flops(request, config, (28, 28, 1), 3)
        assert own.steps == steps, name
        assert own.workdir.endswith(f"-{steps}")
        folders.add(own.workdir)
        assert own.checkpoint_every == max(min(500, steps // 4), steps // 8)
        assert flops.match_flops(dataclasses.replace(request, equal_flops=False), config, (28, 28, 1), 3) == config
    monkeypatch.setattr(flops, "REFERENCE", "natural")
    request = dataclasses.replace(request, steps=3000)
    found = {flops.match_flops(request, request.configs(name)[0], (28, 28, 1), 3).workdir for name in names}
    assert found == folders, "a run is found again, whoever's steps are matched"


def test_a_step_is_counted_once_for_all_seeds_and_lengths(monkeypatch):
    counted = []
    monkeypatch.setattr(flops, "_step_flops", lambda config, shape, classes: counted.append((config, shape)) or 1.0)
    for seed, steps in [(0, 5), (1, 7)]:
        config = training.configure(defense="pgd", seed=seed, steps=steps, workdir=f"w{seed}", attack_steps=3)
        assert flops.step_flops(config, [28, 28, 1], 10) == 1.0
    assert counted[0] == counted[1]
    assert hash(counted[0]) == hash(counted[1])
    assert counted[0][0].settings["attack_steps"] == 3


def test_what_the_data_is_too_small_for_is_refused_before_training(tiny_data, tmp_path, prices):
    for changes, words in [
        ({"validation_examples": 50}, r"--validation_examples=50: must be below the 50 training images of tiny"),
        ({"validation_examples": 40}, r"--batch_size=16: must be at most the 10 training images"),
    ]:
        with pytest.raises(ConfigError, match=words):
            run(Request(**{**LITTLE, **changes}, data="t.npz", workdir=str(tmp_path / "runs")))
    assert list(tmp_path.iterdir()) == []


def test_the_best_is_chosen_among_several_of_a_short_run():
    for steps, every in [(1, 1), (3, 1), (400, 100), (2000, 500), (8000, 1000)]:
        (config,) = Request(steps=steps, entry=("natural",)).configs("natural")
        assert (config.checkpoint_every, config.validation_examples) == (every, 1000)


def test_all_share_the_schedule_and_a_preset_brings_its_points():
    request = Request(eps=0.2, learning_rate=0.002, schedule="cosine", eps_warmup=0.25)
    configs = {name: request.configs(name)[0] for name in entries()}
    assert {(c.learning_rate, c.schedule, c.eps_warmup, c.eps1, c.eps_scale, c.delta) for c in configs.values()} == {
        (0.002, "cosine", 0.25, 0.2, 1.1, 0.25)
    }
    assert all(config.soft_label for config in configs.values())
    hard = dataclasses.replace(request, delta=0.0, eps_scale=1.0, ema=0.99).configs("PGD-3")[0]
    assert (hard.soft_label, hard.eps_scale, hard.ema) == (False, 1.0, 0.99)
    assert {c.defense for c in configs.values()} == set(defenses.DEFENSES), "every defense here"
    robust, letter = configs["e2SAD, robust"].settings, configs["e2SAD, paper's points"].settings
    assert [robust[k] for k in ("eps2", "alpha", "memory", "ball_second")] == [0.1, 0.0, "int8", True]
    assert [letter[k] for k in ("eps2", "alpha", "memory", "ball_second")] == [0.2 / 3, 0.6, "none", False]
    assert configs["PGD-2, shorter steps"].settings["attack_step_size"] == pytest.approx(0.16)
    parts = {name: request.configs(name)[0] for name in PARTS}
    assert parts["e2SAD, robust, second step of eps"].settings["eps2"] == 0.2
    assert parts["e2SAD, robust, full eps from the start"].eps_warmup == 0
    assert parts["e2SAD, robust, no dissimilarity"].eps_warmup == 0.25
    constant = parts["e2SAD, robust, constant learning rate"]
    assert (constant.schedule, constant.learning_rate, constant.eps_warmup) == ("constant", 0.001, 0.25)
    assert configs["e2SAD, robust2"].workdir == parts["e2SAD, robust, first point by a step"].workdir, "one run"
    assert len({c.workdir for c in [*parts.values(), configs["e2SAD, robust"]]}) == len(parts) + 1
    assert len({c.workdir for c in configs.values()}) == len(configs)


def test_fastats_recipe_stands_where_no_flag_is_given():
    request = Request.of(recipe="fastat")
    assert (request.data, request.eps, request.steps, request.queries) == ("cifar10", 8 / 255, 38_282, 5000)
    assert len(request.stages(10)) == 3
    assert set(request.entries()) > {"e2SAD, robust", "e2SAD, robust2", "natural", *FASTAT}
    for name in request.entries():
        (config,) = request.configs(name)
        about = (config.model, config.optimizer, config.learning_rate, config.schedule, config.augment)
        assert about == ("preact_resnet18", "sgd", 0.1, "onecycle", "crop,flip")
        assert (config.weight_decay, config.ema, config.eps_warmup) == (5e-4, 0.9995, 0.0)
        assert (config.eps1, config.eps_scale, config.delta) == (8 / 255, 1.0, 0.36)
        assert config.mean.startswith("0.4914")
    assert Request.of(recipe="fastat", augment="none", width=16).configs("natural")[0].augment == "none"
    narrow = Request(model="preact_resnet18", width=16, augment="flip").configs("natural")[0]
    assert (narrow.width, narrow.augment) == (16, "flip")
    short = Request.of(recipe="fastat", data="my.npz", steps=2000, model="digits_cnn", ema=0.0, entry=("PGD-10",))
    (config,) = short.configs("PGD-10")
    assert (short.data, config.steps, config.model, config.ema) == ("my.npz", 2000, "digits_cnn", 0.0), "as given"
    assert (config.mean, config.optimizer, short.entries()) == ("", "sgd", ("PGD-10",))


def test_a_registered_defense_is_an_entry_by_its_name(monkeypatch):
    mine = dataclasses.replace(defenses.DEFENSES["natural"], label="Mine")
    monkeypatch.setitem(defenses.DEFENSES, "mine", mine)
    assert "mine" in entries()
    assert Request(entry=("mine",)).configs("mine")[0].defense == "mine"
    assert len(entries()) <= position("mine") + 1 + len(PARTS)
    assert Request(entry=("pgd",)).configs("pgd")[0].settings["attack_steps"] == 30, "its defaults"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"entry": ("mart",)}, r'--entry=mart: must be of "natural", '),
        (
            {"entry": ("e2sad robust",)},
            r'--entry=e2sad robust: did you mean \'e2SAD, robust\'.*\? must be of "natural", ',
        ),
        ({"entry": ("x" * 9999,)}, r"--entry=x{100}: must be of"),
        ({"eps": 0.0}, r"--eps=0.0: must be above 0"),
        ({"seeds": 0}, r"--seeds=0: must be at least 1"),
        ({"validation_examples": -1}, r"--validation_examples=-1: must be at least 0"),
        ({"parts": True, "entry": ("natural",)}, r"--parts: .* leave out --entry=natural"),
        (
            {"judge": "held_out", "validation_examples": 400},
            r"--examples=500: must be at most --validation_examples=400 for --judge=held",
        ),
    ],
)
def test_requests_that_cannot_be_right_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        Request(**values)
