"""ATTA: PGD training whose attack on an image goes on where it ended an epoch before."""

import dataclasses

import jax

from e2sad_jax import attacks
from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import ATTACK_STEP_SIZE, ATTACK_STEPS, MEMORY, NORM, Defense, register
from e2sad_jax.defenses._types import Bounds, LogitsFn, Parts, batch_mean, checked_start, ended
from e2sad_jax.losses import cross_entropy


def atta(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    start: jax.Array | None = None,
    key: jax.Array | None = None,
    eps: jax.typing.ArrayLike = 0.3,
    steps: int = 1,
    step_size: jax.typing.ArrayLike | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """ATTA-k (MAT): J(theta, x_k, y) at the end of k steps from where the image's last attack ended.

    x_0 = project(x + start);  x_{j+1} = project(x_j + a sign(grad J(theta, x_j, y)));  start' = x_k - x

    Few steps an epoch add up to many over the epochs: images that fool a model mostly fool the next one too. Keep start'
    of each image for its next time:

        loss, parts = atta(logits_fn, x, y, start=start, eps=eps)
        start = parts["delta"]

    It is `pgd` with fewer and shorter steps. The authors' second form, TRADES' loss at the same points, is `trades` with
    `start`, but for its attack, which climbs TRADES' divergence.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too.
      start: perturbations `[N, ...]` that the attack starts from, in the images' own units; `parts` then has the next ones
        as `delta`. The authors begin with noise of 0.001. None: a random point of the ball, and nothing to be kept.
      key: random key of the start; needed without `start`.
      eps: budget of the attack in `norm`, at least 0, in the images' own units.
      steps: k, at least 1.
      step_size: a, above 0; None for the smaller of eps / 2 and 2.5 eps / k. The authors take, on MNIST at eps 0.3, 0.01
        for k of 1 and of 40, in 60 epochs; on CIFAR-10 at eps 0.031, 0.015 for k of 1 and 0.007 for k of 10, in 38 epochs,
        and there the perturbations are drawn anew every 10 epochs.
      norm: "linf" or "l2", of each image's perturbation; the paper's is "linf".
      bounds: range of valid images, or None.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name; with `start` what is to be kept is among them.

    Raises:
      ValueError: if a budget is out of range, or `start` does not have the images' shape.

    Reference: Zheng et al., 2020, https://arxiv.org/abs/1912.11969
    """
    x, eps, step_size, bounds = core.checks.threat_model(
        "atta", x, eps=eps, norm=norm, bounds=bounds, steps=steps, step_size=step_size
    )
    mean, y = batch_mean("atta", x, y, weights)
    start = checked_start("atta", start, x)
    key = core.threefry("atta", key) if start is None else None
    if step_size is None and not (core.is_number(eps) and eps == 0):  # where there is nowhere to go
        step_size = min(0.5, 2.5 / steps) * eps

    def J(z: jax.Array) -> jax.Array:
        return cross_entropy(logits_fn(z), y)

    x_adv = attacks.pgd(key, J, x, eps=eps, steps=steps, step_size=step_size, start=start, norm=norm, bounds=bounds)
    loss = mean(J(x_adv))
    return loss, ended({"adversarial": loss}, x_adv, x, start)


SETTINGS = (
    dataclasses.replace(ATTACK_STEPS, default=1),
    ATTACK_STEP_SIZE,
    dataclasses.replace(MEMORY, default="int8"),
    NORM,
)
register("atta", Defense(atta, "ATTA", SETTINGS))
