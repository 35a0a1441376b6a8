"""DeepFool: steps to the nearest boundary of the linearised network."""

import jax
import jax.numpy as jnp

from e2sad_jax import losses
from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._aim import aim
from e2sad_jax.attacks._ball import linf_ball, project_and_cast
from e2sad_jax.attacks._numerics import (
    as_float32,
    boundary_distances,
    broadcast,
    finite,
    losses_and_gradient,
    nearest_boundary,
    unit,
)
from e2sad_jax.attacks._types import Bounds, LogitsFn


def deepfool(
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array | None = None,
    *,
    targets: jax.Array | None = None,
    steps: int = 50,
    overshoot: float = 0.02,
    norm: str = "l2",
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """DeepFool: the nearest image of another class, by steps to the boundary of the linearised network.

    With y the class, w_k = grad z_k - grad z_y and f_k = z_k - z_y at the present point, the boundary nearest to it is
    that of l = argmin_k |f_k| / ||w_k||_q (q = 2, or 1 in the l-infinity norm), and the step to it

        |f_l| / ||w_l||_2^2 w_l,    or    |f_l| / ||w_l||_1 sign(w_l)

    With `targets` it is the boundary between the target and the class that leads among the others, and a step takes one
    gradient instead of K.

    Each image stops by itself as soon as `(1 + overshoot)` times its change is of another class, or of its target. The size
    of the change then says how robust the network is there. There is no budget: measure the change, or keep what is within
    yours.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, K at least 2. Each step takes the gradients of all K.
      x: images `[N, ...]`, floating point, inside `bounds`.
      labels: integer classes to leave, `[N]`; None for the predicted ones. An image of another class stays as it is. Where
        they are traced, one out of range makes its image NaN.
      targets: integer classes to reach, `[N]`, other than `labels`; None for any. An image of its target stays as it is.
      steps: number of steps at most, at least 1.
      overshoot: share by which the change reaches beyond the boundary, at least 0.
      norm: "l2" or "linf", in which the change is small.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Images, same shape and dtype as `x`; one that was not fooled within `steps` is where it had got to. No gradient
      flows through them.

    Raises:
      TypeError: if `x` is not floating point, or `labels` or `targets` are not integers.
      ValueError: if an argument is out of range, a target is the label, or the logits are not `[N, K]`.

    Reference: Moosavi-Dezfooli et al., 2016, https://arxiv.org/abs/1511.04599
    """
    x, _, _, bounds = _checks.threat_model("deepfool", x, norm=norm, bounds=bounds, steps=steps)
    _checks.number("deepfool", "overshoot", overshoot)
    if not len(x):  # nothing that a model could be asked
        return x
    x = jax.lax.stop_gradient(x)
    clean = as_float32(x)
    everywhere = linf_ball(x, jnp.inf, bounds)

    def look(z: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(as_float32(_checks.logits("deepfool", logits_fn(z), len(x))))

    def beyond(z: jax.Array) -> jax.Array:
        """The image that would be returned for `z`."""
        return project_and_cast(everywhere, clean + (1 + overshoot) * (z - clean), x.dtype)

    def step(_: int | jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z, fooled = state
        away, towards = boundary(z.astype(x.dtype))
        towards = finite(towards)
        towards = jnp.sign(towards) if norm == "linf" else unit(towards)
        moves = ~fooled & jnp.isfinite(away)
        z = everywhere.project(z + broadcast(jnp.where(moves, away, 0), x) * towards)
        return z, fooled | goal.reached(look(beyond(z)))

    def boundary(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The distance to the nearest boundary, `[N]`, infinite where there is none, and the normal towards it."""
        if wanted is None:
            return nearest_boundary(logits_fn, z, leave, norm=norm)
        reach = wanted
        lead, w = map(as_float32, losses_and_gradient(lambda z: -losses.margin(logits_fn(z), reach), z))
        return boundary_distances(lead[None], w[None], jnp.abs(look(z).max(-1))[None], norm)[0], w

    logits = look(x)
    goal = aim("deepfool", logits, labels, targets)
    leave, wanted = goal
    end, _ = _loops.repeat_while(lambda state: ~state[1].all(), steps, step, (clean, goal.reached(logits)))
    return jax.lax.stop_gradient(goal.nan_without_class(beyond(end), logits.shape[1]))
