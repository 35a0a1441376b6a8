"""The committed results: quoted, clean, and the same in every form."""

import json
import pathlib
import re
import runpy
import sys

import pytest

from benchmarks import official_page
from benchmarks import results as index
from e2sad_jax.comparison import show
from e2sad_jax.reporting import card, results
from experiments.paper import tables

ROOT = pathlib.Path(__file__).resolve().parents[3]
RESULTS = ROOT / "results"
FOLDERS = sorted({path.parent for path in RESULTS.rglob("*") if path.is_file()} - {RESULTS})
COMPARISONS = sorted(path.parent for path in RESULTS.rglob("compare.json"))
RUNS = {"digits": "natural", "mnist": "fgsm", "svhn_10k": "natural"}  # folders of one run, with the baseline
NAMED = {"IFGSM-30": "IFGSM-30 (Eq. 3)"}  # as the README calls them


def name(folder):
    return folder.relative_to(RESULTS).as_posix()


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_a_folder_is_quoted(folder):
    pages = [ROOT / "README.md", RESULTS / "README.md", *(ROOT / "docs").glob("*.md")]
    quoted = [page for page in pages if re.search(rf"\]\([^)]*{re.escape(name(folder))}/", page.read_text())]
    assert quoted, "what no page links to is not kept"


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_a_folder_was_made_at_clean_commits(folder):
    for path in folder.iterdir():
        if path.suffix in (".json", ".md"):
            assert "with changes" not in path.read_text(), path


def test_the_table_of_results_is_that_of_the_files():
    assert (RESULTS / "README.md").read_text() == index.readme()
    answered = {pathlib.PurePosixPath(question.source).parent.as_posix() for question in index.QUESTIONS}
    assert set(map(name, FOLDERS)) <= answered
    assert all(index.missing().values()), "what is not there has a command that makes it"


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("attacks_vs_reference/*/official.json")), ids=lambda p: p.parent.name
)
def test_the_page_of_the_official_code_is_that_of_its_json(path):
    results = json.loads(path.read_text())["results"]
    assert path.with_suffix(".md").read_text() == official_page.page(results)
    assert [line for line in official_page.failures(results) if "outside" in line] == []


def test_provenance_of_rows_of_several_origins():
    environments = [{"hardware": "CPU", "date": f"2026-11-2{i} 10:00 UTC", "commit": f"{i}" * 40} for i in (3, 5)]
    old, new = ({"command": f"run {i}", "environment": e} for i, e in enumerate(environments))
    found = index.provenance_of({**new, "rows": [{"origin": old}, {"origin": old}, {}]})
    assert [(part["command"], part["commit"][:1]) for part in found] == [("run 1", "5"), ("run 0", "3")]
    text = "`first`, CPU, 2 cores, X, 2026-01-01, commit abc\n\n`second`, 2026-01-02 03:04 UTC, CPU, 4 cores, Y; commit def\n"
    assert index.provenance_of(text) == [
        {"command": "second", "hardware": "CPU, 4 cores, Y", "date": "2026-01-02", "commit": "def"}
    ]
    command = "python -m tests.torture --results=results --only=full_disk"
    now = "python -m benchmarks.faults --results=results/reliability --only=full_disk"
    assert index.command_now(command, "reliability/torture.md") == now


@pytest.mark.parametrize("folder", sorted(RUNS))
def test_tables_and_cards_of_runs_are_those_of_their_json(folder):
    here = RESULTS / folder
    found = {of: json.loads((here / f"{of}.json").read_text()) for of in (RUNS[folder], "e2sad")}
    assert (here / "results.md").read_text() == results.markdown(found)
    for of, result in found.items():
        assert (here / f"{of}_card.md").read_text() == card.model_card(result)


def test_every_run_that_is_kept_has_a_card():
    """As the runs of `RUNS` have, whose cards are compared."""
    runs = [path for path in RESULTS.rglob("*.json") if {"attacks", "config", "examples"} <= set(read(path))]
    assert {name(path.parent) for path in runs} == set(RUNS)
    assert sorted(path.with_name(f"{path.stem}_card.md") for path in runs) == sorted(
        path for folder in RUNS for path in (RESULTS / folder).glob("*_card.md")
    )


def read(path):
    return json.loads(path.read_text())


def test_a_card_is_printed_by_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["card", str(RESULTS / "digits" / "e2sad.json")])
    runpy.run_path(card.__file__, run_name="__main__")
    assert capsys.readouterr().out == (RESULTS / "digits" / "e2sad_card.md").read_text()


@pytest.mark.parametrize("folder", COMPARISONS, ids=name)
def test_tables_and_cards_of_comparisons_are_those_of_their_json(folder):
    result = json.loads((folder / "compare.json").read_text())
    assert (folder / "compare.md").read_text() == show.markdown(result)
    assert (folder / "compare_card.md").read_text() == show.card(result)
    assert (folder / "compare.png").exists()
    for row in result["rows"]:
        for which in {"last", "average", "best"} & row.keys():  # rows are the means of their runs
            robust = [run[which]["robust"] for run in row["runs"]]
            assert row[which]["robust"] == pytest.approx(sum(robust) / len(robust))
        assert row["flops"] == row["step_flops"] * row["settings"]["steps"]


def test_the_card_of_the_papers_models_is_that_of_their_json():
    folder = RESULTS / "paper_small"
    records = json.loads((folder / "models.json").read_text())["records"]
    assert (folder / "models_card.md").read_text() == tables.card("small", records, [1_000])


def test_the_readmes_table_is_that_of_the_comparison():
    result = json.loads((RESULTS / "mnist_short" / "compare.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    shown = re.findall(
        r"^\| \**([^|*]+?)\** \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(shown) >= 5
    for title, robust, clean, price in shown:
        row = rows[NAMED.get(title, title)]
        step = row["step_flops"] / result["natural_step_flops"]
        assert (robust, clean, price) == (f"{row['last']['robust']:.3f}", f"{row['last']['clean']:.3f}", f"{step:.2f}")
