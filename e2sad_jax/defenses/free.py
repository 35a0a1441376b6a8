"""Free adversarial training: one backward pass for both the parameters and the perturbation."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import Defense, Setting, register
from e2sad_jax.defenses._types import Bounds, LogitsFn, Parts, batch_mean
from e2sad_jax.losses import cross_entropy


def free(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    delta: jax.Array,
    eps: jax.typing.ArrayLike = 0.3,
    bounds: Bounds = (0.0, 1.0),
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """One replay of free adversarial training: J(theta, clip(x + delta), y).

    Train on each batch m times in a row. Each time one backward pass gives two gradients: that in theta, for the
    optimiser, and that in `delta`, for `free_ascent`. The next step takes its result, on the same batch or on the next:

        (loss, parts), (g, g_delta) = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(params, delta)
        delta = free_ascent(delta, g_delta, eps=eps)

    A step costs a natural one. The paper makes N / m passes over the images where natural training makes N, so both
    take the same number of steps: those of N passes show each image N / m times, m steps in a row.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft.
      delta: the perturbation so far, `[N, ...]`, float32 at least; zeros before the first step of all. Its gradient
        is that at the perturbed image, also where that was clipped.
      eps: budget in the l-infinity norm, at least 0, in the images' own units.
      bounds: range of valid images, or None.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name.

    Raises:
      ValueError: if `eps`, `bounds` or the shape of `delta` is not right.

    Reference: Shafahi et al., 2019, https://arxiv.org/abs/1904.12843
    """
    x, eps, _, bounds = core.checks.threat_model("free", x, eps=eps, bounds=bounds)
    if delta.shape != x.shape:
        raise ValueError(f"free: delta has shape {delta.shape}; it must be that of the images, {x.shape}")
    limits = core.linf_ball(x, eps, bounds)
    point = core.project_and_cast(limits, core.as_float32(x) + delta.astype(limits.lower.dtype), x.dtype)
    through = (delta - jax.lax.stop_gradient(delta)).astype(x.dtype)  # zeros, for the gradient
    mean, y = batch_mean("free", x, y, weights)
    loss = mean(cross_entropy(logits_fn(point + through), y))
    return loss, {"adversarial": loss}


def free_ascent(delta: jax.Array, gradient: jax.Array, *, eps: jax.typing.ArrayLike) -> jax.Array:
    """The perturbation of the next step: clip(delta + eps sign(gradient), -eps, eps).

    Args:
      delta: the perturbation, `[N, ...]`.
      gradient: that of `free`'s loss in `delta`, `[N, ...]`.
      eps: budget in the l-infinity norm, at least 0, in the images' own units.

    Returns:
      `[N, ...]`, of the dtype of `delta`; no gradient flows through it.

    Raises:
      ValueError: if `eps` is out of range.
    """
    eps = core.checks.budget("free_ascent", "eps", eps, delta)
    moved = jnp.clip(delta + (eps * jnp.sign(gradient)).astype(delta.dtype), jnp.negative(eps), eps)
    return jax.lax.stop_gradient(moved.astype(delta.dtype))


REPLAYS = Setting("replays", 8, "steps that free training takes on each batch", lower=1, argument=None)
register("free", Defense(free, "Free", (REPLAYS,), ascent=free_ascent, replays="replays"))
