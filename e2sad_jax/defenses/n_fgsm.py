"""N-FGSM training: one FGSM step from a noisy image, not projected onto the ball; two gradient steps in all."""

import jax

from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import ATTACK_STEP_SIZE, MEMORY, NORM, TRAINING_LOSS, Defense, Setting, register
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


def n_fgsm(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    key: jax.Array | None = None,
    eps: jax.typing.ArrayLike = 0.3,
    noise: jax.typing.ArrayLike = 2.0,
    step_size: jax.typing.ArrayLike | None = None,
    norm: str = "linf",
    training_loss: str = "ce",
    bounds: Bounds = (0.0, 1.0),
    start: jax.Array | None = None,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """N-FGSM training: J(theta, x_adv, y) at an FGSM step from a noisy image, without projection onto the ball.

    x_adv = clip(x_0 + a sign(grad J(theta, x_0, y))),  x_0 = clip(x + U(-k eps, k eps))

    In the l2 norm the noise is uniform in the ball of k eps, and the step is a g / ||g||_2. Both are clipped to the image
    range alone, so x_adv may lie up to k eps + a from x. No clean term.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too.
      key: random key of the noise; needed without `start`.
      eps: budget to defend against in `norm`, at least 0, in the images' own units.
      noise: k, the noise in multiples of eps, at least 0.
      step_size: a, above 0; None for the paper's eps.
      norm: "linf" or "l2", of each image's perturbation.
      training_loss: "ce", the cross-entropy at x_adv; "qub", its quadratic upper bound
        (`losses.quadratic_upper_bound`), with one more pass, that of the clean images. The gradient flows through both
        passes; the attack climbs the cross-entropy all the same.
      bounds: range of valid images, or None.
      start: perturbations `[N, ...]` that the attack starts from, in the images' own units; `parts` then has
        `delta`, where it ended, to be the images' next start (docs/defenses.md). None: a noisy image.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name: of "qub" the bound, and the clean loss in it.

    Raises:
      ValueError: if `noise` or a budget is out of range, or `training_loss` is unknown.

    Reference: de Jorge et al., 2022, https://arxiv.org/abs/2202.01181;
    of "qub": You and Lee, 2025, https://arxiv.org/abs/2601.13645
    """
    x, eps, step_size, bounds = core.checks.threat_model(
        "n_fgsm", x, eps=eps, norm=norm, bounds=bounds, step_size=step_size
    )
    core.checks.number("n_fgsm", "noise", noise)
    check_training_loss("n_fgsm", training_loss)
    mean, y = batch_mean("n_fgsm", x, y, weights)
    start = checked_start("n_fgsm", start, x)
    step_size = eps if step_size is None else step_size

    def J(z: jax.Array) -> jax.Array:
        return cross_entropy(logits_fn(z), y)

    limits = core.ball(norm, x, noise * eps + step_size, bounds)  # which cuts to the range alone: nothing goes farther
    if start is None:
        keys = core.per_image_keys("n_fgsm", key, x.shape[0])
        offset = noise * eps * limits.sample(keys, core.as_float32(x))
    else:  # in the ball: with no projection after it, it would grow with each turn
        wide = core.as_float32(x)
        offset = core.ball(norm, wide, eps, None).project(wide + start) - wide
    noisy = limits.project(core.as_float32(x) + offset)
    gradient = core.as_attack(core.input_gradient)(J, noisy.astype(x.dtype))
    x_adv = core.project_and_cast(limits, noisy + step_size * limits.steepest(core.as_float32(gradient)), x.dtype)
    loss, parts = adversarial_loss(training_loss, logits_fn, x, x_adv, y, mean)
    return loss, ended(parts, x_adv, x, start)


NOISE = Setting("noise", 2.0, "noise of N-FGSM, in multiples of eps1", lower=0)
register("n_fgsm", Defense(n_fgsm, "N-FGSM", (NOISE, ATTACK_STEP_SIZE, MEMORY, NORM, TRAINING_LOSS)))
