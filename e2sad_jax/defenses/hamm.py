"""Hamm's minimax defense with a gradient-norm penalty (Eq. 5)."""

import jax
import optax

from e2sad_jax import attacks
from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import ALPHA, MEMORY, Defense, register
from e2sad_jax.defenses._types import (
    Bounds,
    LogitsFn,
    Parts,
    batch_mean,
    check_weight,
    checked_start,
    clean_term,
    ended,
    weighted,
)
from e2sad_jax.losses import cross_entropy


def hamm(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    alpha: float = 0.6,
    eps: jax.typing.ArrayLike = 0.3,
    bounds: Bounds = (0.0, 1.0),
    start: jax.Array | None = None,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """Hamm's defense: alpha J(theta, x, y) + (1 - alpha) [J(theta, x_adv, y) + eps N / 2 ||dJ(theta, x_adv, y) / dx_adv||].

    The bracket is Eq. 5: J the batch mean, N the batch size (with weights the effective one, (sum w)^2 / sum w^2), x_adv by
    FGSM and held constant, the norm the L2 norm of the whole batch's gradient, which an array `eps` multiplies inside. It
    is mixed with the clean term as the paper does; `alpha=0` gives Eq. 5 alone. The penalty is differentiated through the
    gradient, a second derivative; where the gradient vanishes the norm's own is taken as 0.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, twice differentiable.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too.
      alpha: weight of the clean term, in [0, 1].
      eps: budget of the attack in the l-infinity norm, at least 0, in the images' own units.
      bounds: range of valid images, or None.
      start: perturbations `[N, ...]` that the attack starts from, in the images' own units; `parts` then has
        `delta`, where it ended, to be the images' next start (docs/defenses.md). None: the images.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name, before their weights.

    Raises:
      ValueError: if `alpha` or `eps` is out of range.

    Reference: Hamm, 2018, "Machine vs machine: minimax-optimal defense against adversarial examples"
    """
    x, eps, _, bounds = core.checks.threat_model("hamm", x, eps=eps, bounds=bounds)
    check_weight("hamm", "alpha", alpha, 1)
    mean, y = batch_mean("hamm", x, y, weights)
    start = checked_start("hamm", start, x)

    def J(z: jax.Array) -> jax.Array:  # per example; its sum is the batch mean
        return mean.terms(cross_entropy(logits_fn(z), y))

    x_adv = attacks.fgsm(weighted(alpha, J), x, eps=eps, start=start, bounds=bounds)
    clean = clean_term(alpha, J, x)
    adversarial, gradient = jax.value_and_grad(lambda z: J(z).sum())(x_adv)
    penalty = mean.size / 2 * optax.safe_norm((eps * core.as_float32(gradient)).ravel(), 0.0)
    loss = alpha * clean + (1 - alpha) * (adversarial + penalty)
    return loss, ended({"clean": clean, "adversarial": adversarial, "penalty": penalty}, x_adv, x, start)


register("hamm", Defense(hamm, "Hamm", (ALPHA, MEMORY)))
