"""Writes results/README.md: one table of what the committed results answer, taken from their own files.

python -m benchmarks.results
"""

import collections
import json
import pathlib
import re
from collections.abc import Mapping

from benchmarks.questions import QUESTIONS, Content
from e2sad_jax._io import write_text
from e2sad_jax.reporting.table import Table

ROOT = pathlib.Path(__file__).parents[1] / "results"
INTRODUCTION = """\
# Results

Each folder answers one question. The command of its row made it, at the commit of its row. The numbers of this page are read
from the files in the folders by `python -m benchmarks.results`. Prices in FLOPs are counted at the commit that their table
names (`python -m experiments.compare --show --results=FOLDER` counts them again).
"""
LIMITS = """\
Robust accuracy: images classified correctly under all attacks of the table behind the link. Most results are of one seed and
a reduced scale; each table says which. `svhn_10k` is the first 10,000 images of SVHN's test set, split 8,000 to 2,000: no
number of it compares with one on SVHN. The JSON files of `mnist`, `svhn_10k`, `defenses_mnist` and `e2sad_ablation` were
brought into the present format after they were measured; no measured number changed. `mnist_long/standard` was measured while
result files of an earlier command were not committed; its commit was marked "with changes" for it, which was taken off by
hand. The rows of e2SAD in `mnist_long/standard`, and that of the paper's setting after 8,000 steps in `mnist_lengths`, were
put beside the others by hand, with their commands. The outcomes of the first seeds of `mnist_long` were written back into the
folders of their runs from `compare.json`. The first seeds of `e2SAD, robust2` were measured under its other name, `e2SAD,
robust, first point by a step`. In `mnist` and `svhn` of `attacks_vs_reference` our gradients are without those at starting
points, 1 % of them, and Square's l2 queries are those before it made its change as long as the budget and left its schedule
unscaled; not so those of `svhn-e2sad`. The command that trained `svhn-e2sad` is shown without its `--results`. The pages of
`attacks_vs_reference` were written anew from their JSON files, and its seconds were measured beside other work on the same
cores. No accelerator has been measured.
"""


# Programs that have moved since they printed a result.
_MOVED = {
    "tests.torture.__main__": "benchmarks.faults",
    "tests.torture": "benchmarks.faults",
    "benchmarks.soak": "benchmarks.faults.soak",
    "benchmarks.fuzz": "benchmarks.faults.fuzz",
}


def read(path: pathlib.Path) -> Content:
    """The content of a result: of a JSON file the values, else the text."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else text


def provenance_of(content: Content) -> list[dict[str, str]]:
    """Command, hardware, date, commit and number of rows of all that a result holds, the newest part first."""
    if isinstance(content, str):
        line = re.findall(r"^`(.*)`, .*$", content, re.M)[-1]
        about = content[content.rindex(line) :]
        patterns = {
            "hardware": r"(CPU, \d+ cores, [^,;]+)",
            "date": r"(\d{4}-\d\d-\d\d)",
            "commit": r"commit ([0-9a-f]+)",
        }
        return [{"command": line, **{k: re.findall(p, about)[0] for k, p in patterns.items()}}]
    if "provenance" in content:
        parts = [content["provenance"]]
    elif "environment" in content or "rows" in content:
        rows = content.get("rows", [])
        rows = rows.values() if isinstance(rows, dict) else rows
        parts = [content] * sum("origin" not in row for row in rows) or [content] * ("environment" in content)
        parts += [row["origin"] for row in rows if "origin" in row]
    else:
        parts = list(content.values())
    flat = [{**part, **part.get("environment", {})} for part in parts]
    rows_of = collections.Counter((p["command"], p["commit"]) for p in flat)
    unique = {(p["command"], p["commit"]): {**p, "rows": rows_of[p["command"], p["commit"]]} for p in flat}
    return sorted(unique.values(), key=lambda p: str(p["date"]), reverse=True)


def command_now(command: str, page: str) -> str:
    """A command that printed a result, with today's names of the program and of the folder."""
    for old, new in _MOVED.items():
        command = command.replace(f"-m {old} ", f"-m {new} ")
    return re.sub(r"--results=\S+", f"--results=results/{pathlib.PurePosixPath(page).parent}", command)


def _each(parts: list[dict[str, str]], name: str, length: int | None = None) -> str:
    return ", ".join(dict.fromkeys(str(part[name])[:length] for part in parts))


def table(root: pathlib.Path = ROOT) -> Table:
    """The table of README.md, of all questions whose folders are there."""
    rows = []
    for question in QUESTIONS:
        if (root / question.source).exists():
            content = read(root / question.source)
            parts = provenance_of(content)
            whole = max(parts, key=lambda part: (part.get("rows", 0), -len(part["command"])))["command"]
            command = command_now(whole, question.page)
            about = [_each(parts, "hardware"), _each(parts, "date", 10), _each(parts, "commit", 7)]
            rows.append([f"[{question.text}]({question.page})", question.answer(content), f"`{command}`", *about])
    return Table(columns=["question", "answer", "command", "hardware", "date", "commit"], rows=rows, labels=6)


def missing(root: pathlib.Path = ROOT) -> Mapping[str, str]:
    """Questions whose folders are not there, each with the command that makes it."""
    return {q.text: q.command for q in QUESTIONS if not (root / q.source).exists()}


def readme(root: pathlib.Path = ROOT) -> str:
    """The whole page."""
    parts = [INTRODUCTION, table(root).markdown()]
    if left := missing(root):
        commands = "\n".join(f"# {text}\n{command}" for text, command in left.items())
        parts.append(f"Not measured at this version yet:\n\n```sh\n{commands}\n```\n")
    return "\n".join([*parts, LIMITS])


if __name__ == "__main__":
    write_text(ROOT / "README.md", readme())
