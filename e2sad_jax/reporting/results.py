"""Writes the results of one run: `results.json`, `results.md`, `model_card.md` and `outcomes.npz`."""

import dataclasses
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from e2sad_jax._io import write_bytes, write_json, write_text
from e2sad_jax.evaluation import SUITES, Attack, Outcome, nan_logits
from e2sad_jax.reporting import card, paper_numbers, provenance
from e2sad_jax.reporting.card import WORST, images_of
from e2sad_jax.reporting.table import Table
from e2sad_jax.training.config import Config


@dataclasses.dataclass(frozen=True)
class Best:
    """The checkpoint with the highest robust accuracy during training; the test set has no part in the choice.

    Attributes:
      step: training step of the checkpoint.
      chosen_on: the images that chose it, in words.
      outcomes: outcomes of the evaluation's attacks on it, by name.
      averaged: whether its averaged weights were better than the raw ones, and are meant.
    """

    step: int
    chosen_on: str
    outcomes: Mapping[str, Outcome]
    averaged: bool = False


def build(
    config: Config,
    dataset: Mapping[str, Any],
    suite: Sequence[Attack],
    outcomes: Mapping[str, Outcome],
    *,
    classes: int,
    steps: int,
    parameters: int,
    train_seconds: float,
    best: Best | None = None,
) -> dict[str, Any]:
    """Collects the content of results.json for one evaluated run.

    Args:
      config: settings of the run.
      dataset: what its workdir notes about the data: `name`, `version`, `train_examples`, `test_examples`, `image_shape`,
        `num_classes`, `sha256`.
      suite: the attacks.
      outcomes: their outcomes on the last checkpoint, by name.
      classes: how many classes have an image among those that were attacked.
      steps: training steps of the last checkpoint.
      parameters: number of the network's parameters.
      train_seconds: duration of training.
      best: the best checkpoint, if one was chosen.

    Returns:
      What results.json holds.
    """
    examples = len(next(iter(outcomes.values())).correct)
    settings = config.to_json()
    whole = examples == dataset["test_examples"]
    column, why_not = paper_numbers.comparable(settings, dataset["name"], steps, whole)
    last = _measured(suite, outcomes)
    for attack, row in zip(suite, last["attacks"], strict=True):
        # By name, and only where the name means the paper's budget.
        row["paper"] = column.accuracy.get(attack.name) if column and attack in SUITES[column.data] else None
    return {
        "dataset": dict(dataset),
        "examples": examples,
        "classes": classes,
        "steps": steps,
        **last,
        "best": best
        and {
            "step": best.step,
            "averaged": best.averaged,
            "chosen_on": best.chosen_on,
            **_measured(suite, best.outcomes),
        },
        "paper": column.table if column else why_not,
        "parameters": parameters,
        "train_seconds": round(train_seconds, 1),
        "config": {k: v for k, v in settings.items() if k not in ("workdir", "data_dir", "resume")},
        "command": provenance.command(),
        "environment": provenance.environment(),
    }


def _measured(suite: Sequence[Attack], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Accuracies of one checkpoint under each attack and under all combined."""
    rows = []
    for attack in suite:
        outcome = outcomes[attack.name]
        counts = {"accuracy": outcome.accuracy, "correct": int(outcome.correct.sum()), "nan": outcome.nan}
        rows.append({**dataclasses.asdict(attack), **counts})
    worst = np.all([outcome.correct for outcome in outcomes.values()], axis=0)
    return {"attacks": rows, "worst_case_accuracy": float(worst.mean())}


def heading(results: Mapping[str, Any]) -> str:
    """A heading with what was measured: data set, images, training steps."""
    return f"{results['dataset']['name']}: accuracy on {images_of(results)}, {results['steps']:,} training steps"


def table(all_results: Mapping[str, Mapping[str, Any]], notes: Sequence[str] = ()) -> Table:
    """A row for each attack; a column for each model, for the paper's where it compares, and for a best checkpoint apart.

    Args:
      all_results: what `build` returned, by the name of the model; all with the same attacks.
      notes: sentences below the table.
    """
    first = next(iter(all_results.values()))
    columns = {"attack": [*map(_attack_name, first["attacks"]), WORST]}
    for name, results in all_results.items():
        columns[name] = card.accuracies(results)
        printed = [row["paper"] for row in results["attacks"]]
        if any(value is not None for value in printed):
            columns[f"{name}, paper"] = ["" if value is None else f"{value:.4f}" for value in printed] + [""]
        if card.apart(results):
            columns[f"{name}, best ({card.which(results['best'])})"] = card.accuracies(results["best"])
    rows = list(zip(*columns.values(), strict=True))
    return Table(title=heading(first), columns=list(columns), rows=rows, notes=notes, footer=1)


def of_seeds(by_seed: Sequence[Mapping[str, Mapping[str, Any]]]) -> Table:
    """The table of several seeds: mean and standard deviation of each accuracy, a column for each model.

    Where the best checkpoint of a seed is its last, or none was chosen, the last counts in both columns.

    Args:
      by_seed: for each of at least two seeds, what `build` returned, by the name of the model.
    """
    first = by_seed[0]
    columns = {"attack": [*map(_attack_name, next(iter(first.values()))["attacks"]), WORST]}
    for name in first:
        runs = [results[name] for results in by_seed]
        kinds = {name: runs}
        if any(card.apart(run) for run in runs):
            kinds[f"{name}, best"] = [run["best"] or run for run in runs]
        for heading_of, measured in kinds.items():
            values = np.array([card.values(one) for one in measured])
            spread = values.std(0, ddof=1)
            columns[heading_of] = [f"{mean:.4f} ± {s:.4f}" for mean, s in zip(values.mean(0), spread, strict=True)]
    any_run = next(iter(first.values()))
    seeds = [next(iter(results.values()))["config"]["seed"] for results in by_seed]
    notes = [
        f"Mean ± standard deviation over {len(seeds)} runs, of seeds {', '.join(map(str, seeds))}.",
        f"Command: `{provenance.command()}`",
        provenance.sentence(any_run["environment"]),
    ]
    rows = list(zip(*columns.values(), strict=True))
    return Table(title=heading(any_run), columns=list(columns), rows=rows, notes=notes, footer=1)


def about_best(all_results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each model: which of its checkpoints is the best, and on which images it was chosen."""
    sentences = []
    for name, results in all_results.items():
        if best := results.get("best"):
            chosen = f"best by PGD-10 on {best['chosen_on']}"
            if best.get("averaged"):
                sentences.append(f"{name}: the averaged weights of step {best['step']:,} are the {chosen}.")
            elif card.apart(results):
                sentences.append(f"{name}: the checkpoint of {card.which(best)} is the {chosen}.")
            else:
                sentences.append(f"{name}: the last checkpoint is also the {chosen}.")
    return sentences


def about_nan(all_results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each model some of whose images have NaN logits; mostly none."""
    sentences = []
    for name, results in all_results.items():
        for which, measured in ((name, results), (f"{name}, best checkpoint", results.get("best"))):
            counts = {row["name"]: row.get("nan", 0) for row in measured["attacks"]} if measured else {}
            if nan := nan_logits(counts, results["examples"]):
                sentences.append(f"{which}: {nan}.")
    return sentences


def _attack_name(row: Mapping[str, Any]) -> str:
    if row["kind"] == "pgd":
        step = "" if row["step_size"] is None else f"step {row['step_size']:.2g}, "
        return f"{row['name']} (eps {row['eps']:.3g}, {step}random start)"
    if row["kind"] == "ifgsm":
        return f"{row['name']} (eps {row['eps']:.3g}, step eps/{row['steps']})"
    return str(row["name"])


def summary(all_results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table and the choice of checkpoints, for a terminal."""
    return table(all_results, [*about_nan(all_results), *about_best(all_results)]).text()


def markdown(all_results: Mapping[str, Mapping[str, Any]]) -> str:
    """results.md: the table, how to read it, and the command that measured it."""
    first = next(iter(all_results.values()))
    notes = []
    for name, results in all_results.items():
        if results["paper"].startswith("Table"):
            note = f"{name}: the paper's numbers are from its {results['paper']}."
            if results["config"]["defense"] == "e2sad":
                note += " The gradient of its Eq. 7 is zero; the second step here is `--second_step=total`."
            notes.append(note)
        else:
            notes.append(f"{name}: not compared with the paper: {results['paper']}.")
    notes += [
        *about_nan(all_results),
        *about_best(all_results),
        f"`{WORST}`: images classified correctly under every attack of the table. IFGSM is the paper's attack and weak; "
        "PGD is stronger.",
        f"Command: `{first['command']}`",
        provenance.sentence(first["environment"]),
    ]
    return table(all_results, notes).markdown()


def write(
    workdir: pathlib.Path,
    results: Mapping[str, Any],
    outcomes: Mapping[str, Outcome],
    best: Best | None = None,
    before: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes results.json, results.md, model_card.md and outcomes.npz into a workdir.

    outcomes.npz holds `correct` and `prediction` per attack, `[A, N]`, and `best_correct` and `best_prediction` where the
    best checkpoint is not the last, or its averaged weights are meant.

    Args:
      workdir: folder of the run.
      results: what `build` returned.
      outcomes: outcomes of the last checkpoint, by attack.
      best: the best checkpoint.
      before: results of other runs, by defense, whose columns results.md shows before this run's.
    """
    arrays: dict[str, Any] = {"attacks": np.array(list(outcomes))}
    for prefix, of in {"": outcomes, **({"best_": best.outcomes} if best and card.apart(results) else {})}.items():
        arrays[f"{prefix}correct"] = np.stack([o.correct for o in of.values()])
        arrays[f"{prefix}prediction"] = np.stack([o.prediction for o in of.values()])
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_bytes(workdir / "outcomes.npz", content.getvalue())
    write_json(workdir / "results.json", results)
    write_text(workdir / "results.md", markdown({**(before or {}), results["config"]["defense"]: results}))
    write_text(workdir / "model_card.md", card.model_card(results))
