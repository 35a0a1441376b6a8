"""The comparison of defenses: trained once, attacked once, shown whole."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from e2sad_jax import data, training
from e2sad_jax._io import read_sealed
from e2sad_jax.comparison import judge, price, show
from e2sad_jax.comparison.request import ENTRIES, PARTS, Request
from e2sad_jax.comparison.run import run
from e2sad_jax.errors import ConfigError
from e2sad_jax.runs import trainer
from e2sad_jax.runs.checkpoint import digest
from e2sad_jax.runs.classifier import load
from e2sad_jax.training.config import DEFENSES
from tests.unit.training.test_train import standard_promotion  # noqa: F401

LITTLE = {
    "steps": 3,
    "batch_size": 16,
    "validation_examples": 10,
    "examples": 10,
    "queries": 5,
    "apgd_steps": 2,
    "targets": 1,
}


def test_models_are_trained_and_attacked_once_and_shown(tiny, tmp_path, monkeypatch, unoptimized):
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    scores = {"natural": {1: 0.0, 2: 1.0, 3: 1.0}, "rs_fgsm": {1: 0.0, 2: 2.0, 3: 1.0}}
    monkeypatch.setattr(
        trainer, "validate", lambda run, state, stop: {"score": scores[run.config.defense][int(state.step)]}
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    request = Request(
        entry=("RS-FGSM", "natural"), data="tiny.npz", workdir="~/runs", results=str(tmp_path / "out"), **LITTLE
    )
    said, attacked, auto = [], [], judge.auto

    def counting(apply, params, *args, **kwargs):
        attacked.append(digest(params))
        return auto(apply, params, *args, **kwargs)

    monkeypatch.setattr(judge, "auto", counting)
    result = run(request, said.append)
    assert [row["name"] for row in result["rows"]] == ["natural", "RS-FGSM"], "in the order of their price"
    natural, rs_fgsm = result["rows"]
    assert rs_fgsm["flops"] == pytest.approx(1.7 * natural["flops"], rel=0.1)
    for row in result["rows"]:
        (one,) = row["runs"]
        for which in ("last", "best"):
            own, mean = one[which], row[which]
            assert 0 <= mean["robust"] == own["robust"] <= own["after"]["APGD-CE"] <= mean["clean"] == own["clean"]
            assert mean["lowest"] == mean["highest"] == mean["robust"]
        assert read_sealed(pathlib.Path(one["workdir"]) / "auto.json") == one
        assert len(data.hold_out(tiny, load(one["workdir"]).config.validation_examples)[0].x_train) == 40, (
            "ten are held out"
        )
    assert [row[which]["steps"] for row in result["rows"] for which in ("last", "best")] == [[3], [3], [3], [2]]
    kept = [
        load(row["runs"][0]["workdir"], which)
        for row, which in [(natural, "last"), (rs_fgsm, "last"), (rs_fgsm, "best")]
    ]
    assert attacked == [digest(classifier.params) for classifier in kept], "once where the best is the last"
    assert len(set(attacked)) == 3
    assert ["best checkpoint" in line for line in said] == [False, True]
    card = (tmp_path / "out" / "compare_card.md").read_text()
    assert "`digits_cnn`, 2 of them: natural; RS-FGSM." in card
    assert f"SHA-256 `{tiny.sha256[:16]}...`" in card
    assert f"Command:** `{result['command']}`" in card
    assert "One seed; the standard error of an accuracy on 10 images is up to 0.158." in card
    assert f" to {max(row['last']['robust'] for row in result['rows']):.3f} (" in card
    page = (tmp_path / "out" / "compare.md").read_text()
    assert f"| RS-FGSM | {rs_fgsm['last']['clean']:.3f} |" in page
    assert "tiny.npz, digits_cnn, 3 steps of 16, 1 seed(s)" in page
    assert "APGD-CE 2 steps, Square 5 queries, one restart each, eps 0.3, 10 test images" in page, (
        "three classes: no DLR"
    )
    assert "best: the checkpoint that stood PGD-10 best on 10 held-out images" in page
    last, best = (
        f"{r['clean']:.3f} | {r['robust']:.3f} ({r['lowest']:.3f} .. {r['highest']:.3f})"
        for r in (rs_fgsm["last"], rs_fgsm["best"])
    )
    assert f"| RS-FGSM | {last} | 3 | {best} | 2 | {rs_fgsm['flops']:.3g} |" in page
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"] == result["rows"]

    def no_more(*args, **kwargs):
        raise AssertionError("done before")

    monkeypatch.setattr(judge, "train", no_more)
    monkeypatch.setattr(judge, "auto", no_more)
    assert run(request, said.append)["rows"] == result["rows"]
    path = pathlib.Path(rs_fgsm["runs"][0]["workdir"]) / "auto.json"
    known = json.loads(path.read_text())
    of_before = {"asked": {k: v for k, v in known["asked"].items() if k != "checkpoints"}, "step": 3, "robust": 0.5}
    path.write_text(json.dumps(of_before))
    with pytest.raises(AssertionError, match="done before"):
        run(request, said.append)
    for other in ({"examples": 5}, {"judge": "held_out"}):
        with jax.numpy_dtype_promotion("standard"), pytest.raises(AssertionError, match="done before"):
            run(Request(**{**LITTLE, **other}, data="tiny.npz", workdir="~/runs"), said.append)


def test_what_is_not_asked_for_again_stays_in_the_table(tiny, tmp_path, monkeypatch, unoptimized, capsys):
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    paths = {"workdir": str(tmp_path / "runs"), "results": str(tmp_path)}
    request = Request(entry=("RS-FGSM",), data="tiny.npz", **paths, **LITTLE)
    (rs_fgsm,) = run(request)["rows"]
    result = run(dataclasses.replace(request, entry=("natural",)))
    assert [row["name"] for row in result["rows"]] == ["natural", "RS-FGSM"]
    kept = result["rows"][1]
    assert {**kept, "origin": 0} == {**rs_fgsm, "origin": 0}
    assert kept["origin"]["command"] == result["command"]
    assert f": natural\n\n`{result['command']}`" in show.markdown(
        {
            **result,
            "rows": [
                result["rows"][0],
                {**kept, "origin": {**kept["origin"], "environment": {**result["environment"], "date": "then"}}},
            ],
        }
    )
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["rows"] == result["rows"]

    again = run(dataclasses.replace(request, entry=("RS-FGSM",)))
    assert [row["name"] for row in again["rows"]] == ["natural", "RS-FGSM"]
    assert "origin" not in again["rows"][1], "asked for, so its own"
    monkeypatch.chdir(tmp_path)
    moved = dataclasses.replace(request, entry=("natural",), workdir="runs", results=".", data_dir="elsewhere")
    assert [row["name"] for row in run(moved)["rows"]] == ["natural", "RS-FGSM"], "wherever it lies"
    said: list[str] = []
    with monkeypatch.context() as changed:
        changed.setattr(data, "load", lambda name, data_dir: dataclasses.replace(tiny, x_test=255 - tiny.x_test))
        there = dataclasses.replace(moved, workdir="there")
        assert [row["name"] for row in run(there, said.append)["rows"]] == ["natural"], "other test images"
    assert said[0].startswith("RS-FGSM: an earlier row, of other images")
    run(request)
    with monkeypatch.context() as changed:
        changed.setattr(
            "e2sad_jax.comparison.request.ENTRIES", {**ENTRIES, "RS-FGSM": {"defense": "rs_fgsm", "alpha": 0.5}}
        )
        assert [row["name"] for row in run(moved)["rows"]] == ["natural"], "of another recipe by now"
    other = run(dataclasses.replace(request, entry=("natural",), queries=6))
    assert [row["name"] for row in other["rows"]] == ["natural"], "other attacks, another table"
    (tmp_path / "compare.json").write_text("{}")
    capsys.readouterr()
    assert [row["name"] for row in run(request)["rows"]] == ["RS-FGSM"]
    assert "compare.json is of no use" in capsys.readouterr().err


def test_other_data_makes_other_runs(tiny, tmp_path, monkeypatch):
    request = Request(entry=("natural",), data="a.npz", workdir=str(tmp_path), **LITTLE)
    (a,), (b,) = (dataclasses.replace(request, data=name).configs("natural") for name in ("a.npz", "b.npz"))
    assert a.workdir != b.workdir
    asked = []
    monkeypatch.setattr(judge, "open_run", lambda config, dataset: asked.append(dataset) or 1 / 0)
    attacks = [dataclasses.asdict(stage) for stage in request.stages(tiny.num_classes)]
    known = {"data": tiny.sha256, "judge": "test", "checkpoints": ["last", "best"], "examples": 10, "stages": attacks}
    pathlib.Path(a.workdir).mkdir()
    last, best = ({"step": step, "clean": 1.0, "robust": 0.5} for step in (3, 2))
    done = {"asked": known, "last": last, "best": best, "seed": 0, "eps": 0.3, "images": 10, "chosen_on": "10 images"}
    done |= {"flops": 1.0, "train_seconds": 1.0}
    (pathlib.Path(a.workdir) / "auto.json").write_text(json.dumps(done))
    assert judge.judge(request, a, tiny) == done
    other = dataclasses.replace(tiny, x_test=tiny.x_test[::-1].copy())
    with pytest.raises(ZeroDivisionError):  # a file of the same name with other images
        judge.judge(request, a, other)
    assert asked == [other]


def test_held_out_images_are_attacked_where_settings_are_chosen(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    seen = []

    def attacked(config, which, images, labels, stages):
        seen.append(images)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return {"step": {"last": 3, "best": 2}[which], "clean": 1.0, "after": {}, "robust": 0.5}

    monkeypatch.setattr(judge, "_attacked", attacked)
    monkeypatch.setattr(trainer, "validate", lambda run, state, stop: {"score": float(int(state.step) == 2)})
    monkeypatch.setattr(judge, "step_flops", lambda config, dataset: 1.0)
    request = Request(entry=("natural",), data="tiny.npz", judge="held_out", workdir=str(tmp_path / "runs"), **LITTLE)
    with pytest.raises(KeyboardInterrupt):  # while the best is attacked
        run(request, lambda line: None)
    result = run(request, lambda line: None)
    assert [result["rows"][0][which]["steps"] for which in ("last", "best")] == [[3], [2]]
    assert len(seen) == 3, "the last is not attacked again"
    (config,) = request.configs("natural")
    train_set, watched = data.hold_out(tiny, config.validation_examples)
    np.testing.assert_array_equal(seen[0], watched.x_test)
    assert not any((image == train_set.x_train).all((1, 2, 3)).any() for image in seen[0])
    assert "10 images held out of the training set" in (tmp_path / "runs" / "compare.md").read_text()


def row(name, flops, last, best):
    """A row of one seed whose checkpoints have these robust accuracies."""
    return {
        "name": name,
        "flops": flops,
        "train_seconds": 1.0,
        "last": {"clean": 0.9, "robust": last, "lowest": last, "highest": last, "steps": [9]},
        "best": {"clean": 0.8, "robust": best, "lowest": best, "highest": best, "steps": [9 if last == best else 4]},
        "runs": [{}],
    }


def drawn(rows, monkeypatch, **request):
    """The axes of the picture of such rows."""
    figures = []
    monkeypatch.setattr(show.plots, "save", lambda path, figure, dpi: figures.append(figure))
    about = {"attacks": [], "eps": 0.3, "images": 500, "chosen_on": "1,000 held-out images"}
    request = dataclasses.asdict(Request(**request))
    show.plot(pathlib.Path("compare.png"), {"request": request, "rows": rows, **about})
    figures[0].draw_without_rendering()
    title, whole = figures[0]._suptitle.get_window_extent(), figures[0].bbox
    assert whole.x0 <= title.x0 < title.x1 <= whole.x1, "the title is there as a whole"
    (axes,) = figures[0].axes
    return axes, [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata())]


def test_the_picture_has_a_hollow_marker_only_where_the_best_is_another(monkeypatch):
    rows = [row("natural", 1.0, 0.0, 0.0), row("e2SAD, paper's points", 3.0, 0.2, 0.4)]
    _, markers = drawn(rows, monkeypatch)
    points = {(float(m.get_xdata()[0]), float(m.get_ydata()[0])): m.get_markerfacecolor() == "none" for m in markers}
    assert points == {(1.0, 0.0): False, (3.0, 0.2): False, (3.0, 0.4): True}


def test_names_in_the_picture_do_not_cover_each_other(monkeypatch):
    robust = [0.0, 0.0, 0.01, 0.8, 0.81, 0.81, 0.815, 0.95]
    rows = [row("natural" if i == 0 else f"d{i}", 1.0 + i, r, r) for i, r in enumerate(robust)]
    axes, _ = drawn(rows, monkeypatch)
    names = {text.get_text(): text for text in axes.texts}
    assert len(names) == len(rows)
    heights = sorted(text.xyann[1] for text in names.values())
    assert min(np.diff(heights)) > 0.046
    assert heights[0] >= 0
    assert heights[-1] == 0.95
    for r in rows:  # the line leads to the point
        assert names[r["name"]].xy == (r["flops"], r["last"]["robust"])


@pytest.mark.parametrize("how", ["equal_flops", "parts"])
def test_where_all_cost_the_same_the_picture_goes_by_name(how, monkeypatch):
    rows = [row("PGD-2", 3.0, 0.1, 0.1), row("e2SAD, robust", 3.0, 0.2, 0.4)]
    axes, markers = drawn(rows, monkeypatch, **{how: True})
    steps = " (9)" if how == "equal_flops" else ""  # of the last checkpoint: what the same FLOPs buy
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"PGD-2{steps}", f"e2SAD, robust{steps}"]
    assert [marker.get_xdata()[0] for marker in markers] == [0.1, 0.4, 0.2]


def test_what_the_data_is_too_small_for_is_refused_before_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    for changes, words in [
        ({"validation_examples": 50}, r"--validation_examples=50: must be below the 50 training images of tiny"),
        ({"validation_examples": 40}, r"--batch_size=16: must be at most the 10 training images"),
    ]:
        with pytest.raises(ConfigError, match=words):
            run(Request(**{**LITTLE, **changes}, data="t.npz", workdir=str(tmp_path / "runs")))
    assert list(tmp_path.iterdir()) == []


def test_the_best_is_chosen_among_several_of_a_short_run():
    for steps, every in [(1, 1), (3, 1), (400, 100), (2000, 500), (6000, 500)]:
        (config,) = Request(steps=steps, entry=("natural",)).configs("natural")
        assert (config.checkpoint_every, config.validation_examples) == (every, 1000)


def test_all_share_the_schedule_and_a_preset_brings_its_points():
    request = Request(eps=0.2, learning_rate=0.002, schedule="cosine", eps_warmup=0.25)
    configs = {name: request.configs(name)[0] for name in ENTRIES}
    assert {(c.learning_rate, c.schedule, c.eps_warmup, c.eps1, c.soft_label) for c in configs.values()} == {
        (0.002, "cosine", 0.25, 0.2, False)
    }
    assert {c.defense for c in configs.values()} == set(DEFENSES), "every defense here"
    robust, letter = configs["e2SAD, robust"], configs["e2SAD, paper's points"]
    assert (robust.eps2, robust.alpha, robust.random_start, robust.ball_second) == (0.2 * 2 / 3, 0.0, True, True)
    assert configs["PGD-2, shorter steps"].attack_step_size == pytest.approx(0.16)
    parts = {name: request.configs(name)[0] for name in PARTS}
    assert parts["e2SAD, robust, second step of eps"].eps2 == 0.2
    assert parts["e2SAD, robust, full eps from the start"].eps_warmup == 0
    assert parts["e2SAD, robust, no second point"].eps_warmup == 0.25
    constant = parts["e2SAD, robust, constant learning rate"]
    assert (constant.schedule, constant.learning_rate, constant.eps_warmup) == ("constant", 0.001, 0.25)
    assert len({c.workdir for c in [*parts.values(), robust]}) == len(parts) + 1
    assert (letter.eps2, letter.alpha, letter.random_start, letter.ball_second) == (0.2 / 3, 0.6, False, False)
    assert len({c.workdir for c in configs.values()}) == len(configs)


def test_with_equal_flops_all_spend_what_e2sad_does(tiny):
    request = Request(steps=1000, batch_size=8, equal_flops=True)
    spent = {}
    for name in ("natural", "PGD-3", "e2SAD, robust"):
        (config,) = request.configs(name)
        # Networks need larger images than the tiny ones; the number of classes is what is left.
        images = dataclasses.replace(tiny, x_train=np.zeros((9, 28, 28, 1), np.uint8))
        own = price.affordable(request, config, images)
        spent[name] = own.steps * training.step_flops(config, (28, 28, 1), tiny.num_classes)
        assert (own.steps == 1000) == (name == "e2SAD, robust")
        assert own.workdir == (config.workdir if own.steps == 1000 else f"{config.workdir}-{own.steps}")
    assert max(spent.values()) < 1.01 * min(spent.values())


def test_requests_that_cannot_be_right_are_refused():
    with pytest.raises(ConfigError, match=r'--entry=pgd: must be of "natural", '):
        Request(entry=("pgd",))
    with pytest.raises(ConfigError, match=r"--eps=0.0: must be above 0"):
        Request(eps=0.0)
    with pytest.raises(ConfigError, match=r"--seeds=0: must be at least 1"):
        Request(seeds=0)
    with pytest.raises(ConfigError, match=r"--validation_examples=-1: must be at least 0"):
        Request(validation_examples=-1)
    with pytest.raises(ConfigError, match=r"--parts: .* leave out --entry=natural"):
        Request(parts=True, entry=("natural",))
    with pytest.raises(
        ConfigError, match=r"--examples=500: must be at most --validation_examples=400 for --judge=held"
    ):
        Request(judge="held_out", validation_examples=400)
