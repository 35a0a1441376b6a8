"""Natural training: the baseline without any defense."""

import jax

from e2sad_jax.defenses._registry import Defense, register
from e2sad_jax.defenses._types import LogitsFn, Parts
from e2sad_jax.losses import cross_entropy


def natural(logits_fn: LogitsFn, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Parts]:
    """Natural training: J(theta, x, y), the mean cross-entropy on clean images.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`.
      y: target distributions `[N, K]`, hard or soft.

    Returns:
      The loss, a scalar, and its parts by name.
    """
    loss = cross_entropy(logits_fn(x), y).mean()
    return loss, {"clean": loss}


register("natural", Defense(natural, "natural"))
