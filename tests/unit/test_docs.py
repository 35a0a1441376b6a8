"""What the documentation shows runs as it stands."""

import csv
import doctest
import importlib
import json
import pathlib
import pkgutil
import re

import jax
import pytest

import e2sad_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks" / "scaling.md",
    ROOT / "results" / "README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    """Blocks of a page share their names, in order, as a reader would paste them."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
    if page == ROOT / "README.md":
        assert len(blocks) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_to_files_of_this_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_flags_in_commands_exist(page):
    from e2sad_jax.defenses import DEFENSES
    from e2sad_jax.training import Config

    known = {
        *Config.__dataclass_fields__,
        *(name for defense in DEFENSES.values() for name in defense.defaults()),
        *("table", "figure", "study", "scale", "seeds", "time_budget_minutes", "results"),  # experiments.paper
        *("image_size", "rounds", "seconds", "peer", "steps_per_dispatch"),  # experiments.step_cost
        *("coordinator", "process_id", "num_processes"),
        *(
            "which",
            "predict",
            "eps",
            "examples",
            "transfer_from",
            "auto",
            "noauto",
            "queries",
            "targets",
            "restarts",
        ),  # .evaluate
        *("entry", "apgd_steps", "parts", "equal_flops", "judge"),  # experiments.compare
        "preset",
        "baseline",
        "describe",
        "help",
        "to",
        "overwrite",
        "format",  # .export
        "constraint",
        "editable",
    }
    for line in page.read_text().splitlines():
        if "-m experiments." in line or "-m e2sad_jax." in line:
            assert set(re.findall(r"--([a-z0-9_]+)", line)) <= known, line


def test_examples_in_docstrings_print_what_they_say():
    ran = 0
    for info in pkgutil.walk_packages(e2sad_jax.__path__, "e2sad_jax."):
        result = doctest.testmod(importlib.import_module(info.name))
        assert result.failed == 0, info.name
        ran += result.attempted
    assert ran >= 5


def test_every_accuracy_that_the_page_on_the_paper_quotes_stands_in_a_table():
    """Three decimals are ours, four the paper's; CSV and JSON of the small scale hold what is quoted."""
    ours, theirs = set(), set()
    for path in (ROOT / "results" / "small").glob("*.csv"):
        for line in csv.DictReader(path.read_text().splitlines()):
            ours |= {f"{float(line[name]):.3f}" for name in ("ours", "spread") if line.get(name)}
            ours |= {f"{float(seed):.3f}" for seed in line["seeds"].split()} if line.get("seeds") else set()
            theirs |= {f"{float(line['paper']):.4f}"} if line.get("paper") else set()
    for path in (ROOT / "results" / "small").glob("figure*.json"):
        rows = json.loads(path.read_text())["table"]["rows"]
        ours |= {cell for row in rows for cell in row if re.fullmatch(r"\d+\.\d{3}", cell)}
    text = (ROOT / "docs" / "paper.md").read_text()
    quoted = re.findall(r"(?<![\d.])\d+\.\d{3,4}(?!\d)", text)
    assert len(quoted) > 30
    assert [q for q in quoted if q not in (ours if len(q.split(".")[1]) == 3 else theirs)] == []


NAMED = {
    "e2SAD, `robust`": "e2SAD, robust",
    "e2SAD, `paper`'s points": "e2SAD, paper's points",
    "the same with lambda 1": "e2SAD, lambda 1",
    "nothing": "e2SAD, robust",
}


@pytest.mark.parametrize(
    ("page", "number", "folder", "rows"),
    [
        ("which-defense.md", 1, "compare", 15),
        ("which-defense.md", 2, "compare_digits", 8),
        ("e2sad.md", 2, "compare_parts", 12),
        ("e2sad.md", 3, "compare", 11),
        ("e2sad.md", 4, "compare_equal", 10),
    ],
)
def test_the_numbers_of_every_defense_are_those_of_the_comparison(page, number, folder, rows):
    """Name, clean, robust, and price or steps."""
    text = (ROOT / "docs" / page).read_text()
    table = re.findall(r"(?:^\|.*\n)+", text, re.M)[number - 1]
    by = {row["name"]: row for row in json.loads((ROOT / "results" / folder / "compare.json").read_text())["rows"]}
    shown = re.findall(r"^\| *([^|]+?) *\| *([\d.]+) *\| *([\d.]+) *\| *([\d.,]+) *\|", table, re.M)
    assert len(shown) == rows
    assert f"](../results/{folder}/compare.md)" in text
    for name, clean, robust, last in shown:
        name = re.sub(r" \(.*\)$", "", name) if folder == "compare_parts" else name
        row = by.get(name) or by.get(NAMED.get(name)) or by[f"e2SAD, robust, {name}"]
        own = row.get("last", row)
        assert (clean, robust) == (f"{own['clean']:.3f}", f"{own['robust']:.3f}"), name
        if "| steps |" in table:
            assert last == f"{own['steps'][0]:,}", name
        else:
            assert last == f"{row['flops'] / by['natural']['flops']:.2f}", name


def test_the_readmes_speeds_are_those_of_the_results():
    rows = json.loads((ROOT / "results" / "step_cost" / "step_cost.json").read_text())["rows"]
    by = {(row["name"], row["by"]): row for row in rows}
    shown = re.findall(r"^\| (\S+) \| (.*) \|$", (ROOT / "README.md").read_text().split("## Speed")[1], re.M)
    shown = [(name, cells.split(" | ")) for name, cells in shown if (name, "e2sad_jax") in by]
    assert {"natural", "fgsm", "e2sad", "ifgsm-30"} <= {name for name, _ in shown}
    for name, cells in shown:
        ours = by[name, "e2sad_jax"]
        peers = (by[name, peer].get("ours_over_peer") for peer in ("torch", "torch.compile"))
        assert cells == [
            f"{ours['milliseconds']:,.0f}",
            f"{ours['images_per_second']:,.0f}",
            f"{ours['time_natural']:.2f}",
            f"{ours['flops_natural']:.2f}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in peers),
        ], name
