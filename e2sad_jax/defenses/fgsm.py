"""FGSM adversarial training, on a mixture of clean and adversarial images (Eq. 3)."""

import jax

from e2sad_jax import attacks
from e2sad_jax.defenses._registry import ALPHA, Defense, register
from e2sad_jax.defenses._types import Bounds, LogitsFn, Parts, check_weight, clean_term, weighted
from e2sad_jax.losses import cross_entropy


def fgsm(
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
    check_weight("fgsm", "alpha", alpha, 1)
    m = x.shape[0]

    def J(z: jax.Array) -> jax.Array:  # per example; its sum is the batch mean
        return cross_entropy(logits_fn(z), y) / m

    x_adv = attacks.fgsm(weighted(alpha, J), x, eps=eps, bounds=bounds)
    clean, adversarial = clean_term(alpha, J, x), J(x_adv).sum()
    return alpha * clean + (1 - alpha) * adversarial, {"clean": clean, "adversarial": adversarial}


register("fgsm", Defense(fgsm, "FGSM", (ALPHA,)))
