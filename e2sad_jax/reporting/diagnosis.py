"""Shows a diagnosis as text, as Markdown and as a picture."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from e2sad_jax import attacks
from e2sad_jax.data.dataset import in_words
from e2sad_jax.evaluation import nan_logits
from e2sad_jax.reporting import plots, provenance
from e2sad_jax.reporting.card import WORST
from e2sad_jax.reporting.table import Table

Result = Mapping[str, Any]
NORMS = {"linf": "l-inf", "l2": "l2"}


def tables(result: Result) -> list[Table]:
    """The tables of a diagnosis: accuracy against budget, steps, restarts; worst case; transfer; checks.

    Args:
      result: what evaluation.json holds.
    """
    eps, n = f"{_budget(result)} {result['eps']:.4g}", result["images"]
    budget, steps, restarts = result["over_eps"], result["over_steps"], result["over_restarts"]
    found = [
        Table(
            title=f"Accuracy on {n:,} images against the budget (1 restart; clean accuracy {result['clean']:.3f})",
            columns=[_budget(result), *(f"{e:.4g}" for e in budget["eps"])],
            rows=[[name, *map(_accuracy, values)] for name, values in budget["accuracy"].items()],
        ),
        Table(
            title=f"Accuracy against the steps of PGD ({eps}, 1 restart)",
            columns=["steps", *map(str, steps["steps"])],
            rows=[["PGD", *map(_accuracy, steps["accuracy"])]],
        ),
        Table(
            title=f"Accuracy against restarts ({eps}, worst of all restarts)",
            columns=["restarts", *(str(i + 1) for i in range(len(restarts["accuracy"])))],
            rows=[[restarts["attack"], *map(_accuracy, restarts["accuracy"])]],
        ),
    ]
    if worst := result["worst_case"]:
        rows = [[name, _accuracy(value), worst["fooled"].get(name, "")] for name, value in worst["accuracy"].items()]
        found.append(
            Table(
                title=f"Worst case: accuracy after each attack in turn ({eps}, {n:,} images)",
                columns=["attack", "accuracy", "images it fooled"],
                rows=[*rows, [f"{WORST}, those above included", _accuracy(worst["robust"]), ""]],
                notes=[f"{describe(stage)}." for stage in worst["stages"]],
                footer=1,
            )
        )
    if transfer := result["transfer"]:
        found.append(
            Table(
                title=f"Transfer ({transfer['attack']}, {eps}, made for {transfer['from']})",
                columns=["model", "accuracy"],
                rows=[
                    [result["name"], _accuracy(transfer["accuracy"])],
                    [transfer["from"], _accuracy(transfer["accuracy_of_substitute"])],
                ],
            )
        )
    if more := result.get("more"):
        rows = [[row["attack"], row["norm"], f"{row['eps']:.4g}", _accuracy(row["accuracy"])] for row in more]
        found.append(
            Table(title=f"More attacks ({n:,} images)", columns=["attack", "norm", "budget", "accuracy"], rows=rows)
        )
    rows = [
        [
            check["name"],
            _accuracy(check["value"]),
            f"{'at most' if check['below'] else 'at least'} {check['bound']}",
            "SUSPICIOUS" if check["suspicious"] else "",
        ]
        for check in result["checks"]
    ]
    columns = ["check", "measured", "expected", ""]
    return [*found, Table(title="Checks for gradient masking", columns=columns, rows=rows)]


def _budget(result: Result) -> str:
    """What a budget is called: "eps", with the norm where it is not l-infinity."""
    return "eps" if result["norm"] == "linf" else f"{NORMS[result['norm']]} eps"


def sentences(result: Result) -> list[str]:
    """What the tables do not say: NaN, images whose fall is rounding, and the accuracy of 8-bit images."""
    said, n = [], result["images"]
    if nan := nan_logits(result["nan"], n):
        said.append(f"NaN: {nan}.")
    if verified := result.get("verified"):
        small, large = sorted(verified["batch_sizes"])
        outside = f"{verified['outside']:,} of them lie outside the ball or the range"
        where = outside if verified["outside"] else "all of them lie in the ball and the range"
        said.append(
            f"Verified: {verified['fooled']:,} of {n:,} images fool the model, in batches of {large:,} and of {small:,}; "
            f"{where} (largest change {verified['largest']:.6g})."
        )
        if verified["differ"]:
            said.append(f"{verified['differ']:,} predictions depend on the batch size.")
    if count := result["overturned"]:
        said.append(
            f"{count:,} of {n:,} images fool the model within an attack's program but not in the forward pass of the clean "
            "accuracy: they count as correct."
        )
    if (quantized := result.get("quantized")) is not None:
        said.append(
            f"8 bits: the worst image of each, rounded to grey levels inside the ball: accuracy {quantized:.4f} "
            f"({result['robust']:.4f} before rounding)."
        )
    return said


def _accuracy(value: float) -> str:
    return f"{value:.3f}"


def describe(stage: Mapping[str, Any]) -> str:
    """One attack of the worst case with its effort, in words."""
    if attacks.ATTACKS[stage["kind"]].family == "score-based":
        return f"{stage['name']}: {stage['steps']:,} queries, {_restarts(stage['restarts'])}"
    targets = f" towards each of {stage['targets']} classes" if stage["loss"] == "targeted_dlr" else ""
    return f"{stage['name']}: {stage['steps']} steps{targets}, {_restarts(stage['restarts'])}"


def _restarts(count: int) -> str:
    return "1 restart" if count == 1 else f"{count} restarts"


def images_of(result: Result) -> str:
    """The test images of an evaluation in words."""
    return in_words(result["images"], result["test_images"], result["classes"], result["num_classes"])


def text(result: Result) -> str:
    """The tables, the images, what else is to be said, and the verdict, for a terminal."""
    about = [f"Measured on {images_of(result)}.", *sentences(result)]
    return "\n\n".join([*(table.text() for table in tables(result)), *about, result["verdict"]])


def markdown(result: Result) -> str:
    """evaluation.md: the verdict, the tables, the picture, and the provenance."""
    blocks = [f"# Robustness of {result['name']}", f"Measured on {images_of(result)}. {result['verdict']}"]
    blocks += [table.markdown(level=2).strip() for table in tables(result)]
    blocks += sentences(result)
    blocks.append("![Accuracy against budget and steps](evaluation.png)")
    blocks.append(f"Command: `{result['command']}`. {provenance.sentence(result['environment'])}")
    return "\n\n".join(blocks) + "\n"


def plot(path: pathlib.Path, results: Sequence[Result]) -> None:
    """Draws accuracy against budget and against steps, a colour for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles, norm = ["--", "-", ":"], NORMS[results[0]["norm"]]
    for i, result in enumerate(results):
        colour = f"C{i}"
        curve = result["over_eps"]
        for style, (name, values) in zip(styles, curve["accuracy"].items(), strict=False):
            label = f"{result['name']}, {name}" if len(results) > 1 else name
            left.plot([0, *curve["eps"]], [result["clean"], *values], style, color=colour, marker=".", label=label)
        if worst := result["worst_case"]:
            left.plot(result["eps"], worst["robust"], "*", color=colour, markersize=12, label="worst case")
        steps = result["over_steps"]
        right.plot(steps["steps"], steps["accuracy"], "-", color=colour, marker=".", label=result["name"])
    left.set(xlabel=f"eps ({norm})", ylabel="accuracy", ylim=(0, 1.02))
    right.set(xlabel=f"PGD steps (eps {results[0]['eps']:.4g}, {norm})", xscale="log", ylim=(0, 1.02))
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    figure.suptitle(f"Accuracy under {norm} attack, {results[0]['images']:,} images")
    plots.save(path, figure, dpi=120)
