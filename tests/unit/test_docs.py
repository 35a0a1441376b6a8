"""What the documentation shows runs as it stands."""

import contextlib
import csv
import doctest
import functools
import importlib
import json
import pathlib
import pkgutil
import re

import jax
import pytest

import e2sad_jax
from e2sad_jax import attacks, defenses

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "results" / "README.md",
]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    """Blocks of a page share their names, in order, as a reader would paste them."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    registries = [(registry, dict(registry)) for registry in (attacks.ATTACKS, defenses.DEFENSES)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        for registry, entries in registries:  # a page may register its own
            stack.callback(registry.update, entries)
            stack.callback(registry.clear)
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
    if page == ROOT / "README.md":
        assert blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_to_files_of_this_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Every flag of every command, by its `--help`."""
    from absl import flags

    from e2sad_jax import cli
    from experiments.paper import __main__ as paper
    from experiments.step_cost import __main__ as step_cost

    known: set[str] = {"help", "to", "overwrite", "data_dir"}  # the latter of e2sad_jax.data
    for define in (
        lambda: cli.define_flags(cli.RECIPES["mnist"]),
        *(functools.partial(cli.define_request, name) for name in cli.REQUESTS),
        paper.define_flags,
        step_cost.define_flags,
    ):
        values = flags.FlagValues()
        with pytest.MonkeyPatch.context() as patch:
            for module in (cli, paper, step_cost):
                patch.setattr(module, "FLAGS", values)
            patch.setattr(flags, "FLAGS", values)
            for kind in ("bool", "integer", "float", "string", "list", "multi_string"):
                patch.setattr(
                    flags, f"DEFINE_{kind}", functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=values)
                )
            patch.setattr(
                cli,
                "DEFINE",
                {kind: functools.partial(define, flag_values=values) for kind, define in cli.DEFINE.items()},
            )
            define()
        known |= set(values)
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_flags_in_commands_exist(page, known_flags):
    for line in page.read_text().splitlines():
        if "-m experiments." in line or "-m e2sad_jax." in line or "e2sad train" in line:
            given = re.findall(r"--([a-z0-9_]+)", line)
            assert {name if name in known_flags else name.removeprefix("no") for name in given} <= known_flags, line


def test_examples_in_docstrings_print_what_they_say(unoptimized):
    ran = 0
    for info in pkgutil.walk_packages(e2sad_jax.__path__, "e2sad_jax."):
        result = doctest.testmod(importlib.import_module(info.name))
        assert result.failed == 0, info.name
        ran += result.attempted
    assert ran >= 5


def test_every_accuracy_that_the_page_on_the_paper_quotes_stands_in_a_table():
    """Three decimals are ours, four the paper's; CSV and JSON of the small scale hold what is quoted."""
    ours, theirs = set(), set()
    for path in (ROOT / "results" / "paper_small").glob("*.csv"):
        for line in csv.DictReader(path.read_text().splitlines()):
            ours |= {f"{float(line[name]):.3f}" for name in ("ours", "spread") if line.get(name)}
            ours |= {f"{float(seed):.3f}" for seed in line["seeds"].split()} if line.get("seeds") else set()
            theirs |= {f"{float(line['paper']):.4f}"} if line.get("paper") else set()
    for path in (ROOT / "results" / "paper_small").glob("figure*.json"):
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
        ("docs/defenses.md", 1, "mnist_short", 18),
        ("docs/defenses.md", 2, "digits_flops", 18),
        ("docs/defenses.md", 3, "svhn_flops", 8),
        ("docs/defenses.md", 4, "defenses_mnist", 15),
        ("docs/e2sad.md", 3, "e2sad_parts", 12),
        ("docs/e2sad.md", 4, "defenses_mnist", 7),
        ("docs/e2sad.md", 5, "mnist_long", 5),
    ],
)
def test_the_numbers_of_every_defense_are_those_of_the_comparison(page, number, folder, rows):
    """Name, clean, robust, and price or steps."""
    text = (ROOT / page).read_text()
    table = re.findall(r"(?:^\|.*\n)+", text, re.M)[number - 1]
    result = json.loads((ROOT / "results" / folder / "compare.json").read_text())
    by = {row["name"]: row for row in result["rows"]}
    shown = re.findall(r"^\| *([^|]+?) *\| *([\d.]+) *\| *([\d.]+) *\| *([\d.,]+) *\|", table, re.M)
    assert len(shown) == rows
    assert f"](../results/{folder}/compare.md)" in text
    for name, clean, robust, last in shown:
        name = re.sub(r" \(.*\)$", "", name) if folder == "e2sad_parts" else name
        row = by.get(name) or by.get(NAMED.get(name)) or by[f"e2SAD, robust, {name}"]
        own = row.get("last", row)
        assert (clean, robust) == (f"{own['clean']:.3f}", f"{own['robust']:.3f}"), name
        if "| steps |" in table:
            assert last == f"{own['steps'][0]:,}", name
        else:
            assert last == f"{row['step_flops'] / result['natural_step_flops']:.2f}", name
    if "| with Square |" in table:
        standard = json.loads((ROOT / "results" / folder / "standard/compare.json").read_text())
        of = {row["name"]: f"{row['last']['robust']:.3f}" for row in standard["rows"]}
        assert dict(re.findall(r"^\| *([^|]+?) *\|.*\| ([\d.]+) \|$", table, re.M)) == of
