"""Adversarial training: with FGSM or IFGSM on a mixture (Eq. 3), and Madry's minmax with PGD (Eq. 4)."""

import jax

from e2sad_jax.attacks import fgsm, ifgsm, pgd
from e2sad_jax.defenses._types import Bounds, LogitsFn, Parts, check_weight, clean_term, weighted
from e2sad_jax.losses import cross_entropy


def fgsm_training(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    alpha: float = 0.6,
    eps: float = 0.3,
    bounds: Bounds = (0.0, 1.0),
) -> tuple[jax.Array, Parts]:
    """FGSM adversarial training: alpha J(theta, x, y) + (1 - alpha) J(theta, x_adv, y) (Eq. 3 with Eq. 1).

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too.
      alpha: weight of the clean term, in [0, 1].
      eps: l-infinity budget of the attack, at least 0, in the images' own units.
      bounds: range of valid images, or None.

    Returns:
      The loss, a scalar, and its parts by name, before their weights.

    Raises:
      ValueError: if `alpha` or `eps` is out of range.
    """
    check_weight("fgsm_training", "alpha", alpha, 1)
    m = x.shape[0]

    def J(z: jax.Array) -> jax.Array:  # per example; its sum is the batch mean
        return cross_entropy(logits_fn(z), y) / m

    x_adv = fgsm(weighted(alpha, J), x, eps=eps, bounds=bounds)
    clean, adversarial = clean_term(alpha, J, x), J(x_adv).sum()
    return alpha * clean + (1 - alpha) * adversarial, {"clean": clean, "adversarial": adversarial}


def ifgsm_training(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    alpha: float = 0.6,
    eps: float = 0.3,
    steps: int = 30,
    step_size: float | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> tuple[jax.Array, Parts]:
    """IFGSM adversarial training: alpha J(theta, x, y) + (1 - alpha) J(theta, x_adv, y) (Eq. 3 with Eq. 2).

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too.
      alpha: weight of the clean term, in [0, 1].
      eps: l-infinity budget of the attack, at least 0, in the images' own units.
      steps: gradient steps of the attack, at least 1.
      step_size: step of the attack; None for the paper's eps / steps.
      bounds: range of valid images, or None.

    Returns:
      The loss, a scalar, and its parts by name, before their weights.

    Raises:
      ValueError: if `alpha` or a budget is out of range.
    """
    check_weight("ifgsm_training", "alpha", alpha, 1)
    m = x.shape[0]

    def J(z: jax.Array) -> jax.Array:  # per example; its sum is the batch mean
        return cross_entropy(logits_fn(z), y) / m

    x_adv = ifgsm(weighted(alpha, J), x, eps=eps, steps=steps, step_size=step_size, bounds=bounds)
    clean, adversarial = clean_term(alpha, J, x), J(x_adv).sum()
    return alpha * clean + (1 - alpha) * adversarial, {"clean": clean, "adversarial": adversarial}


def pgd_minmax(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    key: jax.Array,
    eps: float = 0.3,
    steps: int = 40,
    step_size: float | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> tuple[jax.Array, Parts]:
    """Madry's minmax: J(theta, x + delta, y) at its maximum over the ball, found by PGD from a random start (Eq. 4).

    No clean term: the saddle point of Madry et al. is trained on adversarial images alone.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too.
      key: random key of the start.
      eps: l-infinity budget of the attack, at least 0, in the images' own units.
      steps: gradient steps of the attack, at least 1.
      step_size: step of the attack; None for 2.5 eps / steps.
      bounds: range of valid images, or None.

    Returns:
      The loss, a scalar, and its parts by name.

    Raises:
      ValueError: if a budget is out of range.

    Reference: Madry et al., 2017, https://arxiv.org/abs/1706.06083
    """

    def J(z: jax.Array) -> jax.Array:
        return cross_entropy(logits_fn(z), y)

    x_adv = pgd(key, J, x, eps=eps, steps=steps, step_size=step_size, bounds=bounds)
    loss = J(x_adv).mean()
    return loss, {"adversarial": loss}
