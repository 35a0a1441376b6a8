"""A comparison as a table, a model card and a picture."""

import pathlib
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np

from e2sad_jax.comparison.request import FASTAT, JUDGES, REFERENCE, checkpoints
from e2sad_jax.data.dataset import in_words
from e2sad_jax.reporting import plots
from e2sad_jax.reporting.card import PURPOSE, limits
from e2sad_jax.reporting.table import Table

Result = Mapping[str, Any]
TITLE = "Robust accuracy against the price of training"
CROWDED = 0.8  # of robust accuracy: above it good defenses differ by hundredths
OURS, OTHERS = "#c1272d", "#3b6ea5"


def protocol(result: Result) -> list[str]:
    """How the models were trained and attacked, in sentences.

    Args:
      result: what compare.json holds.
    """
    r = result["request"]
    return [
        f"Trained on {r['data']}: network `{r['model']}`{_width(r)}, {_length(r)}, {_seeds(result)}, "
        f"{_labels(r)}{_augmented(r)}{begun(r)}, learning rate {r['learning_rate']:g} ({r['schedule']}), "
        f"{_rise(r['eps_warmup'])}{', unless a part says otherwise' if r['parts'] else ''}.",
        f"Robust accuracy: the share of {_images(result)} classified correctly under all of {_attacks(result)}; one restart "
        f"each, eps {result['eps']:.4g}.",
    ]


def _width(request: Mapping[str, Any]) -> str:
    return f" of width {width}" if (width := request.get("width")) else ""  # not in files of earlier versions


def _augmented(request: Mapping[str, Any]) -> str:
    changes = request.get("augment", "none")
    return "" if changes == "none" else f", augmentation ({changes})"


def begun(request: Mapping[str, Any]) -> str:
    """Says which weights the networks began with, after a comma; empty if with random ones."""
    start = request.get("init_from")
    return f", begun with the weights of `{start}` (their FLOPs are not counted)" if start else ""


def _images(result: Result) -> str:
    kind, count = JUDGES[result["request"]["judge"]], result["images"]
    if result.get("of") is None:  # of an earlier version
        return f"{count:,} {kind}"
    return in_words(count, result["of"], result["classes"], result["num_classes"], kind)


def _attacks(result: Result) -> str:
    return ", ".join(
        f"{a['name']} ({a['steps']:,} {'queries' if a['kind'] == 'square' else 'steps'}"
        + (f" towards each of {a['targets']} classes)" if a["loss"] == "targeted_dlr" else ")")
        for a in result["attacks"]
    )


def _length(r: Mapping[str, Any]) -> str:
    if r["equal_flops"]:
        return f"as many steps of {r['batch_size']} as cost what {r['steps']:,} of {REFERENCE} do"
    return f"{r['steps']:,} steps of {r['batch_size']}"


def _seeds(result: Result) -> str:
    low, high = _least_and_most_seeds(result)
    return "1 seed" if high == 1 else f"{high} seeds" if low == high else f"{low} to {high} seeds"


def _least_and_most_seeds(result: Result) -> tuple[int, int]:
    counts = [_seeds_of(result, row) for row in result["rows"]]
    return min(counts), max(counts)


def _seeds_of(result: Result, row: Mapping[str, Any]) -> int:
    return int(row.get("seeds", result["request"]["seeds"]))


def _labels(r: Mapping[str, Any]) -> str:
    labels = f"soft labels (delta {r['delta']:g})" if r.get("delta") else "hard labels"
    scale = r.get("eps_scale", 1)
    return labels if scale == 1 else f"{labels}, budget of training {scale:g} eps"


def _rise(warmup: float) -> str:
    if not warmup:
        return "the same eps in all steps"
    return f"eps rising over {f'{warmup:g} of all' if warmup < 1 else f'{warmup:,.0f}'} steps"


def table(result: Result) -> Table:
    """A row for each entry: accuracies of the last and of the best checkpoint, and the price.

    Args:
      result: what compare.json holds.
    """
    several = _least_and_most_seeds(result)[1] > 1
    robust = "robust (lowest .. highest)" if several else "robust"
    rows, attacked, published = [], _attacked(result), result["request"].get("recipe") == "fastat"
    for row in result["rows"]:
        lost = _seeds_of(result, row) - len(row["runs"])
        cells = [row["name"] + (f" ({lost} of the seeds diverged)" if lost else "")]
        for which in attacked:
            own = row[which]
            cells += [f"{own['clean']:.3f}", f"{own['robust']:.3f}"]
            if _seeds_of(result, row) > 1:
                cells[-1] += f" ({own['lowest']:.3f} .. {own['highest']:.3f})"
            if which != "average":
                cells.append(", ".join(f"{step:,}" for step in sorted(set(own["steps"]))))
        if published:
            cells += [f"{percent / 100:.3f}" for percent in FASTAT[row["name"]]] if row["name"] in FASTAT else ["", ""]
        rows.append([*cells, f"{row['flops']:.3g}", f"{_price(result, row):.2f}"])
    priced = result["priced"]
    average = ["average: clean", f"average: {robust}"] if "average" in attacked else []
    best = ["best: clean", f"best: {robust}", "best: step"] if "best" in attacked else []
    return Table(
        title=TITLE,
        columns=[
            "defense",
            "clean",
            robust,
            "steps",
            *average,
            *best,
            *(["published: clean", "published: AutoAttack"] if published else []),
            "training FLOPs",
            "FLOPs of a step, natural = 1",
        ],
        rows=rows,
        notes=[
            *protocol(result),
            "clean, robust: of the last checkpoint."
            + (
                f" best: of the checkpoint with the highest accuracy under PGD-10 on {result['chosen_on']}."
                if best
                else ""
            ),
            *(
                [f"average: averaged weights (`--ema={result['request']['ema']:g}`) of the last checkpoint."]
                if average
                else []
            ),
            *(
                [
                    "published: by FastAT Benchmark (https://arxiv.org/abs/2604.22853), three seeds, of the checkpoint, raw or "
                    "averaged, that PGD-10 chose on 1,000 held-out images."
                ]
                if published
                else []
            ),
            f"FLOPs: XLA's count for the CPU, JAX {priced['jax']}, commit {priced['commit']}, {priced['date']}.",
            *(f"{row['name']}: {sentence}." for row in result["rows"] for sentence in broken(row)),
            *(f"Trained and attacked: {origin}." for origin in _origins(result)),
            *_elsewhere(result),
        ],
    )


def _attacked(result: Result) -> tuple[str, ...]:
    return checkpoints(result["request"])


def broken(row: Mapping[str, Any]) -> list[str]:
    """What is to be said of NaN logits of an entry's checkpoints, a sentence each; mostly nothing."""
    said = [(which, run["seed"], run[which].get("nan")) for run in row["runs"] for which in run["asked"]["checkpoints"]]
    return list(dict.fromkeys(f"{which} checkpoint, seed {seed}: {nan}" for which, seed, nan in said if nan))


def _price(result: Result, row: Mapping[str, Any]) -> float:
    """FLOPs of a training step, natural training's being 1."""
    return float(row["step_flops"] / result["natural_step_flops"])


def markdown(result: Result) -> str:
    """compare.md: the table and the picture."""
    return f"{table(result).markdown()}\n![{TITLE}](compare.png)\n"


def _origins(result: Result) -> list[str]:
    """What trained and attacked the rows; which of the rows, where there are several."""
    origins: dict[str, list[str]] = {}
    for row in result["rows"]:
        for run in row["runs"]:
            origin = _origin(result, row, run)
            e = origin["environment"]
            made = f"`{origin['command']}`, {e['hardware']}, {e['date']}, commit {e['commit']}"
            if row["name"] not in origins.setdefault(made, []):
                origins[made].append(row["name"])
    return list(origins) if len(origins) == 1 else [f"{made}: {'; '.join(of)}" for made, of in origins.items()]


def _origin(result: Result, row: Mapping[str, Any], run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Command and environment of a run: its own where it was measured for an earlier row, that of its row, or the result's."""
    return run.get("origin") or row.get("origin") or result


def _elsewhere(result: Result) -> list[str]:
    """What was done at another commit than the origin's, by runs that were there already: a sentence for each commit."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        for run in row["runs"]:
            here = _origin(result, row, run)["environment"]["commit"]
            attacked = [run[which].get("commit", here) for which in _attacked(result)]
            done = [("trained", commit) for commit in run.get("trained", [])] + [("attacked", at) for at in attacked]
            for key in dict.fromkeys(done):
                if key[1] != here and row["name"] not in found.setdefault(key, []):
                    found[key].append(row["name"])
    return [f"{what.capitalize()} at commit {commit}: {'; '.join(names)}." for (what, commit), names in found.items()]


def card(result: Result) -> str:
    """compare_card.md: of all models of the comparison, what a model card says of one.

    Args:
      result: what compare.json holds.
    """
    r, rows = result["request"], result["rows"]
    robust = sorted(rows, key=lambda row: float(row["last"]["robust"]))
    best, clean = robust[-1], sorted(float(row["last"]["clean"]) for row in rows)
    runs = sum(len(row["runs"]) for row in rows)
    digest = rows[0]["runs"][0]["asked"]["data"][:16]
    lines = [
        "# Model card: all models of [the comparison](compare.md)",
        "",
        f"- **Models:** `{r['model']}`, {runs} of them: {'; '.join(row['name'] for row in rows)}.",
        PURPOSE,
        f"- **Data:** {r['data']} (SHA-256 of the content `{digest}...`). The models inherit what these images leave out or "
        "get wrong.",
        f"- **Training and evaluation:** {' '.join(protocol(result))}",
        *(f"- **Command:** {origin}." for origin in _origins(result)),
        *(f"- **Other commits:** {sentence}" for sentence in _elsewhere(result)),
        "",
        "## Evaluation",
        "",
        f"Each model's accuracies are in [compare.md](compare.md). Clean accuracy from {clean[0]:.3f} to {clean[-1]:.3f}, "
        f"robust accuracy of the last checkpoint from {robust[0]['last']['robust']:.3f} to {best['last']['robust']:.3f} "
        f"({best['name']}).",
        "",
        "## Limits",
        "",
        *limits(_least_and_most_seeds(result)[1], result["images"]),
    ]
    return "\n".join(lines) + "\n"


def plot(path: pathlib.Path, result: Result) -> None:
    """Draws the robust accuracy of the last checkpoints: against the price of a step, or by name where all have about one.

    Args:
      path: PNG to write.
      result: what compare.json holds.
    """
    r = result["request"]
    figure = _by_name(result) if r["parts"] else _by_price(result)
    plots.save(path, figure, dpi=150)


def _is_ours(row: Mapping[str, Any]) -> bool:
    return bool(row["settings"]["defense"] == "e2sad")


def _caption(result: Result) -> str:
    r = result["request"]
    name = pathlib.Path(r["data"]).stem if r["data"].endswith(".npz") else r["data"].upper()
    return textwrap.fill(f"{name}, eps {result['eps']:.3g}, {_length(r)}, {_seeds(result)}, {_images(result)}", 95)


def _by_price(result: Result) -> Any:
    """A point for each defense, labelled with its name, with a bar from its lowest to its highest seed; e2SAD's are stars.

    The line is the frontier: the highest robust accuracy at each price or a lower one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.2), layout="constrained")
    axes = figure.subplots()
    points = [(_price(result, row), row["last"]["robust"]) for row in result["rows"]]
    best = sorted({(x, max(b for a, b in points if a <= x)) for x, _ in points})
    end = 1.6 * max(x for x, _ in points)
    axes.step(*zip(*best, (end, best[-1][1]), strict=True), where="post", color="0.75", lw=1.2, zorder=1)
    for row, (x, y) in zip(result["rows"], points, strict=True):
        ours = _is_ours(row)
        low, high = row["last"]["lowest"], row["last"]["highest"]
        axes.plot([x, x], [low, high], color=OURS if ours else OTHERS, lw=1.2, zorder=2)
        axes.plot(
            x, y, "*" if ours else "o", ms=14 if ours else 7, color=OURS if ours else OTHERS, mec="white", zorder=3
        )
    axes.set(xscale="log", xlabel="FLOPs of a training step (natural training = 1)", ylabel="robust accuracy")
    axes.set(ylim=(-0.05, 1.0), xlim=(0.8, end))
    if best[-1][1] > CROWDED:
        lows, highs = zip(*((row["last"]["lowest"], row["last"]["highest"]) for row in result["rows"]), strict=True)
        _spread(axes, min(lows), max(highs))
    axes.set_xticks(ticks := [t for t in (1, 2, 3, 5, 10, 20, 50) if t <= axes.get_xlim()[1]], list(map(str, ticks)))
    axes.set_xticks([], minor=True)
    axes.grid(color="0.93")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(_caption(result), fontsize=9, color="0.35", loc="left")
    names = []
    for row, (x, y) in zip(result["rows"], points, strict=True):
        style: dict[str, Any] = {"color": OURS if _is_ours(row) else "0.15", "fontsize": 9}
        names.append((row["name"], x, y, {**style, "weight": "bold"} if row["name"] == REFERENCE else style))
    plots.label_points(axes, names)
    return figure


def _spread(axes: Any, lowest: float, highest: float) -> None:
    """Gives high accuracies more room: the axis is logarithmic in the error, from below the lowest accuracy."""
    ticks = [0, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.98]
    bottom = max(-0.05, 1.02 - 1.4 * (1.02 - lowest))
    if bottom > 0.8:
        ticks = [round(0.01 * t, 2) for t in range(80, 100)]
    axes.set_yscale("function", functions=(lambda y: -np.log(1.02 - np.minimum(y, 1)), lambda z: 1.02 - np.exp(-z)))
    axes.set(ylim=(bottom, (1 + 2 * highest) / 3), ylabel="robust accuracy (logarithmic in the error)")
    axes.set_yticks([t for t in ticks if bottom < t < axes.get_ylim()[1]])


def _by_name(result: Result) -> Any:
    """A line for each entry, in the order of the table."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(7, 0.9 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        ours = row["name"] == REFERENCE
        note = f"{_price(result, row):.2f}"
        name = row["name"].removeprefix(f"{REFERENCE}, ")
        style: dict[str, Any] = {
            "color": OURS if ours else OTHERS,
            "marker": "*" if ours else "o",
            "ms": 13 if ours else 7,
        }
        axes.plot([row["last"]["robust"]], [f"{name} ({note})"], ls="", **style)
    axes.set(xlabel="robust accuracy", xlim=(-0.03, 1.0))
    axes.invert_yaxis()
    axes.grid(color="0.93")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    price = "\nIn parentheses: FLOPs of a training step (natural training = 1)"
    figure.suptitle(_caption(result) + price, fontsize=9, color="0.35")
    return figure
