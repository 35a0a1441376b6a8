"""Tables, figures, costs and the report: what they show is what was measured."""

import html.parser
import json
import re

import numpy as np
import pytest

from e2sad_jax.runs import trainer
from experiments.paper import cost, figure2_problem, plan, runner, tables


def test_tables_and_figures_from_start_to_report(ask, trained, tmp_path, labels, lines_of):
    everything = [plan.Item(kind, name) for kind in ("table", "figure") for name in plan.NAMES[kind]]
    reproduction = ask(*everything, labels, seeds=1)
    written = reproduction.run()
    runs = [c.workdir for c, _ in trained]
    assert len(runs) == len(set(runs)) == 10 + 4 + 1, "each once, shared by all that need it"
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
    for line in lines:
        same = (line["substitute"], line["substitute_label"]) == (line["target"], line["target_label"])
        assert line["white_box"] == str(same)
        if same:
            assert line["ours"] == white[line["target"], line["target_label"]]
    assert any(line["substitute"] == "e2SAD" for line in lines)
    assert "| **0." in (folder / "table2.md").read_text(), "white-box cells are marked"

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
    assert len(lines_of(folder / "models.csv")) == 15
    card = (folder / "models_card.md").read_text()
    assert "**Models:** 15, each with" in card
    assert re.search(r"\*\*Training:\*\* (?=.*\bnatural\b)(?=.*\bfgsm\b)(?=.*\be2sad\b)", card)
    assert re.search(r"standard error of an accuracy on \d+ images", card)

    # The report: one file, nothing fetched.
    text = (folder / "report.html").read_text()
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)""", text) == []
    assert text.count("data:image/png;base64,") == 4
    parser = Tags()
    parser.feed(text)
    assert parser.open == []
    for title in ("Table 1", "Table 2", "Table 3", "Figure 2", "Figure 3", "Figure 4", "soft against hard", "Models"):
        assert title in text

    # Again: nothing is trained, nothing attacked; and a part of it later leaves the rest in the report.
    before = {p.name: p.read_text() for p in folder.glob("table*.csv")}
    trained.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "evaluate", None)
        patch.setattr(runner, "transfer", None)
        patch.setattr(runner.figures, "_figure_4", None)
        ask(*everything[:2], *everything[3:], seeds=1).run()
    assert trained == []
    assert {p.name: p.read_text() for p in folder.glob("table*.csv")} == before
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == 4


class Tags(html.parser.HTMLParser):
    """Open tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_cell():
    cell = tables.Cell([0.5, 0.7], paper=0.9)
    assert tables.text(cell.values(), 3) == ("0.600 ± 0.141", "0.9000, -0.300")
    assert tables.text(tables.Cell([0.5], paper=0.25).values(), 3) == ("0.500", "0.2500, +0.250")
    assert tables.text(tables.Cell([0.5], paper=0.25, comparable=False).values(), 4) == ("0.5000", "0.2500")
    assert tables.text(tables.Cell([0.5]).values(), 3) == ("0.500", "")
    assert tables.text(tables.Cell([0.5], paper=0.5001).values(), 3) == ("0.500", "0.5001, +0.000")
    assert tables.text("natural", 3) == ("natural", "")


# What it measures and illustrates.


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


def test_surfaces_of_a_trained_model(ask, lines_of):
    """Figures 3 and 4 are surfaces: not flat, the clean loss at the origin, attacked points above it."""
    reproduction = ask(plan.FIGURE_3)
    reproduction.run()
    config = reproduction.entries(plan.FIGURE_3)[0].config
    images, labels = reproduction.datasets["mnist"].x_test, reproduction.datasets["mnist"].y_test
    p = np.asarray(reproduction.classifier(config)(images), np.float64)
    clean = -np.log(p[np.arange(len(labels)), labels])
    rows = lines_of(reproduction.results / "figure3.csv")
    surface = np.array([float(row["summed_loss"]) for row in rows]).reshape(3, 3)
    assert surface[0, 0] == pytest.approx(clean.sum(), rel=1e-4)
    assert surface[2, 0] > surface[1, 0] > surface[0, 0], "the loss rises along IFGSM's direction"
    assert np.ptp(surface[1]) > 1e-3, "and changes across it"
    points = json.loads((reproduction.results / "figure3.json").read_text())["table"]["rows"]
    (_, *origin), (_, *first), (_, *second) = points
    assert origin[:2] == ["0.000", "0.000"]
    assert float(first[2]) > float(origin[2])
    assert float(second[1]) > float(first[1]) + 0.03, "the second step leaves g1, along g2"


def test_cost_is_measured_beside_a_natural_step_and_found_again(tmp_path):
    quick = {"model": "digits_cnn", "batch_size": 8}
    configs = [
        e.config for e in plan.table_1(plan.Scale("t", quick, {}, 1, 3, 1), {}) if e.name in ("FGSM 0.3", "e2SAD")
    ]
    told = []
    measured = cost.measure(configs, (8, 8, 1), 10, tmp_path, told.append)
    steps = measured["steps"]
    natural, fgsm, e2sad = (
        steps[f"{name}, digits_cnn, batch 8, float32{rest}"]
        for name, rest in (("natural", ""), ("fgsm", ""), ("e2sad", ", total"))
    )
    assert natural["flops_natural"] == natural["time_natural"] == 1.0
    assert 1.5 < fgsm["flops_natural"] < e2sad["flops_natural"] < 5
    for step in steps.values():
        assert 0 < step["fastest"] <= step["milliseconds"] <= step["slowest"]
    assert len(told) >= 3
    told.clear()
    assert cost.measure(configs, (8, 8, 1), 10, tmp_path, told.append) == measured
    assert told == [], "found again"
    answer = cost.faster_together(configs[0], (8, 8, 1), 10, 3, tmp_path)
    (path,) = tmp_path.glob("together-*.json")
    assert json.loads(path.read_text())["faster"] is answer
    path.write_text(json.dumps({"faster": not answer}))
    assert cost.faster_together(configs[0], (8, 8, 1), 10, 3, tmp_path) is not answer, "found again"


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
