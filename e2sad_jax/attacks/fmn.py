"""FMN: the smallest change that fools the network, by gradient steps within a ball whose radius closes in on the boundary."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _checks
from e2sad_jax.attacks._aim import Aim
from e2sad_jax.attacks._ball import ball
from e2sad_jax.attacks._closing import Point, close_in
from e2sad_jax.attacks._numerics import broadcast, norms
from e2sad_jax.attacks._types import Bounds, LogitsFn

DUAL = {"linf": "l1", "l2": "l2"}


def fmn(
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array | None = None,
    *,
    targets: jax.Array | None = None,
    steps: int = 100,
    step_size: jax.typing.ArrayLike = 1.0,
    gamma: float = 0.05,
    last_gamma: float = 0.001,
    norm: str = "l2",
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Fast Minimum-Norm attack: the nearest image of another class, by gradient steps in a ball of changing radius.

    A step goes along the gradient of the `losses.margin` m, scaled to l2 norm `step_size`, and is projected onto the ball of
    radius eps around x. Before each, at the present change d,

        eps = (1 + gamma) (||d|| + |m| / ||grad m||_q)   until an image is found: a little beyond the linearised boundary
        eps = (1 + gamma) eps                            where d does not fool the network, afterwards
        eps = min((1 - gamma) eps, ||d*||)               where it does; d* is the smallest change found

    with q dual to the norm.

    `step_size` falls to a hundredth and `gamma` to `last_gamma`, both along half a cosine. Each step takes one gradient.
    There is no budget: one run gives the accuracy at every budget. Measure the change, or keep what is within yours.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, K at least 2.
      x: images `[N, ...]`, floating point, inside `bounds`.
      labels: integer classes to leave, `[N]`; None for the predicted ones. An image of another class stays as it is. Where
        they are traced, one out of range makes its image NaN.
      targets: integer classes to reach, `[N]`, other than `labels`; None for any. An image of its target stays as it is.
      steps: number of steps, at least 1.
      step_size: l2 length of the first step, above 0, a number or `[N]`.
      gamma: relative change of the radius in the first step, in [0, 1).
      last_gamma: and in the last.
      norm: "l2" or "linf", in which the change is small.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Images, same shape and dtype as `x`, inside `bounds`; an image for which nothing was found is that of `x`. No
      gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point, or `labels` or `targets` are not integers.
      ValueError: if an argument is out of range, a target is the label, or the logits are not `[N, K]`.

    Reference: Pintor et al., 2021, https://arxiv.org/abs/2102.12827 (Algorithm 1)
    """
    x, _, first, bounds = _checks.threat_model("fmn", x, step_size=step_size, norm="l2", bounds=bounds, steps=steps)
    _checks.threat_model("fmn", x, norm=norm, bounds=None)
    for name, value in (("gamma", gamma), ("last_gamma", last_gamma)):
        if not 0 <= value < 1:
            raise ValueError(f"fmn: {name}={value}; it must lie in [0, 1), the paper takes 0.05 and 0.001")

    def advance(at: Point) -> tuple[jax.Array, jax.Array]:
        rate = last_gamma + (gamma - last_gamma) * at.share
        slope = norms(at.gradient, DUAL[norm])
        boundary = at.distance + jnp.abs(at.loss) / jnp.where(slope > 0, slope, 1)
        # A share beyond the boundary, on which rounding would decide.
        outside = (1 + rate) * jnp.where(at.nearest.fooled, at.radius, jnp.where(slope > 0, boundary, at.distance))
        radius = jnp.where(at.fooled, jnp.minimum((1 - rate) * at.radius, at.nearest.distance), outside)
        radius = jnp.where(jnp.isfinite(radius), radius, at.distance)
        return ball(norm, at.clean, broadcast(radius, at.clean), bounds).project(at.clean + at.moved), radius

    return close_in(
        "fmn",
        logits_fn,
        x,
        labels,
        targets,
        objective=Aim.lead,
        advance=advance,
        step_size=first,
        radius=jnp.inf,
        steps=steps,
        norm=norm,
        bounds=bounds,
    )
