"""MI-FGSM: IFGSM with momentum."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._ball import cast_inside, linf_ball
from e2sad_jax.attacks._numerics import as_float32, finite, input_gradient
from e2sad_jax.attacks._types import Bounds, LossFn


def mi_fgsm(
    loss_fn: LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    steps: int = 10,
    step_size: jax.typing.ArrayLike | None = None,
    decay: jax.typing.ArrayLike = 1.0,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Momentum iterative fast gradient sign method: IFGSM along a decaying sum of all gradients so far.

    g_k = decay g_{k-1} + grad / mean |grad|;  x_k = clamp_{x, eps}(x_{k-1} + a sign(g_k)),  g_0 = 0, x_0 = x

    Made for transfer: images that are made for one network fool another more often than those of `pgd`. The paper
    divides by the sum of |grad|, which gives the same signs.

    Args:
      loss_fn: images `[N, ...]` to per-example losses `[N]`, to be maximised.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: budget in the l-infinity norm, at least 0, in the images' own units.
      steps: number of gradient steps, at least 1.
      step_size: a, above 0; None for the paper's eps / steps.
      decay: weight of the gradients before, at least 0; 0 makes it `ifgsm`.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Adversarial images, same shape and dtype as `x`, within `eps` of it; no gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if a budget is out of range or `loss_fn` does not return per-example losses.

    Reference: Dong et al., 2018, https://arxiv.org/abs/1710.06081
    """
    x, eps, step_size, bounds = _checks.threat_model(
        "mi_fgsm", x, eps=eps, bounds=bounds, steps=steps, step_size=step_size
    )
    _checks.number("mi_fgsm", "decay", decay)
    if not len(x):  # nothing that a model could be asked
        return x
    if step_size is None:
        step_size = eps / steps
    limits, start = linf_ball(x, eps, bounds), as_float32(x)

    def step(_: int | jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z, momentum = state
        gradient = finite(as_float32(input_gradient(loss_fn, z.astype(x.dtype))))
        size = jnp.abs(gradient).mean(tuple(range(1, x.ndim)), keepdims=True)
        momentum = gradient / jnp.where(size > 0, size, 1) + decay * momentum
        return limits.project(z + step_size * jnp.sign(momentum)), momentum

    end, _ = _loops.repeat(steps, step, (start, jnp.zeros_like(start)))
    return jax.lax.stop_gradient(cast_inside(end, x.dtype, limits))
