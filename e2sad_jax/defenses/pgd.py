"""Madry's minmax training: the loss at the worst point of the ball, found by PGD (Eq. 4)."""

import jax

from e2sad_jax import attacks
from e2sad_jax.defenses._registry import ATTACK_STEP_SIZE, ATTACK_STEPS, Defense, register
from e2sad_jax.defenses._types import Bounds, LogitsFn, Parts
from e2sad_jax.losses import cross_entropy


def pgd(
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
    """PGD training (Madry's minmax): J(theta, x_adv, y) at images of PGD from a random start (Eq. 4).

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

    x_adv = attacks.pgd(key, J, x, eps=eps, steps=steps, step_size=step_size, bounds=bounds)
    loss = J(x_adv).mean()
    return loss, {"adversarial": loss}


register("pgd", Defense(pgd, "PGD", (ATTACK_STEPS, ATTACK_STEP_SIZE)))
