"""GradAlign: FGSM training that keeps the loss's input gradient the same all over the ball."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import core, fgsm
from e2sad_jax.defenses._registry import MEMORY, Defense, Setting, register
from e2sad_jax.defenses._types import Bounds, LogitsFn, Parts, batch_mean, check_weight, checked_start, ended
from e2sad_jax.losses import cross_entropy


def grad_align(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    key: jax.Array,
    weight: jax.typing.ArrayLike = 0.2,
    eps: jax.typing.ArrayLike = 0.3,
    bounds: Bounds = (0.0, 1.0),
    start: jax.Array | None = None,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """FGSM + GradAlign: J(theta, x_adv, y) + lambda / m sum_i [1 - cos(g(x_i), g(x_i + U(-eps, eps)))].

    g is each image's own gradient of J, x_adv its FGSM point, without random start and held constant. Where g is the
    same all over the ball, FGSM's point is the worst one, and FGSM training does not collapse. The regulariser is
    differentiated through both gradients, a second derivative; an image whose gradient vanishes has none. The noisy
    image is not clipped to the range, as in the paper's formula.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, twice differentiable.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too.
      key: random key of the noise.
      weight: lambda, at least 0. 0.2 is the paper's on CIFAR-10 at eps 8/255; it grows with eps.
      eps: budget of attack and noise in the l-infinity norm, at least 0, in the images' own units.
      bounds: range of valid images, or None.
      start: perturbations `[N, ...]` that the attack starts from, in the images' own units; `parts` then has
        `delta`, where it ended, to be the images' next start (docs/defenses.md). None: the images.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name, before their weights.

    Raises:
      ValueError: if `weight` or `eps` is out of range.

    Reference: Andriushchenko and Flammarion, 2020, https://arxiv.org/abs/2007.02617
    """
    x, eps, _, bounds = core.checks.threat_model("grad_align", x, eps=eps, bounds=bounds)
    check_weight("grad_align", "weight", weight)
    mean, y = batch_mean("grad_align", x, y, weights)
    start = checked_start("grad_align", start, x)

    def J(z: jax.Array) -> jax.Array:
        return cross_entropy(logits_fn(z), y)

    x_adv = fgsm(J, x, eps=eps, start=start, bounds=bounds)
    wide = core.as_float32(x)
    keys = core.per_image_keys("grad_align", key, x.shape[0])
    noise = eps * core.linf_ball(x, eps, None).sample(keys, wide)
    noisy = jax.lax.stop_gradient((wide + noise).astype(x.dtype))
    adversarial = mean(J(x_adv))
    misalignment = mean(_misalignment(core.input_gradient(J, x), core.input_gradient(J, noisy)))
    parts = {"adversarial": adversarial, "misalignment": misalignment}
    return adversarial + weight * misalignment, ended(parts, x_adv, x, start)


def _misalignment(first: jax.Array, second: jax.Array) -> jax.Array:
    """1 - cos of the angle between each example's two gradients, `[N]`; 0 where one of them is zero."""
    a, b = (_scaled(core.as_float32(g).reshape(g.shape[0], -1)) for g in (first, second))
    squared = (a**2).sum(-1) * (b**2).sum(-1)
    vanishes = squared == 0
    cosine = (a * b).sum(-1) / jnp.sqrt(jnp.where(vanishes, 1, squared))
    return jnp.where(vanishes, 0, 1 - cosine)


def _scaled(g: jax.Array) -> jax.Array:
    """Each row with a largest entry of 1, so that squares of tiny gradients do not underflow; no angle changes."""
    largest = jax.lax.stop_gradient(jnp.abs(g).max(-1, keepdims=True))
    return g / jnp.where(largest == 0, 1, largest)


WEIGHT = Setting("align_weight", 0.2, "weight of GradAlign's misalignment", lower=0, argument="weight")
register("grad_align", Defense(grad_align, "GradAlign", (WEIGHT, MEMORY)))
