"""The measured cost as a table for a terminal, as markdown, and as a plot against the steps of the attack."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from e2sad_jax.defenses import DEFENSES
from e2sad_jax.reporting import plots
from e2sad_jax.reporting.table import Table
from experiments.step_cost.request import OURS

Row = Mapping[str, Any]
COLORS = {OURS: "#1f4e99", "xla": "#7a7a7a", "torch": "#d1495b", "torch.compile": "#e8963a", "art": "#6a994e"}
MARKS = {"fgsm": ("FGSM", "s", 7), "e2sad": ("e2SAD", "*", 15)}
TARGET = (1.4, 0.7)  # FLOPs of IFGSM-k training in natural steps are at most 1.4 + 0.7 k


def _digits(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, `-` for none."""
    if value is None:
        return "-"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole >= digits:
        return f"{value:,.0f}"
    return f"{value:.{max(digits - whole, 0)}f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _scaled(name: str, unit: float) -> Callable[[Row], str]:
    return lambda row: "-" if row[name] is None else _digits(row[name] / unit)


def _share(row: Row) -> str:
    return "-" if row["share_of_ceiling"] is None else f"{row['share_of_ceiling']:.0%}"


def _spread(row: Row) -> str:
    return "-" if row["fastest"] is None else f"{_digits(row['fastest'])}..{_digits(row['slowest'])}"


# Heading in two lines, and what a row says under it.
COLUMNS: Sequence[tuple[tuple[str, str], Callable[[Row], str]]] = (
    (("compile", "s"), lambda row: "-" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}"),
    (("ms per", "step"), lambda row: _digits(row["milliseconds"])),
    (("fastest", "..slowest"), _spread),
    (("images", "per s"), lambda row: _digits(row["images_per_second"])),
    (("time /", "natural"), lambda row: _ratio(row["time_natural"])),
    (("time /", "IFGSM-30"), lambda row: "-" if row["time_ifgsm_30"] is None else f"{row['time_ifgsm_30']:.3f}"),
    (("ours /", "peer"), lambda row: _ratio(row["ours_over_peer"])),
    (("time /", "float32"), lambda row: _ratio(row["time_float32"])),
    (("GFLOP", ""), _scaled("flops", 1e9)),
    (("FLOPs /", "natural"), lambda row: _ratio(row["flops_natural"])),
    (("GB", ""), _scaled("bytes_accessed", 1e9)),
    (("of", "ceiling"), _share),
    (("peak", "MB"), _scaled("peak_bytes", 1e6)),
)


def label(row: Row) -> str:
    """The defense as it is written, with its steps or its preset."""
    return DEFENSES[row["defense"]].label + row["name"].removeprefix(row["defense"])


def _cells(result: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """Headings and rows, without columns in which nothing stands."""
    rows = result["rows"]
    several = len({row["precision"] for row in rows}) > 1
    columns = [
        (heading, cell)
        for heading, cell in COLUMNS
        if (several or heading != ("time /", "float32")) and any(cell(row) != "-" for row in rows)
    ]
    lines = []
    for row in rows:
        name = label(row) if row["by"] == OURS else f"  {row['by']}"
        if several and row["by"] == OURS:
            name += f" {row['precision']}"
        if row["error"]:
            name += " (failed)"
        lines.append([name, *(cell(row) for _, cell in columns)])
    return [("step", ""), *(heading for heading, _ in columns)], lines


def heading(result: Mapping[str, Any]) -> str:
    """One line that says what was measured."""
    s = result["settings"]
    size = "x".join(map(str, s["image_shape"]))
    return f"Cost of a training step: {s['model']}, batch {s['batch_size']} of {size}"


def notes(result: Mapping[str, Any]) -> list[str]:
    """How to read the table, what went wrong, and on what it was measured."""
    s, e, rows = result["settings"], result["environment"], result["rows"]
    ceilings = [
        f"{c['flops_per_second'] / 1e9:,.0f} GFLOP/s in {precision}" for precision, c in result["ceiling"].items()
    ]
    lines = [
        f"Median of {result['rounds_done']} rounds in which all were timed in turn; ratios are medians of each round's. "
        f"Steps per dispatch: {s['steps_per_dispatch']}.",
        "FLOPs and bytes by XLA's count of the CPU's program. Ceiling: the best of this run's large matrix products, "
        f"{', '.join(ceilings)}.",
    ]
    if any(row["ours_over_peer"] for row in rows):
        lines.append(
            "Rows below one of ours are others' for the same defense; their ratios to natural and IFGSM-30 are to their "
            "own. ours / peer below 1: ours is faster. All use all cores."
        )
    compared = [row for row in rows if row.get("losses")]
    if compared:
        apart = [
            max(abs(theirs / ours - 1) for ours, theirs in zip(*both, strict=True))
            for both in zip(
                zip(*(row["our_losses"] for row in compared), strict=True),
                zip(*(row["losses"] for row in compared), strict=True),
                strict=True,
            )
        ]
        lines.append(
            "Before, from equal parameters, the losses of the first steps were ours to "
            f"{', '.join(f'{a:.0e}' for a in apart)}."
        )
    said: dict[str, list[str]] = {}
    for row in rows:
        for text in filter(None, (row["note"], row["error"] and f"failed: {row['error']}")):
            said.setdefault(f"{row['by']}: {text}" if row["by"] != OURS else text, []).append(label(row))
    lines += [f"{', '.join(names)}: {text}." for text, names in said.items()]
    peers = ", ".join(f"{name} {e[name]}" for name in ("torch", "adversarial-robustness-toolbox") if name in e)
    threads = f"; threads: {e['threads']}" if "threads" in e else ""
    lines += [
        f"Command: `{result['command']}`",
        f"Measured {e['date']} on {e['hardware']}{threads}; Python {e['python']}, JAX {e['jax']}, jaxlib {e['jaxlib']}, "
        f"Flax {e['flax']}{', ' + peers if peers else ''}; commit {e['commit']}.",
    ]
    return lines


def table(result: Mapping[str, Any]) -> Table:
    """The table, and beneath it how and on what it was measured."""
    headings, lines = _cells(result)
    columns = ["\n".join(filter(None, pair)) for pair in headings]
    return Table(title=heading(result), columns=columns, rows=lines, notes=notes(result))


def text(result: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    return table(result).text()


def markdown(result: Mapping[str, Any]) -> str:
    """step_cost.md: the table in Markdown."""
    return table(result).markdown()


def plot(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Draws time and FLOPs against the steps of the attack, in natural steps of ours; FGSM and e2SAD are marked.

    Args:
      path: PNG to write.
      result: what `measure` returns; its first precision is drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    precision = result["rows"][0]["precision"]
    rows = [row for row in result["rows"] if row["precision"] == precision]
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(f"{heading(result)}, {precision}", fontsize=12)
    left, right = figure.subplots(1, 2)
    _panel(left, rows, "time_our_natural", "Time")
    _panel(right, [row for row in rows if row["by"] == OURS], "flops_natural", "FLOPs, by XLA's count")
    left.set_ylabel(f"natural training steps of {OURS}")
    shown = dict.fromkeys(row["by"] for row in rows if row["milliseconds"])
    lines = any(row["defense"] == "ifgsm" for row in rows)
    marker, text = ("o", "IFGSM, ") if lines else ("", "")
    marks: list[Any] = [Line2D([], [], marker=marker, ms=4, color=COLORS[by], label=text + by) for by in shown]
    for text, marker, size in MARKS.values():
        marks.append(Line2D([], [], marker=marker, ms=size, mec="white", color="0.35", ls="", label=text))
    if lines:
        marks.append(Line2D([], [], ls="--", lw=1, color="0.55", label="bound on IFGSM's FLOPs: 1.4 + 0.7 k"))
    figure.legend(handles=marks, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    plots.save(path, figure, dpi=130)


def _panel(ax: Any, rows: Sequence[Row], field: str, title: str) -> None:
    """Lines of IFGSM by library, their quartiles shaded; FGSM at one step of attack and e2SAD at two."""
    from matplotlib.ticker import NullLocator

    top, ticks_at, iterated = 2, {1, 2}, False
    for by in dict.fromkeys(row["by"] for row in rows):
        own = [row for row in rows if row["by"] == by and row[field] is not None]
        color = COLORS[by]
        if line := [row for row in own if row["defense"] == "ifgsm"]:
            steps = [row["attack_steps"] for row in line]
            top, ticks_at, iterated = max(top, *steps), ticks_at | set(steps), True
            ax.plot(steps, [row[field] for row in line], "o-", color=color, ms=4, lw=1.8, zorder=3)
            if field == "time_our_natural":
                low, high = zip(*map(_quartiles, line), strict=True)
                ax.fill_between(steps, low, high, color=color, alpha=0.18, lw=0)
        for row in own:
            if row["defense"] in MARKS:
                gradients = 1 if row["defense"] == "fgsm" or row["name"].endswith(", robust") else 2
                _, marker, size = MARKS[row["defense"]]
                ax.plot(gradients, row[field], marker, color=color, ms=size, mec="white", mew=0.8, zorder=4)
                if by == OURS and row["defense"] == "e2sad":
                    _level(ax, row[field], f"{label(row)} {row[field]:.2f}", color)
    if field == "flops_natural" and iterated:
        ax.plot(
            *zip(*((k, TARGET[0] + TARGET[1] * k) for k in range(1, top + 1)), strict=True), "--", color="0.55", lw=1
        )
    _level(ax, 1, "natural", "0.5")
    ax.set(title=title, xlabel="gradient steps k of the training attack", xscale="log", yscale="log")
    ax.set_xlim(0.85, top * 1.5)
    for axis, ticks in ((ax.xaxis, sorted(ticks_at)), (ax.yaxis, [a * 10**b for b in range(4) for a in (1, 2, 5)])):
        low, high = axis.get_view_interval()
        axis.set_ticks([tick for tick in ticks if low <= tick <= high])
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    ax.grid(alpha=0.2)
    ax.spines[["top", "right"]].set_visible(False)


def _level(ax: Any, value: float, text: str, color: str) -> None:
    ax.axhline(value, color=color, lw=0.9, ls=":", zorder=1)
    place = ax.get_yaxis_transform()
    ax.text(0.995, value, text, transform=place, ha="right", va="bottom", fontsize=8.5, color=color)


def _quartiles(row: Row) -> tuple[float, float]:
    """Quartiles of a step's time, in natural steps of ours."""
    unit = row["milliseconds"] / row["time_our_natural"]
    return row["lower_quartile"] / unit, row["upper_quartile"] / unit
