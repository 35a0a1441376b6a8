"""FGSM adversarial training, on a mixture of clean and adversarial images (Eq. 3)."""

import jax

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


def fgsm(
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
    """FGSM adversarial training: alpha J(theta, x, y) + (1 - alpha) J(theta, x_adv, y) (Eq. 3 with Eq. 1).

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
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
    """
    x, eps, _, bounds = core.checks.threat_model("fgsm", x, eps=eps, bounds=bounds)
    check_weight("fgsm", "alpha", alpha, 1)
    mean, y = batch_mean("fgsm", x, y, weights)
    start = checked_start("fgsm", start, x)

    def J(z: jax.Array) -> jax.Array:  # per example; its sum is the batch mean
        return mean.terms(cross_entropy(logits_fn(z), y))

    x_adv = attacks.fgsm(weighted(alpha, J), x, eps=eps, start=start, bounds=bounds)
    clean, adversarial = clean_term(alpha, J, x), J(x_adv).sum()
    return alpha * clean + (1 - alpha) * adversarial, ended(
        {"clean": clean, "adversarial": adversarial}, x_adv, x, start
    )


register("fgsm", Defense(fgsm, "FGSM", (ALPHA, MEMORY)))
