"""Shows a diagnosis as text, as Markdown and as a picture."""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from e2sad_jax import attacks
from e2sad_jax.data.dataset import in_words
from e2sad_jax.evaluation import accuracy_at, nan_logits
from e2sad_jax.reporting import plots, provenance
from e2sad_jax.reporting.card import WORST
from e2sad_jax.reporting.table import Table

Result = Mapping[str, Any]
NORMS = {"linf": "l-inf", "l2": "l2"}
CLASSES = 20  # rows of the table by class, at most
QUANTILES = (0.1, 0.5, 0.9)  # of the distances of nearest adversarial images


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
    if classes := result.get("per_class"):
        shown = sorted(classes, key=lambda row: row["robust"])[:CLASSES]
        some = f", the {CLASSES} least robust of {len(classes)}" if len(classes) > CLASSES else ""
        found.append(
            Table(
                title=f"Accuracy by class ({eps}, all attacks combined{some})",
                columns=["class", "images", "clean", "robust"],
                rows=[
                    [row["class"], row["images"], _accuracy(row["clean"]), _accuracy(row["robust"])]
                    for row in (shown if some else classes)
                ],
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
    if (nearest := result.get("nearest")) and (
        far := sorted(np.inf if d is None else d for d in nearest["distances"] if d != 0)
    ):
        low, middle, high = (far[int(q * (len(far) - 1))] for q in QUANTILES)
        said.append(
            f"Nearest adversarial images ({nearest['attack']}, {NORMS[result['norm']]}), of the {len(far):,} images that are "
            f"classified correctly without attack: median distance {_distance(middle)}, from {_distance(low)} to "
            f"{_distance(high)} for 80 % of them."
        )
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
    if (worst := result["worst_case"]) and "near" in worst:
        stood = round(list(worst["accuracy"].values())[-1] * n)
        said.append(
            f"Later attacks left out {worst['left_out']:,} of the {stood:,} images that stand: their decision boundary is "
            f"estimated to lie far outside the ball (near {worst['near']:g})."
        )
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
    if result.get("examples"):
        blocks.append(f"![Images and their worst images]({result['examples']})")
    blocks.append(f"## For a model card\n\n{paragraph(result)}")
    blocks.append(f"Command: `{result['command']}`. {provenance.sentence(result['environment'])}")
    return "\n\n".join(blocks) + "\n"


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}footer{margin-top:2rem;color:#666;font-size:13px}"
)


def page(result: Result, folder: pathlib.Path) -> str:
    """evaluation.html: what `markdown` says, as a page that needs no other file.

    Args:
      result: what evaluation.json holds.
      folder: of the pictures; one that is missing is left out.
    """
    title = f"Robustness of {result['name']}"
    pictures = [name for name in ("evaluation.png", result.get("examples")) if name and (folder / name).exists()]
    sources = [base64.b64encode((folder / name).read_bytes()).decode() for name in pictures]
    footer = f"Command: {result['command']}. {provenance.sentence(result['environment'])}"
    blocks = [
        f"<h1>{html.escape(title)}</h1>",
        _block("p", f"Measured on {images_of(result)}."),
        _block("p", result["verdict"]),
        *(f'<p><img alt="" src="data:image/png;base64,{source}"/></p>' for source in sources),
        *(table.html(level=2) for table in tables(result)),
        *(_block("p", sentence) for sentence in sentences(result)),
        _block("h2", "For a model card"),
        _block("p", paragraph(result)),
        _block("footer", footer),
    ]
    head = f'<meta charset="utf-8"/><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(blocks)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _block(tag: str, words: str) -> str:
    return f"<{tag}>{html.escape(words)}</{tag}>"


def paragraph(result: Result) -> str:
    """The evaluation in a few sentences, for a model card."""
    worst, norm = result["worst_case"], NORMS[result["norm"]]
    attacks_of = (
        "the worst case of "
        + "; ".join(describe(stage) for stage in worst["stages"])
        + "; and all attacks of the curves"
        if worst
        else "the attacks of the curves"
    )
    suspicious = [check["name"] for check in result["checks"] if check["suspicious"]]
    masking = (
        f"Checks for gradient masking are suspicious ({', '.join(suspicious)})"
        if suspicious
        else f"None of {len(result['checks'])} checks finds a sign of gradient masking"
    )
    return (
        f"On {images_of(result)}, accuracy is {result['clean']:.3f} without attack and {result['robust']:.3f} under "
        f"{attacks_of}, in {norm} balls of {result['eps']:.4g} within images in {_range(result)}. {masking}. The images that "
        "fool the model were classified again in batches of another size. This robust accuracy is an upper bound."
    )


def _distance(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "infinity (none was found)"


def _range(result: Result) -> str:
    low, high = result["bounds"]
    return f"[{low:g}, {high:g}]" if all(isinstance(bound, int | float) for bound in (low, high)) else "their range"


def examples(path: pathlib.Path, clean: np.ndarray, worst: np.ndarray, titles: Sequence[str], width: float) -> None:
    """Draws images, their worst images and the change between them, a column for each.

    Args:
      path: of the PNG.
      clean: images `[n, H, W, C]`.
      worst: as `clean`.
      titles: above each column.
      width: of the images' range.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * len(clean) + 0.6, 4.4), layout="constrained")
    change = worst - clean
    largest = float(np.abs(change).max()) or 1.0
    low = float(min(clean.min(), worst.min(), 0.0))
    rows = ("image", (clean - low) / width), ("worst", (worst - low) / width), ("change", change / (2 * largest) + 0.5)
    for axes, (name, images) in zip(figure.subplots(3, len(clean), squeeze=False), rows, strict=True):
        for column, image in enumerate(images):
            grey = image.shape[-1] == 1
            axes[column].imshow(
                np.clip(image[..., 0] if grey else image, 0, 1), cmap="gray" if grey else None, vmin=0, vmax=1
            )
            axes[column].set(xticks=[], yticks=[])
            if name == "image":
                axes[column].set_title(titles[column], fontsize="small")
        axes[0].set_ylabel(name if name != "change" else f"change, +-{largest:.3g}")
    plots.save(path, figure, dpi=120)


def plot(path: pathlib.Path, results: Sequence[Result]) -> None:
    """Draws accuracy against budget and against steps, a colour for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles, norm = ["--", "-", ":"], NORMS[results[0]["norm"]]
    for i, result in enumerate(results):
        colour = f"C{i}"
        curve = result["over_eps"]
        nearest = result.get("nearest")
        fixed = {name: values for name, values in curve["accuracy"].items() if not nearest or name != nearest["attack"]}
        if nearest:
            far = np.array([np.inf if d is None else d for d in nearest["distances"]])
            budgets = np.linspace(0, max([result["eps"], *curve["eps"]]), 200)
            left.plot(
                budgets,
                accuracy_at(far, budgets),
                color=colour,
                alpha=0.5,
                lw=3,
                label=f"{nearest['attack']}, every budget",
            )
        for style, (name, values) in zip(styles, fixed.items(), strict=False):
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
