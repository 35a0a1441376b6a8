"""Pictures of a run."""

import io
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import attacks
from e2sad_jax._io import write_bytes
from e2sad_jax.losses import cross_entropy, soft_labels


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
    seed: int = 0,
    count: int = 8,
) -> None:
    """Draws images, their first and second adversarial points, the perturbations, and the predictions.

    The first point is FGSM's, the second e2SAD's, for a model of any defense.

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
      seed: of the second step's random numbers.
      count: images to show: the first of each class, up to so many.
    """
    from matplotlib.figure import Figure

    rows = np.array([np.flatnonzero(labels == k)[0] for k in np.unique(labels)[:count]])
    low, high = bounds

    @jax.jit
    def points(params: Any, x: jax.Array, labels: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        y = soft_labels(labels, num_classes, 0.0)

        def logits_fn(z: jax.Array) -> jax.Array:
            return apply(params, z)

        def loss_fn(z: jax.Array) -> jax.Array:
            return cross_entropy(logits_fn(z), y)

        first = attacks.fgsm(loss_fn, x, eps=eps1, bounds=bounds)
        second = attacks.second_step(
            logits_fn,
            first,
            eps=eps2,
            objective=second_step,
            loss_fn=loss_fn,
            key=jax.random.key(seed),
            bounds=bounds if clip_second else None,
        )
        return [(z, jax.nn.softmax(logits_fn(z))) for z in (x, first, second)]

    (x, p), (first, p1), (second, p2) = jax.device_get(
        points(params, jnp.asarray(images[rows]), jnp.asarray(labels[rows]))
    )
    lines = [
        ("clean", x, p),
        (f"first point\nFGSM, eps {eps1:.3g}", first, p1),
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


def save(path: pathlib.Path, figure: Any, *, dpi: int) -> None:
    """Writes a figure as PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    write_bytes(path, content.getvalue())
