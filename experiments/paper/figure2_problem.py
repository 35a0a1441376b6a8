"""The three-class problem of Figure 2: one input, and probabilities that were chosen to distinguish the two steps."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import attacks, losses

EPS1, EPS2 = 0.3, 0.1
CLEAN = 0.0
# Inputs and the probabilities there. At 0.2 and 0.4 they are near the example of Section 3.2.2: [0.4, 0.3, 0.3], right,
# and [0.45, 0.55, 0], wrong at a lower loss. In between, logits are interpolated by bells of this width.
INPUTS = (-0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
PROBABILITIES = (
    (0.90, 0.05, 0.05),
    (0.84, 0.08, 0.08),
    (0.66, 0.17, 0.17),
    (0.39, 0.28, 0.33),
    (0.49, 0.10, 0.41),
    (0.45, 0.52, 0.03),
    (0.20, 0.70, 0.10),
    (0.10, 0.85, 0.05),
)
WIDTH = 0.11


class Curves(NamedTuple):
    """Along the input, `[N]` each: x, probabilities `[N, 3]`, loss, CE(f(x_adv), f(x)), CE(f(x), f(x))."""

    x: np.ndarray
    probabilities: np.ndarray
    loss: np.ndarray
    change: np.ndarray
    entropy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Point:
    """One input: its probabilities `[3]`, predicted class from 1, loss, change CE(f(x_adv), f(x)) and its slope, entropy."""

    x: float
    probabilities: np.ndarray
    predicted: int
    loss: float
    change: float
    change_slope: float
    entropy: float


def logits_fn(x: jax.Array) -> jax.Array:
    """The classifier: inputs `[N, 1]` to logits `[N, 3]`."""
    return jnp.exp(-((x - jnp.array([INPUTS], x.dtype)) ** 2) / (2 * WIDTH**2)) @ jnp.array(_weights(), x.dtype)


def _weights() -> np.ndarray:
    distances = np.subtract.outer(INPUTS, INPUTS)
    return np.linalg.solve(np.exp(-(distances**2) / (2 * WIDTH**2)), np.log(PROBABILITIES))


def loss_fn(x: jax.Array) -> jax.Array:
    """Cross-entropy with class 1, `[N]`."""
    return losses.cross_entropy(logits_fn(x), jnp.zeros((x.shape[0], 3)).at[:, 0].set(1))


def compute() -> tuple[Curves, dict[str, Point]]:
    """The curves, and the points that the attacks find from the clean input, by name."""
    clean = jnp.array([[CLEAN]])
    adv = attacks.fgsm(loss_fn, clean, eps=EPS1, bounds=None)

    def change(x: jax.Array) -> jax.Array:  # Eq. 7, f(x_adv) constant
        at_adv = jnp.broadcast_to(jax.lax.stop_gradient(logits_fn(adv)), (x.shape[0], 3))
        return losses.dissimilarity(at_adv, logits_fn(x))

    def describe(x: jax.Array) -> tuple[np.ndarray, ...]:
        logits = logits_fn(x)
        values = (jax.nn.softmax(logits), loss_fn(x), change(x), losses.dissimilarity(logits, logits))
        return tuple(np.asarray(value, np.float64) for value in values)

    points = {}
    for name, x in {
        "clean": clean,
        "first point": adv,
        "second point by the loss": attacks.second_step(logits_fn, adv, eps=EPS2, objective="loss", loss_fn=loss_fn),
        "second point by `total`": attacks.second_step(logits_fn, adv, eps=EPS2, objective="total"),
    }.items():
        p, loss, changed, entropy = (value[0] for value in describe(x))
        slope = float(jax.grad(lambda z: change(z).sum())(x)[0, 0])
        points[name] = Point(
            round(float(x[0, 0]), 6), p, int(p.argmax()) + 1, float(loss), float(changed), slope, float(entropy)
        )
    line = jnp.linspace(INPUTS[0], INPUTS[-2], 301)[:, None]
    return Curves(np.asarray(line[:, 0], np.float64), *describe(line)), points
