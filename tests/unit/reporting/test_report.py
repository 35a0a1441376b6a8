"""What a report says beside the numbers: the paper's only where they are comparable, the command as it can be typed."""

import importlib.machinery
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from e2sad_jax import data
from e2sad_jax.comparison import show
from e2sad_jax.evaluation import SUITES, Outcome
from e2sad_jax.reporting import provenance, report
from e2sad_jax.reporting.report import Best
from e2sad_jax.training import configure
from experiments.paper import tables


@pytest.fixture(scope="module")
def mnist() -> data.Dataset:
    """The name and sizes of MNIST, nothing in it."""
    x, y = np.zeros((10_000, 2, 2, 1), np.uint8), np.zeros(10_000, np.int32)
    return data.Dataset("mnist", "3.0.1", x, y, x, y, num_classes=10, source_sha256={})


def build(mnist, suite, correct=9_000, best=None, **changes):
    """Results of a run that is right about the first `correct` images; `best` is the step and that number of the best."""

    def outcomes(correct):
        outcome = Outcome(np.arange(10_000) < correct, np.zeros(10_000, np.int32))
        return {attack.name: outcome for attack in SUITES[suite]}

    about = {"steps": 30_000, "parameters": 1, "train_seconds": 1.0}
    about["best"] = best and Best(best[0], "500 training images", outcomes(best[1]))
    return report.build(configure(**changes), mnist, SUITES[suite], outcomes(correct), **about)


@pytest.mark.parametrize(("suite", "shown"), [("mnist", 5), ("svhn", 1), ("digits", 2)])
def test_the_papers_numbers_stand_only_beside_the_papers_attacks(suite, shown, mnist):
    """IFGSM-10 has another budget in each suite; clean, and FGSM 0.3 on the digits, mean the same everywhere."""
    rows = build(mnist, suite)["attacks"]
    with_paper = {row["name"] for row in rows if row["paper"] is not None}
    assert len(with_paper) == shown
    assert ("IFGSM-10" in with_paper) == (suite == "mnist")
    assert "PGD-40" not in with_paper


def test_the_table_in_markdown(mnist):
    text = report.markdown({"natural": build(mnist, "mnist", 5_000, defense="natural"), "e2sad": build(mnist, "mnist")})
    assert text.startswith("# mnist: accuracy on all 10,000 test images, 30,000 training steps\n")
    assert "| IFGSM-30 (eps 0.3, step eps/30) | 0.5000 | 0.0930 | 0.9000 | 0.8633 |" in text
    assert "gradient is zero" in text
    assert "IFGSM is the paper's and weak" in text


def test_the_best_has_a_column_where_it_is_not_the_last(mnist):
    """Beside its model's own and the paper's; the paper's numbers are for the last alone."""
    natural = build(mnist, "mnist", 5_000, (30_000, 5_000), defense="natural")
    e2sad = build(mnist, "mnist", 9_000, (1_500, 9_500))
    assert all("paper" not in row for row in e2sad["best"]["attacks"])
    text = report.markdown({"natural": natural, "e2sad": e2sad})
    assert "| attack | natural | natural, paper | e2sad | e2sad, paper | e2sad, best (step 1,500) |\n" in text
    assert "| IFGSM-30 (eps 0.3, step eps/30) | 0.5000 | 0.0930 | 0.9000 | 0.8633 | 0.9500 |" in text
    assert "| every attack above | 0.5000 |  | 0.9000 |  | 0.9500 |" in text
    assert "- natural: the last is also the best checkpoint by PGD-10 on 500 training images.\n" in text
    assert "- e2sad: step 1,500 is the best checkpoint by PGD-10 on 500 training images; the column" in text
    table = report.text_table({"natural": natural, "e2sad": e2sad}).splitlines()
    assert table[0].endswith("  e2sad, paper  e2sad, best (step 1,500)")
    assert len({len(line) for line in table}) == 1


def test_results_of_before_there_was_a_best_are_shown_as_they_were(mnist):
    results = build(mnist, "mnist", defense="natural")
    del results["best"]
    assert "best checkpoint" not in report.markdown({"natural": results})
    assert report.about_best({"natural": results}) == []
    assert report.text_table({"natural": results}).splitlines()[0].split() == ["attack", "natural", "natural,", "paper"]


def test_lines_of_cells_are_aligned():
    assert report.aligned([["a", "bb", "c"], ["long", "b", ""]]) == ["a     bb  c", "long   b   "]
    assert report.aligned([["a", "bb"], ["long", "b"]], " ") == ["a    bb", "long  b"]


def test_the_command_can_be_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnist.py", "--data=my file.npz", "--steps=3"])
    assert provenance.command().endswith(" '--data=my file.npz' --steps=3")
    for name in ("package", "package.__main__"):
        spec = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec, raising=False)
        assert provenance.command() == "python -m package '--data=my file.npz' --steps=3"


def test_the_command_that_goes_on_names_the_interpreter_where_python_is_another(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["mnist.py", "--steps=3"])
    for folder in (tmp_path / "other", tmp_path / "my env"):
        folder.mkdir()
        (folder / "python").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "my env"))
    assert provenance.again() == provenance.command()
    (tmp_path / "my env" / "python3.99").touch(mode=0o755)
    with monkeypatch.context() as beside:
        beside.setattr(sys, "executable", str(tmp_path / "my env" / "python3.99"))
        assert provenance.again().startswith(f"'{tmp_path}/my env/python3.99' "), "another one in the same folder"
    for elsewhere in (tmp_path / "other", tmp_path / "nothing"):
        monkeypatch.setenv("PATH", str(elsewhere))
        assert provenance.again() == f"'{tmp_path}/my env/python'{provenance.command().removeprefix('python')}"
    monkeypatch.chdir(tmp_path)
    assert provenance.again().startswith("'my env/python' "), "as short as it can be typed"


def test_hardware_is_what_a_run_uses():
    """One device, however many there are (these tests have four)."""
    assert " x " not in provenance.environment()["hardware"]


ROOT = pathlib.Path(__file__).resolve().parents[3]
OF_MANY = ("compare_card.md", "models_card.md")
CARDS = sorted(card for card in (ROOT / "results").glob("*/*_card.md") if card.name not in OF_MANY)


def test_a_model_card_says_what_a_number_needs_beside_it(mnist):
    """Attack, budget, steps, step size, restarts, images; and the settings, as flags that make the same run again."""
    results = build(
        mnist, "mnist", 400, (1_500, 9_500), batch_size=64, soft_label=False, eps_warmup=0.5, clip_second=True
    )
    card = report.model_card({**results, "examples": 2_500})
    assert card.startswith("# Model card: e2sad on mnist\n")
    assert "On the first 2,500 of 10,000 test images" in card
    assert "| attack | budget | steps | step | restarts | accuracy | best checkpoint, step 1,500 |\n" in card
    assert "| PGD-40 | 0.3 | 40 | 0.02 | 1 | 0.0400 | 0.9500 |\n" in card
    assert "| IFGSM-30 | 0.3 | 30 | 0.01 | 1 | 0.0400 | 0.9500 |\n" in card
    assert "| every attack above |  |  |  |  | 0.0400 | 0.9500 |\n" in card
    assert "is up to 0.010." in card
    assert "not robust at these budgets" in card
    assert "not robust" not in report.model_card(build(mnist, "mnist", 9_000))
    flags = card.split("steps of 64, `")[1].split("`")[0].split()
    changes = {"batch_size": "64", "clip_second": True, "eps_warmup": "0.5", "soft_label": False, "defense": "e2sad"}
    read = {f.removeprefix("--").removeprefix("no").split("=")[0]: "=" in f and f.split("=")[1] for f in flags}
    read |= {name: f"--{name}" in flags for name in ("clip_second", "soft_label")}
    assert {k: v for k, v in read.items() if k != "steps"} == changes


@pytest.mark.parametrize("card", CARDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_cards_are_those_of_the_results_beside_them(card):
    results = json.loads(card.with_name(card.name.replace("_card.md", ".json")).read_text())
    assert card.read_text() == report.model_card(results)
    table = (card.parent / "results.md").read_text()
    for row in results["attacks"]:  # the same numbers as in the table that was written with the run
        assert f"{row['accuracy']:.4f}" in table


def test_committed_cards_of_many_models_are_those_of_the_results_beside_them():
    """Of the comparison on the digits there is none: its results are from before checkpoints were chosen."""
    cards = sorted((ROOT / "results").glob("**/compare_card.md"))
    assert [card.parent.name for card in cards] == [
        "compare",
        "compare_equal",
        "compare_parts",
        "e2sad_robust",
        "standard",
    ]
    for card in cards:
        assert card.read_text() == show.card(json.loads((card.parent / "compare.json").read_text()))
    small = ROOT / "results" / "small"
    records = json.loads((small / "models.json").read_text())["records"]
    assert (small / "models_card.md").read_text() == tables.card("small", records, [1_000])


def test_every_committed_run_has_a_card():
    """Those of whole runs, as `report.build` made them."""
    runs = [
        path.with_name(f"{path.stem}_card.md")
        for path in (ROOT / "results").glob("*/*.json")
        if {"attacks", "config", "examples"} <= set(json.loads(path.read_text()))
    ]
    assert len(runs) == 8
    assert sorted(runs) == CARDS


def test_the_card_is_printed_by_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "e2sad_jax.reporting.report", str(ROOT / "results" / "digits" / "e2sad.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == (ROOT / "results" / "digits" / "e2sad_card.md").read_text()
