"""Learning with a strong adversary: training on the worst point of the linearised loss, and on nothing else."""

import jax
import jax.numpy as jnp

from e2sad_jax import attacks
from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import NORM, Defense, Setting, register
from e2sad_jax.defenses._types import Bounds, LogitsFn, Parts, batch_mean
from e2sad_jax.errors import quoted
from e2sad_jax.losses import cross_entropy

ADVERSARIES = ("loss", "alpha")


def strong_adversary(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    eps: jax.typing.ArrayLike = 1.5,
    norm: str = "l2",
    adversary: str = "loss",
    bounds: Bounds = None,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """Learning with a strong adversary: J(theta, x + r, y) with ||r|| = eps, r by one step; no clean term.

    The inner problem, max J over ||r|| <= eps, is solved on a linearised network:

    * "loss": r = eps g / ||g||_2, or eps sign(g) in the l-infinity norm, with g the gradient of J: an `attacks.fgsm` step.
    * "alpha": the direction of the nearest boundary of the linearised softmax, as DeepFool's, of length eps. It takes the
      gradients of all K probabilities. An image whose softmax saturates to exactly one class stays as it is.

    In the l-infinity norm, "loss" is FGSM training without the clean term. The paper's images are grey levels / 256 with l2
    1.5, and it does not clip x + r to their range.

    The perturbation may be of a layer instead of the pixels: `logits_fn` is then the part of the network above it, and `x`
    what the part below it gives.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; "loss" uses them, "alpha" leaves the class of the highest.
      eps: length of the perturbation in `norm`, at least 0, in the images' own units.
      norm: "l2" or "linf", of each image's perturbation.
      adversary: "loss" or "alpha".
      bounds: range of valid images, to clip x + r to; None for no clipping, as in the paper.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name.

    Raises:
      ValueError: if `eps` is out of range, or `adversary` or `norm` is unknown.

    Reference: Huang et al., 2015, https://arxiv.org/abs/1511.03034
    """
    x, eps, _, bounds = core.checks.threat_model("strong_adversary", x, eps=eps, norm=norm, bounds=bounds)
    if adversary not in ADVERSARIES:
        raise ValueError(f"strong_adversary: adversary={quoted(adversary)}; it must be one of {', '.join(ADVERSARIES)}")
    mean, y = batch_mean("strong_adversary", x, y, weights)

    def J(z: jax.Array) -> jax.Array:
        return cross_entropy(logits_fn(z), y)

    if adversary == "loss":
        x_adv = attacks.fgsm(J, x, eps=eps, norm=norm, bounds=bounds)
    else:
        limits = core.ball(norm, x, eps, bounds)

        def probabilities(z: jax.Array) -> jax.Array:
            return jax.nn.softmax(core.as_float32(core.checks.logits("strong_adversary", logits_fn(z), len(x))))

        nearest_boundary = core.as_attack(core.nearest_boundary)
        distance, normal = nearest_boundary(probabilities, x, y.argmax(-1), norm=norm)
        way = jnp.where(core.broadcast(jnp.isfinite(distance), x), limits.steepest(normal), 0)
        x_adv = core.project_and_cast(limits, core.as_float32(x) + eps * way, x.dtype)
    loss = mean(J(x_adv))
    return loss, {"adversarial": loss}


ADVERSARY = Setting(
    "adversary",
    "loss",
    "direction of the training attack: loss, that of the loss's gradient; alpha, to the nearest boundary of the softmax",
    choices=ADVERSARIES,
)
register("strong_adversary", Defense(strong_adversary, "strong adversary", (ADVERSARY, NORM)))
