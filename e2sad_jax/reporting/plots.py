"""Pictures of a run."""

import io
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import attacks, networks
from e2sad_jax._compile import jit
from e2sad_jax._io import write_bytes
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.losses import cross_entropy, soft_labels
from e2sad_jax.training.config import Config


def examples(
    path: pathlib.Path,
    config: Config,
    model: nn.Module,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    title: str,
    num_classes: int,
    count: int = 8,
) -> None:
    """Draws test images, their first and second adversarial points, the perturbations, and what the model says of each.

    The first point is FGSM's with `config.eps1`, the second e2SAD's, whatever the model was trained on: with its settings
    where it is e2SAD, else with a third of that budget, the paper's ratio.

    Args:
      path: PNG to write.
      config: the run's settings.
      model: the network.
      params: its variables.
      images: test images `[N, H, W, C]` as stored.
      labels: `[N]`.
      title: line above the picture.
      num_classes: number of classes K.
      count: images to show: the first of each class, as far as they go.
    """
    from matplotlib.figure import Figure

    rows = np.array([np.flatnonzero(labels == k)[0] for k in np.unique(labels)[:count]])
    transform = TRANSFORMS[config.transform]
    low, high = transform.bounds
    eps2 = config.settings.get("eps2", config.eps1 / 3)

    @jit
    def points(params: Any, images: jax.Array, labels: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        logits_fn = networks.logits_fn(model, params)

        def loss_fn(z: jax.Array) -> jax.Array:
            return cross_entropy(logits_fn(z), y)

        x, y = transform.apply(images), soft_labels(labels, num_classes, 0.0)
        first = attacks.fgsm(loss_fn, x, eps=config.eps1, bounds=transform.bounds)
        second = attacks.second_step(
            logits_fn,
            first,
            eps=eps2,
            objective=config.settings.get("second_step", "total"),
            loss_fn=loss_fn,
            key=jax.random.key(config.seed),
            bounds=transform.bounds if config.settings.get("clip_second") else None,
        )
        return [(z, jax.nn.softmax(logits_fn(z))) for z in (x, first, second)]

    (x, p), (first, p1), (second, p2) = jax.device_get(
        points(params, jnp.asarray(images[rows]), jnp.asarray(labels[rows]))
    )
    lines = [
        ("clean", x, p),
        (f"first point\nFGSM, eps {config.eps1:.3g}", first, p1),
        (f"second point\neps {eps2:.3g}", second, p2),
        ("first - clean", first - x, None),
        ("second - first", second - first, None),
    ]
    span = max(config.eps1, eps2) or 1.0
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
