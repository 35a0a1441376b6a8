"""What every defense shares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import _arguments
from e2sad_jax.attacks.core import Ball, Bounds, LogitsFn, as_float32, checks, is_number, per_image_keys
from e2sad_jax.errors import quoted
from e2sad_jax.losses import cross_entropy, quadratic_upper_bound

__all__ = [
    "TRAINING_LOSSES",
    "BatchMean",
    "Bounds",
    "LogitsFn",
    "Parts",
    "adversarial_loss",
    "batch_mean",
    "bernoulli_signs",
    "check_training_loss",
    "check_weight",
    "checked_start",
    "clean_term",
    "ended",
    "is_zero",
    "signs_or_start",
    "weighted",
]

TRAINING_LOSSES = ("ce", "qub")
# The terms of a loss by name: batch means, before their weights. And what is kept for an image's next time, `[N, ...]`.
Parts = dict[str, jax.Array]


class BatchMean(NamedTuple):
    """The mean over the images of a batch, which may have weights; 0 leaves an image out.

    Attributes:
      size: m, the number of images; with weights their effective number, (sum w)^2 / sum w^2.
      share: of each image, `[N]`, 1 in all; None for 1 / m each.
    """

    size: Any
    share: jax.Array | None

    def terms(self, values: jax.Array) -> jax.Array:
        """What each image's value `[N]` adds to the mean, `[N]`."""
        if self.share is None:
            return values / self.size
        return values * self.share

    def __call__(self, values: jax.Array) -> jax.Array:
        """The mean of values `[N]`."""
        return values.mean() if self.share is None else self.terms(values).sum()


def batch_mean(
    name: str, x: jax.Array, y: jax.Array, weights: jax.typing.ArrayLike | None
) -> tuple[BatchMean, jax.Array]:
    """The mean over a batch with weights, and its target distributions, zeros for an image that is left out.

    So neither the loss nor the gradient depends on what its label may be, NaN from a label of -1 for example.

    Args:
      name: the defense's name in the messages.
      x: images `[N, ...]`.
      y: target distributions `[N, K]`.
      weights: `[N]`, or None.

    Raises:
      ValueError: if `weights` are not `[N]`, or, where they can be read, not finite, negative, or all 0.
    """
    if not (n := len(x)):
        raise ValueError(f"{name}: images have shape {x.shape}; the mean over a batch needs at least one")
    if weights is None:
        return BatchMean(n, None), y
    weights = weights if isinstance(weights, (jax.Array, np.ndarray)) else np.asarray(weights)
    if weights.shape != (n,) or not (weights.dtype == bool or jnp.issubdtype(weights.dtype, jnp.number)):
        raise ValueError(
            f"{name}: weights are {weights.dtype} {weights.shape}; they must be numbers ({n},), one for each image"
        )
    if checks.is_readable(weights):
        known = checks.read(weights).astype(float)
        if not (np.isfinite(known) & (known >= 0)).all() or not known.sum() > 0:
            raise ValueError(f"{name}: weights={known}; each must be finite and at least 0, and one of them above 0")
    w = jnp.asarray(weights).astype(_arguments.wide(x.dtype))
    total, squares = w.sum(), jnp.square(w).sum()
    share = w / jnp.where(total > 0, total, 1)
    mean = BatchMean(jnp.square(total) / jnp.where(squares > 0, squares, 1), share)
    return mean, jnp.where(w[:, None] > 0, y, jnp.zeros_like(y))


def checked_start(name: str, start: object | None, x: jax.Array) -> jax.Array | None:
    """The perturbations that an attack is to start from, checked (`checks.perturbation`); None where none are given."""
    return None if start is None else checks.perturbation(name, "start", start, x)


def ended(parts: Parts, x_adv: jax.Array, x: jax.Array, start: jax.Array | None) -> Parts:
    """The parts of a loss whose attack ended at `x_adv`, with that perturbation as `delta` where a `start` was given."""
    if start is None:
        return parts
    return {**parts, "delta": jax.lax.stop_gradient(as_float32(x_adv) - as_float32(x))}


def check_weight(name: str, argument: str, value: object, upper: float = float("inf")) -> None:
    """Refuses a weight outside [0, upper]; a traced one cannot be looked at and passes."""
    if is_number(value) and not 0 <= float(value) <= upper:  # type: ignore[arg-type]
        raise ValueError(f"{name}: {argument}={value}; it must lie in [0, {upper}]")


def is_zero(weight: object) -> bool:
    """Whether a term of this weight may be left out: one that is traced may be anything."""
    return is_number(weight) and float(weight) == 0  # type: ignore[arg-type]


def clean_term(alpha: jax.typing.ArrayLike, loss_fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The clean loss; at weight 0 only to be seen, without the pass for a gradient that would be multiplied by 0."""
    clean = loss_fn(x).sum()
    return jax.lax.stop_gradient(clean) if is_zero(alpha) else clean


def weighted(
    alpha: jax.typing.ArrayLike, loss_fn: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    """`alpha * loss_fn`, the term exactly as in the training loss, for an attack to differentiate.

    With the same scale in attack and training XLA finds one backward pass where two are written. A weight of exactly 0
    is left out: the attack would find no gradient at all.
    """
    scale = (alpha if alpha != 0 else 1) if is_number(alpha) else jnp.where(alpha == 0, 1, alpha)
    return lambda z: scale * loss_fn(z)  # type: ignore[return-value]


def bernoulli_signs(keys: jax.Array, like: jax.Array) -> jax.Array:
    """-1 or 1 with equal probability for each pixel, `[N, ...]`; image i is drawn from `keys[i]`."""
    return jax.vmap(lambda k: jax.random.rademacher(k, like.shape[1:], like.dtype))(keys)


def signs_or_start(
    name: str, limits: Ball, x: jax.Array, start: jax.Array | None, key: jax.Array | None, size: jax.typing.ArrayLike
) -> jax.Array:
    """Where the attack of GAT and NuAT begins, in the ball: at random signs of a size, or at x + `start`."""
    if start is not None:
        return checks.from_start(name, limits, x, start)
    wide = as_float32(x)
    return limits.project(wide + size * limits.steepest(bernoulli_signs(per_image_keys(name, key, len(x)), wide)))


def check_training_loss(name: str, value: str) -> None:
    """Refuses what is none of `TRAINING_LOSSES`."""
    if value not in TRAINING_LOSSES:
        raise ValueError(f"{name}: training_loss={quoted(value)}; it must be one of {', '.join(TRAINING_LOSSES)}")


def adversarial_loss(
    training_loss: str, logits_fn: LogitsFn, x: jax.Array, x_adv: jax.Array, y: jax.Array, mean: BatchMean
) -> tuple[jax.Array, Parts]:
    """The loss at adversarial images, and its parts: the cross-entropy, or the quadratic upper bound on it.

    Args:
      training_loss: "ce" or "qub".
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`; only the bound asks the model about them.
      x_adv: adversarial images `[N, ...]`.
      y: target distributions `[N, K]`.
      mean: over the batch.
    """
    if training_loss == "ce":
        loss = mean(cross_entropy(logits_fn(x_adv), y))
        return loss, {"adversarial": loss}
    logits = logits_fn(x)
    loss = mean(quadratic_upper_bound(logits, logits_fn(x_adv), y))
    return loss, {"clean": mean(cross_entropy(logits, y)), "bound": loss}
