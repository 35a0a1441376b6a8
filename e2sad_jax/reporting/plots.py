"""Plots of a run and of points with names."""

import io
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import _streams
from e2sad_jax._compile import jit
from e2sad_jax._io import write_bytes
from e2sad_jax.defenses.e2sad import adversarial_points
from e2sad_jax.losses import cross_entropy, soft_labels

# The settings of e2SAD that `examples` takes.
POINTS = ("second_step", "clip_second", "random_start", "ball_second", "norm")


def examples(
    path: pathlib.Path,
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    images: Any,
    labels: np.ndarray,
    *,
    num_classes: int,
    title: str,
    eps1: float,
    eps2: float,
    second_step: str = "total",
    bounds: tuple[float, float] = (0.0, 1.0),
    clip_second: bool = False,
    random_start: bool = False,
    ball_second: bool = False,
    norm: str = "linf",
    seed: int = 0,
    count: int = 8,
) -> None:
    """Draws images, their first and second adversarial points, the perturbations, and the predictions.

    The points are e2SAD's by two steps, for a model of any defense, whatever its training remembers.

    Args:
      path: PNG to write.
      apply: from parameters and images to logits `[N, K]`.
      params: parameters of `apply`.
      images: inputs of the network `[N, H, W, C]`, in `bounds`.
      labels: `[N]`.
      num_classes: number of classes K.
      title: line above the picture.
      eps1: budget of the first step, in units of the images.
      eps2: budget of the second step.
      second_step: what the second step differentiates, one of `attacks.OBJECTIVES`.
      bounds: range of the images.
      clip_second: whether the second point is clipped to `bounds`.
      random_start: whether the first step starts at a random point of the ball.
      ball_second: whether the second point stays in the ball of `eps1`.
      norm: "linf" or "l2", of both budgets.
      seed: of the random numbers of both steps.
      count: images to show: the first of each class, up to so many.
    """
    from matplotlib.figure import Figure

    rows = np.array([np.flatnonzero(labels == k)[0] for k in np.unique(labels)[:count]])
    low, high = bounds

    @jit
    def points(params: Any, x: jax.Array, labels: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        y = soft_labels(labels, num_classes, 0.0)

        def logits_fn(z: jax.Array) -> jax.Array:
            return apply(params, z)

        def loss_fn(z: jax.Array) -> jax.Array:
            return cross_entropy(logits_fn(z), y)

        first, second = adversarial_points(
            logits_fn,
            loss_fn,
            x,
            eps1=eps1,
            eps2=eps2,
            second_step=second_step,
            clip_second=clip_second,
            random_start=random_start,
            ball_second=ball_second,
            norm=norm,
            bounds=bounds,
            key=_streams.key(seed, _streams.PICTURE),
        )
        return [(z, jax.nn.softmax(logits_fn(z))) for z in (x, first, second)]

    (x, p), (first, p1), (second, p2) = jax.device_get(
        points(params, jnp.asarray(images[rows]), jnp.asarray(labels[rows]))
    )
    lines = [
        ("clean", x, p),
        (f"first point\nFGSM{' from a random start' if random_start else ''},\neps {eps1:.3g}", first, p1),
        (f"second point\neps {eps2:.3g}", second, p2),
        ("first - clean", first - x, None),
        ("second - first", second - first, None),
    ]
    span = max(eps1, eps2) or 1.0
    figure = Figure(figsize=(1.25 * len(rows) + 1.4, 1.55 * len(lines) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(lines), len(rows), squeeze=False)
    for line, (name, values, probabilities) in zip(axes, lines, strict=True):
        shown = (values - low) / (high - low) if probabilities is not None else values / (2 * span) + 0.5
        for i, ax in enumerate(line):
            picture = np.clip(shown[i], 0, 1)
            if picture.shape[-1] != 3:  # neither grey nor RGB: the mean of the channels
                picture = picture.mean(-1)
            ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
            if probabilities is not None:
                guess, label = int(probabilities[i].argmax()), int(labels[rows[i]])
                said = f"{guess} ({probabilities[i].max():.2f})"
                ax.set_title(
                    said if guess == label else f"{said}, not {label}",
                    fontsize=8,
                    color="black" if guess == label else "crimson",
                )
        line[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    save(path, figure, dpi=120)


def label_points(axes: Any, names: Sequence[tuple[str, float, float, Mapping[str, Any]]]) -> None:
    """Writes the name of each point next to it, where it overlaps neither a point nor another name.

    Each name takes the place near its point that is farthest from all others. Bold names choose first, then those of
    crowded points.

    Args:
      axes: of a figure whose limits, scales and other contents are final.
      names: name, x, y of each point, and keywords of its text.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    figure.draw_without_rendering()
    pixel = figure.dpi / 72  # of a point of type
    at = axes.transData.transform([(x, y) for _, x, y, _ in names])
    taken = [Bbox.from_bounds(x - 4 * pixel, y - 4 * pixel, 8 * pixel, 8 * pixel) for x, y in at]
    frame = axes.get_window_extent(renderer)

    def turn(i: int) -> tuple[bool, float]:
        crowd = np.sort(np.hypot(*(at - at[i]).T))[1:4].sum()
        return names[i][3].get("weight") != "bold", float(crowd)

    def write(i: int, distance: float, right: float, up: float) -> Any:
        name, x, y, style = names[i]
        sides = int(np.sign(right)) + 1, int(np.sign(up)) + 1
        return axes.annotate(
            name,
            (x, y),
            (right * distance, up * distance),
            textcoords="offset points",
            ha=("right", "center", "left")[sides[0]],
            va=("top", "center", "bottom")[sides[1]],
            path_effects=[withStroke(linewidth=3, foreground="white")],  # lines do not strike it through
            **style,
        )

    def box_at(i: int, size: Any, distance: float, right: float, up: float) -> Any:
        corner = at[i] + pixel * distance * np.array([right, up]) - size * (1 - np.sign([right, up])) / 2
        return Bbox.from_bounds(*corner, *size)

    def score(box: Any, distance: float, own: int) -> float:
        gaps = [_gap(box, other) / pixel for k, other in enumerate(taken) if k != own]
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        return min([6.0, *gaps]) - distance - 40 * sum(gap < 2.5 for gap in gaps) - 400 * (not inside)

    for i in sorted(range(len(names)), key=turn):
        text = write(i, 0, 1, 1)
        size = np.array(text.get_window_extent(renderer).size)
        text.remove()
        places = [(d, *side) for d, side in itertools.product((6, 9, 12, 16), _SIDES)]
        best = max(places, key=lambda place: score(box_at(i, size, *place), place[0], i))
        write(i, *best)
        taken.append(box_at(i, size, *best))


_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))


def _gap(a: Any, b: Any) -> float:
    """Distance between two boxes; negative by the overlap where they overlap."""
    across, along = max(a.x0 - b.x1, b.x0 - a.x1), max(a.y0 - b.y1, b.y0 - a.y1)
    return float(np.hypot(across, along)) if min(across, along) > 0 else float(max(across, along))


def save(path: pathlib.Path, figure: Any, *, dpi: int) -> None:
    """Writes a figure as PNG, atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    write_bytes(path, content.getvalue())
