"""Steps compiled for accelerators that are not here: what their programs do, and the time that bounds them."""

import dataclasses
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from e2sad_jax import distributed, networks, training
from e2sad_jax._io import check_folder, write_json, write_text
from e2sad_jax.data import KNOWN
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.errors import first_line
from e2sad_jax.reporting import plots, provenance
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.reporting.table import Table
from e2sad_jax.runs.signals import stopping
from e2sad_jax.training.config import Config
from e2sad_jax.training.state import shardings
from e2sad_jax.training.step import step_arguments
from experiments.step_cost.compiled import Program
from experiments.step_cost.counts import peak_bytes
from experiments.step_cost.request import DATA, NUM_CLASSES, Request, StepsFailedError
from experiments.step_cost.step import no_compilation_cache
from experiments.step_cost.targets import Target, less_optimising

FORMAT = 1  # of ahead.json
Row = dict[str, Any]


def lower(
    config: Config, image_shape: tuple[int, ...], num_classes: int, examples: int, target: Target, steps: int = 1
) -> jax.stages.Lowered:
    """The train step of a run, unchanged, lowered for chips that are not here.

    Args:
      config: the run's settings; `devices` is not read.
      image_shape: (H, W, C).
      num_classes: number of classes K.
      examples: images of the training set, which lies on each chip.
      target: the chips.
      steps: of a dispatch.

    Raises:
      ConfigError: if the plugin has no such chips, or they do not divide the batch.
    """
    mesh = distributed.mesh(target.count, config.batch_size, target.devices())
    assert mesh is not None
    model = networks.create(num_classes=num_classes, image_shape=image_shape, **config.network())
    step: Any = training.make_train_step(
        config, model, num_classes, TRANSFORMS[config.transform], steps=steps, mesh=mesh
    )

    state, *rest = step_arguments(config, model, image_shape, num_classes, examples)
    if steps > 1:
        rest.append(jax.ShapeDtypeStruct((), np.int32))
    return step.lower(_placed(shardings(mesh), state), *_placed([distributed.whole(mesh)] * len(rest), rest))


def _placed(places: Any, shapes: Any) -> Any:
    """Shapes with the places of which `places` has a prefix."""
    return jax.tree.map(
        lambda place, some: jax.tree.map(lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=place), some),
        places,
        shapes,
    )


def read(compiled: jax.stages.Compiled, flops: float, target: Target, precision: str) -> Row:
    """What a compiled step does on each chip, and what bounds it.

    Args:
      compiled: the program.
      flops: of the step over all chips, by the project's count: XLA's takes a loop for one turn.
      target: the chips.
      precision: of the products.
    """
    program = Program.read(compiled.as_text() or "")
    # XLA's estimate counts a loop as one turn. A GPU has none.
    counted: Any = compiled.cost_analysis()
    estimate = float((counted or {}).get("optimal_seconds", 0))
    collectives = {kind: {"number": n, "bytes": sent} for kind, (n, sent) in program.collectives().items()}
    moved, own = program.bytes_moved, flops / target.count
    bounds = target.bound(own, moved, sum(kind["bytes"] for kind in collectives.values()), precision)
    return {
        "flops": own,
        "bytes": moved,
        "peak_bytes": peak_bytes(compiled),
        "collectives": collectives,
        "kernels": program.kernels,
        "transfers": program.transfers,
        "unknown_loops": program.unknown_loops,
        "estimate": estimate if estimate > 0 and not program.loops else None,
        "bounds": bounds,
        # Compute grows with the images of a chip, a sum does not.
        "hidden_from": bounds["links"] / bounds["compute"] if bounds["compute"] else None,
    }


def run(request: Request) -> None:
    """Compiles each step for each target, prints the table, and writes ahead.md, .json and .png after each.

    Raises:
      ConfigError: before anything is compiled.
      StepsFailedError: if a step did not compile, after the others were written.
      Stopped: after Ctrl-C or SIGTERM; what was read is written.
    """
    folder = pathlib.Path(request.results).expanduser()
    check_folder(folder, f"--results={request.results}", make=True)
    targets = [Target.named(name) for name in dict.fromkeys(request.target)]
    examples = KNOWN[DATA[request.model]].train
    steps = request.steps_per_dispatch or 1
    result: dict[str, Any] = {
        "format": FORMAT,
        "settings": {
            **{name: getattr(request, name) for name in ("model", "batch_size", "target")},
            "image_shape": list(request.image_shape),
            "steps_per_dispatch": steps,
            "examples": examples,
        },
        "command": provenance.command(),
        "environment": provenance.environment(),
        "chips": {target.chip.name: dataclasses.asdict(target.chip) for target in targets},
        "rows": [],
    }
    configs = _configs(request)
    with stopping(at_once=True), Bar("step cost", len(targets) * len(configs), "programs") as bar:
        for label, config in configs:
            flops = training.step_flops(config, request.image_shape, NUM_CLASSES)
            for target in targets:
                about = {"target": target.name, "chips": target.count, "label": label, "precision": config.precision}
                began = time.process_time()
                try:
                    with less_optimising(), no_compilation_cache():
                        lowered = lower(config, request.image_shape, NUM_CLASSES, examples, target, steps)
                        row = about | read(lowered.compile(), flops, target, config.precision) | {"error": None}
                except jax.errors.JaxRuntimeError as error:
                    row = about | {"error": first_line(error)}
                result["rows"].append(row | {"compile_cpu_seconds": time.process_time() - began})
                write_json(folder / "ahead.json", result)
                write_text(folder / "ahead.md", table(result).markdown())
                bar.update(1, f"{label} for {target.name}")
    print(table(result).text())
    plot(folder / "ahead.png", result)
    for name in ("ahead.md", "ahead.json", "ahead.png"):
        print(folder / name)
    if failed := [f"{row['label']} for {row['target']}" for row in result["rows"] if row["error"]]:
        raise StepsFailedError(f"{len(failed)} steps did not compile: {', '.join(failed)} (see their rows)")


def _configs(request: Request) -> list[tuple[str, Config]]:
    """The rows with their settings."""
    return [(kind.name, request.config(kind)) for kind in request.kinds()]


def table(result: Mapping[str, Any]) -> Table:
    """A row for each step and target: what its program does on a chip, and the least time by each bound."""
    s, e = result["settings"], result["environment"]
    several = len({row["precision"] for row in result["rows"]}) > 1
    columns = [
        "step", *(["precision"] if several else []), "target", "GFLOP", "GB moved", "peak\nMB", "sums\nMB", "sums", "kernels",
        "compute\nms", "memory\nms", "links\nms", "bound\nms", "XLA's\nms", "batch that\nhides sums",
    ]  # fmt: skip
    lines = []
    for row in result["rows"]:
        head = [row["label"], *([row["precision"]] if several else []), row["target"]]
        if row["error"]:
            lines.append([*head, "failed", *["-"] * (len(columns) - len(head) - 1)])
            continue
        sums = row["collectives"].get("all-reduce", {"number": 0, "bytes": 0})
        bounds = row["bounds"]
        lines.append(
            [
                *head,
                f"{row['flops'] / 1e9:.2f}",
                f"{row['bytes'] / 1e9:.2f}",
                f"{row['peak_bytes'] / 1e6:,.0f}",
                f"{sums['bytes'] / 1e6:.2f}",
                sums["number"],
                f"{row['kernels']:,}",
                *(f"{1e3 * bounds[name]:.3f}" for name in ("compute", "memory", "links")),
                f"{1e3 * max(bounds.values()):.3f}",
                "-" if row["estimate"] is None else f"{1e3 * row['estimate']:.3f}",
                f"{s['batch_size'] * row['hidden_from']:,.0f}" if row["chips"] > 1 else "-",
            ]
        )
    others = sorted({k for row in result["rows"] if not row["error"] for k in row["collectives"]} - {"all-reduce"})
    moves = sum(row["transfers"] for row in result["rows"] if not row["error"])
    notes = [
        f"Compiled for chips that are not here: nothing was run, no time is measured. Steps in a dispatch: "
        f"{s['steps_per_dispatch']}; a training set of {s['examples']:,} images on each chip. A column is of one chip.",
        "compute, memory, links: the least time at the chip's peak. bound: the longest of them, which a step cannot go below "
        "where nothing stays in a cache. XLA's: its own estimate, which a GPU's compiler does not give; it is left out of "
        "programs with loops, of which it counts one turn.",
        "GFLOP: XLA's count of the CPU's program without loops. GB moved: operands and results of all kernels, a TPU core's "
        "own memory left out. A sum of n chips sends 2 (n - 1) / n times its bytes.",
        f"Exchanges with the host: {moves}. Other collectives: {', '.join(others) or 'none'}.",
        *(_about(c) for c in result["chips"].values()),
        *(f"{row['label']} for {row['target']}: failed: {row['error']}" for row in result["rows"] if row["error"]),
        f"Command: `{result['command']}`",
        f"Compiled {e['date']} on {e['hardware']}; JAX {e['jax']}, jaxlib {e['jaxlib']}; commit {e['commit']}.",
    ]
    size = "x".join(map(str, s["image_shape"]))
    title = f"A training step ahead of time: {s['model']}, batch {s['batch_size']} of {size}"
    return Table(title=title, columns=columns, rows=lines, notes=notes)


def _about(chip: Mapping[str, Any]) -> str:
    peak = ", ".join(f"{flops / 1e12:.4g} TFLOP/s {precision}" for precision, flops in chip["peak"].items())
    near = f"{chip['bandwidth'] / 1e9:,.0f} GB/s to its memory, {chip['link'] / 1e9:,.0f} GB/s to its neighbours"
    far = f", {chip['far'] / 1e9:,.0f} GB/s beyond {chip['host']} chips" if chip["far"] != chip["link"] else ""
    return f"{chip['name']}: {peak}; {near}{far} ({chip['source']})."


def plot(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Draws the bound of each step against the number of chips, a panel for each kind of chip and precision."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [row for row in result["rows"] if not row["error"]]
    panels = list(dict.fromkeys((_kind(row), row["precision"]) for row in rows))
    if not panels:
        return
    labels = list(dict.fromkeys(row["label"] for row in rows))
    figure = Figure(figsize=(3.6 * len(panels) + 0.6, 4.4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        own = sorted((row for row in rows if (_kind(row), row["precision"]) == panel), key=lambda row: row["chips"])
        for label in labels:
            line = [(row["chips"], 1e3 * max(row["bounds"].values())) for row in own if row["label"] == label]
            if line:
                axes.plot(*zip(*line, strict=True), "o-", ms=5, color=f"C{labels.index(label)}")
        links: dict[int, float] = {}
        for row in own:
            links[row["chips"]] = max(1e3 * row["bounds"]["links"], links.get(row["chips"], 0))
        links = {chips: ms for chips, ms in links.items() if chips > 1}
        axes.plot(list(links), list(links.values()), "--", lw=1.2, color="0.5", zorder=1)
        ticks = sorted({row["chips"] for row in own})
        axes.set(xscale="log", yscale="log", xlabel=f"{panel[0]} chips", title=f"{panel[0]}, {panel[1]}")
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.set_xticks([], minor=True)
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("least ms of a step")
    figure.axes[0].yaxis.set_major_formatter("{x:g}")
    marks = [Line2D([], [], marker="o", ms=5, color=f"C{i}", label=label) for i, label in enumerate(labels)]
    marks.append(Line2D([], [], ls="--", lw=1.2, color="0.5", label="links alone"))
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=9, frameon=False)
    plots.save(path, figure, dpi=120)


def _kind(row: Row) -> str:
    """The kind of chip of a row's target."""
    return re.split("[:x]", row["target"])[0]
