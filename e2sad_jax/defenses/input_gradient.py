"""Input-gradient regularisation: no attack, but a loss that is flat around each image."""

import jax

from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import Defense, Setting, register
from e2sad_jax.defenses._types import LogitsFn, Parts, batch_mean, check_weight
from e2sad_jax.losses import cross_entropy


def input_gradient(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    weight: jax.typing.ArrayLike = 1.0,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """Input-gradient penalty: J(theta, x, y) + lambda / m sum_i ||dJ_i / dx_i||_2^2.

    J_i is the loss of image i alone, so the penalty does not depend on the size of the batch. It is differentiated
    through the gradient, a second derivative.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, twice differentiable.
      x: clean images `[N, ...]`.
      y: target distributions `[N, K]`, hard or soft.
      weight: lambda, at least 0, in squared units of the images; the paper tunes it for each data set.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name, before their weights.

    Raises:
      ValueError: if `weight` or `weights` are out of range.

    Reference: Ross and Doshi-Velez, 2018, https://arxiv.org/abs/1711.09404
    """
    x = core.checks.images("input_gradient", x)
    check_weight("input_gradient", "weight", weight)
    mean, y = batch_mean("input_gradient", x, y, weights)

    def J(z: jax.Array) -> jax.Array:
        return cross_entropy(logits_fn(z), y)

    clean = mean(J(x))
    gradient = core.as_float32(core.input_gradient(J, x))
    penalty = mean((gradient**2).reshape(x.shape[0], -1).sum(-1))
    return clean + weight * penalty, {"clean": clean, "penalty": penalty}


WEIGHT = Setting("gradient_weight", 1.0, "weight of the squared input gradient", lower=0, argument="weight")
register("input_gradient", Defense(input_gradient, "input gradient", (WEIGHT,)))
