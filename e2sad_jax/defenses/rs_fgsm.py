"""Fast adversarial training (RS-FGSM): one FGSM step from a random start; two gradient steps in all."""

import jax

from e2sad_jax import attacks
from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import ATTACK_STEP_SIZE, MEMORY, NORM, Defense, register
from e2sad_jax.defenses._types import Bounds, LogitsFn, Parts, batch_mean, checked_start, ended
from e2sad_jax.losses import cross_entropy


def rs_fgsm(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    key: jax.Array | None = None,
    eps: jax.typing.ArrayLike = 0.3,
    step_size: jax.typing.ArrayLike | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
    start: jax.Array | None = None,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """Fast adversarial training: J(theta, x_adv, y) at an FGSM step from a random start.

    x_adv = clamp_{x, eps}(x_0 + a sign(grad J(theta, x_0, y))),  x_0 = clip(x + U(-eps, eps))

    One step of PGD with a larger step; in the l2 ball it is a g / ||g||_2. No clean term. It may collapse: after some
    epochs the loss is high at FGSM's point alone, and PGD breaks the model. Smaller budgets, fewer epochs or N-FGSM help.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too.
      key: random key of the start; needed without `start`.
      eps: budget of the attack in `norm`, at least 0, in the images' own units.
      step_size: a, above 0; None for the paper's 1.25 eps.
      norm: "linf" or "l2", of each image's perturbation.
      bounds: range of valid images, or None.
      start: perturbations `[N, ...]` that the attack starts from, in the images' own units; `parts` then has
        `delta`, where it ended, to be the images' next start (docs/defenses.md). None: a random point.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name.

    Raises:
      ValueError: if a budget is out of range.

    Reference: Wong et al., 2020, https://arxiv.org/abs/2001.03994
    """
    x, eps, step_size, bounds = core.checks.threat_model(
        "rs_fgsm", x, eps=eps, norm=norm, bounds=bounds, step_size=step_size
    )
    mean, y = batch_mean("rs_fgsm", x, y, weights)
    start = checked_start("rs_fgsm", start, x)
    key = core.threefry("rs_fgsm", key) if start is None else None

    def J(z: jax.Array) -> jax.Array:
        return cross_entropy(logits_fn(z), y)

    if step_size is None and not (core.is_number(eps) and eps == 0):  # where there is nowhere to go
        step_size = 1.25 * eps
    x_adv = attacks.pgd(key, J, x, eps=eps, steps=1, step_size=step_size, start=start, norm=norm, bounds=bounds)
    loss = mean(J(x_adv))
    return loss, ended({"adversarial": loss}, x_adv, x, start)


register("rs_fgsm", Defense(rs_fgsm, "RS-FGSM", (ATTACK_STEP_SIZE, MEMORY, NORM)))
