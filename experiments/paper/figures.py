"""Figures 2 to 4 of the paper, computed, and a picture of each study; with the numbers that they show."""

from __future__ import annotations

import functools
import io
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import _streams, attacks, losses, networks
from e2sad_jax._compile import jit, platform
from e2sad_jax._io import read_json, write_bytes, write_json, write_text
from e2sad_jax.data.transforms import TRANSFORMS, Transform
from e2sad_jax.evaluation import Attack, in_batches, surfaces
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.reporting.table import Table
from e2sad_jax.training.config import Config
from experiments.paper import figure2_problem, origin, plan
from experiments.paper.plan import Item

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from e2sad_jax.data import Dataset
    from experiments.paper.runner import Reproduction

Drawn = tuple[Any, dict[str, Any], list[dict[str, Any]]]  # a figure, its text for the report, its numbers for the CSV
SEEN_BY = (Attack("FGSM 0.3", "fgsm", 0.3, 1), plan.TRANSFER)  # Figure 4a and 4b
BATCH = {"cpu": 32}  # images whose surfaces are computed at once; elsewhere:
BATCH_ELSEWHERE = 250
VERSION = 1  # of the surfaces: to be raised when a change of the code changes them


def write(r: Reproduction, item: Item) -> list[pathlib.Path]:
    """Draws a figure and writes the numbers behind it; one that was drawn of the same models before is left as it is.

    Args:
      r: with the trained models that the figure needs.
      item: Figure 2, 3 or 4.

    Returns:
      Its files: a picture, .csv and .json.
    """
    configs = [entry.config for entry in r.entries(item)]
    drawn_of = {
        "version": VERSION,
        "weights": [r.weights(config) for config in configs],
        "data": [r.dataset_of(config).sha256 for config in configs],
        "scale": [r.scale.grid, r.scale.surface_images, plan.FIGURE_3_IMAGES],
    }
    paths = [r.results / f"{item.file}.{ending}" for ending in ("png", "csv", "json")]
    if configs and _drawn_of(paths) == drawn_of:
        return paths
    draw = {plan.FIGURE_2: _figure_2, plan.FIGURE_3: _figure_3, plan.FIGURE_4: _figure_4}[item]
    figure, text, records = draw(r)
    if configs:
        records = [{**r.columns(configs[0]), **record} for record in records]
        figure.suptitle(_wrapped(text["setting"], figure), fontsize=8)
    save_picture(paths[0], figure)
    write_text(paths[1], Table.of_records(records).csv())
    about = origin.about(configs, seeds=[0] if configs else [])
    write_json(paths[2], {**text, "picture": paths[0].name, "drawn_of": drawn_of, "provenance": about})
    return paths


def _drawn_of(paths: Sequence[pathlib.Path]) -> Any:
    """What the figure in these files was drawn of, None if one of them is missing or cannot be read."""
    try:
        return read_json(paths[2])["drawn_of"] if all(p.exists() for p in paths) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_picture(path: pathlib.Path, figure: Figure) -> None:
    """Writes a PNG whole or not at all, in 128 colours: a third of the bytes, as every report carries it."""
    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=110)
    write_bytes(path, _fewer_colours(full.getvalue()))


def _fewer_colours(png: bytes) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(content, format="png", optimize=True)
    return content.getvalue()


def _wrapped(text: str, figure: Figure) -> str:
    """Broken into lines that fit the figure's width at font size 8."""
    return textwrap.fill(text, int(figure.get_figwidth() * 15))


def _new(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


# Figure 2.


def _figure_2(r: Reproduction) -> Drawn:
    curves, points = figure2_problem.compute()
    figure = _new(10, 4.6)
    left, right = figure.subplots(1, 2, sharex=True)
    for k, (color, p) in enumerate(zip(("tab:green", "tab:red", "tab:purple"), curves.probabilities.T, strict=True)):
        left.plot(curves.x, p, color=color, label=f"class {k + 1}" + (", the true one" if k == 0 else ""))
    left.set_ylabel("probability")
    right.plot(curves.x, curves.loss, color="tab:blue", label="loss, one-hot label")
    right.plot(curves.x, curves.change, color="tab:orange", label="CE(f(x_adv), f(x)), Eq. 7 with f(x_adv) constant")
    adv = points["first point"]
    tangent = adv.x + np.array([-0.07, 0.07])
    right.plot(
        tangent, adv.change + adv.change_slope * (tangent - adv.x), color="tab:brown", lw=3, alpha=0.7, zorder=3,
        label=f"slope of that at x_adv: {adv.change_slope:.0e}",
    )  # fmt: skip
    right.plot(curves.x, curves.entropy, color="black", ls="--", lw=1, label="CE(f(x), f(x)), what `total` climbs")
    colors = {
        "clean": "black",
        "first point": "green",
        "second point by the loss": "red",
        "second point by `total`": "gold",
    }
    for name, color in colors.items():
        point = points[name]
        style = {"color": color, "marker": "x", "ms": 11, "mew": 3, "ls": "none", "zorder": 5}
        left.plot(point.x, point.probabilities.max(), **style)
        said = f"{name}: class {point.predicted}, loss {point.loss:.2f}"
        right.plot(point.x, point.loss, label=said, **style)
    for axes in (left, right):
        axes.set_xlabel("input x")
    right.set_ylabel("cross-entropy")
    left.legend(fontsize=8)
    right.legend(fontsize=7, loc="upper left")
    right.set_ylim(top=max(curves.loss.max(), curves.change.max()) * 1.6)
    red, yellow = points["second point by the loss"], points["second point by `total`"]
    text = {
        "title": "Figure 2: the loss step and the dissimilarity step part ways",
        "setting": "a made-up classifier of one input and three classes; the same at every scale",
        "caption": (
            f"A step of {figure2_problem.EPS2:g} from the first adversarial point (green, x = {adv.x:g}, class "
            f"{adv.predicted}) along the loss leads to x = {red.x:g} (red): the highest loss of the three, "
            f"{red.loss:.2f}, and yet class {red.predicted}, the true one. Along CE(f(x), f(x)), both arguments "
            f"differentiated, it leads to x = {yellow.x:g} (yellow): class {yellow.predicted}, wrong, at a loss of "
            f"{yellow.loss:.2f}. The classifier was made to show this, with the probabilities of the paper's own example "
            "near the two crosses. At the end of that step CE(f(x), f(x)) is no longer high, but the change of the "
            "prediction is. Eq. 7 to the letter shows nothing of the kind: the orange curve has its minimum at "
            f"x_adv, where its slope is {adv.change_slope:.0e}, so the sign of its gradient there is that of rounding."
        ),
        "table": {
            "header": ["point", "x", "predicted", "loss", "CE(f(x_adv), f(x))", "entropy"],
            "rows": [
                [name, f"{p.x:.2f}", str(p.predicted), f"{p.loss:.3f}", f"{p.change:.3f}", f"{p.entropy:.3f}"]
                for name, p in points.items()
            ],
        },
    }
    records = [
        {
            "x": round(float(x), 4),
            **{f"probability_{k + 1}": round(float(p), 6) for k, p in enumerate(ps)},
            "loss": round(float(loss), 6),
            "change": round(float(change), 6),
            "entropy": round(float(entropy), 6),
        }
        for x, ps, loss, change, entropy in zip(
            curves.x, curves.probabilities, curves.loss, curves.change, curves.entropy, strict=True
        )
    ]
    return figure, text, records


# Figures 3 and 4.


def _loss(
    logits_fn: Callable[[jax.Array], jax.Array], labels: jax.Array, classes: int
) -> Callable[[jax.Array], jax.Array]:
    """The loss that the surfaces show: the cross-entropy with the true classes."""
    y = losses.soft_labels(labels, classes, 0.0)
    return lambda z: losses.cross_entropy(logits_fn(z), y)


@functools.lru_cache(maxsize=8)
def _surface_of_batch(
    model: Any, transform: Transform, attack: Attack, grid: int, classes: int
) -> Callable[..., jax.Array]:
    """The jitted `(params, images, labels, index) -> losses [T, T, N]` around images, as `attack` sees them."""

    @jit
    def batch(params: Any, images: jax.Array, labels: jax.Array, index: jax.Array) -> jax.Array:
        logits_fn = networks.logits_fn(model, params)
        loss_fn = _loss(logits_fn, labels, classes)
        x = transform.apply(images)
        x_adv = attack.perturb(logits_fn, x, labels, bounds=transform.bounds, index=index)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0, impl=_streams.GENERATOR), index)
        g1, g2 = surfaces.directions(x, x_adv, keys)  # keys of the images' own: no matter what is computed at once
        t = jnp.linspace(0, plan.SURFACE_SPAN, grid)
        return surfaces.loss_surface(loss_fn, x, g1, g2, t, t)

    return batch


def _on_batch(compute: Callable[..., Any], params: Any, dataset: Dataset, places: np.ndarray) -> Any:
    return compute(params, dataset.x_test[places], dataset.y_test[places], places)


def _figure_4(r: Reproduction) -> Drawn:
    entries, grid = r.entries(plan.FIGURE_4), r.scale.grid
    dataset = r.dataset_of(entries[0].config)
    n = min(r.scale.surface_images or len(dataset.x_test), len(dataset.x_test))
    batch_size = min(n, BATCH.get(platform(), BATCH_ELSEWHERE))
    t = np.linspace(0, plan.SURFACE_SPAN, grid)
    means: dict[tuple[str, str], np.ndarray] = {}
    with Bar("loss surfaces", len(SEEN_BY) * len(entries) * n, "images") as bar:
        for entry in entries:
            (config,) = r.configs(entry, plan.FIGURE_4)
            classifier = r.classifier(config)
            for attack in SEEN_BY:
                compute = _surface_of_batch(classifier.model, classifier.transform, attack, grid, dataset.num_classes)
                total = np.zeros((grid, grid))
                on_batch = functools.partial(_on_batch, compute, classifier.params, dataset)
                for places, values in in_batches(on_batch, np.arange(n), batch_size):
                    total += np.asarray(values, np.float64)[:, :, : len(places)].sum(-1)
                    r.check()
                    bar.update(len(places))
                means[attack.name, entry.name] = total / n
    figure = _new(3.2 * len(entries), 6.6)
    for row, attack in enumerate(SEEN_BY):
        top = max(means[attack.name, entry.name].max() for entry in entries)
        for column, entry in enumerate(entries):
            mean = means[attack.name, entry.name]
            axes: Any = figure.add_subplot(2, len(entries), row * len(entries) + column + 1, projection="3d")
            _mesh(axes, t, mean, top)
            axes.set_title(f"({'ab'[row]}) {entry.name}\nmean {mean.mean():.2f}, highest {mean.max():.2f}", fontsize=9)
    images = f"all {n:,}" if n == len(dataset.x_test) else f"the first {n:,}"
    text = {
        "title": "Figure 4: loss surfaces of four models",
        "setting": r.describe(entries[0].config),
        "caption": (
            f"Cross-entropy with the true class, the mean over {images} test images (the paper shows the sum), at "
            "x + t1 g1 + t2 g2 for t1, t2 in [0, 0.4], not clipped. g1 is the sign of what FGSM (row a) or IFGSM with 30 "
            "steps (row b), both eps 0.3, adds to the image; g2 is g1 with the signs of half of its pixels turned, drawn "
            "at random, orthogonal to g1 for each image. One height for all models of a row. All were trained on soft "
            "labels. A flat surface says that this attack's plane holds no high loss; it says nothing of other planes "
            "(see PGD-40 in Table 1)."
        ),
        "table": {
            "header": ["seen by", "model", "clean loss", "mean over the surface", "highest"],
            "rows": [
                [attack, name, f"{mean[0, 0]:.3f}", f"{mean.mean():.3f}", f"{mean.max():.3f}"]
                for (attack, name), mean in means.items()
            ],
        },
    }
    records = [
        {
            "seen_by": attack,
            "model": name,
            "t1": round(float(t[i]), 4),
            "t2": round(float(t[k]), 4),
            "mean_loss": round(float(mean[i, k]), 5),
            "summed_loss": round(float(mean[i, k] * n), 2),
        }
        for (attack, name), mean in means.items()
        for i in range(grid)
        for k in range(grid)
    ]
    return figure, text, records


def _mesh(axes: Any, t: np.ndarray, values: np.ndarray, top: float) -> None:
    """A surface over (t1, t2) as a mesh."""
    t1, t2 = np.meshgrid(t, t, indexing="ij")
    axes.plot_surface(t1, t2, values, cmap="viridis", vmin=0, vmax=top, lw=0.2, edgecolor="black", alpha=0.8)
    ticks = np.linspace(0, t[-1], 3)
    axes.set(xlabel="t1", ylabel="t2", zlim=(0, top), xlim=(0, t[-1]), ylim=(0, t[-1]), xticks=ticks, yticks=ticks)
    axes.tick_params(labelsize=7)
    axes.view_init(elev=25, azim=-130)


def _two_steps(
    config: Config, logits_fn: Callable[[jax.Array], jax.Array], x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The first and second points of Algorithm 1, as training finds them: with its own labels."""
    bounds = TRANSFORMS[config.transform].bounds
    first = attacks.fgsm(lambda z: losses.cross_entropy(logits_fn(z), y), x, eps=config.eps1, bounds=bounds)
    own = config.settings
    clip = bounds if own["clip_second"] else None
    second = attacks.second_step(logits_fn, first, eps=own["eps2"], objective=own["second_step"], bounds=clip)
    return first, second


def _figure_3(r: Reproduction) -> Drawn:
    (entry,) = r.entries(plan.FIGURE_3)
    config = entry.config
    dataset, classifier = r.dataset_of(config), r.classifier(config)
    n = min(plan.FIGURE_3_IMAGES, len(dataset.x_test))
    t = np.linspace(0, plan.SURFACE_SPAN, r.scale.grid)
    transform = classifier.transform

    @jit
    def compute(params: Any, images: jax.Array, labels: jax.Array, index: jax.Array) -> Any:
        logits_fn = networks.logits_fn(classifier.model, params)
        loss_fn = _loss(logits_fn, labels, dataset.num_classes)
        x = transform.apply(images)
        first, second = _two_steps(config, logits_fn, x, losses.soft_labels(labels, dataset.num_classes, config.delta))
        iterated = plan.TRANSFER.perturb(logits_fn, x, labels, bounds=transform.bounds, index=index)
        g1, g2 = surfaces.directions(x, iterated, towards=second - first)
        surface = surfaces.loss_surface(loss_fn, x, g1, g2, jnp.asarray(t, jnp.float32), jnp.asarray(t, jnp.float32))
        points = [(*surfaces.coordinates(z - x, g1, g2), loss_fn(z)) for z in (x, first, second)]
        return surface, jnp.array([[a, b, loss] for a, b, loss in points])

    batch_size = min(n, BATCH.get(platform(), BATCH_ELSEWHERE))
    total, points = np.zeros((len(t), len(t))), np.zeros((3, 3))
    on_batch = functools.partial(_on_batch, compute, classifier.params, dataset)
    for places, (surface, found) in in_batches(on_batch, np.arange(n), batch_size):
        total += np.asarray(surface, np.float64)[..., : len(places)].sum(-1)
        points += np.asarray(found, np.float64)[..., : len(places)].sum(-1) / n
        r.check()
    names = ("clean images", "first points (FGSM)", "second points")
    figure = _new(7.5, 6)
    axes: Any = figure.add_subplot(projection="3d")
    top = max(float(np.max(total)), float(np.max(points[:, 2]) * n)) * 1.05
    _mesh(axes, t, np.asarray(total), top)
    axes.set_zlabel("summed loss")
    heights = points[:, 2] * n
    axes.plot(points[:, 0], points[:, 1], heights, color="red", lw=2, zorder=10)
    axes.plot(points[:, 0], points[:, 1], heights, color="blue", marker="o", ls="none", ms=7, zorder=11)
    for name, (a, b, _), height in zip(names, points, heights, strict=True):
        axes.text(a, b, height + 0.04 * top, name, fontsize=8, zorder=12)
    text = {
        "title": "Figure 3: the two steps of e2SAD",
        "setting": f"{r.describe(config)}; a minibatch of the first {n} test images",
        "caption": (
            "Loss of the trained e2SAD model (cross-entropy with the true class, summed over the minibatch) at "
            "x + t1 g1 + t2 g2, with the points that e2SAD's two steps reach in training, on soft labels (blue). g1 is the "
            "sign of what IFGSM with 30 steps adds; g2 is the part of the second step that is orthogonal to g1, for each "
            "image, as long as g1. The "
            "paper leaves g2 open. The points do not lie in the plane: they are drawn where they project to, on average, "
            "at the height of their own loss."
        ),
        "table": {
            "header": ["point", "t1", "t2", "mean loss"],
            "rows": [[n_, *(f"{v:.3f}" for v in p)] for n_, p in zip(names, points, strict=True)],
        },
    }
    records = [
        {"t1": round(float(t[i]), 4), "t2": round(float(t[k]), 4), "summed_loss": round(float(total[i, k]), 3)}
        for i in range(len(t))
        for k in range(len(t))
    ]
    return figure, text, records


# Studies.


def study(path: pathlib.Path, table: Mapping[str, Any]) -> None:
    """Draws a study: accuracy of each model under each attack, with every seed as a dot.

    Args:
      path: PNG to write.
      table: as `tables.write` makes it.
    """
    names = [row[0] if len({row[0] for row in table["rows"]}) > 1 else row[1] for row in table["rows"]]
    if len(set(names)) < len(names):
        names = [f"{row[0]}, {row[1]}" for row in table["rows"]]
    columns = [i for i, cell in enumerate(table["rows"][0]) if isinstance(cell, Mapping)]
    figure = _new(1.4 * len(names) + 3.5, 4)
    axes = figure.subplots()
    width = 0.8 / len(columns)
    for k, column in enumerate(columns):
        cells = [row[column] for row in table["rows"]]
        place = np.arange(len(names)) + (k - (len(columns) - 1) / 2) * width
        axes.bar(place, [c["ours"] for c in cells], width * 0.9, label=table["header"][column], alpha=0.75)
        for x, cell in zip(place, cells, strict=True):
            axes.plot([x] * len(cell["seeds"]), cell["seeds"], ".", color="black", ms=3)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.02)
    figure.suptitle(f"{table['title']}\n{_wrapped(table['setting'], figure)}", fontsize=8)
    figure.legend(fontsize=8, loc="outside right upper")
    save_picture(path, figure)
