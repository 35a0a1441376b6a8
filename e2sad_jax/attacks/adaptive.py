"""Adaptive attacks: losses and models for attacks on defenses that round, draw or reject images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from e2sad_jax import _arguments
from e2sad_jax.attacks import _checks
from e2sad_jax.attacks._numerics import as_float32, per_image, threefry
from e2sad_jax.attacks._types import LogitsFn, LossFn

ImagesFn = Callable[[jax.Array], jax.Array]  # images [N, ...] to images [N, ...]
RandomFn = Callable[[jax.Array, jax.Array], jax.Array]  # keys [N] and images [N, ...] to values [N, ...]


def bpda(function: ImagesFn, back: ImagesFn = lambda z: z) -> ImagesFn:
    """Backward pass differentiable approximation: the values of `function` with the derivatives of `back`.

    It lets gradient attacks through a step that has no gradient worth following, as rounding: attack
    `lambda z: logits_fn(bpda(squeeze)(z))`. No `back` serves every defense; the identity serves what returns an image
    near its input.

    Args:
      function: images `[N, ...]` to images.
      back: a differentiable function that is close to `function`, by default the identity.

    Returns:
      A function of images: exactly the values of `function` where `back` is finite, for every transformation of JAX.

    >>> import jax, jax.numpy as jnp
    >>> print(*jax.value_and_grad(bpda(jnp.rint))(0.75), jax.grad(jnp.rint)(0.75))
    1.0 1.0 0.0

    Reference: Athalye et al., 2018, https://arxiv.org/abs/1802.00420
    """

    def approximated(z: jax.Array) -> jax.Array:
        value, smooth = jax.lax.stop_gradient(function(z)), back(z)
        if value.shape != smooth.shape:
            raise ValueError(f"bpda: function returns shape {value.shape}, back {smooth.shape}; they must be the same")
        return value + (smooth - jax.lax.stop_gradient(smooth)).astype(value.dtype)  # 0: no value is rounded by the sum

    return approximated


def eot(key: jax.Array, loss_fn: RandomFn, *, samples: int) -> LossFn:
    """Expectation over transformation: the mean of a random loss over draws, to be attacked as any other loss.

        E_t[loss(t(x))]

    The draws for an image depend on `key` and on the pixels of that image alone. So every step of an attack sees new
    draws, as its images have changed, and no image's result depends on its batch. To judge the result, take another key.

    Args:
      key: one random key.
      loss_fn: keys `[N]`, one for each image, and images `[N, ...]` to per-example losses `[N]`. Of a function that takes
        one key, `jax.vmap` makes one of keys.
      samples: number of draws, at least 1. Memory grows with it.

    Returns:
      A function of images `[N, ...]` to `[N]`.

    Raises:
      TypeError: if `key` is no random key.
      ValueError: if `samples` is no whole number above 0, or `loss_fn` does not return per-example losses.

    >>> import jax, jax.numpy as jnp
    >>> def noisy(keys, x):
    ...     return jnp.square(x[:, 0] + jax.vmap(jax.random.normal)(keys))
    >>> loss_fn = eot(jax.random.key(0), noisy, samples=10_000)
    >>> print(jnp.round(loss_fn(jnp.array([[0.0], [2.0]])), 1))
    [1. 5.]

    Reference: Athalye et al., 2017, https://arxiv.org/abs/1707.07397
    """
    _arguments.count("eot: samples", samples)

    def expected(x: jax.Array) -> jax.Array:
        return draw(key, lambda keys, z: per_image("loss_fn", lambda z: loss_fn(keys, z), z), x, samples).mean(0)

    return expected


def evading(loss_fn: LossFn, score_fn: LossFn, threshold: jax.typing.ArrayLike, *, weight: float) -> LossFn:
    """The loss of an attack that also evades a detector, for `pgd`, `apgd` and their kin.

        loss(x) - weight max(0, score(x) - threshold)

    Args:
      loss_fn: images `[N, ...]` to losses `[N]`, to be maximised.
      score_fn: images `[N, ...]` to scores `[N]`; an image is rejected if its score is above `threshold`.
      threshold: the detector's. A lower one keeps the images away from it.
      weight: of the score in units of the loss, above 0. A multiple of 1 / (standard deviation of clean scores) is of the
        loss's order; try several.

    Returns:
      A function of images `[N, ...]` to `[N]`.

    Raises:
      TypeError: if `score_fn` returns no floating point numbers; a rejection alone, bool, has no gradient.
      ValueError: if `weight` is not above 0, `threshold` is NaN, or a function does not return one value per image.

    Reference: Carlini and Wagner, 2017, https://arxiv.org/abs/1705.07263
    """
    _checks.number("evading", "weight", weight, positive=True)
    _checks.threshold("evading", threshold)

    def evaded(x: jax.Array) -> jax.Array:
        score = _checks.score("evading", per_image("score_fn", score_fn, x))
        excess = jnp.maximum(as_float32(score) - threshold, 0)
        return as_float32(per_image("loss_fn", loss_fn, x)) - weight * excess

    return evaded


def wrong_and_accepted(
    logits_fn: LogitsFn, score_fn: LossFn, threshold: jax.typing.ArrayLike, labels: jax.Array
) -> LossFn:
    """Whether an image fools a model with a detector: misclassified and not rejected, both on one and the same image.

    It is the `misclassified_fn` of `pgd` and `apgd` for such a model.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`. NaN is misclassified.
      score_fn: images `[N, ...]` to scores `[N]`; an image is rejected if its score is above `threshold`. NaN is not.
      threshold: the detector's.
      labels: integer classes, `[N]`.

    Returns:
      A function of images `[N, ...]` to bool `[N]`. With a traced label out of range an image counts as misclassified.

    Raises:
      TypeError: if `labels` are not integers.
      ValueError: if `threshold` is NaN, `labels` are no classes `[N]`, or the logits are not `[N, K]`.
    """
    _checks.threshold("wrong_and_accepted", threshold)

    def fooled(x: jax.Array) -> jax.Array:
        logits = _checks.logits("wrong_and_accepted", logits_fn(x), len(x))
        own = _checks.classes("wrong_and_accepted", "labels", labels, *logits.shape)
        wrong = (logits.argmax(-1) != own) | jnp.isnan(logits).any(-1)
        return wrong & ~(as_float32(per_image("score_fn", score_fn, x)) > threshold)

    return fooled


def draw(key: jax.Array, function: RandomFn, x: jax.Array, samples: int) -> jax.Array:
    """The values of a random function for several draws.

    Args:
      key: one random key.
      function: keys `[N]` and images `[N, ...]` to an array.
      x: images `[N, ...]`. The draws for an image depend on its pixels, not on its place.
      samples: number of draws.

    Returns:
      `[samples, ...]`, what `function` returned.
    """
    key = threefry("eot", key)
    if key.shape:
        raise ValueError(f"eot: key has shape {key.shape}; it must be one key, those of the images are made of it")
    own = jax.vmap(jax.random.fold_in, (None, 0))(key, _fingerprint(x))
    keys = jax.vmap(lambda i: jax.vmap(jax.random.fold_in, (0, None))(own, i))(jnp.arange(samples))
    return jax.vmap(lambda keys: function(keys, x))(keys)


def _fingerprint(x: jax.Array) -> jax.Array:
    """A hash of each image's bits, uint32 `[N]`: the finaliser of MurmurHash3 of each word and its place, summed."""
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(as_float32(x)), jnp.uint32)  # of float64 two words
    words = bits.reshape(x.shape[0], -1)
    mixed = words ^ (jnp.arange(1, words.shape[1] + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9))[None]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    return mixed.sum(1, dtype=jnp.uint32)
