"""Tables: built from outcomes, written as CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from e2sad_jax import paper, report
from e2sad_jax.config import Config
from e2sad_jax.evaluate import Attack
from e2sad_jax.reproduction import cost, figures, plan
from e2sad_jax.reproduction.plan import Entry
from e2sad_jax.workdir import read_config, read_training, write_json, write_text

if TYPE_CHECKING:
    from e2sad_jax.reproduction.runner import Reproduction

TITLES = {
    "table 1": "Table 1: accuracy under white-box attacks, MNIST",
    "table 2": "Table 2: accuracy under black-box attacks, MNIST",
    "table 3": "Table 3: accuracy under white-box attacks, SVHN",
    "second_step": "Study: what the second step differentiates",
    "lam": "Study: the weight lambda of the dissimilarity",
    "alpha": "Study: the weight alpha of the clean loss",
    "labels": "Study: soft against hard labels",
}
COST = ("FLOPs of a step", "time of a step")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One accuracy.

    Attributes:
      seeds: accuracy for each seed.
      paper: the paper's, None if it has none.
      comparable: whether the difference to the paper's means anything: the same data set.
      white_box: whether the attack knew the network that it met (Table 2).
    """

    seeds: Sequence[float]
    paper: float | None = None
    comparable: bool = True
    white_box: bool = False

    @property
    def ours(self) -> float:
        return statistics.fmean(self.seeds)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, None for a single one."""
        return statistics.stdev(self.seeds) if len(self.seeds) > 1 else None

    @property
    def difference(self) -> float | None:
        return None if self.paper is None or not self.comparable else self.ours - self.paper

    def values(self) -> dict[str, Any]:
        """As numbers, for CSV and JSON."""
        return {
            "ours": _rounded(self.ours),
            "spread": _rounded(self.spread),
            "paper": self.paper,
            "difference": _rounded(self.difference),
            "white_box": self.white_box,
            "seeds": [_rounded(value) for value in self.seeds],
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def text(cell: Mapping[str, Any] | str, digits: int) -> tuple[str, str]:
    """A cell in two parts: ours with its spread, and the paper's with the difference; the second may be empty."""
    if isinstance(cell, str):
        return cell, ""
    ours = f"{cell['ours']:.{digits}f}"
    if cell["spread"] is not None:
        ours += f" ± {cell['spread']:.{digits}f}"
    if cell["paper"] is None:
        return ours, ""
    beside = f"{cell['paper']:.4f}"
    if cell["difference"] is not None:
        beside += f", {cell['difference']:+.{digits}f}"
    return ours, beside


def markdown(table: Mapping[str, Any]) -> str:
    """The table as a page of its own."""
    lines = [f"# {table['title']}", "", f"{table['setting']}.", ""]
    lines += [" | ".join(["", *table["header"], ""]).strip(), "|" + " --- |" * table["names"]]
    lines[-1] += " ---: |" * (len(table["header"]) - table["names"])
    for row in table["rows"]:
        cells = []
        for cell in row:
            ours, beside = text(cell, table["digits"])
            if not isinstance(cell, str) and cell["white_box"]:
                ours = f"**{ours}**"
            cells.append(f"{ours} ({beside})" if beside else ours)
        lines.append(" | ".join(["", *cells, ""]).strip())
    p = table["provenance"]
    lines += ["", *(f"- {note}" for note in table["notes"]), f"- {provenance(p)}"]
    return "\n".join(lines) + "\n"


def provenance(p: Mapping[str, Any]) -> str:
    """Command, hardware, date, versions and commit in a sentence."""
    return (
        f"Written {p['date']} by `{p['command']}` on {p['hardware']}; Python {p['python']}, JAX {p['jax']}, Flax "
        f"{p['flax']}, optax {p['optax']}; commit {p['commit']}. Seeds: {p['seeds']}."
    )


def write(reproduction: Reproduction, item: str) -> list[pathlib.Path]:
    """Writes one table or study; for a study a picture too.

    Args:
      reproduction: with all outcomes that the table needs.
      item: "table 1", "table 2", "table 3", or a study's name.

    Returns:
      The files written.
    """
    builder = _black_box if item == "table 2" else _white_box
    table, records = builder(reproduction, item)
    name = item.replace(" ", "") if item.startswith("table") else f"study_{item}"
    written = save(reproduction.results, name, table, records)
    if item in plan.STUDIES:
        path = reproduction.results / f"{name}.png"
        figures.study(path, table)
        written.append(path)
    return written


def save(
    folder: pathlib.Path, name: str, table: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> list[pathlib.Path]:
    """Writes a table as NAME.json, NAME.csv (one line for each number of the table) and NAME.md."""
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    paths = [folder / f"{name}.{ending}" for ending in ("json", "csv", "md")]
    write_json(paths[0], {**table, "records": list(records)})
    write_text(paths[1], lines.getvalue())
    write_text(paths[2], markdown(table))
    return paths


def _white_box(r: Reproduction, item: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for each model, a column for each attack, then the cost of training."""
    number = item.partition(" ")[2]
    entries, suite = r.entries(item), plan.suite(number or item, r.scale)
    config = entries[0].config
    comparable = r.is_paper_data(config)
    costs = r.costs([entry.config for entry in entries])

    def cell(entry: Entry, attack: Attack) -> Cell:
        accuracies = [_known(r.outcome(c, attack)).accuracy for c in r.configs(entry, item)]
        return Cell(accuracies, entry.paper.get(attack.name), comparable)

    rows: list[list[Any]] = []
    records: list[dict[str, Any]] = []
    for entry in entries:
        step = costs["steps"][cost.key(entry.config)]
        row: list[Any] = [entry.name, entry.label]
        for attack in suite:
            values = cell(entry, attack).values()
            row.append(values)
            records.append(
                {
                    "model": entry.name,
                    "label": entry.label,
                    **dataclasses.asdict(attack),
                    **_flat(values),
                    **{k: round(step[k], 4) for k in ("flops_natural", "time_natural", "milliseconds")},
                }
            )
        spent = f"{step['time_natural']:.2f} ({step['milliseconds']:.3g} ms)"
        rows.append([*row, f"{step['flops_natural']:.2f}", spent])
    first, last = suite[0], suite[-1]
    notes = [
        "In brackets: the paper's accuracy, and ours minus the paper's."
        if comparable
        else f"{r.dataset_of(config).name} is not the paper's data set: the paper's accuracies, in brackets, are no "
        "measure for ours, and no difference is given."
    ]
    if not any(entry.paper for entry in entries):
        notes = []
    notes += [
        f"{last.name}: eps {last.eps:.3g}, {last.steps} steps of {last.step_size:.3g} from a random start, the worst of "
        f"{last.restarts} for each image. The paper does not have it. Its own IFGSM takes steps of eps/k from the clean "
        "image and is weak: it never turns back at the edge of the ball.",
        _sampling(r, entries, item, first.name),
        f"Cost: {COST[0]} by XLA's count and {COST[1]}, as multiples of a natural step, both at this batch size; median "
        f"of {costs['rounds']} rounds in which all steps were timed in turn. {provenance_of_cost(costs)}",
    ]
    if item in ("second_step", "lam", "alpha", "labels"):
        notes.append(
            "All but the named setting as in Table 1: alpha 0.6, lambda 0.1, eps1 0.3, eps2 0.1, second step `total`."
        )
    header = ["model", "labels", *(attack.name for attack in suite), *COST]
    return _table(r, item, config, header, rows, notes, names=2), records


def _black_box(r: Reproduction, item: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for each substitute, a column for each target."""
    entries = r.entries(item)
    by_seed = list(zip(*(r.configs(entry, item) for entry in entries), strict=True))
    costs = r.costs([entry.config for entry in entries])
    rows: list[list[Any]] = []
    records: list[dict[str, Any]] = []
    for i, substitute in enumerate(entries):
        row: list[Any] = [substitute.name, substitute.label]
        for k, target in enumerate(entries):
            accuracies = [_known(r.transferred(configs[i], configs))[k].accuracy for configs in by_seed]
            value = Cell(
                accuracies,
                paper.transfer(substitute.key, target.key),
                r.is_paper_data(substitute.config),
                white_box=i == k,
            ).values()
            row.append(value)
            step = costs["steps"][cost.key(target.config)]
            records.append(
                {
                    "substitute": substitute.name,
                    "substitute_label": substitute.label,
                    "target": target.name,
                    "target_label": target.label,
                    **_flat(value),
                    "white_box": i == k,
                    "target_flops_natural": round(step["flops_natural"], 4),
                }
            )
        rows.append(row)
    for k, (name, format_) in enumerate([("flops_natural", "{:.2f}"), ("time_natural", "{:.2f}")]):
        steps = [costs["steps"][cost.key(entry.config)][name] for entry in entries]
        rows.append([f"{COST[k]} of the target", "", *(format_.format(value) for value in steps)])
    header = ["substitute", "labels", *(f"{e.name}, {e.label}" for e in entries)]
    notes = [
        "Rows: the model for which IFGSM (eps 0.3, 30 steps of 0.01) made the images; columns: the model that met them. "
        "Bold: white-box, the two are the same. In brackets: the paper's accuracy, and ours minus the paper's.",
        "The paper leaves e2SAD and FGSM 0.4 out as substitutes. Its first e2SAD value, 0.868, is unclear in the scan.",
        _sampling(r, entries, item, "the table"),
        f"Cost: as multiples of a natural step. {provenance_of_cost(costs)}",
    ]
    return _table(r, item, entries[0].config, header, rows, notes, names=2), records


def provenance_of_cost(costs: Mapping[str, Any]) -> str:
    e = costs["environment"]
    return f"Measured {e['date']} on {e['hardware']}, JAX {e['jax']}, by `{costs['command']}`."


def _sampling(r: Reproduction, entries: Sequence[Entry], item: str, what: str) -> str:
    n = r.tested(entries[0].config).examples
    seeds = r.seeds(item.partition(" ")[0])
    text = f"{n:,} test images: an accuracy has a standard error of up to {math.sqrt(0.25 / n):.3f}."
    return f"Mean ± standard deviation over {seeds} seeds. {text}" if seeds > 1 else f"One seed. {text}"


def _table(
    r: Reproduction,
    item: str,
    config: Config,
    header: list[str],
    rows: list[list[Any]],
    notes: list[str],
    names: int,
) -> dict[str, Any]:
    seeds = r.seeds(item.partition(" ")[0])
    return {
        "title": TITLES[item],
        "setting": r.describe(config),
        "header": header,
        "names": names,
        "digits": 3 if r.tested(config).examples < 10_000 else 4,
        "rows": rows,
        "notes": notes,
        "provenance": about(", ".join(str(seed) for seed in range(seeds))),
    }


def about(seeds: str) -> dict[str, Any]:
    """Command, environment and seeds, to stand beside what is written now."""
    return {"command": report.command(), **report.environment(), "seeds": seeds}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    seeds = " ".join(f"{value:g}" for value in values["seeds"])
    return {**{k: values[k] for k in ("ours", "spread", "paper", "difference")}, "seeds": seeds}


def _known(value: Any) -> Any:
    assert value is not None, "written after everything is known"
    return value


def write_models(r: Reproduction) -> list[pathlib.Path]:
    """Writes models.json, .csv and .md: how each run of this scale was trained, on what, when, by which command."""
    rows, records = [], []
    for path in sorted(r.root.glob("*/config.json")):
        segments = read_training(path.parent)
        if not segments:
            continue
        config, dataset = read_config(path.parent)
        seconds = sum(s["seconds"] / s["runs_together"] for s in segments)
        record = {
            "run": path.parent.name,
            "data": dataset["name"],
            "defense": config.defense,
            "labels": "soft" if config.soft_label else "hard",
            "eps1": round(config.eps1, 4),
            "lambda": config.lam if config.defense == "e2sad" else "",
            "alpha": config.alpha if config.defense not in ("natural", "pgd") else "",
            "second step": config.second_step if config.defense == "e2sad" else "",
            "seed": config.seed,
            "batch": config.batch_size,
            "steps": segments[-1]["to_step"],
            "minutes": round(seconds / 60, 2),
            "goes": len(segments),
            "hardware": "; ".join(dict.fromkeys(s["hardware"] for s in segments)),
            "trained": segments[-1]["date"],
            "commit": ", ".join(dict.fromkeys(str(s["commit"])[:7] for s in segments)),
        }
        records.append(record)
        rows.append([str(value) for value in record.values()])
    table = {
        "title": "Models",
        "setting": f"{r.scale.name} scale: every run behind the tables and figures",
        "header": list(records[0]),
        "names": 1,
        "digits": 3,
        "rows": rows,
        "notes": [
            "minutes: training time with checkpoints and their validation, shared equally by runs that trained together. "
            "It depends on what else the machine did; compare the cost columns of the tables instead.",
        ],
        "provenance": about(", ".join(dict.fromkeys(str(record["seed"]) for record in records))),
    }
    return save(r.results, "models", table, records)
