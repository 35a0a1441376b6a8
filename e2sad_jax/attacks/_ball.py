"""The one place that knows the ball and the image range, and how to stay inside both after rounding."""

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Bounds = tuple[float, float]
LossFn = Callable[[jax.Array], jax.Array]


class Box(NamedTuple):
    """The points that an attack may reach: lower and upper limit for every pixel, in float32 at least."""

    lower: jax.Array
    upper: jax.Array

    def clip(self, x: jax.Array) -> jax.Array:
        return jnp.clip(x, self.lower, self.upper)


def check_images(name: str, x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name}: images are {x.dtype}; they must be floating point, as the loss sees them (uint8: x / 255)"
        )
    if x.ndim < 1:
        raise ValueError(f"{name}: images need a leading batch axis [N, ...], got a scalar")


def is_number(value: object) -> bool:
    """Whether `value` is one number that can be looked at: Python's, NumPy's, or JAX's outside of a transformation."""
    if isinstance(value, (np.ndarray, jax.Array)):
        return value.ndim == 0 and not isinstance(value, jax.core.Tracer)
    return isinstance(value, numbers.Real)


def check_number(name: str, argument: str, value: object, *, positive: bool = False) -> None:
    """Refuses a budget that cannot be right; a traced one cannot be looked at and passes."""
    if not is_number(value):
        return
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name}: {argument}={value}; it must be finite and {'above' if positive else 'at least'} 0")


def check_steps(name: str, argument: str, value: int) -> None:
    if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}: {argument}={value}; it must be a whole number, at least 1")


def check_bounds(name: str, bounds: Bounds | None) -> None:
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"{name}: bounds={bounds}; the lower must be below the upper one")


def box(x: jax.Array, eps: jax.typing.ArrayLike, bounds: Bounds | None) -> Box:
    """The l-infinity ball of radius `eps` around `x`, cut to `bounds` (`clamp` in Eq. 2)."""
    x = widen(x)
    lower, upper = x - eps, x + eps
    if bounds is not None:
        lower, upper = jnp.maximum(lower, bounds[0]), jnp.minimum(upper, bounds[1])
    return Box(lower, upper)


def widen(x: jax.Array) -> jax.Array:
    """Iterates are kept in float32 at least: in bfloat16 a step below 0.002 near 1 would be rounded away."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def narrow(x: jax.Array, dtype: jnp.dtype, limits: Box) -> jax.Array:
    """Back to the images' own dtype; where rounding left the box, one representable number back inside."""
    result = x.astype(dtype)
    if jnp.finfo(dtype).bits >= 32:
        return result
    infinity = jnp.asarray(jnp.inf, dtype)
    result = jnp.where(widen(result) > limits.upper, jnp.nextafter(result, -infinity), result)
    return jnp.where(widen(result) < limits.lower, jnp.nextafter(result, infinity), result)


def input_gradient(loss_fn: LossFn, x: jax.Array) -> jax.Array:
    """Gradient of the summed per-example losses: each image's own gradient, whatever the batch around it.

    Raises:
      ValueError: if `loss_fn` does not return one loss per image.
    """

    def total(z: jax.Array) -> jax.Array:
        losses = loss_fn(z)
        if losses.shape != x.shape[:1]:
            raise ValueError(
                f"loss_fn returned shape {losses.shape} for {x.shape[0]} images; it must return per-example losses, "
                f"shape ({x.shape[0]},), neither summed nor averaged"
            )
        return losses.sum()

    return jax.grad(total)(x)


def per_image_keys(name: str, key: jax.Array, n: int) -> jax.Array:
    """One key per image, `[n]`, from one key or from n."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # a raw uint32 key of the older jax.random.PRNGKey
    if key.shape == (n,):
        return key
    if key.shape != ():
        raise ValueError(f"{name}: key has shape {key.shape}; it must be one key, or one for each of the {n} images")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
