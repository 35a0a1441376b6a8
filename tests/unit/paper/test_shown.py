"""Tables, figures, costs and the report: what they show is what was measured."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax._io import read_sealed, sealed, write_json
from e2sad_jax.evaluation import Attack, Outcome, transfer
from experiments.paper import cost, figure2_problem, page, plan, runner, tables
from tests.unit.paper.html_page import Shown, is_whole


@pytest.mark.slow
@pytest.mark.usefixtures("made_up")
def test_every_table_and_figure_of_known_outcomes(ask, tmp_path, lines_of):
    everything = [plan.Item(kind, name) for kind in ("table", "figure") for name in plan.NAMES[kind]]
    reproduction = ask(*everything, plan.Item("study", "labels"), seeds=1)
    assert len(reproduction.runs) == 10 + 4 + 1, "each once, shared by all that need it"
    written = reproduction.run()
    folder = tmp_path / "results" / "tiny"
    assert {p.name for p in written} == {p.name for p in folder.iterdir()}
    assert not [p for p in folder.iterdir() if p.stat().st_size == 0]

    # Table 1: our numbers are those of the outcomes, the paper's beside them, the difference between them.
    lines = lines_of(folder / "table1.csv")
    assert len(lines) == 10 * 6
    entries = {e.key: e for e in reproduction.entries(plan.TABLE_1)}
    for line in lines:
        entry = entries[line["model"], line["label"]]
        (attack,) = [a for a in plan.TABLE_1.suite(reproduction.scale) if a.name == line["name"]]
        (config,) = reproduction.configs(entry, plan.TABLE_1)
        known = reproduction.known(config, attack)
        correct = known.outcomes[0].prediction == reproduction.test_set(config)[1]
        assert float(line["ours"]) == pytest.approx(np.mean(correct), abs=1e-6)
        expected = entry.paper.get(attack.name)
        assert line["paper"] == ("" if expected is None else str(expected))
        assert line["difference"] == "", "these are not the paper's images"
    assert [line["name"] for line in lines[:6]][-1] == "PGD-40, 2 restarts"
    assert all(line["paper"] == "" for line in lines if line["model"] == "Hamm 0.3" or line["name"].startswith("PGD"))

    # Table 2: all pairs; on the diagonal what Table 1 says of IFGSM-30.
    lines = lines_of(folder / "table2.csv")
    assert len(lines) == 81
    white = {(t["model"], t["label"]): t["ours"] for t in lines_of(folder / "table1.csv") if t["name"] == "IFGSM-30"}
    configs = {e.key: reproduction.configs(e, plan.TABLE_2)[0] for e in reproduction.entries(plan.TABLE_2)}
    order = list(configs)
    for line in lines:
        substitute, target = (line["substitute"], line["substitute_label"]), (line["target"], line["target_label"])
        assert line["white_box"] == str(substitute == target)
        if substitute == target:
            assert line["ours"] == white[target]
        known = reproduction.known(configs[substitute], plan.TRANSFER, list(configs.values()))
        assert float(line["ours"]) == pytest.approx(known.outcomes[order.index(target)].accuracy, abs=1e-6)
    assert any(line["substitute"] == "e2SAD" for line in lines)
    assert "| **" in (folder / "table2.md").read_text(), "white-box cells are marked"

    # A subset says so everywhere.
    for name in ("table3.md", "table3.json"):
        text = (folder / name).read_text()
        assert "part_of_svhn" in text
        assert "is not the paper's data set" in text
    for name in ("table1", "table2", "table3", "study_labels", "figure3", "figure4"):
        content = json.loads((folder / f"{name}.json").read_text())
        assert content["setting"].startswith("tiny scale: ")
        assert {"command", "hardware", "date", "jax", "commit", "seeds"} <= set(content["provenance"])
        if (folder / f"{name}.md").exists():
            assert "tiny scale: " in (folder / f"{name}.md").read_text()
    for path in folder.glob("*.csv"):
        if path.name != "figure2.csv":  # the same at every scale
            assert {line["scale"] for line in lines_of(path)} == {"tiny"}
            assert {line["data"] for line in lines_of(path)} <= {"grey", "part_of_svhn"}
    lines = lines_of(folder / "figure4.csv")
    assert len(lines) == 2 * 4 * 9
    origins = {(m["model"], m["mean_loss"]) for m in lines if float(m["t1"]) == float(m["t2"]) == 0}
    assert len(origins) == 4, "at the origin both attacks see the clean loss"
    for name in ("figure2", "figure3", "figure4", "study_labels"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    titles = ("Table 1", "Table 2", "Table 3", "Figure 2", "Figure 3", "Figure 4", "soft against hard")
    is_whole(folder / "report.html", pictures=4, titles=titles)

    # Figure 3 is a surface: not flat, the clean loss at the origin, attacked points above it.
    config = reproduction.entries(plan.FIGURE_3)[0].config
    images, labels = reproduction.datasets["mnist"].x_test, reproduction.datasets["mnist"].y_test
    p = np.asarray(reproduction.classifier(config)(images), np.float64)
    clean = -np.log(p[np.arange(len(labels)), labels])
    surface = np.array([float(row["summed_loss"]) for row in lines_of(folder / "figure3.csv")]).reshape(3, 3)
    assert surface[0, 0] == pytest.approx(clean.sum(), rel=1e-4)
    assert surface[2, 0] > surface[1, 0] > surface[0, 0], "the loss rises along IFGSM's direction"
    assert np.ptp(surface[1]) > 1e-3, "and changes across it"
    points = json.loads((folder / "figure3.json").read_text())["table"]["rows"]
    (_, *origin), (_, *first), (_, *second) = points
    assert origin[:2] == ["0.000", "0.000"]
    assert float(first[2]) > float(origin[2])
    assert float(second[1]) > float(first[1]) + 0.03, "the second step leaves g1, along g2"


def test_a_cell():
    cell = tables.Cell([0.5, 0.7], paper=0.9)
    assert tables.text(cell.values(), 3) == ("0.600 ± 0.141", "0.9000, -0.300")
    assert tables.text(tables.Cell([0.5], paper=0.25).values(), 3) == ("0.500", "0.2500, +0.250")
    assert tables.text(tables.Cell([0.5], paper=0.25, comparable=False).values(), 4) == ("0.5000", "0.2500")
    assert tables.text(tables.Cell([0.5]).values(), 3) == ("0.500", "")
    assert tables.text(tables.Cell([0.5], paper=0.5001).values(), 3) == ("0.500", "0.5001, +0.000")
    assert tables.text("natural", 3) == ("natural", "")


# What it measures and illustrates.


@pytest.mark.slow
def test_the_two_steps_of_figure_2_part_ways():
    """The caption's claims, from the attacks themselves; the slope of Eq. 7 also by finite differences."""
    curves, points = figure2_problem.compute()
    clean, first, red, yellow = points.values()
    assert [p.predicted for p in (clean, first, red, yellow)] == [1, 1, 1, 2]
    assert red.loss > yellow.loss > first.loss > clean.loss
    assert (first.x, red.x, yellow.x) == pytest.approx((0.3, 0.2, 0.4))
    assert yellow.change == max(p.change for p in points.values())
    assert abs(first.change_slope) < 1e-4 < abs(red.change_slope)
    assert np.argmin(curves.change) == np.argmin(abs(curves.x - first.x)), "the curve is lowest at the first point"
    h = 1e-3
    for point in (first, red, yellow):
        near = np.interp([point.x - h, point.x + h], curves.x, curves.change)
        assert (near[1] - near[0]) / (2 * h) == pytest.approx(point.change_slope, abs=0.3)
    np.testing.assert_allclose(curves.probabilities.sum(-1), 1, rtol=1e-5)
    at = [np.interp(0.4, curves.x, p) for p in curves.probabilities.T]
    assert at == pytest.approx([0.45, 0.52, 0.03], abs=0.005)


def test_black_box_by_hand():
    """Three linear classifiers of one pixel: images made for one meet the others; rows and columns are not swapped."""

    def apply(w, x):
        return jnp.concatenate([x[:, 0, 0], -x[:, 0, 0]], -1) * w

    images = np.array([0.5, 0.2, -0.4, -0.1], np.float32).reshape(4, 1, 1, 1)
    labels = np.array([0, 0, 1, 1])
    one, backwards = jnp.float32(1), jnp.float32(-1)
    attack = Attack("FGSM", "fgsm", 0.3, 1)

    def ask(substitute, *targets, **kwargs):
        own, others = (apply, substitute), [(apply, target) for target in targets]
        results = transfer(own, others, images, labels, attack, bounds=(-1.0, 1.0), **kwargs)
        return [r.correct.tolist() for r in results]

    # For `one` an image moves by 0.3 towards zero: those nearer than that cross it. `backwards` is wrong on all clean
    # images, and right on those that crossed.
    own, other = ask(one, one, backwards)
    assert own == [True, False, True, False]
    assert other == [False, True, False, True]
    # Images made for `backwards` move away from zero.
    assert ask(backwards, one, backwards) == [[True] * 4, [False] * 4]
    assert ask(one, one, backwards, batch_size=3) == [own, other]
    steps = []
    ask(one, one, batch_size=3, progress=lambda name, gradients: steps.append(gradients))
    assert steps == [0, 3, 1]


def test_cost_is_measured_beside_a_natural_step_and_found_again(monkeypatch, tmp_path):
    """Of made-up steps; that of real ones is asked in tests/slow/test_step_cost.py."""
    seconds = {"natural": 1.0, "fgsm": 2.0, "e2sad": 4.0}
    monkeypatch.setattr(cost.training, "step_counts", lambda config, *_: {"flops": 10 * seconds[config.defense]})

    class Step:
        def __init__(self, config, image_shape, num_classes, runs=None):
            self.took = seconds[config.defense] * (1 if runs is None else runs - 0.5)

        def timer(self, least):
            return lambda: self.took

    monkeypatch.setattr(cost, "Step", Step)
    quick = {"model": "digits_cnn", "batch_size": 8}
    entries = plan.table_1(plan.Scale("t", quick, {}, 1, 3, 1), {})
    configs = [e.config for e in entries if e.name in ("FGSM 0.3", "e2SAD")]
    progress = []
    measured = cost.measure(configs, (8, 8, 1), 10, tmp_path, progress.append)
    names = [
        f"{name}, digits_cnn, batch 8, float32{rest}"
        for name, rest in (("natural", ""), ("fgsm", ""), ("e2sad", ", total"))
    ]
    steps = [measured["steps"][name] for name in names]
    assert [step["flops_natural"] for step in steps] == [step["time_natural"] for step in steps] == [1.0, 2.0, 4.0]
    for step in steps:
        assert 0 < step["fastest"] <= step["milliseconds"] <= step["slowest"]
    assert len(progress) >= 3
    progress.clear()
    assert cost.measure(configs, (8, 8, 1), 10, tmp_path, progress.append) == measured
    assert progress == [], "found again"
    assert cost.faster_together(configs[0], (8, 8, 1), 10, 3, tmp_path) is True
    (path,) = tmp_path.glob("together-*.json")
    assert read_sealed(path)["faster"] is True
    write_json(path, sealed({"faster": False}))
    assert cost.faster_together(configs[0], (8, 8, 1), 10, 3, tmp_path) is False, "found again"


@pytest.mark.usefixtures("made_up")
def test_differences_are_shown_for_the_papers_data_alone(ask, monkeypatch, lines_of):
    monkeypatch.setattr(runner.Reproduction, "is_paper_data", lambda self, config: True)
    reproduction = ask(plan.TABLE_3)
    reproduction.run()
    lines = lines_of(reproduction.results / "table3.csv")
    for line in lines:
        if line["paper"]:
            assert float(line["difference"]) == pytest.approx(float(line["ours"]) - float(line["paper"]), abs=1e-6)
    assert sum(bool(line["paper"]) for line in lines) == 20
    assert {line["in_paper"] for line in lines if line["name"].startswith("PGD")} == {"False"}
    text = (reproduction.results / "table3.md").read_text()
    assert "ours minus the paper's. Ours had less training" in text
    assert "PGD-40, 2 restarts (not in the paper)" in text


HOSTILE = "<script>alert(1)</script>\"'&`<b>`"


def test_what_is_shown_is_escaped(tmp_path):
    """Names of files, settings and commands may hold anything; the page shows it, and runs nothing."""
    cell = tables.Cell([0.5], paper=0.25, white_box=True).values()
    about = {name: HOSTILE for name in ("date", "command", "hardware", "python", "jax", "flax", "optax", "commit")}
    table = {
        **{"title": f"Table 1: {HOSTILE}", "setting": HOSTILE, "header": [HOSTILE, "FGSM"], "names": 1, "digits": 3},
        **{"rows": [[HOSTILE, cell], ["`odd", cell]], "notes": [HOSTILE], "provenance": about},
    }
    numbers = {"header": [HOSTILE], "rows": [[HOSTILE]]}
    figure = {**table, "caption": HOSTILE, "picture": "../figure2.png", "table": numbers}
    folder = tmp_path / "a&b <i>"
    folder.mkdir()
    write_json(folder / "table1.json", table)
    write_json(folder / "figure2.json", figure)
    write_json(folder / "table2.json", {**table, "rows": [["too short"]]})
    (folder / "figure2.png").write_bytes(b"a picture")
    text = page.write(folder).read_text()
    assert "<script" not in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;<code>&lt;b&gt;</code>" in text
    assert "`odd" in text, "a lone quotation mark begins no code"
    assert "table2.json cannot be read (ValueError" in text
    is_whole(folder / "report.html", pictures=1, titles=("a&amp;b &lt;i&gt;",))
    seen = Shown()
    seen.feed(text)
    assert [text.strip() for text in seen.texts].count(HOSTILE.replace("`", "")) == 8, "all of them in full"


def test_nan_logits_become_a_note_of_the_table():
    fine = Outcome(np.ones(2, bool), np.zeros(2, np.int32))
    broken = Outcome(np.array([True, False]), np.array([0, -1], np.int32))
    said = ["e2SAD, soft, seed 1: 1 of 2 images have NaN logits under PGD-40: they count as misclassified."]
    assert tables.nan_notes("e2SAD, soft", "PGD-40", [fine, broken]) == said
