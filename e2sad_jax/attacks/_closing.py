"""Gradient steps whose distance from the image closes in on the boundary, and the nearest image they come upon: FMN, DDN."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._aim import Aim, aim
from e2sad_jax.attacks._ball import linf_ball, project_and_cast
from e2sad_jax.attacks._numerics import as_float32, finite, like_sharded, norms, select, unit
from e2sad_jax.attacks._search import Nearest
from e2sad_jax.attacks._types import Bounds, LogitsFn

LAST = 0.01  # share of the first step that the last one has


class Point(NamedTuple):
    """Where an attack is.

    Attributes:
      clean: the images, `[N, ...]`, float32 or wider.
      change: from them, `[N, ...]`.
      distance: its norm, `[N]`.
      fooled: whether it fools the network, bool `[N]`.
      moved: the change after a step along the gradient, `[N, ...]`.
      loss: the objective, `[N]`.
      gradient: its gradient, `[N, ...]`, finite.
      share: half a cosine from 1 in the first step towards 0 after the last, a scalar.
      radius: that of the last step, `[N]`.
      nearest: the nearest image that fools, this one among them.
    """

    clean: jax.Array
    change: jax.Array
    distance: jax.Array
    fooled: jax.Array
    moved: jax.Array
    loss: jax.Array
    gradient: jax.Array
    share: jax.Array
    radius: jax.Array
    nearest: Nearest


class _State(NamedTuple):
    """The present point, the radius around the image `[N]`, and the nearest image found."""

    z: jax.Array
    radius: jax.Array
    nearest: Nearest


def close_in(
    name: str,
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array | None,
    targets: jax.Array | None,
    *,
    objective: Callable[[Aim, jax.Array], jax.Array],
    advance: Callable[[Point], tuple[jax.Array, jax.Array]],
    step_size: jax.typing.ArrayLike,
    radius: jax.typing.ArrayLike,
    steps: int,
    norm: str,
    bounds: Bounds,
) -> jax.Array:
    """Takes `steps` steps from the images and returns the nearest of the points that fool the network.

    Args:
      name: the attack's name in messages.
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: images `[N, ...]`, checked.
      labels: as of the attack.
      targets: as of the attack.
      objective: what the gradient is taken of, of what the attack aims at and logits to `[N]`.
      advance: from a point to the next one, `[N, ...]`, not yet clipped, and its radius `[N]`.
      step_size: l2 length of the first step along the gradient, as `threat_model` returns it; it falls to `LAST` of that.
      radius: the first one.
      steps: number of steps.
      norm: of distances.
      bounds: checked.

    Returns:
      Images, as `x`; that of `x` where none was found.
    """
    if not len(x):  # nothing that a model could be asked
        return x
    x = jax.lax.stop_gradient(x)
    clean, everywhere = as_float32(x), linf_ball(x, jnp.inf, bounds)
    logits = jax.lax.stop_gradient(as_float32(_checks.logits(name, logits_fn(x), len(x))))
    goal = aim(name, logits, labels, targets)
    already = goal.reached(logits)

    def filled(value: jax.typing.ArrayLike) -> jax.Array:
        return like_sharded(jnp.full(len(x), value, clean.dtype), x)

    def total(z: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = logits_fn(z)
        loss = objective(goal, logits)
        return loss.sum(), (loss, goal.lead(logits) > 0)

    def step(i: int | jax.Array, state: _State) -> _State:
        share = (1 + jnp.cos(jnp.pi * jnp.asarray(i, clean.dtype) / steps)) / 2
        image = project_and_cast(everywhere, state.z, x.dtype)
        gradient, (loss, fooled) = jax.lax.stop_gradient(jax.grad(total, has_aux=True)(image))
        change = as_float32(image) - clean
        distance = norms(change, norm)
        nearest = state.nearest.keep(image, distance, fooled)
        loss, gradient = loss.astype(clean.dtype), finite(as_float32(gradient))
        moved = change + step_size * (LAST + (1 - LAST) * share) * unit(gradient)
        z, radius = advance(Point(clean, change, distance, fooled, moved, loss, gradient, share, state.radius, nearest))
        return _State(select(already, clean, z), radius, nearest)

    start = _State(clean, filled(radius), Nearest(x, jnp.where(already, 0, filled(jnp.inf)), already))
    end = _loops.repeat_long(steps, step, start)
    image = project_and_cast(everywhere, end.z, x.dtype)
    fooled = goal.lead(jax.lax.stop_gradient(logits_fn(image))) > 0
    found = end.nearest.keep(image, norms(as_float32(image) - clean, norm), fooled).image
    return jax.lax.stop_gradient(goal.nan_without_class(found, logits.shape[1]))
