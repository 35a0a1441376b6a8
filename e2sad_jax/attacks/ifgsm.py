"""IFGSM: several small steps along the sign of the gradient."""

import jax

from e2sad_jax.attacks import _checks
from e2sad_jax.attacks._ascent import ascend
from e2sad_jax.attacks._ball import linf_ball
from e2sad_jax.attacks._checks import from_start
from e2sad_jax.attacks._types import Bounds, LossFn
from e2sad_jax.attacks._within import as_attack


@as_attack
def ifgsm(
    loss_fn: LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    steps: int,
    step_size: jax.typing.ArrayLike | None = None,
    start: jax.Array | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Iterative fast gradient sign method: several steps along the sign of the gradient (Eq. 2).

    x_0 = x;  x_k = clamp_{x, eps}(x_{k-1} + a sign(grad loss_fn(x_{k-1}))),  k = 1 .. steps

    With the paper's a = eps / steps it only just reaches the edge of the ball and never turns back: weak. To judge a
    model use `pgd`, which overshoots.

    Args:
      loss_fn: images `[N, ...]` to per-example losses `[N]`, to be maximised.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: budget in the l-infinity norm, at least 0, in the images' own units.
      steps: number of gradient steps N, at least 1.
      step_size: a, above 0; None for the paper's eps / steps.
      start: perturbations `[N, ...]` to start from, in the images' own units: the attack begins at x + start, brought into
        the ball. None: at `x`.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Adversarial images, same shape and dtype as `x`, within `eps` of it; no gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if a budget is out of range or `loss_fn` does not return per-example losses.

    Reference: Kurakin et al., 2016, https://arxiv.org/abs/1611.01236
    """
    x, eps, step_size, bounds = _checks.threat_model(
        "ifgsm", x, eps=eps, bounds=bounds, steps=steps, step_size=step_size
    )
    if not len(x):  # nothing that a model could be asked
        return x
    if step_size is None:
        step_size = eps / steps
    limits = linf_ball(x, eps, bounds)
    # The first step's gradient is the clean image's, which training takes too: outside a loop XLA finds the two to be one.
    first = from_start("ifgsm", limits, x, start)
    return jax.lax.stop_gradient(ascend(loss_fn, first, limits, x.dtype, step_size, steps, unrolled=1))
