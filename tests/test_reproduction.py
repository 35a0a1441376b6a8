"""The paper's tables and figures by one command: what is planned, trained once, resumed, and shown."""

import csv
import dataclasses
import errno
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from e2sad_jax import jobs, paper, train
from e2sad_jax.errors import BusyError, ConfigError, DataError, NonFiniteError, OutOfTimeError, Stopped, WorkdirError
from e2sad_jax.evaluate import SUITES, Attack, transfer
from e2sad_jax.reproduction import cost, illustration, outcomes, page, plan, runner, tables
from e2sad_jax.reproduction.clock import Clock
from e2sad_jax.transforms import Transform
from e2sad_jax.workdir import open_workdir, read_training, write_config

LABELS, LAM = plan.Item("study", "labels"), plan.Item("study", "lam")
SHORT = {"ifgsm": 2, "pgd": 2}
TINY = {"model": "digits_cnn", "steps": 2, "batch_size": 8, "checkpoint_every": 2, "attack_steps": 2}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam mixes float and int32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch, unoptimized):
    """Attacks of two steps under the names of the long ones, no validation, costs that are made up."""

    def short(attack):
        return dataclasses.replace(attack, steps=min(attack.steps, SHORT.get(attack.kind, attack.steps)))

    monkeypatch.setattr(plan, "SUITES", {name: tuple(map(short, suite)) for name, suite in SUITES.items()})
    monkeypatch.setattr(plan, "TRANSFER", short(plan.TRANSFER))
    monkeypatch.setattr(runner, "POLL", 0.0)
    monkeypatch.setattr(jobs, "_watch", lambda job, state: {"score": 0.0})
    step = {"flops_natural": 2.0, "time_natural": 3.0, "milliseconds": 4.0, "fastest": 4.0, "slowest": 5.0}

    def measure(configs, *args):
        steps = {cost.key(config): step for config in configs}
        about = {"date": "today", "hardware": "none", "jax": "0", "commit": None}
        return {"steps": steps, "rounds": 7, "command": "c", "environment": about}

    monkeypatch.setattr(runner, "cost", types.SimpleNamespace(key=cost.key, measure=measure))


def save_images(path: pathlib.Path, size: int, channels: int) -> str:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 10
    images = rng.integers(0, 200, (60, size, size, channels)).astype(np.uint8)
    images[np.arange(60), labels % size] = 255
    np.savez(path, x_train=images[:40], y_train=labels[:40], x_test=images[40:], y_test=labels[40:])
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return save_images(folder / "grey.npz", 8, 1), save_images(folder / "part_of_svhn.npz", 8, 3)


@pytest.fixture
def ask(files, tmp_path):
    """A reproduction at a scale of a few steps, of the files above, in a folder of the test's own."""
    scale = plan.Scale("tiny", {**TINY, "eval_examples": 15}, TINY, restarts=2, grid=3, surface_images=10)

    def ask(*items, **what):
        request = {"data": files, "scale": scale, "workdir": str(tmp_path / "runs"), **what}
        return runner.Reproduction(runner.Request(items, results=str(tmp_path / "results"), **request))

    return ask


@pytest.fixture
def trained(monkeypatch):
    """The configurations that were trained, in order, with the step they began at."""
    seen, fit = [], jobs.fit

    def counting(config, model, dataset, state, **kwargs):
        configs = [config] if not isinstance(config, list) else config
        seen.extend((c, int(np.ravel(state.step)[0])) for c in configs)
        return fit(config, model, dataset, state, **kwargs)

    monkeypatch.setattr(jobs, "fit", counting)
    return seen


def lines_of(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# What is planned.


def test_full_scale_is_the_papers_setting_to_the_letter():
    full = plan.SCALES["full"]
    entries = plan.table_1(full, {})
    assert [(e.name, e.label) for e in entries[:-1]] == [
        (name, label) for name in ("natural", "FGSM 0.3", "FGSM 0.4", "IFGSM 0.3") for label in ("hard", "soft")
    ] + [("e2SAD", "soft")]
    for entry in entries[:-1]:
        column, why_not = paper.beside(entry.config, "mnist", entry.config.total_steps(60_000), True)
        assert column is not None, why_not
        assert column.accuracy == entry.paper
    hamm = entries[-1].config
    assert (hamm.defense, hamm.steps, hamm.batch_size, hamm.soft_label, hamm.eps1) == ("hamm", 30_000, 256, False, 0.3)
    for entry in plan.table_3(full, {}):
        assert entry.config.epochs == 20
        assert entry.config.total_steps(73_257) == 5_724
        column, why_not = paper.beside(entry.config, "svhn", 5_724, True)
        assert column is not None, why_not
    assert plan.table_3(full, {})[2].config.attack_steps == 10


def test_small_scale_is_the_same_set_of_models_and_says_so():
    full, small = plan.SCALES["full"], plan.SCALES["small"]
    for table in (plan.table_1, plan.table_2, plan.table_3):
        pairs = list(zip(table(full, {}), table(small, {}), strict=True))
        for a, b in pairs:
            assert (a.key, a.paper) == (b.key, b.paper)
            changed = {k for k, v in a.config.identity().items() if b.config.identity()[k] != v}
            assert changed <= {"model", "batch_size"}
        said = small.describe(pairs[0][1].config, "mnist", 10_000)
        assert said.startswith("small scale: mnist, ")
        assert re.search(r"the paper: (30,000 steps|20 epochs) of 256", said)
    assert full.describe(full_config := plan.table_1(full, {})[0].config, "mnist", 10_000) == (
        "full scale: mnist, mnist_cnn, 30,000 steps of 256, all 10,000 test images"
    )
    assert "layers in bf16" in full.describe(dataclasses.replace(full_config, precision="bf16"), "mnist", 10_000)


def test_studies_change_one_setting_and_share_the_model_of_table_1():
    full = plan.SCALES["full"]
    base = next(e.config for e in plan.table_1(full, {}) if e.name == "e2SAD")
    for name, values, field in [
        ("second_step", {"total", "noise", "loss", "literal", "random"}, "second_step"),
        ("lam", {0.03, 0.1, 0.3, 1.0, 3.0}, "lam"),
        ("alpha", {0.2, 0.4, 0.6, 0.8}, "alpha"),
        ("labels", {True, False}, "soft_label"),
    ]:
        configs = [e.config for e in plan.study(name, full, {}) if e.config.defense == "e2sad"]
        assert {getattr(c, field) for c in configs} == values
        assert base in configs
        for config in configs:
            assert dataclasses.replace(config, **{field: getattr(base, field)}) == base


def test_the_papers_black_box_table(shared):
    names = {
        "natural": "natural",
        "fgsm_at_0.3": "FGSM 0.3",
        "fgsm_at_0.4": "FGSM 0.4",
        "ifgsm_at_0.3_k30": "IFGSM 0.3",
    }
    lines = lines_of(shared("paper/table2_mnist_blackbox.csv"))
    assert len(lines) == 12
    for line in lines:
        substitute = (names[line["substitute"]], line["substitute_label"])
        for column, name in names.items():
            assert paper.transfer(substitute, (name, line["target_label"])) == float(line[column])
        assert paper.transfer(substitute, ("e2SAD", "soft")) == float(line["e2sad_soft"])
    assert paper.transfer(("e2SAD", "soft"), ("natural", "hard")) is None
    assert paper.transfer(("natural", "hard"), ("Hamm 0.3", "hard")) is None


# What is done and shown.


def test_tables_and_figures_from_start_to_report(ask, trained, tmp_path):
    everything = [plan.Item(kind, name) for kind in ("table", "figure") for name in plan.NAMES[kind]]
    reproduction = ask(*everything, LABELS, seeds=1)
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
        patch.setattr(runner, "evaluate", None)
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


def test_stopped_anywhere_it_goes_on_without_doing_anything_twice(ask, trained, monkeypatch, tmp_path):
    """Time runs out again and again, at each place where it may; in the end the tables are those of one go."""
    whole = ask(LABELS, seeds=1, workdir=str(tmp_path / "whole"))
    whole.run()
    expected = lines_of(whole.results / "study_labels.csv")
    trained.clear()

    attacked, evaluate = [], runner.evaluate

    def counting(*args, **kwargs):
        attacked.append(args[4][0].name)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(runner, "evaluate", counting)
    goes, patience = 0, 0
    while goes < 60:
        goes, looks = goes + 1, 0

        def stop(clock, patience=patience):
            nonlocal looks
            looks += 1
            return -1 if looks > patience else 0

        monkeypatch.setattr(runner.Clock, "stop", stop)
        try:
            ask(LABELS, seeds=1).run()
            break
        except OutOfTimeError as error:
            said, exit_code = str(error), error.exit_code
        patience = 5 if goes % 2 else 2
    assert 5 < goes < 60
    assert exit_code == 4
    assert re.search(r"left: (e2sad (hard|soft) seed 0|tables and figures)", said)
    assert "The same command goes on from there" in said
    assert lines_of(whole.results / "study_labels.csv") == expected
    steps = {}
    for config, start in trained:
        assert start >= steps.get(config.workdir, 0), "never from an earlier step than before"
        steps[config.workdir] = start
    assert len(steps) == 2
    assert len(attacked) <= 2 * 6 + goes, "an attack is begun again only if it was cut off"


def test_ctrl_c_is_its_own_exit_code(ask, monkeypatch):
    monkeypatch.setattr(runner.Clock, "stop", lambda clock: 2)
    with pytest.raises(Stopped, match="0 of 2 models are trained and attacked; left: e2sad hard seed 0") as caught:
        ask(LABELS, seeds=1).run()
    assert caught.value.exit_code == 130


def test_the_budget_ends_before_its_time(monkeypatch):
    """A tenth of a short budget is kept in reserve, more if there was a longer time between two looks at the clock."""
    now = [100.0]
    monkeypatch.setattr("e2sad_jax.reproduction.clock.time.monotonic", lambda: now[0])

    def stops(*times):
        now[0] = 100.0
        clock = Clock(lambda: 0, 1.0, 100.0)
        codes = []
        for seconds in times:
            now[0] = 100.0 + seconds
            codes.append(clock.stop())
        return codes

    assert stops(*range(0, 60, 5)) == [0] * 11 + [-1]
    assert stops(1, 31, 44, 46) == [0, 0, 0, -1], "what took long may take long again, up to a quarter of the budget"
    assert Clock(lambda: 0, 0.0, -1e9).stop() == 0, "no budget, no end"
    assert Clock(lambda: 15, 1.0, 100.0).stop() == 15


def test_together_is_what_it_is_alone(ask, trained, tmp_path):
    results = {}
    for together in (1, 3):
        r = ask(LAM, seeds=1, together=together, workdir=str(tmp_path / f"runs{together}"))
        r.run()
        results[together] = [r.classifier(c).params for c in r.runs]
        segments = [read_training(pathlib.Path(c.workdir))[0]["runs_together"] for c in r.runs]
        assert segments == ([1] * 5 if together == 1 else [3, 3, 3, 2, 2])
    for a, b in zip(results[1], results[3], strict=True):
        # As a whole: where a gradient is nearly zero, Adam turns rounding into a step of its own size.
        assert float(optax.tree.norm(optax.tree.sub(a, b))) < 1e-5 * float(optax.tree.norm(a))


def test_a_run_that_another_process_has_is_waited_for(ask, monkeypatch):
    reproduction = ask(LABELS, seeds=1)
    config = reproduction.runs[0]
    dataset, workdir = reproduction.dataset_of(config), pathlib.Path(config.workdir)
    waited = []
    other = open_workdir(workdir, config, dataset)
    other.__enter__()
    write_config(workdir, config, dataset)
    with pytest.raises(BusyError), jobs.open_job(config, dataset):
        pass

    def wait(clock, why, seconds):
        waited.append([reproduction.finished(c) for c in reproduction.runs])
        if len(waited) == 2:
            other.__exit__(None, None, None)

    monkeypatch.setattr(runner.Clock, "wait", wait)
    reproduction.run()
    assert waited == [[False, True]] * 2, "meanwhile the other one was trained"
    assert reproduction.finished(config)


def test_one_that_diverges_does_not_keep_the_others(ask, trained, monkeypatch):
    """Whether they train together or alone; what does not need it is written."""
    real = train.training_loss

    def breaking(config, bounds):
        loss_of = real(config, bounds)

        def loss_fn(f, x, y, key):
            loss, parts = loss_of(f, x, y, key)
            return loss / jax.numpy.where(config.lam > 2, 0.0, 1.0), parts

        return loss_fn

    monkeypatch.setattr(train, "training_loss", breaking)
    for together in (5, 1):
        reproduction = ask(LAM, plan.FIGURE_3, seeds=1, together=together)
        with pytest.raises(NonFiniteError, match=r"step 1: .*loss=inf.*not need them is done") as caught:
            reproduction.run()
        assert caught.value.exit_code == 3
        assert [reproduction.finished(c) for c in reproduction.runs] == [True] * 4 + [False]
        assert {p.name for p in reproduction.results.glob("*.png")} == {"figure3.png"}
    tried = [(pathlib.Path(c.workdir).name, start) for c, start in trained]
    assert len(tried) == 5 + 1 + 4 + 1, "together; the lost one, and the others together; in the second go the lost one"


def test_busy_runs_are_waited_for_also_when_another_one_diverges(ask, monkeypatch):
    reproduction, looks, waits = ask(LAM, seeds=1), [], []

    def group(self, group):
        looks.append(group[0].lam)
        if group[0].lam > 2:
            raise NonFiniteError("step 1: loss=inf")
        if len(waits) < 3:
            raise BusyError("another process is at work")

    monkeypatch.setattr(runner.Reproduction, "_group", group)
    monkeypatch.setattr(runner.Clock, "wait", lambda *args: waits.append(1))
    monkeypatch.setattr(runner.Reproduction, "_write", lambda self: [])
    with pytest.raises(NonFiniteError):
        reproduction.run()
    assert len(waits) == 3
    assert len(looks) <= 5 + 4 * 4


def test_a_full_disk_leaves_what_is_finished(ask, trained, monkeypatch):
    reproduction = ask(LABELS, seeds=1)
    write, written = outcomes.write_json, []

    def full(path, value):
        if len(written) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(outcomes, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            reproduction.run()
    assert len(trained) == 2
    again = ask(LABELS, seeds=1)
    again.run()
    assert len(trained) == 2, "no model was trained again"


# What cannot be.


def test_a_workdir_of_another_version_or_run_is_refused_before_anything_is_trained(ask, trained):
    reproduction = ask(LABELS, seeds=1)
    workdir = pathlib.Path(reproduction.runs[1].workdir)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text('{"format": 99}')
    with pytest.raises(WorkdirError, match="has format 99, this version reads 1; choose another --workdir"):
        ask(LABELS, seeds=1)
    assert trained == []
    (workdir / "config.json").unlink()
    ask(LABELS, seeds=1)


def test_data_that_does_not_fit_is_refused(ask, files, tmp_path):
    five = save_images(tmp_path / "five.npz", 16, 5)
    with pytest.raises(ConfigError, match="images have 5 channels; 1 stands for MNIST, 3 for SVHN"):
        ask(plan.TABLE_1, data=(five,))
    with pytest.raises(ConfigError, match="grey stands for mnist already"):
        ask(plan.TABLE_1, data=(files[0], files[0]))
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        ask(plan.TABLE_1, data=("nowhere.npz",))
    assert not (tmp_path / "runs").exists()


def test_a_damaged_outcome_is_made_anew_and_a_damaged_table_named(ask, tmp_path):
    reproduction = ask(LABELS, seeds=1)
    reproduction.run()
    config = reproduction.runs[0]
    attack = reproduction.attacks[config][1]
    path = outcomes.path_of(pathlib.Path(config.workdir), attack, reproduction.tested(config))
    good = path.read_text()
    for bad in ("", good[:100], good.replace("predictions", "prediction"), '{"predictions": [[1, 2]]}', "[1]", "null"):
        path.write_text(bad)
        assert ask(LABELS, seeds=1).missing(config) == [attack]
    ask(LABELS, seeds=1).run()
    assert json.loads(path.read_text())["predictions"] == json.loads(good)["predictions"]
    (reproduction.results / "study_labels.json").write_text("{}")
    text = page.write(reproduction.results).read_text()
    assert "study_labels.json cannot be read (KeyError" in text
    assert 'id="models"' in text, "the rest is there"


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
    curves, points = illustration.compute()
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


def test_surfaces_of_a_trained_model(ask):
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


def test_black_box_by_hand():
    """Three linear classifiers of one pixel: images made for one meet the others; rows and columns are not swapped."""

    class Linear:
        def apply(self, w, x):
            return jnp.concatenate([x[:, 0, 0], -x[:, 0, 0]], -1) * w

    model = Linear()
    transform = Transform("as it is", lambda images: images, (-1.0, 1.0))
    images = np.array([0.5, 0.2, -0.4, -0.1], np.float32).reshape(4, 1, 1, 1)
    labels = np.array([0, 0, 1, 1])
    one, backwards = jnp.float32(1), jnp.float32(-1)
    attack = Attack("FGSM", "fgsm", 0.3, 1)

    def ask(substitute, *targets, **kwargs):
        results = transfer(
            (model, substitute), [(model, t) for t in targets], images, labels, attack, transform=transform,
            num_classes=2, **kwargs,
        )  # fmt: skip
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
    assert steps == [3, 1]


def test_cost_is_measured_beside_a_natural_step_and_found_again(tmp_path):
    configs = [
        e.config for e in plan.table_1(plan.Scale("t", TINY, TINY, 1, 3, 1), {}) if e.name in ("FGSM 0.3", "e2SAD")
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


def test_differences_are_shown_for_the_papers_data_alone(ask, monkeypatch):
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


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--table=4"], 2, "--table=4: must be of 1, 2, 3, all"),
        (["--figure=1"], 2, "--figure=1: must be of 2, 3, 4, all"),
        (["--study=eps"], 2, "--study=eps: must be of second_step, lam, alpha, labels, all"),
        (["--scale=huge"], 2, "--scale=huge: must be one of full, small"),
        (["--seeds=-1"], 2, "--seeds=-1: must be at least 0"),
        (["--time_budget_minutes=nan"], 2, "--time_budget_minutes=nan: must be at least 0"),
        (["--table=1", "--precision=fp8"], 2, "--precision=fp8: must be one of float32, tf32, bf16"),
        (["--table=1", "--data=nowhere.npz"], 2, "nowhere.npz"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(flags, code, words, tmp_path):
    paths = [f"--workdir={tmp_path / 'w'}", f"--results={tmp_path / 'r'}"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.paper", *paths, *flags],
        cwd=pathlib.Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == code
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
