"""Results as files and tables: `results.json`, `results.md`, `outcomes.npz`, and the table at the end of a run."""

import dataclasses
import datetime
import functools
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from e2sad_jax import paper
from e2sad_jax.config import Config
from e2sad_jax.data import Dataset
from e2sad_jax.evaluate import SUITES, Attack, Outcome, worst_case
from e2sad_jax.workdir import describe_dataset, write_json, write_text

WORST = "every attack above"


def environment() -> dict[str, Any]:
    """Date, hardware, versions and commit, as they belong beside every number."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": f"{device.device_kind} ({device.platform})"  # its settings say how many
        if device.platform != "cpu"
        else f"CPU, {os.cpu_count()} cores, {_cpu_name()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "commit": commit(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str | None:
    """The commit of the checkout at the first call, marked where files differ from it; None outside a checkout."""
    here = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "--error-unmatch", "__init__.py"):
            return None
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """The command line of this process as a user types it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec is not None and spec.name else f"python {sys.argv[0]}"
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def build(
    config: Config,
    dataset: Dataset,
    suite: Sequence[Attack],
    outcomes: Mapping[str, Outcome],
    *,
    steps: int,
    parameters: int,
    train_seconds: float,
) -> dict[str, Any]:
    """Everything that results.json says about one evaluated run."""
    examples = len(next(iter(outcomes.values())).correct)
    column, why_not = paper.beside(config, dataset.name, steps, examples == len(dataset.x_test))
    rows = []
    for attack in suite:
        row: dict[str, Any] = {**dataclasses.asdict(attack), "accuracy": outcomes[attack.name].accuracy}
        row["correct"] = int(outcomes[attack.name].correct.sum())
        # By name, and only where the name means the paper's budget.
        row["paper"] = column.accuracy.get(attack.name) if column and attack in SUITES[column.data] else None
        rows.append(row)
    return {
        "dataset": describe_dataset(dataset),
        "examples": examples,
        "steps": steps,
        "attacks": rows,
        "worst_case_accuracy": float(worst_case(outcomes).mean()),
        "paper": column.table if column else why_not,
        "parameters": parameters,
        "train_seconds": round(train_seconds, 1),
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("workdir", "data_dir", "resume")},
        "command": command(),
        "environment": environment(),
    }


def heading(results: Mapping[str, Any]) -> str:
    """One line that says what was measured: data set, examples, steps."""
    data, n = results["dataset"], results["examples"]
    part = f"all {n:,}" if n == data["test_examples"] else f"the first {n:,} of {data['test_examples']:,}"
    return f"{data['name']}: accuracy on {part} test images, {results['steps']:,} training steps"


def _cells(all_results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The table: a row per attack, a column per model, and the paper's where the setting is the paper's."""
    with_paper = {name for name, r in all_results.items() if any(row["paper"] is not None for row in r["attacks"])}
    header = ["attack"]
    for name in all_results:
        header += [name, f"{name}, paper"] if name in with_paper else [name]
    lines = [header]
    for i, row in enumerate(next(iter(all_results.values()))["attacks"]):
        line = [_attack_name(row)]
        for name, results in all_results.items():
            own = results["attacks"][i]
            line.append(f"{own['accuracy']:.4f}")
            if name in with_paper:
                line.append("" if own["paper"] is None else f"{own['paper']:.4f}")
        lines.append(line)
    line = [WORST]
    for name, results in all_results.items():
        line += [f"{results['worst_case_accuracy']:.4f}"] + ([""] if name in with_paper else [])
    return [*lines, line]


def _attack_name(row: Mapping[str, Any]) -> str:
    if row["kind"] == "pgd":
        return f"{row['name']} (eps {row['eps']:.3g}, step {row['step_size']:.2g}, random start)"
    if row["kind"] == "ifgsm":
        return f"{row['name']} (eps {row['eps']:.3g}, step eps/{row['steps']})"
    return str(row["name"])


def text_table(all_results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table for a terminal."""
    cells = _cells(all_results)
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def markdown(all_results: Mapping[str, Mapping[str, Any]]) -> str:
    """results.md: the table, what it was measured on and by which command."""
    first = next(iter(all_results.values()))
    cells = _cells(all_results)
    table = [cells[0], ["---"] + ["---:"] * (len(cells[0]) - 1), *cells[1:]]
    lines = [f"# {heading(first)}", "", *("| " + " | ".join(line) + " |" for line in table), ""]
    for name, results in all_results.items():
        if results["paper"].startswith("Table"):
            note = f"- {name}: the paper's numbers are from its {results['paper']}"
            if results["config"]["defense"] == "e2sad":
                note += "; it gives Eq. 7, whose gradient is zero: `--second_step=total` is how it is read here"
            lines.append(note + ".")
        else:
            lines.append(f"- {name}: no numbers of the paper beside it: {results['paper']}.")
    environment = first["environment"]
    lines += [
        f"- `{WORST}`: images that are classified right in every row. IFGSM is the paper's and weak; PGD says more.",
        f"- Command: `{first['command']}`",
        f"- Measured {environment['date']} on {environment['hardware']}; Python {environment['python']}, "
        f"JAX {environment['jax']}, Flax {environment['flax']}; commit {environment['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def write(workdir: pathlib.Path, results: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> None:
    """Writes results.json, results.md and outcomes.npz (`correct` and `prediction` per attack, `[N]`) into a workdir."""
    temporary = workdir / ".outcomes.tmp.npz"
    arrays: dict[str, Any] = {"attacks": np.array(list(outcomes))}
    arrays["correct"] = np.stack([o.correct for o in outcomes.values()])
    arrays["prediction"] = np.stack([o.prediction for o in outcomes.values()])
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, workdir / "outcomes.npz")
    write_json(workdir / "results.json", results)
    write_text(workdir / "results.md", markdown({results["config"]["defense"]: results}))
