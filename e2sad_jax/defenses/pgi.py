"""FGSM-PGI: one FGSM step from what all earlier gradients of the same image say, held close to that start."""

import dataclasses

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import core
from e2sad_jax.defenses._prior import step_from
from e2sad_jax.defenses._registry import ATTACK_STEP_SIZE, MEMORY, Defense, Setting, register
from e2sad_jax.defenses._types import Bounds, LogitsFn, Parts, batch_mean, check_weight, checked_start


def pgi(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    start: jax.Array | None = None,
    momentum: jax.Array | None = None,
    key: jax.Array | None = None,
    eps: jax.typing.ArrayLike = 0.3,
    step_size: jax.typing.ArrayLike | None = None,
    weight: jax.typing.ArrayLike = 10.0,
    decay: jax.typing.ArrayLike = 0.3,
    bounds: Bounds = (0.0, 1.0),
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """FGSM-PGI in its form with momentum (FGSM-MEP): J(theta, x_adv, y) + weight / m sum_i |z(x_adv_i) - z(x_0_i)|^2 / K.

    x_0 = project(x + start);  g = grad J(theta, x_0, y);  x_adv = project(x_0 + a sign(g))
    momentum' = decay momentum + (1 - decay) g / max |g|;  start' = project(x_0 + a sign(momentum')) - x

    z are the logits. Both points are constants; the gradient of the regulariser flows through both of its arguments. Keep
    start' and momentum' of each image for its next time:

        loss, parts = pgi(logits_fn, x, y, start=start, momentum=momentum, eps=eps)
        start, momentum = parts["delta"], parts["momentum"]

    The authors' code divides g by the l1 norm of the batch's gradients in place of each image's largest entry. With the
    signs of g in the momentum nothing of an earlier gradient would be left: at a decay below 0.5 the last sign outweighs
    all the others. Their code draws anew what is kept every 40 epochs of 110.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too. The authors take 0.6 for the true class.
      start: perturbations `[N, ...]` that the step starts from, in the images' own units; `parts` then has the next ones
        as `delta`, and `momentum`. None: a random point of the ball, and nothing to be kept.
      momentum: of each image's gradients, `[N, ...]`, in [-1, 1]; only with `start`. None: zeros.
      key: random key of the start; needed without `start`.
      eps: budget in the l-infinity norm, at least 0, in the images' own units.
      step_size: a, above 0; None for eps, as in the paper.
      weight: of the regulariser, at least 0; the authors' 10 is for the mean over the K logits, as here.
      decay: of the momentum, in [0, 1].
      bounds: range of valid images, or None.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name, before their weights; with `start` what is to be kept is among them.

    Raises:
      ValueError: if a budget or a weight is out of range, or `start` or `momentum` does not have the images' shape.

    Reference: Jia et al., 2022, https://arxiv.org/abs/2207.08859
    """
    x, eps, step_size, bounds = core.checks.threat_model("pgi", x, eps=eps, bounds=bounds, step_size=step_size)
    check_weight("pgi", "weight", weight)
    check_weight("pgi", "decay", decay, 1)
    mean, y = batch_mean("pgi", x, y, weights)
    start = checked_start("pgi", start, x)
    step_size = eps if step_size is None else step_size
    limits, wide = core.linf_ball(x, eps, bounds), core.as_float32(x)
    if start is not None:
        offset = start
    elif momentum is not None:
        raise ValueError("pgi: momentum without start; give both, or neither for a random start")
    else:
        offset = jnp.asarray(eps) * limits.sample(core.per_image_keys("pgi", key, len(x)), wide)
    loss, parts, at, gradient = step_from(
        "pgi", logits_fn, x, y, offset, limits, mean, step_size=step_size, weight=weight
    )
    if start is None:
        return loss, parts
    before = jnp.zeros_like(wide) if momentum is None else core.checks.perturbation("pgi", "momentum", momentum, x)
    largest = jnp.abs(gradient).max(tuple(range(1, x.ndim)), keepdims=True)
    decay = jnp.asarray(decay, wide.dtype)
    after = decay * before + (1 - decay) * gradient / jnp.where(largest > 0, largest, 1)
    kept = {"delta": limits.project(at + step_size * jnp.sign(after)) - wide, "momentum": after}
    return loss, {**parts, **jax.lax.stop_gradient(kept)}


SETTINGS = (
    Setting("prior_weight", 10.0, "weight of FGSM-PGI's regulariser", lower=0, argument="weight"),
    Setting("prior_decay", 0.3, "decay of FGSM-PGI's momentum", lower=0, upper=1, argument="decay"),
    ATTACK_STEP_SIZE,
    dataclasses.replace(MEMORY, default="int8"),
)
register("pgi", Defense(pgi, "FGSM-PGI", SETTINGS, remembers=("delta", "momentum")))
