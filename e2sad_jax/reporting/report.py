"""Results as files and tables: `results.json`, `results.md`, `model_card.md`, `outcomes.npz`, and a run's last table.

python -m e2sad_jax.reporting.report results.json    # prints the model card
"""

import dataclasses
import io
import json
import pathlib
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from e2sad_jax._io import write_bytes, write_json, write_text
from e2sad_jax.data import Dataset
from e2sad_jax.evaluation import SUITES, Attack, Outcome
from e2sad_jax.reporting import paper_numbers, provenance
from e2sad_jax.runs.folder import describe_dataset
from e2sad_jax.training.config import Config

WORST = "every attack above"


@dataclasses.dataclass(frozen=True)
class Best:
    """The checkpoint that stood attacks best during training; the test set has no part in that.

    Attributes:
      step: of the checkpoint.
      chosen_on: the images that chose it, in words.
      outcomes: what the attacks of the evaluation did to it.
    """

    step: int
    chosen_on: str
    outcomes: Mapping[str, Outcome]


def build(
    config: Config,
    dataset: Dataset,
    suite: Sequence[Attack],
    outcomes: Mapping[str, Outcome],
    *,
    steps: int,
    parameters: int,
    train_seconds: float,
    best: Best | None = None,
) -> dict[str, Any]:
    """Everything that results.json says about one evaluated run: `outcomes` are the last checkpoint's."""
    examples = len(next(iter(outcomes.values())).correct)
    column, why_not = paper_numbers.beside(config, dataset.name, steps, examples == len(dataset.x_test))
    last = _measured(suite, outcomes)
    for attack, row in zip(suite, last["attacks"], strict=True):
        # By name, and only where the name means the paper's budget.
        row["paper"] = column.accuracy.get(attack.name) if column and attack in SUITES[column.data] else None
    return {
        "dataset": describe_dataset(dataset),
        "examples": examples,
        "steps": steps,
        **last,
        "best": best and {"step": best.step, "chosen_on": best.chosen_on, **_measured(suite, best.outcomes)},
        "paper": column.table if column else why_not,
        "parameters": parameters,
        "train_seconds": round(train_seconds, 1),
        "config": {k: v for k, v in config.to_json().items() if k not in ("workdir", "data_dir", "resume")},
        "command": provenance.command(),
        "environment": provenance.environment(),
    }


def _measured(suite: Sequence[Attack], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """What the attacks of a suite left of one checkpoint."""
    rows = []
    for attack in suite:
        outcome = outcomes[attack.name]
        counts = {"accuracy": outcome.accuracy, "correct": int(outcome.correct.sum())}
        rows.append({**dataclasses.asdict(attack), **counts})
    return {
        "attacks": rows,
        "worst_case_accuracy": float(np.all([o.correct for o in outcomes.values()], axis=0).mean()),
    }


def heading(results: Mapping[str, Any]) -> str:
    """One line that says what was measured: data set, examples, steps."""
    return f"{results['dataset']['name']}: accuracy on {_images(results)}, {results['steps']:,} training steps"


def _images(results: Mapping[str, Any]) -> str:
    n, there = results["examples"], results["dataset"]["test_examples"]
    return f"{f'all {n:,}' if n == there else f'the first {n:,} of {there:,}'} test images"


def _cells(all_results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The table: a row per attack; a column per model, the paper's where the setting is the paper's, the best's if apart."""
    first = next(iter(all_results.values()))
    columns = [["attack", *map(_attack_name, first["attacks"]), WORST]]
    for name, results in all_results.items():
        columns.append([name, *_accuracies(results)])
        printed = [row["paper"] for row in results["attacks"]]
        if any(value is not None for value in printed):
            columns.append([f"{name}, paper", *("" if value is None else f"{value:.4f}" for value in printed), ""])
        if _apart(results):
            columns.append([f"{name}, best (step {results['best']['step']:,})", *_accuracies(results["best"])])
    return [list(line) for line in zip(*columns, strict=True)]


def _accuracies(measured: Mapping[str, Any]) -> list[str]:
    return [
        f"{value:.4f}" for value in (*(row["accuracy"] for row in measured["attacks"]), measured["worst_case_accuracy"])
    ]


def _apart(results: Mapping[str, Any]) -> bool:
    """Whether the best checkpoint is another than the last; results of earlier versions name none."""
    best = results.get("best")
    return best is not None and best["step"] != results["steps"]


def about_best(all_results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each model: which of its checkpoints is the best, and what says so."""
    lines = []
    for name, results in all_results.items():
        if best := results.get("best"):
            chosen = f"best checkpoint by PGD-10 on {best['chosen_on']}"
            if _apart(results):
                lines.append(
                    f"{name}: step {best['step']:,} is the {chosen}; the column without a step is the last one's"
                )
            else:
                lines.append(f"{name}: the last is also the {chosen}")
    return lines


def _attack_name(row: Mapping[str, Any]) -> str:
    if row["kind"] == "pgd":
        return f"{row['name']} (eps {row['eps']:.3g}, step {row['step_size']:.2g}, random start)"
    if row["kind"] == "ifgsm":
        return f"{row['name']} (eps {row['eps']:.3g}, step eps/{row['steps']})"
    return str(row["name"])


def aligned(lines: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """Lines of cells for a terminal: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        gap.join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]


def text_table(all_results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table for a terminal."""
    lines = aligned(_cells(all_results))
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def markdown(all_results: Mapping[str, Mapping[str, Any]]) -> str:
    """results.md: the table, what it was measured on and by which command."""
    first = next(iter(all_results.values()))
    cells = _cells(all_results)
    lines = [f"# {heading(first)}", "", *("| " + " | ".join(line) + " |" for line in _ruled(cells)), ""]
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
        *(f"- {line}." for line in about_best(all_results)),
        f"- `{WORST}`: images that are classified right in every row. IFGSM is the paper's and weak; PGD says more.",
        f"- Command: `{first['command']}`",
        f"- Measured {environment['date']} on {environment['hardware']}; Python {environment['python']}, "
        f"JAX {environment['jax']}, Flax {environment['flax']}; commit {environment['commit']}.",
    ]
    return "\n".join(lines) + "\n"


PURPOSE = (
    "- **For:** studying and comparing defenses against adversarial images. Not for decisions that matter, and no "
    "protection by itself."
)


def limits(seeds: int, *images: int) -> list[str]:
    """What the numbers of any model card do not say; `images`: how many the accuracies are of, each number that there is."""
    errors = (f"on {n:,} images is up to {0.5 / n**0.5:.3f}" for n in images)
    return [
        f"- {'One seed' if seeds == 1 else f'At most {seeds} seeds'}; the standard error of an accuracy {', '.join(errors)}.",
        "- An accuracy under attack is an upper bound, for these attacks, budgets and steps: another norm, a larger budget "
        "or a better attack leaves less. IFGSM, whose steps never turn back, is weak; `experiments.evaluate` attacks harder.",
    ]


def model_card(results: Mapping[str, Any]) -> str:
    """model_card.md: what the model is for, what it learnt from and how, what it stood, and what that does not say."""
    config, data, n = Config.from_json(results["config"]), results["dataset"], results["examples"]
    shape, environment = "x".join(map(str, data["image_shape"])), results["environment"]
    best = results["best"] if _apart(results) else None
    tables = [("accuracy", results), *([(f"best checkpoint, step {best['step']:,}", best)] if best else [])]
    cells = [["attack", "budget", "steps", "step", "restarts", *(name for name, _ in tables)]]
    accuracies = [list(line) for line in zip(*(_accuracies(measured) for _, measured in tables), strict=True)]
    for row, shown in zip([*results["attacks"], {"kind": WORST}], accuracies, strict=True):
        cells.append([*_effort(row), *shown])
    lines = [
        f"# Model card: {config.defense} on {data['name']}",
        "",
        f"- **Model:** `{config.model}`, {results['parameters']:,} parameters, images {shape}, {data['num_classes']} classes, "
        f"input `{config.transform}`, layers in {config.precision}.",
        PURPOSE,
        f"- **Data:** {' '.join(filter(None, (data['name'], data['version'])))}, {data['train_examples']:,} training images "
        f"(content SHA-256 `{data['sha256'][:16]}...`). Whatever these images leave out or get wrong, the model does too.",
        f"- **Training:** {results['steps']:,} steps of {config.batch_size}, `{' '.join(_flags(config))}`, all else as by "
        f"default; {results['train_seconds']:,} seconds.",
        f"- **Command:** `{results['command']}`",
        f"- **Measured** {environment['date']} on {environment['hardware']}; JAX {environment['jax']}; commit "
        f"{environment['commit']}.",
        "",
        "## Evaluation",
        "",
        f"On {_images(results)}, with their true labels; attacks raise the cross-entropy, inside l-infinity balls whose "
        "budgets are in units of the network's input:",
        "",
        *("| " + " | ".join(line) + " |" for line in _ruled(cells)),
        "",
        "## Limits",
        "",
        *limits(1, n),
    ]
    if results["worst_case_accuracy"] < 0.5:
        lines.append(
            "- The attacks above together fool it on more than half of the images: not robust at these budgets."
        )
    return "\n".join(lines) + "\n"


def _effort(row: Mapping[str, Any]) -> list[str]:
    """An attack's cells in a model card: name, budget, steps, step size, restarts."""
    match row["kind"]:
        case "clean":
            return ["clean", "", "", "", ""]
        case kind if kind == WORST:
            return [WORST, "", "", "", ""]
    step = row["step_size"] or (row["eps"] / row["steps"] if row["kind"] in ("fgsm", "ifgsm", "mi_fgsm") else None)
    return [
        str(row["name"]),
        f"{row['eps']:.4g}",
        str(row["steps"]),
        "" if step is None else f"{step:.2g}",
        str(row["restarts"]),
    ]


def _flags(config: Config) -> list[str]:
    """The settings of a run that are not the defaults, as flags, the defense before them."""
    usual = Config(defense=config.defense).to_json()
    own = {k: v for k, v in config.identity().items() if k != "defense" and v != usual[k]}
    flags = [f"--no{k}" if v is False else f"--{k}" if v is True else f"--{k}={v}" for k, v in own.items()]
    return [f"--defense={config.defense}", *flags]


def _ruled(cells: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Cells of a table in Markdown, with the line below the first."""
    return [cells[0], ["---"] + ["---:"] * (len(cells[0]) - 1), *cells[1:]]


def write(
    workdir: pathlib.Path,
    results: Mapping[str, Any],
    outcomes: Mapping[str, Outcome],
    best: Best | None = None,
    before: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
) -> None:
    """Writes results.json, results.md, model_card.md and outcomes.npz into a workdir.

    results.md has a column for each of the results `before`, by name, too.

    outcomes.npz holds `correct` and `prediction` per attack, `[A, N]`, and `best_correct` and `best_prediction` where the
    best checkpoint is not the last.
    """
    arrays: dict[str, Any] = {"attacks": np.array(list(outcomes))}
    for prefix, of in {"": outcomes, **({"best_": best.outcomes} if best and _apart(results) else {})}.items():
        arrays[f"{prefix}correct"] = np.stack([o.correct for o in of.values()])
        arrays[f"{prefix}prediction"] = np.stack([o.prediction for o in of.values()])
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_bytes(workdir / "outcomes.npz", content.getvalue())
    write_json(workdir / "results.json", results)
    write_text(workdir / "results.md", markdown({**before, results["config"]["defense"]: results}))
    write_text(workdir / "model_card.md", model_card(results))


if __name__ == "__main__":
    print(model_card(json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
