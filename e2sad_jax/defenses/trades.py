"""TRADES: the clean loss and the divergence between the predictions on clean and adversarial images."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import ATTACK_STEP_SIZE, ATTACK_STEPS, MEMORY, NORM, Defense, Setting, register
from e2sad_jax.defenses._types import Bounds, LogitsFn, Parts, batch_mean, check_weight, checked_start, ended
from e2sad_jax.losses import cross_entropy, expectation

START = 1e-3  # standard deviation of the noise that the attack starts from: at the image itself it has no gradient


def trades(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    key: jax.Array | None = None,
    beta: jax.typing.ArrayLike = 6.0,
    eps: jax.typing.ArrayLike = 0.3,
    steps: int = 40,
    step_size: jax.typing.ArrayLike | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
    start: jax.Array | None = None,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """TRADES: J(theta, x, y) + beta / m sum_i KL(f(x_i) || f(x_adv_i)).

    x_adv climbs the divergence itself, from x + 0.001 N(0, 1) by steps along the gradient's signs (in the l2 ball along the
    gradient), projected onto the ball. It is a
    constant; the gradient of the divergence flows through both of its arguments.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`; f is its softmax.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack does not see them.
      key: random key of the start; needed without `start`.
      beta: weight of the divergence, at least 0; the paper's 1 / lambda.
      eps: budget of the attack in `norm`, at least 0, in the images' own units.
      steps: gradient steps of the attack, at least 1. The paper takes 40 of 0.01 on MNIST (eps 0.3), 10 of 0.007 on
        CIFAR-10 (eps 0.031).
      step_size: step of the attack; None for 2.5 eps / steps.
      norm: "linf" or "l2", of each image's perturbation.
      bounds: range of valid images, or None.
      start: perturbations `[N, ...]` that the attack starts from, in the images' own units; `parts` then has
        `delta`, where it ended, to be the images' next start (docs/defenses.md). None: noise.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name, before their weights.

    Raises:
      ValueError: if `beta` or a budget is out of range.

    Reference: Zhang et al., 2019, https://arxiv.org/abs/1901.08573
    """
    x, eps, step_size, bounds = core.checks.threat_model(
        "trades", x, eps=eps, norm=norm, bounds=bounds, steps=steps, step_size=step_size
    )
    mean, y = batch_mean("trades", x, y, weights)
    start = checked_start("trades", start, x)
    check_weight("trades", "beta", beta)
    if step_size is None:
        step_size = 2.5 * eps / steps

    def log_f(z: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(core.as_float32(core.checks.logits("trades", logits_fn(z), len(x))))

    f_x = log_f(x)
    constant = jax.lax.stop_gradient(core.as_attack(log_f)(x))

    def divergence_of(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        return expectation(jnp.exp(log_p), log_p - log_q)

    def divergence(z: jax.Array) -> jax.Array:
        return divergence_of(constant, log_f(z))

    limits = core.ball(norm, x, eps, bounds)
    wide = core.as_float32(x)
    if start is None:
        keys = core.per_image_keys("trades", key, x.shape[0])
        offset = START * jax.vmap(lambda k: jax.random.normal(k, wide.shape[1:], wide.dtype))(keys)
    else:
        offset = start
    x_adv = core.ascend(divergence, limits.project(wide + offset), limits, x.dtype, step_size, steps)
    x_adv = jax.lax.stop_gradient(x_adv)

    clean = mean(cross_entropy(f_x, y))  # log f is f's logits as well as any
    kl = mean(divergence_of(f_x, log_f(x_adv)))
    return clean + beta * kl, ended({"clean": clean, "divergence": kl}, x_adv, x, start)


BETA = Setting("beta", 6.0, "weight of TRADES' divergence", lower=0)
register("trades", Defense(trades, "TRADES", (BETA, ATTACK_STEPS, ATTACK_STEP_SIZE, MEMORY, NORM)))
