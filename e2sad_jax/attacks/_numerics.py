"""Gradients, random keys and choices image by image; dtypes and norms of batches."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import _arguments
from e2sad_jax.attacks._types import LogitsFn, LossFn

T = TypeVar("T")
THREEFRY = "threefry2x32"


def as_float32(x: jax.Array) -> jax.Array:
    """Casts to float32 unless `x` is wider.

    Attacks keep their iterates so: in bfloat16 a step below 0.002 is lost to rounding near 1.
    """
    return x.astype(_arguments.wide(x.dtype))


def finite(gradient: jax.Array) -> jax.Array:
    """Replaces NaN and infinity by 0: a pixel with such a gradient is left alone instead of becoming NaN."""
    return jnp.where(jnp.isfinite(gradient), gradient, 0)


def length(x: jax.Array) -> jax.Array:
    """The l2 norm of each image, `[N, 1, ...]`."""
    return jnp.sqrt(jnp.square(x).sum(tuple(range(1, x.ndim)), keepdims=True))


def unit(x: jax.Array) -> jax.Array:
    """Scales each image to l2 norm 1; zero stays zero."""
    largest = jnp.abs(x).max(tuple(range(1, x.ndim)), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)  # the square of a saturated network's gradient would be zero
    size = length(x)
    return x / jnp.where(size > 0, size, 1)  # zero for the largest numbers too, whose reciprocals are rounded to it


def norms(x: jax.Array, norm: str) -> jax.Array:
    """The norm of each image, `[N]`; `norm` is "linf", "l2" or "l1"."""
    axes = tuple(range(1, x.ndim))
    if norm == "l2":
        return length(x).reshape(-1)
    return jnp.abs(x).max(axes) if norm == "linf" else jnp.abs(x).sum(axes)


def broadcast(values: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes values `[N]` to `[N, 1, ...]`, so that they broadcast against images."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def select(choose: jax.Array, yes: T, no: T) -> T:
    """Per image `yes` where `choose` `[N]` is True, otherwise `no`; both are trees of arrays `[N, ...]`."""
    return jax.tree.map(lambda a, b: jnp.where(broadcast(choose, a), a, b), yes, no)


def like_sharded(values: jax.Array, like: jax.Array) -> jax.Array:
    """The constant `values`, inside `shard_map` typed as varying over the devices that `like` varies over.

    A loop's initial value needs the type of its later values.
    """
    return jnp.where((like != like).any(), values, values)  # the type is what counts; the compiler drops the choice


def per_image(name: str, function: LossFn, x: jax.Array) -> jax.Array:
    """`function(x)`, checked to be one value per image.

    Args:
      name: the function's name in the message.
      function: images `[N, ...]` to values `[N]`.
      x: images `[N, ...]`.

    Raises:
      TypeError: if it does not return an array.
      ValueError: if the values are not `[N]`.
    """
    values = function(x)
    what = "per-example losses" if name == "loss_fn" else "one value for each image"
    if not isinstance(values, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{name} returned a {type(values).__name__}; it must return one array, {what} [N]: of several outputs pass "
            "these alone, lambda x: f(x)[0]"
        )
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"{name} returned shape {values.shape} for {x.shape[0]} images; it must return {what}, "
            f"shape ({x.shape[0]},), neither summed nor averaged"
        )
    return values


def input_gradient(loss_fn: LossFn, x: jax.Array) -> jax.Array:
    """The gradient of each image's loss in that image, `[N, ...]`, independent of the rest of the batch.

    It may be differentiated again, as regularisers do.

    Raises:
      ValueError: if `loss_fn` does not return one loss per image.
    """
    return jax.grad(lambda z: per_image("loss_fn", loss_fn, z).sum())(x)


def losses_and_gradient(loss_fn: LossFn, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The losses `[N]` and their `input_gradient`, both without a gradient."""

    def total(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = per_image("loss_fn", loss_fn, z)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(x)
    return jax.lax.stop_gradient((losses, gradient))


def linearise(logits_fn: LogitsFn, z: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits `[N, K]` and the gradients of each logit minus the label's, `[K, N, ...]`."""
    logits, backward = jax.vjp(logits_fn, z)
    n, classes = _arguments.logits("logits_fn", logits, len(z)).shape
    one_hot = jnp.broadcast_to(jnp.eye(classes, dtype=logits.dtype)[:, None], (classes, n, classes))
    gradients = jax.vmap(lambda cotangent: backward(cotangent)[0])(like_sharded(one_hot, logits))
    logits, gradients = jax.lax.stop_gradient((as_float32(logits), as_float32(gradients)))
    return logits, gradients - jnp.take_along_axis(gradients, labels.reshape(1, -1, *[1] * (z.ndim - 1)), 0)


def nearest_boundary(logits_fn: LogitsFn, z: jax.Array, labels: jax.Array, *, norm: str) -> tuple[jax.Array, jax.Array]:
    """The boundary of the linearised network nearest to each image, between its label and any other class.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, or to what else decides by its highest entry.
      z: images `[N, ...]`.
      labels: classes y, `[N]`.
      norm: "linf" or "l2", of the distance.

    Returns:
      The distance `[N]`, infinite where there is no boundary, and its normal grad z_k - grad z_y, `[N, ...]`.
    """
    logits, w = linearise(logits_fn, z, labels)
    own = jnp.take_along_axis(logits, labels[:, None], 1)
    distance = boundary_distances((logits - own).T, w, jnp.abs(own).T, norm)
    normal = jnp.take_along_axis(w, distance.argmin(0).reshape(1, -1, *[1] * (z.ndim - 1)), 0)[0]
    return distance.min(0), normal


def boundary_distances(lead: jax.Array, w: jax.Array, scale: jax.Array, norm: str) -> jax.Array:
    """Distances `[K, N]` to where `lead` `[K, N]`, of gradient `w` `[K, N, ...]`, is 0; infinite where that is nowhere.

    `scale` `[1, N]` is the size of the numbers whose difference `lead` is.
    """
    axes = tuple(range(2, w.ndim))
    size = jnp.abs(w).sum(axes) if norm == "linf" else jnp.sqrt(jnp.square(w).sum(axes))
    # On the boundary itself the step would be zero, and with it the overshoot: one rounding more.
    gap = jnp.abs(lead) + jnp.finfo(lead.dtype).eps * jnp.maximum(scale, 1)
    distance = jnp.where(size > 0, gap / jnp.where(size > 0, size, 1), jnp.inf)
    return jnp.where(jnp.isfinite(distance), distance, jnp.inf)


def per_image_keys(name: str, key: jax.Array | None, n: int) -> jax.Array:
    """Keys `[n]`, one per image, from one key or from `n` keys.

    They are of the generator threefry. Keys of another one, such as `rbg`, are turned into keys of it: what those draw
    under `vmap` depends on the place in the batch.

    Args:
      name: the attack's name in the message.
      key: one key, folded with each image's place in the batch, or keys `[n]`, which are returned.
      n: number of images.

    Raises:
      TypeError: if `key` is no random key.
      ValueError: if `key` is neither one key nor `n`.
    """
    keys = threefry(name, key)
    if keys.shape == (n,):
        return keys
    if keys.shape != ():
        raise ValueError(f"{name}: key has shape {keys.shape}; it must be one key, or one for each of the {n} images")
    return jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(n))


def threefry(name: str, key: jax.Array | None) -> jax.Array:
    """`key` itself if it is of the generator threefry, else a key of threefry made of all of its words.

    Args:
      name: the attack's name in the message.
      key: one key or several.

    Raises:
      TypeError: if `key` is no random key.
    """
    dtype = getattr(key, "dtype", None)
    if (
        key is None
        or dtype is None
        or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or (dtype == jnp.uint32 and key.ndim))
    ):
        raise TypeError(f"{name}: key is {dtype or type(key).__name__}; it must be a random key, jax.random.key(seed)")
    if dtype != jnp.uint32 and str(jax.random.key_impl(key)) == THREEFRY:
        return key
    words = key if dtype == jnp.uint32 else jax.random.key_data(key)  # raw ones are of the older jax.random.PRNGKey
    keys = jax.random.wrap_key_data(words[..., :2], impl=THREEFRY)
    for word in range(2, words.shape[-1]):
        fold = jax.random.fold_in
        for _ in keys.shape:
            fold = jax.vmap(fold)
        keys = fold(keys, words[..., word])
    return keys
