"""FMN: the smallest change that fools the network, by gradient steps within a ball whose radius closes in on the boundary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax import losses
from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._aim import aim
from e2sad_jax.attacks._ball import ball, linf_ball, project_and_cast
from e2sad_jax.attacks._numerics import (
    as_float32,
    broadcast,
    finite,
    like_sharded,
    losses_and_gradient,
    norms,
    select,
    unit,
)
from e2sad_jax.attacks._search import Nearest
from e2sad_jax.attacks._types import Bounds, LogitsFn

LAST = 0.01  # share of the first step that the last one has
DUAL = {"linf": "l1", "l2": "l2"}


class _State(NamedTuple):
    """The present point, the radius of the ball around the image `[N]`, and the nearest image found."""

    z: jax.Array
    radius: jax.Array
    nearest: Nearest


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
    if not len(x):  # nothing that a model could be asked
        return x
    x = jax.lax.stop_gradient(x)
    clean, everywhere = as_float32(x), linf_ball(x, jnp.inf, bounds)
    logits = jax.lax.stop_gradient(as_float32(_checks.logits("fmn", logits_fn(x), len(x))))
    goal = aim("fmn", logits, labels, targets)
    already = goal.reached(logits)

    def lead(z: jax.Array) -> jax.Array:
        """Above 0 where the network is fooled."""
        logits = logits_fn(z)
        return losses.margin(logits, goal.leave) if goal.targets is None else -losses.margin(logits, goal.targets)

    def filled(value: float) -> jax.Array:
        return like_sharded(jnp.full(len(x), value, clean.dtype), x)

    def step(i: int | jax.Array, state: _State) -> _State:
        share = (1 + jnp.cos(jnp.pi * jnp.asarray(i, clean.dtype) / steps)) / 2
        rate = last_gamma + (gamma - last_gamma) * share
        image = project_and_cast(everywhere, state.z, x.dtype)
        led, gradient = losses_and_gradient(lead, image)
        led, gradient = led.astype(clean.dtype), finite(as_float32(gradient))
        change = as_float32(image) - clean
        distance = norms(change, norm)
        nearest = state.nearest.keep(image, distance, led > 0)
        slope = norms(gradient, DUAL[norm])
        boundary = distance + jnp.abs(led) / jnp.where(slope > 0, slope, 1)
        # A share beyond the boundary, on which rounding would decide.
        outside = (1 + rate) * jnp.where(nearest.fooled, state.radius, jnp.where(slope > 0, boundary, distance))
        radius = jnp.where(led > 0, jnp.minimum((1 - rate) * state.radius, nearest.distance), outside)
        radius = jnp.where(jnp.isfinite(radius), radius, distance)
        moved = clean + change + first * (LAST + (1 - LAST) * share) * unit(gradient)
        z = ball(norm, clean, broadcast(radius, clean), bounds).project(moved)
        return _State(select(already, clean, z), radius, nearest)

    start = _State(clean, filled(jnp.inf), Nearest(x, jnp.where(already, 0, filled(jnp.inf)), already))
    end = _loops.repeat_long(steps, step, start)
    image = project_and_cast(everywhere, end.z, x.dtype)
    led = jax.lax.stop_gradient(as_float32(lead(image)))
    found = end.nearest.keep(image, norms(as_float32(image) - clean, norm), led > 0).image
    return jax.lax.stop_gradient(goal.nan_without_class(found, logits.shape[1]))
