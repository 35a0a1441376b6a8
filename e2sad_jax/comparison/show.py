"""A comparison as a table, a model card and a picture."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from e2sad_jax.comparison.request import CHECKPOINTS, JUDGES, REFERENCE
from e2sad_jax.reporting import plots, report


def _about(result: Mapping[str, Any]) -> str:
    r = result["request"]
    attacks = ", ".join(
        f"{a['name']} {a['steps']:,} {'queries' if a['kind'] == 'square' else 'steps'}"
        + (f" towards each of {a['targets']} targets" if a["loss"] == "targeted_dlr" else "")
        for a in result["attacks"]
    )
    return (
        f"{r['data']}, {r['model']}, {_length(r)}, {r['seeds']} seed(s), hard labels, learning rate {r['learning_rate']:g} "
        f"{r['schedule']}, eps rises over {_share(r['eps_warmup'])}"
        f"{' (but where a part says otherwise)' if r['parts'] else ''}; robust: "
        f"what stands {attacks}, one restart each, eps {result['eps']:.4g}, {result['images']:,} {JUDGES[r['judge']]}; "
        f"best: the checkpoint that stood PGD-10 best on {result['chosen_on']}"
    )


def _length(r: Mapping[str, Any]) -> str:
    steps = f"{r['steps']:,} steps of {r['batch_size']}"
    return (
        f"as many steps of {r['batch_size']} as cost what {r['steps']:,} of {REFERENCE} do"
        if r["equal_flops"]
        else steps
    )


def _share(warmup: float) -> str:
    return f"{warmup:g} of all steps" if warmup < 1 else f"{warmup:,.0f} steps"


def _natural(result: Mapping[str, Any]) -> float | None:
    """What natural training cost, where it is among the rows."""
    return next((row["flops"] for row in result["rows"] if row["name"] == "natural"), None)


def markdown(result: Mapping[str, Any]) -> str:
    """The table."""
    lines = [
        "| defense | last: clean | last: robust (lowest .. highest) | last: step | best: clean "
        "| best: robust (lowest .. highest) | best: step | training, FLOPs | natural = 1 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    natural = _natural(result)
    for row in result["rows"]:
        lost = result["request"]["seeds"] - len(row["runs"])
        cells = [row["name"] + (f" ({lost} of the seeds diverged)" if lost else "")]
        for which in CHECKPOINTS:
            own = row[which]
            cells += [f"{own['clean']:.3f}", f"{own['robust']:.3f} ({own['lowest']:.3f} .. {own['highest']:.3f})"]
            cells.append(", ".join(f"{step:,}" for step in sorted(set(own["steps"]))))
        cells.append(f"{row['flops']:.3g}")
        lines.append("| " + " | ".join([*cells, f"{row['flops'] / natural:.2f}" if natural else ""]) + " |")
    return "\n".join(
        [
            "# Robust accuracy against the price of training",
            "",
            f"{_about(result)}.",
            "",
            *lines,
            "",
            "![Robust accuracy against training FLOPs](compare.png)",
            "",
            "\n\n".join(_origins(result)),
            "",
        ]
    )


def _origins(result: Mapping[str, Any]) -> list[str]:
    """What printed the rows; of which it did, where there are several."""
    origins: dict[str, list[str]] = {}
    for row in result["rows"]:
        origin = row.get("origin", result)
        e = origin["environment"]
        made = f"`{origin['command']}`, {e['hardware']}, {e['date']}, commit {e['commit']}"
        origins.setdefault(made, []).append(row["name"])
    return list(origins) if len(origins) == 1 else [f"{made}: {'; '.join(of)}" for made, of in origins.items()]


def card(result: Mapping[str, Any]) -> str:
    """compare_card.md: of all models of the comparison, what `report.model_card` says of one."""
    r, rows = result["request"], result["rows"]
    robust = sorted(rows, key=lambda row: float(row["last"]["robust"]))
    best, clean = robust[-1], sorted(float(row["last"]["clean"]) for row in rows)
    runs = sum(len(row["runs"]) for row in rows)
    digest = rows[0]["runs"][0]["asked"]["data"][:16]
    lines = [
        "# Model card: all models of [the comparison](compare.md)",
        "",
        f"- **Models:** `{r['model']}`, {runs} of them: {'; '.join(row['name'] for row in rows)}.",
        report.PURPOSE,
        f"- **Data:** {r['data']} (content SHA-256 `{digest}...`). Whatever these images leave out or get wrong, the models do "
        "too.",
        f"- **Training and evaluation:** {_about(result)}.",
        *(f"- **Command:** {origin}." for origin in _origins(result)),
        "",
        "## Evaluation",
        "",
        f"Each model's accuracies are in [compare.md](compare.md). Clean from {clean[0]:.3f} to {clean[-1]:.3f}; in the "
        f"worst case, at the last checkpoint, from {robust[0]['last']['robust']:.3f} to {best['last']['robust']:.3f} "
        f"({best['name']}).",
        "",
        "## Limits",
        "",
        *report.limits(r["seeds"], result["images"]),
    ]
    return "\n".join(lines) + "\n"


def plot(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Robust accuracy against training FLOPs, a point for each defense; hollow above it the best checkpoint, where apart."""
    from matplotlib.figure import Figure

    equal = result["request"]["equal_flops"]
    by_name = equal or result["request"]["parts"]  # too many that cost the same
    natural = _natural(result)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    labels = {"last": "last checkpoint", "best": f"best on {result['chosen_on']}, where another"}

    def draw(row: Mapping[str, Any], robust: Sequence[float], *args: Any, **style: Any) -> None:
        name = row["name"]
        if equal:
            name += f" ({row['last']['steps'][0]:,})"
        elif natural:
            name += f" ({row['flops'] / natural:.2f})"
        at = [name if by_name else row["flops"] / (natural or 1)] * len(robust)
        axes.plot(*((robust, at) if by_name else (at, robust)), *args, **style)

    for row in result["rows"]:
        last, best = row["last"]["robust"], row["best"]["robust"]
        ours = row["name"].startswith("e2SAD") and not by_name
        style: dict[str, Any] = {"color": "C3" if ours else "C0"}
        marker = {"marker": "*" if ours else "o", "ms": 14 if ours else 7, "ls": "", **style}
        if best != last:
            draw(row, [last, best], ":", lw=1, **style)
            draw(row, [best], mfc="none", **marker)
        draw(row, [last], **marker)
    for which, fill in (("last", "0.4"), ("best", "none")):
        axes.plot([], [], "o", color="0.4", mfc=fill, label=labels[which])
    axes.legend(loc="best" if by_name else (0.55, 0.15), fontsize=8, frameon=False)
    axes.grid(color="0.92")
    if by_name:
        beside = "steps" if equal else "FLOPs of training, natural = 1"
        axes.set(xlabel=f"robust accuracy (in parentheses: {beside})", xlim=(-0.03, 1.0))
        axes.invert_yaxis()
    else:
        unit = f", natural training = 1 ({natural:.3g})" if natural else ""
        axes.set(xlabel=f"FLOPs of training{unit}", ylabel="robust accuracy", xscale="log", ylim=(-0.03, 1.0))
        axes.margins(x=0.06)
        if natural:
            ticks = (1, 2, 3, 5, 10, 20, 50)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.set_xlim(0.9, 1.15 * max(row["flops"] for row in result["rows"]) / natural)
        _name_points(
            axes, [(row["name"], row["flops"] / (natural or 1), row["last"]["robust"]) for row in result["rows"]]
        )
    figure.suptitle(textwrap.fill(_about(result), 130), fontsize=8)  # across all: names may take half of the width
    plots.save(path, figure, dpi=120)


def _name_points(axes: Any, points: Sequence[tuple[str, float, float]], gap: float = 0.047) -> None:
    """Each point's name in a column to the right of the axes, with a line to it: many lie close together."""
    named = sorted(points, key=lambda point: (-point[2], -point[1]))
    heights: list[float] = []
    for _, _, y in named:
        heights.append(min(y, heights[-1] - gap) if heights else y)
    for i in reversed(range(len(heights))):  # none below the lowest
        heights[i] = max(heights[i], gap * (len(heights) - 1 - i))
    for (name, x, y), height in zip(named, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            (1.03, height),
            textcoords=("axes fraction", "data"),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.75", "lw": 0.6, "shrinkB": 4, "relpos": (0, 0.5)},
        )
