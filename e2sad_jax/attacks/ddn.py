"""DDN: the smallest l2 change that fools the network, by gradient steps on a sphere whose radius closes in on the boundary."""

import jax
import jax.numpy as jnp

from e2sad_jax import losses
from e2sad_jax.attacks import _checks
from e2sad_jax.attacks._aim import Aim
from e2sad_jax.attacks._ball import linf_ball
from e2sad_jax.attacks._closing import Point, close_in
from e2sad_jax.attacks._numerics import broadcast, norms, unit
from e2sad_jax.attacks._types import Bounds, LogitsFn


def ddn(
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array | None = None,
    *,
    targets: jax.Array | None = None,
    steps: int = 100,
    step_size: jax.typing.ArrayLike = 1.0,
    gamma: float = 0.05,
    radius: float = 1.0,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Decoupled Direction and Norm: the nearest image of another class in l2, by gradient steps on a changing sphere.

    A step of the change d, which is 0 at first, goes along the gradient g of the cross-entropy, and its length is set apart
    from its direction:

        radius = (1 - gamma) radius   where x + d fools the network
        radius = (1 + gamma) radius   where it does not
        d = d + step_size g / ||g||
        d = clip(x + radius d / ||d||) - x

    `step_size` falls to a hundredth along half a cosine. The radius never exceeds the distance to the farthest valid image.
    Each step takes one gradient. There is no budget: one run gives the accuracy at every budget. Measure the change, or keep
    what is within yours.

    The paper rounds each point to 8-bit grey levels; this does not (`evaluation.quantize` rounds the result). An image whose
    gradient is 0 takes no random direction: it stays. Where the cross-entropy saturates, take `fmn`.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, K at least 2.
      x: images `[N, ...]`, floating point, inside `bounds`.
      labels: integer classes to leave, `[N]`; None for the predicted ones. An image of another class stays as it is. Where
        they are traced, one out of range makes its image NaN.
      targets: integer classes to reach, `[N]`, other than `labels`; None for any. An image of its target stays as it is.
      steps: number of steps, at least 1.
      step_size: l2 length of the first step, above 0, a number or `[N]`.
      gamma: relative change of the radius in a step, in [0, 1).
      radius: before the first step, above 0.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Images, same shape and dtype as `x`, inside `bounds`; an image for which nothing was found is that of `x`. No
      gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point, or `labels` or `targets` are not integers.
      ValueError: if an argument is out of range, a target is the label, or the logits are not `[N, K]`.

    Reference: Rony et al., 2019, https://arxiv.org/abs/1811.09600 (Algorithm 1)
    """
    x, _, first, bounds = _checks.threat_model("ddn", x, step_size=step_size, norm="l2", bounds=bounds, steps=steps)
    _checks.number("ddn", "radius", radius, positive=True)
    if not 0 <= gamma < 1:
        raise ValueError(f"ddn: gamma={gamma}; it must lie in [0, 1), the paper takes 0.05")
    everywhere = linf_ball(x, jnp.inf, bounds)

    def advance(at: Point) -> tuple[jax.Array, jax.Array]:
        farthest = norms(jnp.maximum(everywhere.upper - at.clean, at.clean - everywhere.lower), "l2")
        changed = jnp.where(at.fooled, 1 - gamma, 1 + gamma) * at.radius
        changed = jnp.minimum(changed, jnp.minimum(farthest, jnp.finfo(changed.dtype).max))
        return at.clean + broadcast(changed, at.clean) * unit(at.moved), changed

    return close_in(
        "ddn",
        logits_fn,
        x,
        labels,
        targets,
        objective=_cross_entropy,
        advance=advance,
        step_size=first,
        radius=radius,
        steps=steps,
        norm="l2",
        bounds=bounds,
    )


def _cross_entropy(goal: Aim, logits: jax.Array) -> jax.Array:
    """That of the class to leave, to be raised, or minus that of the target."""
    classes, sign = (goal.leave, 1) if goal.targets is None else (goal.targets, -1)
    return sign * losses.cross_entropy(logits, losses.soft_labels(classes, logits.shape[-1], delta=0))
