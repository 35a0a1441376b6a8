"""DeepFool: steps to the nearest boundary of the linearised network."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._ball import linf_ball, project_and_cast
from e2sad_jax.attacks._numerics import as_float32, broadcast, finite, linearise, unit
from e2sad_jax.attacks._types import Bounds, LogitsFn


def deepfool(
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array | None = None,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    norm: str = "l2",
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """DeepFool: the nearest image of another class, by steps to the boundary of the linearised network.

    With y the class, w_k = grad z_k - grad z_y and f_k = z_k - z_y at the present point, the boundary nearest to it is
    that of l = argmin_k |f_k| / ||w_k||_q (q = 2, or 1 in the l-infinity norm), and the step to it

        |f_l| / ||w_l||_2^2 w_l,    or    |f_l| / ||w_l||_1 sign(w_l)

    Each image stops by itself as soon as `(1 + overshoot)` times its change is of another class. Its size then says how
    robust the network is there. There is no budget: measure the change, or keep what is within yours.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, K at least 2. Gradients of all K are taken in each step.
      x: images `[N, ...]`, floating point, inside `bounds`.
      labels: integer classes to leave, `[N]`; None for the predicted ones. An image of another class stays as it is.
      steps: number of steps at most, at least 1.
      overshoot: share by which the change reaches beyond the boundary, at least 0.
      norm: "l2" or "linf", in which the change is small.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Images, same shape and dtype as `x`; one that was not fooled within `steps` is where it had got to. No gradient
      flows through them.

    Raises:
      TypeError: if `x` is not floating point or `labels` are not integers.
      ValueError: if an argument is out of range, or the logits are not `[N, K]`.

    Reference: Moosavi-Dezfooli et al., 2016, https://arxiv.org/abs/1511.04599
    """
    _checks.threat_model("deepfool", x, norm=norm, bounds=bounds, steps=steps)
    _checks.number("deepfool", "overshoot", overshoot)
    x = jax.lax.stop_gradient(x)
    clean, axes = as_float32(x), tuple(range(2, x.ndim + 1))
    everywhere = linf_ball(x, jnp.inf, bounds)

    def look(z: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(as_float32(logits_fn(z)))

    def beyond(z: jax.Array) -> jax.Array:
        """The image that would be returned for `z`."""
        return project_and_cast(everywhere, clean + (1 + overshoot) * (z - clean), x.dtype)

    def step(_: int | jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z, fooled = state
        logits, w = linearise(logits_fn, z.astype(x.dtype), y)
        size = jnp.abs(w).sum(axes) if norm == "linf" else jnp.sqrt(jnp.square(w).sum(axes))  # [K, N]
        z_own = jnp.take_along_axis(logits, y[:, None], 1)
        # On the boundary itself the step would be zero, and with it the overshoot: one rounding more.
        gap = jnp.abs(logits - z_own) + jnp.finfo(logits.dtype).eps * jnp.maximum(jnp.abs(z_own), 1)
        distance = jnp.where(size > 0, gap.T / jnp.where(size > 0, size, 1), jnp.inf)
        distance = jnp.where(jnp.isfinite(distance), distance, jnp.inf)
        nearest, away = distance.argmin(0), distance.min(0)
        towards = jnp.take_along_axis(w, nearest.reshape(1, -1, *[1] * (x.ndim - 1)), 0)[0]
        towards = finite(towards)
        towards = jnp.sign(towards) if norm == "linf" else unit(towards)
        moves = ~fooled & jnp.isfinite(away)
        z = everywhere.project(z + broadcast(jnp.where(moves, away, 0), x) * towards)
        return z, fooled | (look(beyond(z)).argmax(-1) != y)

    logits = look(x)
    _checks.logits("deepfool", logits.shape, x.shape[0])
    y = logits.argmax(-1) if labels is None else labels
    _checks.classes("deepfool", "labels", y, logits.shape)
    start = (clean, logits.argmax(-1) != y)
    end, _ = _loops.repeat_while(lambda state: ~state[1].all(), steps, step, start)
    return jax.lax.stop_gradient(beyond(end))
