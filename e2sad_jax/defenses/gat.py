"""GAT: single-step training that keeps the predictions on clean and adversarial images close in the l2 norm."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import ATTACK_STEP_SIZE, MEMORY, NORM, SIGNS, Defense, Setting, register
from e2sad_jax.defenses._types import (
    Bounds,
    LogitsFn,
    Parts,
    batch_mean,
    check_weight,
    ended,
    signs_or_start,
)
from e2sad_jax.losses import cross_entropy


def gat(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    key: jax.Array | None = None,
    weight: jax.typing.ArrayLike = 15.0,
    eps: jax.typing.ArrayLike = 0.3,
    signs: jax.typing.ArrayLike = 0.5,
    step_size: jax.typing.ArrayLike | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
    start: jax.Array | None = None,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """Guided adversarial training: J(theta, x, y) + lambda / m sum_i ||f(x_adv_i) - f(x_i)||_2^2.

    x_adv takes one step up the guided loss, J(theta, z, y) + lambda ||f(z) - f(x)||_2^2, from random signs:

    x_adv = project(x_0 + a sign(grad)),  x_0 = clip(x + k eps r),  each entry of r -1 or 1

    In the l2 ball r is scaled to length 1, and the step is a g / ||g||_2. x_adv is a constant, and in the attack f(x) is; in
    the training loss the gradient flows through both predictions. Lambda is constant, and the attack has both terms in each
    step. The authors' code raises lambda as the learning rate falls, by 3 three times on MNIST, and on CIFAR-10 it leaves the
    attack's second term out in every second step.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`; f is its softmax.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too.
      key: random key of the signs; needed without `start`.
      weight: lambda, at least 0. The authors' code starts with 15 on MNIST at eps 0.3, with 10 on CIFAR-10 at 8/255.
      eps: budget of the attack in `norm`, at least 0, in the images' own units.
      signs: k, the magnitude of the signs in multiples of eps, in [0, 1]. The authors' code takes 1/2 on CIFAR-10, 1 on
        MNIST.
      step_size: a, above 0; None for eps.
      norm: "linf" or "l2", of each image's perturbation.
      bounds: range of valid images, or None.
      start: perturbations `[N, ...]` that the attack starts from, in the images' own units; `parts` then has
        `delta`, where it ended, to be the images' next start (docs/defenses.md). None: signs.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name, before their weights.

    Raises:
      ValueError: if `weight`, `signs` or a budget is out of range.

    Reference: Sriramanan et al., 2020, https://arxiv.org/abs/2011.14969
    """
    x, eps, step_size, bounds = core.checks.threat_model(
        "gat", x, eps=eps, norm=norm, bounds=bounds, step_size=step_size
    )
    check_weight("gat", "weight", weight)
    check_weight("gat", "signs", signs, 1)
    mean, y = batch_mean("gat", x, y, weights)
    step_size = eps if step_size is None else step_size

    def logits(z: jax.Array) -> jax.Array:
        return core.as_float32(core.checks.logits("gat", logits_fn(z), len(x)))

    def squared_distance(z_logits: jax.Array, f_x: jax.Array) -> jax.Array:
        return jnp.square(jax.nn.softmax(z_logits) - f_x).sum(-1)

    clean_logits = logits(x)
    f_x = jax.nn.softmax(clean_logits)
    constant = jax.lax.stop_gradient(jax.nn.softmax(core.as_attack(logits)(x)))

    def guided(z: jax.Array) -> jax.Array:
        z_logits = logits(z)
        return cross_entropy(z_logits, y) + weight * squared_distance(z_logits, constant)

    limits = core.ball(norm, x, eps, bounds)
    first = signs_or_start("gat", limits, x, start, key, signs * eps)
    x_adv = jax.lax.stop_gradient(core.ascend(guided, first, limits, x.dtype, step_size, 1))

    clean = mean(cross_entropy(clean_logits, y))
    distance = mean(squared_distance(logits(x_adv), f_x))
    return clean + weight * distance, ended({"clean": clean, "distance": distance}, x_adv, x, start)


WEIGHT = Setting("gat_weight", 15.0, "weight of GAT's distance of predictions", lower=0, argument="weight")
register("gat", Defense(gat, "GAT", (WEIGHT, SIGNS, ATTACK_STEP_SIZE, MEMORY, NORM)))
