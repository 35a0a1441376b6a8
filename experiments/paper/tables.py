"""Tables: built from outcomes, written as CSV, JSON and Markdown."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from e2sad_jax._io import write_json, write_text
from e2sad_jax.errors import WorkdirError
from e2sad_jax.evaluation import Outcome, nan_logits
from e2sad_jax.reporting import paper_numbers
from e2sad_jax.reporting.card import PURPOSE, limits
from e2sad_jax.reporting.table import Table
from e2sad_jax.runs.checkpoint import state_digest
from e2sad_jax.runs.folder import read_config, read_training
from e2sad_jax.training.config import Config
from experiments.paper import cost, figures, origin, plan
from experiments.paper.cache import Known
from experiments.paper.plan import Entry, Item

if TYPE_CHECKING:
    from experiments.paper.runner import Reproduction

TITLES = {
    "table1": "Table 1: accuracy under white-box attacks",
    "table2": "Table 2: accuracy under black-box attacks",
    "table3": "Table 3: accuracy under white-box attacks",
    "study_second_step": "Study: what the second step differentiates",
    "study_lam": "Study: the weight lambda of the dissimilarity",
    "study_alpha": "Study: the weight alpha of the clean loss",
    "study_labels": "Study: soft against hard labels",
}
NAMES_OF_DATA = {"mnist": "MNIST", "svhn": "SVHN"}
COST = ("FLOPs of a step", "time of a step")
NOT_IN_PAPER = "not in the paper"


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
    reference = f"{cell['paper']:.4f}"
    if cell["difference"] is not None:
        reference += f", {round(cell['difference'], digits) + 0.0:+.{digits}f}"  # never -0.000
    return ours, reference


def markdown(table: Mapping[str, Any]) -> str:
    """The table as a page of its own."""
    rows = []
    for row in table["rows"]:
        cells = []
        for cell in row:
            ours, reference = text(cell, table["digits"])
            if not isinstance(cell, str) and cell["white_box"]:
                ours = f"**{ours}**"
            cells.append(f"{ours} ({reference})" if reference else ours)
        rows.append(cells)
    notes = [*table["notes"], origin.sentence(table["provenance"])]
    body = Table(columns=table["header"], rows=rows, notes=notes, labels=table["names"])
    return f"# {table['title']}\n\n{table['setting']}.\n\n{body.markdown()}"


def write(r: Reproduction, item: Item) -> list[pathlib.Path]:
    """Writes one table or study; for a study a picture too.

    Args:
      r: with all outcomes that the table needs.
      item: the table or study.

    Returns:
      The files written.
    """
    builder = _black_box if item == plan.TABLE_2 else _white_box
    table, records = builder(r, item)
    written = save(r.results, item.file, table, records)
    if item.kind == "study":
        path = r.results / f"{item.file}.png"
        figures.study(path, table)
        written.append(path)
    return written


def save(
    folder: pathlib.Path, name: str, table: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> list[pathlib.Path]:
    """Writes a table as NAME.json, NAME.csv (one line for each number of the table) and NAME.md."""
    paths = [folder / f"{name}.{ending}" for ending in ("json", "csv", "md")]
    write_json(paths[0], {**table, "records": list(records)})
    write_text(paths[1], Table.of_records(records).csv())
    write_text(paths[2], markdown(table))
    return paths


def nan_notes(model: str, attack: str, outcomes: Sequence[Outcome]) -> list[str]:
    """A note for each outcome of which some images have NaN logits; mostly none.

    Args:
      model: its name and labels.
      attack: what the images were attacked by, or made for.
      outcomes: one for each seed.
    """
    said = [nan_logits({attack: outcome.nan}, len(outcome.correct)) for outcome in outcomes]
    return [f"{model}, seed {seed}: {nan}." for seed, nan in enumerate(said) if nan]


def _white_box(r: Reproduction, item: Item) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for each model, a column for each attack, then the cost of training."""
    entries, suite = r.entries(item), item.suite(r.scale)
    config = entries[0].config
    comparable, costs = r.is_paper_data(config), r.costs(config)
    rows: list[list[Any]] = []
    records: list[dict[str, Any]] = []
    attacked = []
    broken: list[str] = []
    for entry in entries:
        step = costs["steps"][cost.key(entry.config)]
        row: list[Any] = [entry.name, entry.label]
        for attack in suite:
            found = [_there(r.known(c, attack)) for c in r.configs(entry, item)]
            attacked += [known.provenance for known in found]
            accuracies = [known.outcomes[0].accuracy for known in found]
            broken += nan_notes(f"{entry.name}, {entry.label}", attack.name, [known.outcomes[0] for known in found])
            cell = Cell(accuracies, entry.paper.get(attack.name), comparable).values()
            row.append(cell)
            records.append(
                {
                    **r.columns(config),
                    "model": entry.name,
                    "label": entry.label,
                    **dataclasses.asdict(attack),
                    "in_paper": attack.name in entry.paper,
                    **_flat(cell),
                    **{k: _rounded(step[k]) for k in ("flops_natural", "time_natural", "milliseconds")},
                }
            )
        rows.append(
            [*row, _times(step["flops_natural"]), f"{step['time_natural']:.2f} ({step['milliseconds']:.3g} ms)"]
        )
    last = suite[-1]
    start = "a random start" if last.restarts == 1 else f"random starts, the worst of {last.restarts} for each image"
    notes = [
        *broken,
        *_compared(r, entries, comparable),
        f"{last.name}: eps {last.eps:.3g}, {last.steps} steps of {last.step_size:.3g} from {start}. The paper does not "
        "have it. Its own IFGSM takes steps of eps/k from the clean image and is weak: it never turns back at the edge of "
        "the ball.",
        _sampling(r, entries, item),
        f"Cost of a training step at batch {config.batch_size}, in natural steps: {COST[0]} by XLA's count, {COST[1]} as "
        f"the median of {costs['rounds']} rounds in which all were timed in turn. {provenance_of_cost(costs)}",
    ]
    if item.kind == "study":
        notes.append(
            "All but the named setting as in Table 1: alpha 0.6, lambda 0.1, eps1 0.3, eps2 0.1, second step `total`, soft "
            "labels."
        )
    in_paper = {name for entry in entries for name in entry.paper}
    header = ["model", "labels"]
    header += [a.name if a.name in in_paper or not in_paper else f"{a.name} ({NOT_IN_PAPER})" for a in suite]
    return _table(r, item, config, [*header, *COST], rows, notes, attacked), records


def _black_box(r: Reproduction, item: Item) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row for each substitute, a column for each target."""
    entries = r.entries(item)
    config = entries[0].config
    by_seed = list(zip(*(r.configs(entry, item) for entry in entries), strict=True))
    costs, comparable = r.costs(config), r.is_paper_data(config)
    steps = [costs["steps"][cost.key(entry.config)] for entry in entries]
    rows: list[list[Any]] = []
    records: list[dict[str, Any]] = []
    attacked = []
    broken: list[str] = []
    for i, substitute in enumerate(entries):
        row: list[Any] = [substitute.name, substitute.label]
        found = [_there(r.known(configs[i], plan.TRANSFER, configs)) for configs in by_seed]
        attacked += [known.provenance for known in found]
        for k, target in enumerate(entries):
            in_paper = paper_numbers.transfer(substitute.key, target.key)
            accuracies = [known.outcomes[k].accuracy for known in found]
            made_for = f"images made for {substitute.name}, {substitute.label}"
            broken += nan_notes(f"{target.name}, {target.label}", made_for, [known.outcomes[k] for known in found])
            cell = Cell(accuracies, in_paper, comparable, white_box=i == k).values()
            row.append(cell)
            records.append(
                {
                    **r.columns(config),
                    "substitute": substitute.name,
                    "substitute_label": substitute.label,
                    "target": target.name,
                    "target_label": target.label,
                    "white_box": i == k,
                    **_flat(cell),
                    "target_flops_natural": _rounded(steps[k]["flops_natural"]),
                    "target_time_natural": _rounded(steps[k]["time_natural"]),
                }
            )
        rows.append(row)
    for title, name in zip(COST, ("flops_natural", "time_natural"), strict=True):
        rows.append([f"{title}, target", "", *(_times(step[name]) for step in steps)])
    header = ["substitute", "labels", *(f"{e.name}, {e.label}" for e in entries)]
    notes = [
        *broken,
        "Rows: the model for which IFGSM (eps 0.3, 30 steps of 0.01) made the images; columns: the model that met them. "
        "Bold: white-box, the two are the same.",
        *_compared(r, entries, comparable),
        "The paper leaves e2SAD and FGSM 0.4 out as substitutes. Its first e2SAD value, 0.868, is unclear in the scan.",
        _sampling(r, entries, item),
        f"Cost of a training step at batch {config.batch_size}, in natural steps. {provenance_of_cost(costs)}",
    ]
    return _table(r, item, config, header, rows, notes, attacked), records


def _compared(r: Reproduction, entries: Sequence[Entry], comparable: bool) -> list[str]:
    """What stands in brackets, and what it is worth."""
    if not any(entry.paper for entry in entries):
        return []
    if not comparable:
        name = r.dataset_of(entries[0].config).name
        return [
            f"{name} is not the paper's data set: the paper's accuracies, in brackets or in grey, are no measure for ours, "
            "and no difference is given."
        ]
    text = "In brackets or in grey: the paper's accuracy, and ours minus the paper's."
    if r.scale.name != "full":
        text += " Ours had less training and a smaller network, so the difference is not that of the methods."
    return [text]


def _there(known: Known | None) -> Known:
    if known is None:
        raise RuntimeError("a table is written when all of its outcomes are known")
    return known


def _times(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def provenance_of_cost(costs: Mapping[str, Any]) -> str:
    """On what, when and by which command the cost was measured, and how far the rounds were apart."""
    e = costs["environment"]
    spread = max(step["slowest"] / step["fastest"] - 1 for step in costs["steps"].values())
    text = f"Measured {e['date']} on {e['hardware']}, JAX {e['jax']}, commit {str(e['commit'])[:7]}, by `{costs['command']}`"
    return f"{text}; the slowest round of a step took up to {spread:.0%} more than its fastest."


def _sampling(r: Reproduction, entries: Sequence[Entry], item: Item) -> str:
    n, seeds = r.examples(entries[0].config), r.seeds(item)
    text = f"{n:,} test images: an accuracy has a standard error of up to {math.sqrt(0.25 / n):.3f}."
    return f"Mean ± standard deviation over {seeds} seeds. {text}" if seeds > 1 else f"One seed. {text}"


def _table(
    r: Reproduction,
    item: Item,
    config: Config,
    header: list[str],
    rows: list[list[Any]],
    notes: list[str],
    attacked: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    name = r.dataset_of(config).name
    runs = [c for entry in r.entries(item) for c in r.configs(entry, item)]
    return {
        "title": f"{TITLES[item.file]}, {NAMES_OF_DATA.get(name, name)}",
        "setting": r.describe(config),
        "header": header,
        "names": 2,
        "digits": 3 if r.examples(config) < 10_000 else 4,
        "rows": rows,
        "notes": notes,
        "provenance": origin.about(runs, attacked, range(r.seeds(item))),
    }


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    seeds = " ".join(f"{value:g}" for value in values["seeds"])
    return {**{k: values[k] for k in ("ours", "spread", "paper", "difference")}, "seeds": seeds}


def write_models(r: Reproduction) -> list[pathlib.Path]:
    """Writes models.json, .csv and .md: how each finished run of this scale was trained, on what, when."""
    records, images = [], set()
    for path in sorted(r.root.glob("*/config.json")):
        try:
            config, dataset = read_config(path.parent)
        except WorkdirError:
            continue  # not of this plan: its own folder was looked at before anything began
        segments = read_training(path.parent)
        if not segments or state_digest(path.parent, config.total_steps(dataset["train_examples"])) is None:
            continue
        images.add(config.eval_examples or dataset["test_examples"])
        seconds = sum(s["seconds"] / s["runs_together"] for s in segments)
        records.append(
            {
                "run": path.parent.name,
                "scale": r.scale.name,
                "data": dataset["name"],
                "defense": config.defense,
                "labels": "soft" if config.soft_label else "hard",
                "eps1": round(config.eps1, 4),
                "lambda": config.settings.get("lam", ""),
                "alpha": config.settings.get("alpha", ""),
                "second step": config.settings.get("second_step", ""),
                "seed": config.seed,
                "network": config.model,
                "precision": config.precision,
                "batch": config.batch_size,
                "steps": segments[-1]["to_step"],
                "minutes": round(seconds / 60, 2),
                "goes": len(segments),
                "hardware": "; ".join(dict.fromkeys(s["hardware"] for s in segments)),
                "trained": segments[-1]["date"],
                "commit": ", ".join(dict.fromkeys(str(s["commit"])[:7] for s in segments)),
            }
        )
    if not records:
        return []
    table = {
        "title": "Models",
        "setting": f"{r.scale.name} scale: every finished run in {r.root}",
        "header": list(records[0]),
        "names": 1,
        "digits": 3,
        "rows": [[str(value) for value in record.values()] for record in records],
        "notes": [
            "minutes: training time with checkpoints and their validation, shared equally by runs that trained together. "
            "It depends on what else the machine did; compare the cost columns of the tables instead.",
        ],
        "provenance": origin.about(),
    }
    write_text(r.results / "models_card.md", card(r.scale.name, records, sorted(images)))
    return [*save(r.results, "models", table, records), r.results / "models_card.md"]


def card(scale: str, records: Sequence[Mapping[str, Any]], images: Sequence[int]) -> str:
    """models_card.md: of all runs of a scale, what a model card says of one.

    Args:
      scale: its name.
      records: as in models.json.
      images: how many test images the attacks of a run have.
    """

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(part for record in records for part in str(record[key]).split(", ")))

    seeds = len({record["seed"] for record in records})

    lines = [
        f"# Model card: all models of the {scale} scale",
        "",
        f"- **Models:** {len(records)}, each with its settings in [models.md](models.md); networks: {all_of('network')}, "
        f"layers in {all_of('precision')}.",
        PURPOSE,
        f"- **Data:** {all_of('data')}. The models inherit what these images leave out or get wrong.",
        f"- **Training:** {all_of('defense')}; batches of {all_of('batch')}, steps: {all_of('steps')}; {all_of('hardware')}; "
        f"commits {all_of('commit')}.",
        "",
        "## Evaluation",
        "",
        "In the tables and figures of this folder, each with its attacks, budgets, steps and number of test images.",
        "",
        "## Limits",
        "",
        *limits(seeds, *images),
    ]
    return "\n".join(lines) + "\n"
