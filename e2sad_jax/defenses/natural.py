"""Natural training: the baseline without any defense."""

import jax

from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import Defense, register
from e2sad_jax.defenses._types import LogitsFn, Parts, batch_mean
from e2sad_jax.losses import cross_entropy


def natural(
    logits_fn: LogitsFn, x: jax.Array, y: jax.Array, *, weights: jax.typing.ArrayLike | None = None
) -> tuple[jax.Array, Parts]:
    """Natural training: J(theta, x, y), the mean cross-entropy on clean images.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`.
      y: target distributions `[N, K]`, hard or soft.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name.

    Raises:
      ValueError: if `weights` are out of range.
    """
    x = core.checks.images("natural", x)
    mean, y = batch_mean("natural", x, y, weights)
    loss = mean(cross_entropy(logits_fn(x), y))
    return loss, {"clean": loss}


register("natural", Defense(natural, "natural"))
