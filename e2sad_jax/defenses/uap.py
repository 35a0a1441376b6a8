"""FGSM-UAP: one FGSM step from one perturbation for all images, which climbs as training goes on."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import core
from e2sad_jax.defenses._prior import step_from
from e2sad_jax.defenses._registry import ATTACK_STEP_SIZE, Defense, Setting, register
from e2sad_jax.defenses._types import Bounds, LogitsFn, Parts, batch_mean, check_weight


def uap(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    delta: jax.Array,
    eps: jax.typing.ArrayLike = 0.3,
    step_size: jax.typing.ArrayLike | None = None,
    weight: jax.typing.ArrayLike = 10.0,
    bounds: Bounds = (0.0, 1.0),
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """FGSM-UAP: J(theta, x_adv, y) + weight / m sum_i |z(x_adv_i) - z(x_0_i)|^2 / K, from one perturbation u for all.

    x_0 = project(x + u);  g = grad J(theta, x_0, y);  x_adv = project(x_0 + a sign(g))

    z are the logits. Both points are constants; the gradient of the regulariser flows through both of its arguments. The
    gradient of the loss in `delta` is defined to be that of the attack, for `uap_ascent`, which makes the next step's:

        (loss, parts), (g, g_delta) = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)(params, delta)
        delta = uap_ascent(delta, g_delta, eps=eps)

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too. The authors take 0.64 for the true class of
        10.
      delta: u and the momentum of its gradients, `[2, ...]` with the shape of one image, float32 at least; zeros before the
        first step of all, where the authors' code has a random corner of the ball as u.
      eps: budget in the l-infinity norm, at least 0, in the images' own units.
      step_size: a, above 0; None for eps, as in the paper.
      weight: of the regulariser, at least 0; the authors' 10 is for the mean over the K logits, as here.
      bounds: range of valid images, or None.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name, before their weights.

    Raises:
      ValueError: if a budget, `weight` or the shape of `delta` is not right.

    Reference: Pan et al., 2024, https://doi.org/10.1609/aaai.v38i19.30147
    """
    x, eps, step_size, bounds = core.checks.threat_model("uap", x, eps=eps, bounds=bounds, step_size=step_size)
    if delta.shape != (2, *x.shape[1:]):
        raise ValueError(f"uap: delta has shape {delta.shape}; it must be that of two images, {(2, *x.shape[1:])}")
    check_weight("uap", "weight", weight)
    mean, y = batch_mean("uap", x, y, weights)
    loss, parts, _, gradient = step_from(
        "uap",
        logits_fn,
        x,
        y,
        core.as_float32(delta[:1]),
        core.linf_ball(x, eps, bounds),
        mean,
        step_size=eps if step_size is None else step_size,
        weight=weight,
    )
    size = jnp.abs(gradient).sum()
    ascent = (gradient.sum(0) / jnp.where(size > 0, size, 1)).astype(delta.dtype)
    through = delta[0] - jax.lax.stop_gradient(delta[0])  # zeros, for the gradient
    return loss + (ascent * through).sum().astype(loss.dtype), parts


def uap_ascent(
    delta: jax.Array, gradient: jax.Array, *, eps: jax.typing.ArrayLike, decay: jax.typing.ArrayLike = 0.3
) -> jax.Array:
    """The universal perturbation and the momentum of the next step.

    momentum' = decay momentum + sum_i g_i / sum_i |g_i|_1;  u' = clip(u + eps sign(momentum'), -eps, eps)

    Args:
      delta: u and the momentum, `[2, ...]`.
      gradient: that of `uap`'s loss in `delta`, `[2, ...]`.
      eps: budget in the l-infinity norm, at least 0, in the images' own units. The authors' code takes 10 / 255 here at a
        budget of 8 / 255; `uap` starts in the ball all the same.
      decay: of the momentum, in [0, 1].

    Returns:
      `[2, ...]`, of the dtype of `delta`; no gradient flows through it.

    Raises:
      ValueError: if `eps` or `decay` is out of range.
    """
    eps = core.checks.budget("uap_ascent", "eps", eps, delta)
    check_weight("uap_ascent", "decay", decay, 1)
    momentum = decay * delta[1] + gradient[0]
    u = jnp.clip(delta[0] + eps * jnp.sign(momentum), jnp.negative(eps), eps)
    return jax.lax.stop_gradient(jnp.stack([u, momentum]).astype(delta.dtype))


UAP_WEIGHT = Setting("uap_weight", 10.0, "weight of FGSM-UAP's regulariser", lower=0, argument="weight")
register("uap", Defense(uap, "FGSM-UAP", (UAP_WEIGHT, ATTACK_STEP_SIZE), ascent=uap_ascent, carried=2))
