"""Madry's minmax training: the loss at the worst point of the ball, found by PGD (Eq. 4)."""

import jax

from e2sad_jax import attacks
from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import (
    ATTACK_STEP_SIZE,
    ATTACK_STEPS,
    MEMORY,
    NORM,
    TRAINING_LOSS,
    Defense,
    register,
)
from e2sad_jax.defenses._types import (
    Bounds,
    LogitsFn,
    Parts,
    adversarial_loss,
    batch_mean,
    check_training_loss,
    checked_start,
    ended,
)
from e2sad_jax.losses import cross_entropy


def pgd(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    key: jax.Array | None = None,
    eps: jax.typing.ArrayLike = 0.3,
    steps: int = 40,
    step_size: jax.typing.ArrayLike | None = None,
    norm: str = "linf",
    training_loss: str = "ce",
    bounds: Bounds = (0.0, 1.0),
    start: jax.Array | None = None,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """PGD training (Madry's minmax): J(theta, x_adv, y) at images of PGD from a random start (Eq. 4).

    No clean term: the saddle point of Madry et al. is trained on adversarial images alone.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too.
      key: random key of the start; needed without `start`.
      eps: budget of the attack in `norm`, at least 0, in the images' own units.
      steps: gradient steps of the attack, at least 1.
      step_size: step of the attack; None for 2.5 eps / steps.
      norm: "linf" or "l2", of each image's perturbation.
      training_loss: "ce", the cross-entropy at x_adv; "qub", its quadratic upper bound
        (`losses.quadratic_upper_bound`), with one more pass, that of the clean images. The gradient flows through both
        passes; the attack climbs the cross-entropy all the same.
      bounds: range of valid images, or None.
      start: perturbations `[N, ...]` that the attack starts from, in the images' own units; `parts` then has
        `delta`, where it ended, to be the images' next start (docs/defenses.md). None: a random point.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name: of "qub" the bound, and the clean loss in it.

    Raises:
      ValueError: if a budget is out of range, or `training_loss` is unknown.

    Reference: Madry et al., 2017, https://arxiv.org/abs/1706.06083;
    of "qub": You and Lee, 2025, https://arxiv.org/abs/2601.13645
    """
    x, eps, step_size, bounds = core.checks.threat_model(
        "pgd", x, eps=eps, norm=norm, bounds=bounds, steps=steps, step_size=step_size
    )
    check_training_loss("pgd", training_loss)
    mean, y = batch_mean("pgd", x, y, weights)
    start = checked_start("pgd", start, x)

    def J(z: jax.Array) -> jax.Array:
        return cross_entropy(logits_fn(z), y)

    x_adv = attacks.pgd(key, J, x, eps=eps, steps=steps, step_size=step_size, start=start, norm=norm, bounds=bounds)
    loss, parts = adversarial_loss(training_loss, logits_fn, x, x_adv, y, mean)
    return loss, ended(parts, x_adv, x, start)


register("pgd", Defense(pgd, "PGD", (ATTACK_STEPS, ATTACK_STEP_SIZE, MEMORY, NORM, TRAINING_LOSS)))
