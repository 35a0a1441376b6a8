"""Models are trained once, in any number of goes; what goes wrong costs nothing that is finished."""

import errno
import json
import os
import pathlib
import re
import shutil

import jax
import pytest

from e2sad_jax._io import sealed, write_json
from e2sad_jax.errors import BusyError, ConfigError, DataError, NonFiniteError, OutOfTimeError, Stopped, WorkdirError
from e2sad_jax.runs import opening
from e2sad_jax.runs.checkpoint import state_digest
from e2sad_jax.runs.folder import open_workdir, read_training
from experiments.paper import cache, page, plan, runner
from experiments.paper.time_budget import Clock
from tests.helpers import change_loss
from tests.unit.paper.html_page import is_whole

pytestmark = pytest.mark.slow


def test_two_models_from_start_to_report(whole, ask, trained, lines_of):
    """Each is trained once and shared by what needs it; the same command again trains and attacks nothing."""
    root, written = whole
    folder = root / "results" / "tiny"
    assert {p.name for p in written} == {p.name for p in folder.iterdir()}
    assert not [p for p in folder.iterdir() if p.stat().st_size == 0]
    lines = lines_of(folder / "models.csv")
    assert [(line["lambda"], line["steps"], line["goes"]) for line in lines] in (
        [("0.1", "2", "1"), ("3.0", "2", "1")],
        [("3.0", "2", "1"), ("0.1", "2", "1")],
    )
    card = (folder / "models_card.md").read_text()
    assert "**Models:** 2, each with" in card
    assert re.search(r"\*\*Training:\*\* e2sad; batches of 8, steps: 2; ", card)
    assert re.search(r"standard error of an accuracy on \d+ images", card)
    content = json.loads((folder / "figure3.json").read_text())
    assert content["provenance"]["trained"]
    content = json.loads((folder / "study_lam.json").read_text())
    assert content["provenance"]["trained"] != ""
    assert content["provenance"]["attacked"] != ""
    is_whole(folder / "report.html", pictures=2, titles=("the weight lambda", "Figure 3", "Models"))

    before = (folder / "study_lam.csv").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "evaluate", None)
        patch.setattr(runner.figures, "_figure_3", None)
        ask(plan.Item("study", "lam"), plan.FIGURE_3, folder=root, seeds=1).run()
        ask(plan.FIGURE_3, folder=root, seeds=1).run()
    assert trained == []
    assert (folder / "study_lam.csv").read_text() == before
    is_whole(folder / "report.html", pictures=2, titles=("the weight lambda",))  # what is left out later stays


def test_stopped_anywhere_it_goes_on_without_doing_anything_twice(
    whole, ask, trained, monkeypatch, lam, lines_of, tmp_path
):
    """Time runs out again and again, at each place where it may; in the end the tables are those of one go."""
    attacked, evaluate = [], opening.evaluate

    def counting(*args, **kwargs):
        attacked.append(args[4][0].name)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(opening, "evaluate", counting)
    goes, patience = 0, 0
    while goes < 60:
        goes, looks = goes + 1, 0

        def stop(clock, patience=patience):
            nonlocal looks
            looks += 1
            return -1 if looks > patience else 0

        monkeypatch.setattr(runner.Clock, "stop", stop)
        try:
            ask(lam, seeds=1).run()
            break
        except OutOfTimeError as error:
            said, exit_code = str(error), error.exit_code
        patience = 5 if goes % 2 else 2
    assert 5 < goes < 60
    assert exit_code == 4
    assert re.search(r"left: (e2sad soft (lam 3.0 )?seed 0|tables and figures)", said)
    assert "The same command resumes from there" in said
    name = "results/tiny/study_lam.csv"
    assert lines_of(tmp_path / name) == lines_of(whole[0] / name)
    steps = {}
    for config, start in trained:
        assert start >= steps.get(config.workdir, 0), "never from an earlier step than before"
        steps[config.workdir] = start
    assert len(steps) == 2
    assert len(attacked) <= 2 * 6 + goes, "an attack is begun again only if it was cut off"


def test_ctrl_c_is_its_own_exit_code(ask, monkeypatch, lam):
    monkeypatch.setattr(runner.Clock, "stop", lambda clock: 2)
    with pytest.raises(Stopped, match="0 of 2 models are trained and attacked; left: e2sad soft seed 0") as caught:
        ask(lam, seeds=1).run()
    assert caught.value.exit_code == 130


def test_the_budget_ends_before_its_time(monkeypatch):
    """A tenth of a short budget is kept in reserve, more if there was a longer time between two looks at the clock."""
    now = [100.0]
    monkeypatch.setattr("experiments.paper.time_budget.time.monotonic", lambda: now[0])

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


def test_runs_of_a_kind_train_together(ask, trained, monkeypatch, lam):
    """That they end where single ones do is tested where populations are."""
    monkeypatch.setattr(plan, "LAMBDAS", (0.1, 1.0, 3.0))
    monkeypatch.setattr(runner.Reproduction, "missing", lambda self, config: [])  # attacks
    monkeypatch.setattr(runner.Reproduction, "_write", lambda self: [])
    reproduction = ask(lam, seeds=1, together=2)
    reproduction.run()
    segments = [read_training(pathlib.Path(c.workdir)) for c in reproduction.runs]
    assert [[s["runs_together"] for s in run] for run in segments] == [[2], [2], [1]]
    assert len({state_digest(pathlib.Path(c.workdir), reproduction.steps(c)) for c in reproduction.runs}) == 3
    assert {c.seed for c, _ in trained} == {0}


@pytest.mark.usefixtures("finished")
def test_a_run_that_another_process_has_is_waited_for(ask, monkeypatch, lam):
    reproduction = ask(lam, seeds=1)
    for config in reproduction.runs:
        shutil.rmtree(pathlib.Path(config.workdir) / cache.FOLDER)
    config = reproduction.runs[0]
    dataset, workdir = reproduction.dataset_of(config), pathlib.Path(config.workdir)
    waited = []
    other = open_workdir(workdir, config, dataset)
    other.__enter__()
    with pytest.raises(BusyError), opening.open_run(config, dataset):
        pass

    def wait(clock, why, seconds):
        waited.append([reproduction.finished(c) for c in reproduction.runs])
        if len(waited) == 2:
            other.__exit__(None, None, None)

    monkeypatch.setattr(runner.Clock, "wait", wait)
    reproduction.run()
    assert waited == [[False, True]] * 2, "meanwhile the other one was attacked"
    assert reproduction.finished(config)


def test_one_that_diverges_does_not_keep_the_others(ask, trained, monkeypatch, lam):
    """Whether they train together or alone; what does not need it is written."""

    def breaking(loss, parts, arguments):
        return loss / jax.numpy.where(arguments["lam"] > 2, 0.0, 1.0), parts

    change_loss(monkeypatch, "e2sad", breaking)
    for together in (2, 1):
        reproduction = ask(lam, plan.FIGURE_3, seeds=1, together=together)
        with pytest.raises(NonFiniteError, match=r"step 1: .*loss=inf.*not need them is done") as caught:
            reproduction.run()
        assert caught.value.exit_code == 3
        assert [reproduction.finished(c) for c in reproduction.runs] == [True, False]
        assert {p.name for p in reproduction.results.glob("*.png")} == {"figure3.png"}
    tried = [(c.settings["lam"], start) for c, start in trained]
    assert sorted(tried) == [(0.1, 0)] * 2 + [(3.0, 0)] * 3, "together; each alone; in the second go the lost one"


def test_busy_runs_are_waited_for_also_when_another_one_diverges(ask, monkeypatch, lam):
    reproduction, looks, waits = ask(lam, seeds=1), [], []

    def group(self, group):
        looks.append(group[0].settings["lam"])
        if group[0].settings["lam"] > 2:
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


@pytest.mark.usefixtures("finished")
def test_a_full_disk_leaves_what_is_finished(ask, trained, monkeypatch, lam):
    reproduction = ask(lam, seeds=1)
    for config in reproduction.runs:
        shutil.rmtree(pathlib.Path(config.workdir) / cache.FOLDER)
    write, written = cache.write_json, []

    def full(path, value):
        if len(written) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            ask(lam, seeds=1).run()
    again = ask(lam, seeds=1)
    assert sum(len(again.missing(config)) for config in again.runs) == 2 * 6 - 8
    again.run()
    assert trained == [], "no model was trained again"


# What cannot be.


def test_a_workdir_of_another_version_or_run_is_refused_before_anything_is_trained(ask, trained, lam):
    reproduction = ask(lam, seeds=1)
    workdir = pathlib.Path(reproduction.runs[1].workdir)
    workdir.mkdir(parents=True)
    write_json(workdir / "config.json", sealed({"format": 99}))
    with pytest.raises(WorkdirError, match="has format 99, this version reads 1; choose another --workdir"):
        ask(lam, seeds=1)
    assert trained == []
    (workdir / "config.json").unlink()
    ask(lam, seeds=1)


def test_data_that_does_not_fit_is_refused(ask, files, tmp_path, image_file):
    five = image_file(tmp_path / "five.npz", 16, 5)
    with pytest.raises(ConfigError, match="images have 5 channels; 1 means MNIST, 3 SVHN"):
        ask(plan.TABLE_1, data=(five,))
    with pytest.raises(ConfigError, match="grey stands for mnist already"):
        ask(plan.TABLE_1, data=(files[0], files[0]))
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        ask(plan.TABLE_1, data=("nowhere.npz",))
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("finished")
def test_a_damaged_outcome_is_made_anew_and_a_damaged_table_named(ask, trained, lam):
    reproduction = ask(lam, seeds=1)
    config = reproduction.runs[0]
    attack = reproduction.attacks[config][1]
    path = cache.path_of(pathlib.Path(config.workdir), attack, reproduction.tested(config))
    good = path.read_text()
    for bad in ("", good[:100], good.replace("predictions", "prediction"), '{"predictions": [[1, 2]]}', "[1]", "null"):
        path.write_text(bad)
        assert ask(lam, seeds=1).missing(config) == [attack]
    ask(lam, seeds=1).run()
    assert json.loads(path.read_text())["predictions"] == json.loads(good)["predictions"]
    assert trained == []
    (reproduction.results / "study_lam.json").write_text("{}")
    text = page.write(reproduction.results).read_text()
    assert "study_lam.json cannot be read (KeyError" in text
    assert 'id="models"' in text, "the rest is there"
