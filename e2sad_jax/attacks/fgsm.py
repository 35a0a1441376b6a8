"""FGSM: one step along the sign of the gradient."""

import jax

from e2sad_jax.attacks import _checks
from e2sad_jax.attacks._ball import ball, project_and_cast
from e2sad_jax.attacks._checks import from_start
from e2sad_jax.attacks._numerics import as_float32, input_gradient
from e2sad_jax.attacks._types import Bounds, LossFn
from e2sad_jax.attacks._within import as_attack


@as_attack
def fgsm(
    loss_fn: LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    start: jax.Array | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Fast gradient sign method: one step along the sign of the gradient (Eq. 1; e2SAD's first step, Eq. 6).

    x_adv = clip(x + eps sign(grad_x loss_fn(x)))

    In the l2 ball the step is eps g / ||g||_2 with g the image's gradient.

    For a targeted attack negate the loss: `fgsm(lambda z: -loss_to_target(z), x, eps=0.3)`.

    Args:
      loss_fn: images `[N, ...]` to per-example losses `[N]`, to be maximised.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: budget in `norm`, at least 0, in the images' own units; 0 returns `x`.
      start: perturbations `[N, ...]` to start from, in the images' own units: the attack begins at x + start, brought into
        the ball. None: at `x`.
      norm: "linf" or "l2", of each image's perturbation.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Adversarial images, same shape and dtype as `x`, within `eps` of it; no gradient flows through them. A pixel whose
      gradient is exactly zero stays as it is.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if `eps` or `bounds` is out of range, `norm` is unknown, or `loss_fn` does not return per-example losses.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.5, 0.9]])
    >>> print(fgsm(lambda z: z[:, 0] - 2 * z[:, 1], x, eps=0.25))
    [[0.75 0.65]]

    Reference: Goodfellow et al., 2015, https://arxiv.org/abs/1412.6572
    """
    x, eps, _, bounds = _checks.threat_model("fgsm", x, eps=eps, norm=norm, bounds=bounds)
    if not len(x):  # nothing that a model could be asked
        return x
    limits = ball(norm, x, eps, bounds)
    first = from_start("fgsm", limits, x, start)
    moved = first + eps * limits.steepest(as_float32(input_gradient(loss_fn, first.astype(x.dtype))))
    return project_and_cast(limits, moved, x.dtype)
