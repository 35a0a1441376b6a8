"""The comparison of defenses: one small one from training to picture, the rest on made-up outcomes."""

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
from e2sad_jax.comparison.request import ENTRIES, PARTS, Request, entries, position
from e2sad_jax.comparison.run import run
from e2sad_jax.errors import ConfigError, NonFiniteError
from e2sad_jax.reporting import provenance
from e2sad_jax.runs import trainer
from e2sad_jax.runs.classifier import load
from tests.unit.runs.test_folder import damages

LITTLE = {
    "steps": 3,
    "batch_size": 16,
    "validation_examples": 10,
    "examples": 10,
    "queries": 5,
    "apgd_steps": 2,
    "targets": 1,
}
PRICES = {"natural": 1.0, "rs_fgsm": 1.7, "pgd": 3.0, "e2sad": 3.0, "ifgsm": 20.0}


def quiet(line):
    pass


def no_more(*args, **kwargs):
    raise AssertionError("done before")


@pytest.fixture
def standard():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def tiny_data(tiny, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    return tiny


@pytest.fixture
def prices(monkeypatch):
    """Prices by defense, so that nothing is compiled."""
    monkeypatch.setattr(comparison, "step_flops", lambda config, *about: PRICES[config.defense])
    monkeypatch.setattr(flops, "step_flops", lambda config, *about: PRICES[config.defense])


@pytest.fixture
def made_up(prices, monkeypatch):
    """Outcomes without training: robust accuracy by defense and seed. Returns the settings that were asked for."""
    seen = []

    def made(request, config, dataset):
        seen.append(config)
        if config.defense == "ifgsm" and config.seed:
            raise NonFiniteError("step 7: loss=nan")
        robust = PRICES[config.defense] / 40 + 0.1 * config.seed
        last = {"step": config.steps, "clean": 0.9, "after": {}, "robust": robust}
        best = {**last, "step": config.steps - 1, "robust": robust + 0.05} if config.defense == "pgd" else last
        asked = evaluate_model.question(request, dataset)
        about = {"asked": asked, "seed": config.seed, "eps": config.eps1, "images": 10, "workdir": config.workdir}
        return {**about, "last": last, "best": best, "chosen_on": "10 held-out images", "train_seconds": 1.0}

    monkeypatch.setattr(comparison, "evaluate_model", made)
    monkeypatch.setattr(comparison, "plot", lambda path, result: None)
    return seen


@pytest.mark.slow
def test_models_are_trained_attacked_once_and_shown(little, tiny_data, tmp_path, monkeypatch, standard):
    scores = {"natural": {1: 0.0, 2: 1.0, 3: 1.0}, "rs_fgsm": {1: 0.0, 2: 2.0, 3: 1.0}}
    monkeypatch.setattr(
        trainer, "validate", lambda run, state, stop: {"score": scores[run.config.defense][int(state.step)]}
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    request = Request(
        entry=("RS-FGSM", "natural"), data="tiny.npz", workdir="~/runs", results=str(tmp_path / "out"), **LITTLE
    )
    said, attacked, auto = [], [], evaluate_model.auto

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
        assert {**read_sealed(pathlib.Path(one["workdir"]) / "auto.json"), "trained": [provenance.commit()]} == one
        assert load(one["workdir"]).config.validation_examples == 10
    assert [row[which]["steps"] for row in result["rows"] for which in ("last", "best")] == [[3], [3], [3], [2]]
    kept = [(natural, "last"), (rs_fgsm, "last"), (rs_fgsm, "best")]
    assert len(attacked) == 3, "once where the best is the last"
    for params, (row, which) in zip(attacked, kept, strict=True):
        saved = load(row["runs"][0]["workdir"], which).params
        for ours, theirs in zip(*map(jax.tree.leaves, (params, saved)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert ["best checkpoint" in line for line in said] == [False, True]
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"] == result["rows"]
    assert (tmp_path / "out" / "compare.md").read_text() == show.markdown(result)
    assert (tmp_path / "out" / "compare_card.md").read_text() == show.card(result)
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000

    monkeypatch.setattr(evaluate_model.trainer, "train", no_more)
    monkeypatch.setattr(evaluate_model, "auto", no_more)
    assert run(request, quiet)["rows"] == result["rows"]
    for other in ({"examples": 5}, {"judge": "held_out"}):
        with pytest.raises(AssertionError, match="done before"):
            run(Request(**{**LITTLE, **other}, data="tiny.npz", workdir="~/runs"), quiet)


def test_an_outcome_counts_for_its_own_question_alone(tiny, tmp_path, capsys):
    request = Request(entry=("natural",), data="a.npz", workdir=str(tmp_path), **LITTLE)
    path, asked = tmp_path / "auto.json", evaluate_model.question(request, tiny)
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
    assert "auto.json is unusable" in capsys.readouterr().err
    for damaged in (b"", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000):
        path.write_bytes(damaged)
        assert evaluate_model.known_outcome(path, asked, 3) == {}


def test_nan_logits_are_said_in_the_table_and_its_lines(tiny_data, made_up, monkeypatch, tmp_path):
    said, lines, made = "2 of 10 images have NaN logits: they count as misclassified", [], comparison.evaluate_model

    def broken(request, config, dataset):
        outcome = made(request, config, dataset)
        return {**outcome, "last": {**outcome["last"], "nan": said if config.defense == "natural" else ""}}

    monkeypatch.setattr(comparison, "evaluate_model", broken)
    paths = {"workdir": str(tmp_path / "runs"), "results": str(tmp_path)}
    run(Request(entry=("natural", "RS-FGSM"), data="tiny.npz", **paths, **LITTLE), lines.append)
    assert f"natural: last checkpoint, seed 0: {said}" in lines
    assert f"- natural: last checkpoint, seed 0: {said}." in (tmp_path / "compare.md").read_text()
    assert sum("NaN" in line for line in lines) == 1


def test_other_data_makes_other_runs(tmp_path):
    request = Request(entry=("natural",), data="a.npz", workdir=str(tmp_path), **LITTLE)
    (a,), (b,) = (dataclasses.replace(request, data=name).configs("natural") for name in ("a.npz", "b.npz"))
    assert a.workdir != b.workdir


def test_held_out_images_are_attacked_to_choose_settings(tiny_data, tmp_path, prices, monkeypatch, little, standard):
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
    monkeypatch.setattr(trainer, "open_run", opened)
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


def test_rows_not_asked_for_again_stay_with_their_origin(tiny_data, tmp_path, made_up, monkeypatch):
    paths = {"workdir": str(tmp_path / "runs"), "results": str(tmp_path)}
    request = Request(entry=("RS-FGSM",), data="tiny.npz", **paths, **LITTLE)
    natural = dataclasses.replace(request, entry=("natural",))
    (rs_fgsm,) = run(request, quiet)["rows"]
    result = run(natural, quiet)
    assert [row["name"] for row in result["rows"]] == ["natural", "RS-FGSM"]
    kept = result["rows"][1]
    assert {**kept, "origin": 0} == {**rs_fgsm, "origin": 0}
    assert kept["origin"]["command"] == result["command"]
    assert json.loads((tmp_path / "compare.json").read_text())["rows"] == result["rows"]
    then = {**kept["origin"], "environment": {**result["environment"], "date": "then"}}
    page = show.markdown({**result, "rows": [result["rows"][0], {**kept, "origin": then}]})
    assert page.count("- Trained and attacked: `") == 2
    assert "Trained at commit" not in page
    assert ", then, commit " in page
    assert ": RS-FGSM.\n" in page

    again = run(request, quiet)
    assert [row["name"] for row in again["rows"]] == ["natural", "RS-FGSM"]
    assert "origin" not in again["rows"][1], "asked for, so its own"
    monkeypatch.chdir(tmp_path)
    moved = dataclasses.replace(natural, workdir="runs", results=".", data_dir="elsewhere")
    assert len(run(moved, quiet)["rows"]) == 2, "wherever it lies"


def test_rows_may_have_numbers_of_seeds_of_their_own(tiny_data, tmp_path, made_up):
    """Three for the leading ones, one for the others, in one table."""
    one = Request(entry=("natural", "RS-FGSM"), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    run(one, quiet)
    result = run(dataclasses.replace(one, entry=("RS-FGSM",), seeds=3), quiet)
    assert [(row["name"], row["seeds"], len(row["runs"])) for row in result["rows"]] == [
        ("natural", 1, 1),
        ("RS-FGSM", 3, 3),
    ]
    page = show.markdown(result)
    assert "1 to 3 seeds, " in page
    (natural,) = (line for line in page.splitlines() if line.startswith("| natural"))
    (rs_fgsm,) = (line for line in page.splitlines() if line.startswith("| RS-FGSM"))
    assert (natural.count(" .. "), rs_fgsm.count(" .. ")) == (0, 2)
    assert "At most 3 seeds." in show.card(result)


def test_rows_of_another_question_are_left_out(tiny_data, tmp_path, made_up, monkeypatch, capsys):
    request = Request(entry=("RS-FGSM",), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    natural = dataclasses.replace(request, entry=("natural",))

    def names(asked, say=quiet):
        run(request, quiet)
        return [row["name"] for row in run(asked, say)["rows"]]

    assert names(natural) == ["natural", "RS-FGSM"]
    said = []
    with monkeypatch.context() as changed:
        run(request, quiet)
        changed.setattr(data, "load", lambda *args: dataclasses.replace(tiny_data, x_test=255 - tiny_data.x_test))
        assert [row["name"] for row in run(natural, said.append)["rows"]] == ["natural"], "other test images"
    assert said[0].startswith("RS-FGSM: an earlier row, of other images")
    with monkeypatch.context() as changed:
        run(request, quiet)
        recipe = {**ENTRIES, "RS-FGSM": {"defense": "rs_fgsm", "attack_step_size": 0.5}}
        changed.setattr("e2sad_jax.comparison.request.ENTRIES", recipe)
        assert [row["name"] for row in run(natural, quiet)["rows"]] == ["natural"], "another recipe by now"
    assert names(dataclasses.replace(natural, queries=6)) == ["natural"], "other attacks, another table"
    (tmp_path / "compare.json").write_text("{}")
    capsys.readouterr()
    assert [row["name"] for row in run(natural, quiet)["rows"]] == ["natural"]
    assert "compare.json is unusable" in capsys.readouterr().err


def test_show_counts_prices_again_and_keeps_the_rows(tiny_data, tmp_path, made_up, monkeypatch):
    request = Request(entry=("RS-FGSM", "PGD-3"), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    before = run(request, quiet)
    assert [row["flops"] for row in before["rows"]] == [3 * 1.7, 3 * 3.0]
    monkeypatch.setitem(PRICES, "pgd", 1.2)
    monkeypatch.setattr(comparison, "evaluate_model", no_more)
    monkeypatch.setattr(data, "load", no_more)
    after = run(Request(show=True, results=str(tmp_path)), quiet)
    assert [(row["name"], row["flops"]) for row in after["rows"]] == [("PGD-3", 3 * 1.2), ("RS-FGSM", 3 * 1.7)]
    assert after["natural_step_flops"] == 1.0, "though natural training is no row"
    for key in ("request", "environment", "command", "attacks"):
        assert after[key] == json.loads(json.dumps(before))[key]
    trained = {row["name"]: row["runs"] for row in before["rows"]}
    assert {row["name"]: row["runs"] for row in after["rows"]} == trained
    assert json.loads((tmp_path / "compare.json").read_text()) == json.loads(json.dumps(after))
    assert "| PGD-3 | 0.900 | 0.075 | 3 | 0.900 | 0.125 | 2 | 3.6 | 1.20 |" in (tmp_path / "compare.md").read_text()
    with pytest.raises(ConfigError, match=r"has no compare\.json; leave out --show"):
        run(Request(show=True, results=str(tmp_path / "none")), quiet)
    (tmp_path / "compare.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"compare\.json is unusable"):
        run(Request(show=True, results=str(tmp_path)), quiet)


def test_the_table_and_card_of_one_seed_and_of_several(tiny_data, tmp_path, made_up):
    names = ("natural", "PGD-3", "IFGSM-30 (Eq. 3)")
    one = run(Request(entry=names, data="tiny.npz", workdir=str(tmp_path / "1"), **LITTLE), quiet)
    page = show.markdown(one)
    assert page.startswith("# Robust accuracy against the price of training\n\n| defense | clean | robust | steps |")
    assert ".." not in page.split("\n- ")[0], "no range of one seed"
    assert "| PGD-3 | 0.900 | 0.075 | 3 | 0.900 | 0.125 | 2 | 9 | 3.00 |" in page
    assert (
        "network `digits_cnn`, 3 steps of 16, 1 seed, soft labels (delta 0.25), budget of training 1.1 eps, "
        "learning rate 0.005 (cyclic)" in page
    )
    assert "APGD-CE (2 steps), Square (5 queries); one restart each, eps 0.3" in page, "three classes: no DLR"
    assert "under PGD-10 on 10 held-out images" in page
    assert "- FLOPs: XLA's count for the CPU, JAX " in page
    card = show.card(one)
    assert "`digits_cnn`, 3 of them: natural; PGD-3; IFGSM-30 (Eq. 3)." in card
    assert f"SHA-256 of the content `{tiny_data.sha256[:16]}...`" in card
    assert f"Command:** `{one['command']}`" in card
    assert "One seed. The standard error of an accuracy on 10 images is up to 0.158." in card
    assert "from 0.025 to 0.500 (IFGSM-30 (Eq. 3))." in card

    said = []
    two = run(Request(entry=names, data="tiny.npz", seeds=2, workdir=str(tmp_path / "2"), **LITTLE), said.append)
    page = show.markdown(two)
    assert "| robust (lowest .. highest) |" in page
    assert "| PGD-3 | 0.900 | 0.125 (0.075 .. 0.175) | 3 | 0.900 | 0.175 (0.125 .. 0.225) | 2 |" in page
    assert "| IFGSM-30 (Eq. 3) (1 of the seeds diverged) | 0.900 | 0.500 (0.500 .. 0.500) |" in page
    assert "IFGSM-30 (Eq. 3), seed 1: step 7: loss=nan" in said
    assert "At most 2 seeds." in show.card(two)


def test_every_run_diverged(tiny_data, tmp_path, made_up, monkeypatch):
    def diverged(*args):
        raise NonFiniteError("step 1: loss=nan")

    monkeypatch.setattr(comparison, "evaluate_model", diverged)
    with pytest.raises(NonFiniteError, match="every run diverged"):
        run(Request(entry=("natural",), data="tiny.npz", workdir=str(tmp_path), **LITTLE), quiet)


@pytest.mark.parametrize("how", ["by price", "equal_flops", "parts"])
def test_the_picture(how, tiny_data, tmp_path, made_up, monkeypatch):
    figures = []
    monkeypatch.setattr(show.plots, "save", lambda path, figure, dpi: figures.append(figure))
    request = Request(
        **({"entry": ("natural", "PGD-3", "e2SAD, robust")} if how != "parts" else {"parts": True}),
        **{"data": "tiny.npz", "workdir": str(tmp_path), "equal_flops": how == "equal_flops", **LITTLE, "seeds": 2},
    )
    result = run(request, quiet)
    show.plot(tmp_path / "compare.png", result)
    (axes,) = figures[-1].axes
    figures[-1].draw_without_rendering()
    title, whole = (figures[-1]._suptitle or axes._left_title).get_window_extent(), figures[-1].bbox
    assert whole.x0 <= title.x0 < title.x1 <= whole.x1, "the title is there as a whole"
    marked = [line for line in axes.lines if line.get_marker() != "None"]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in marked]
    rows = [row["last"] for row in result["rows"]]
    robust = [row["robust"] for row in rows]
    if how == "parts":
        assert [x for x, _ in points] == robust
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names[:3] == ["natural (1.00)", "e2SAD, robust (3.00)", "no memory (3.00)"]
        return
    assert points == [(1.0, robust[0]), (3.0, robust[1]), (3.0, robust[2])]
    assert {text.get_text() for text in axes.texts} == {"natural", "PGD-3", "e2SAD, robust"}
    assert axes.get_xscale() == "log"
    frontier, *bars = (line for line in axes.lines if line not in marked)
    assert list(frontier.get_ydata())[:2] == [robust[0], max(robust)], "the best at each price or below it"
    assert [tuple(bar.get_ydata()) for bar in bars] == [(row["lowest"], row["highest"]) for row in rows]
    assert any(row["lowest"] < row["highest"] for row in rows)
    steps = {row["name"]: row["last"]["steps"][0] for row in result["rows"]}
    assert how == "by price" or steps == {"natural": 9, "PGD-3": 3, "e2SAD, robust": 3}, "what the same FLOPs buy"
    for row, high in zip(result["rows"], (0.0, 0.93, 0.97), strict=True):
        row["last"] |= {"robust": high, "lowest": high, "highest": min(high + 0.01, 1)}
    show.plot(tmp_path / "compare.png", result)
    (axes,) = figures[-1].axes
    heights = axes.transData.transform([(1, y) for y in (0, 0.03, 0.93, 0.97, 0.98)])[:, 1]
    assert (np.diff(heights) > 0).all()
    assert heights[3] - heights[2] > 5 * (heights[1] - heights[0]), "high accuracies have more room"
    assert axes.get_ylim()[0] < 0
    assert 0.98 < axes.get_ylim()[1] <= 1
    result["rows"][0]["last"] |= {"robust": 0.9, "lowest": 0.88, "highest": 0.91}
    show.plot(tmp_path / "compare.png", result)
    (axes,) = figures[-1].axes
    assert 0.8 < axes.get_ylim()[0] < 0.88, "no room for accuracies that no row has"
    assert len(axes.get_yticks()) > 5


def test_rows_of_a_file_older_than_a_setting_count_where_it_did_what_was_done_then(tiny_data, tmp_path, made_up):
    request = Request(
        entry=("natural",), data="tiny.npz", workdir=str(tmp_path), **{**LITTLE, "delta": 0.0, "eps_scale": 1.0}
    )
    before = run(request, quiet)
    for name in ("delta", "eps_scale", "ema", "last_only"):
        del before["request"][name]
    for asked, names in (
        (dataclasses.replace(request, entry=("RS-FGSM",)), ["natural", "RS-FGSM"]),
        (dataclasses.replace(request, entry=("RS-FGSM",), delta=0.25), ["RS-FGSM"]),
    ):
        (tmp_path / "compare.json").write_text(json.dumps(before))
        assert [row["name"] for row in run(asked, quiet)["rows"]] == names


def test_models_that_were_trained_or_attacked_at_another_commit_say_so(tiny_data, tmp_path, made_up, monkeypatch):
    """A run that is found is not the work of the command that found it; a resumed one has several commits."""
    here = comparison.provenance.environment()["commit"]
    at = {"natural": [here], "rs_fgsm": ["b" * 40, here]}
    monkeypatch.setattr(
        comparison,
        "read_training",
        lambda workdir: [{"commit": commit} for commit in at["natural" if "natural" in workdir.name else "rs_fgsm"]],
    )
    whole = comparison.evaluate_model

    def made(request, config, dataset):
        outcome = whole(request, config, dataset)
        known = {} if config.defense == "natural" else {"commit": "a" * 40}
        return {**outcome, "last": {**outcome["last"], **known}}

    monkeypatch.setattr(comparison, "evaluate_model", made)
    asked = Request(entry=("natural", "RS-FGSM"), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    result = run(asked, quiet)
    for page, before in ((show.markdown(result), "- "), (show.card(result), "- **Other commits:** ")):
        assert f"{before}Trained at commit {'b' * 40}: RS-FGSM.\n" in page
        assert f"{before}Attacked at commit {'a' * 40}: RS-FGSM.\n" in page
        assert page.count("at commit") == 2


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
    assert len({c.workdir for c in [*parts.values(), configs["e2SAD, robust"]]}) == len(parts) + 1
    assert len({c.workdir for c in configs.values()}) == len(configs)


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
