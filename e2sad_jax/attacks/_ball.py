"""The one place that knows the ball and the image range, and how to stay inside both after rounding."""

import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NORMS = ("linf", "l2")
Bounds = tuple[float, float]
LossFn = Callable[[jax.Array], jax.Array]


class LinfBall(NamedTuple):
    """The points that an attack may reach: lower and upper limit for every pixel, in float32 at least."""

    lower: jax.Array
    upper: jax.Array

    def clip(self, x: jax.Array) -> jax.Array:
        return jnp.clip(x, self.lower, self.upper)

    def holds(self, x: jax.Array) -> jax.Array:
        """Which images `clip` would leave as they are, bool `[N]`."""
        return ((x >= self.lower) & (x <= self.upper)).all(tuple(range(1, x.ndim)))

    def direction(self, gradient: jax.Array) -> jax.Array:
        """The steepest way up, of length 1 in the ball's norm."""
        return jnp.sign(finite(gradient))

    def noise(self, keys: jax.Array, like: jax.Array) -> jax.Array:
        """Uniform in the ball of radius 1, `[N, ...]`, image i drawn from `keys[i]`."""
        return jax.vmap(lambda k: jax.random.uniform(k, like.shape[1:], like.dtype, -1, 1))(keys)


class L2Ball(NamedTuple):
    """As `LinfBall`, for the l2 ball around each image, cut to the range."""

    center: jax.Array
    radius: jax.typing.ArrayLike
    bounds: Bounds | None

    def clip(self, x: jax.Array) -> jax.Array:
        """To the ball along the radius, then to the range: the second, being nearer the image, leaves no ball."""
        radius, tiny = self._reach(x), float(jnp.finfo(x.dtype).tiny)
        offset = x - self.center
        offset = offset * (radius / jnp.maximum(jnp.maximum(length(offset), radius), tiny))
        inside = self.center + offset
        # Many pixels that are each rounded outwards would add up.
        outwards = jnp.abs(inside - self.center) > jnp.abs(offset)
        inside = jnp.where(outwards, _next(inside, self.center), inside)
        return inside if self.bounds is None else jnp.clip(inside, *self.bounds)

    def _reach(self, x: jax.Array) -> jax.typing.ArrayLike:
        """The radius, less what the length of an image may be rounded by."""
        # A sum of D squares is rounded by about sqrt(D) roundings of one.
        return self.radius * (1 - float(jnp.finfo(x.dtype).eps) * (4 + math.sqrt(math.prod(x.shape[1:]))))

    def holds(self, x: jax.Array) -> jax.Array:
        inside = (length(x - self.center) <= self._reach(x)).reshape(-1)
        if self.bounds is None:
            return inside
        return inside & ((x >= self.bounds[0]) & (x <= self.bounds[1])).all(tuple(range(1, x.ndim)))

    def direction(self, gradient: jax.Array) -> jax.Array:
        return unit(finite(gradient))

    def noise(self, keys: jax.Array, like: jax.Array) -> jax.Array:
        pairs = jax.vmap(jax.random.split)(keys)
        towards = unit(jax.vmap(lambda k: jax.random.normal(k, like.shape[1:], like.dtype))(pairs[:, 0]))
        share = jax.vmap(lambda k: jax.random.uniform(k, (1,) * (like.ndim - 1), like.dtype))(pairs[:, 1])
        return towards * share ** (1 / math.prod(like.shape[1:]))


def finite(gradient: jax.Array) -> jax.Array:
    """NaN and infinity point nowhere: a pixel with such a gradient stays, rather than turn the image into NaN."""
    return jnp.where(jnp.isfinite(gradient), gradient, 0)


def length(x: jax.Array) -> jax.Array:
    """l2 norm of each image, `[N, 1, ...]`."""
    return jnp.sqrt(jnp.square(x).sum(tuple(range(1, x.ndim)), keepdims=True))


def unit(x: jax.Array) -> jax.Array:
    """Each image at l2 norm 1; zero stays zero."""
    largest = jnp.abs(x).max(tuple(range(1, x.ndim)), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)  # the square of a saturated network's gradient would be zero
    size = length(x)
    return x / jnp.where(size > 0, size, 1)  # zero beside the largest numbers too, whose reciprocals are rounded to it


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


def check_classes(name: str, argument: str, values: jax.Array, logits: tuple[int, ...]) -> None:
    """Refuses labels that cannot be classes beside logits of shape `(N, K)`; of traced ones only type and shape are seen."""
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{name}: {argument} are {values.dtype}; they must be integer classes of shape [N]")
    if values.shape != logits[:1]:
        raise ValueError(f"{name}: {argument} have shape {values.shape}; it must be {logits[:1]}, one class per image")
    if can_be_read(values):
        wrong = np.asarray(values)[(np.asarray(values) < 0) | (np.asarray(values) >= logits[1])]
        if wrong.size:
            raise ValueError(f"{name}: {argument} contain {wrong[0]}; each must be a class in [0, {logits[1]})")


def can_be_read(values: jax.Array) -> bool:
    """Whether the numbers are there: not traced, and not on another host."""
    return not isinstance(values, jax.core.Tracer) and getattr(values, "is_fully_addressable", True)


def step_size(name: str, given: jax.typing.ArrayLike | None, default: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """The step of an attack: `given`, refused unless above 0, or where there is none `default`."""
    if given is None:
        return default
    check_number(name, "step_size", given, positive=True)
    return given


def check_bounds(name: str, bounds: Bounds | None) -> None:
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"{name}: bounds={bounds}; the lower must be below the upper one")


def check_norm(name: str, norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"{name}: norm={norm!r}; it must be one of {', '.join(NORMS)}")


def ball(norm: str, x: jax.Array, eps: jax.typing.ArrayLike, bounds: Bounds | None) -> LinfBall | L2Ball:
    """The ball of radius `eps` around `x` in `norm`, cut to `bounds`."""
    return box(x, eps, bounds) if norm == "linf" else L2Ball(as_float32(x), eps, bounds)


def box(x: jax.Array, eps: jax.typing.ArrayLike, bounds: Bounds | None) -> LinfBall:
    """The l-infinity ball of radius `eps` around `x`, cut to `bounds` (`clamp` in Eq. 2)."""
    x = as_float32(x)
    lower, upper = x - eps, x + eps
    if bounds is not None:
        lower, upper = jnp.maximum(lower, bounds[0]), jnp.minimum(upper, bounds[1])
    return LinfBall(lower, upper)


def as_float32(x: jax.Array) -> jax.Array:
    """Iterates are kept in float32 at least: in bfloat16 a step below 0.002 near 1 would be rounded away."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cast_inside(x: jax.Array, dtype: jnp.dtype, limits: LinfBall | L2Ball) -> jax.Array:
    """Back to the images' own dtype; where rounding left the ball, one representable number back inside."""
    if isinstance(limits, L2Ball):  # no pixel farther from the image than it was
        limits = LinfBall(jnp.minimum(x, limits.center), jnp.maximum(x, limits.center))
    result = x.astype(dtype)
    if jnp.finfo(dtype).bits >= 32:
        return result
    infinity = jnp.asarray(jnp.inf, dtype)
    result = jnp.where(as_float32(result) > limits.upper, _next(result, -infinity), result)
    return jnp.where(as_float32(result) < limits.lower, _next(result, infinity), result)


def project_and_cast(limits: LinfBall | L2Ball, point: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The image that an attack returns for `point`: inside `limits`, in the images' own dtype, a constant."""
    return jax.lax.stop_gradient(cast_inside(limits.clip(point), dtype, limits))


def _next(x: jax.Array, towards: jax.Array) -> jax.Array:
    """The next representable number, for which JAX has no derivative; no attack needs one."""
    return jnp.nextafter(*jax.lax.stop_gradient((x, towards)))


def input_gradient(loss_fn: LossFn, x: jax.Array) -> jax.Array:
    """Gradient of the summed per-example losses: each image's own gradient, whatever the batch around it.

    It may be differentiated again, as regularisers do.

    Raises:
      ValueError: if `loss_fn` does not return one loss per image.
    """
    return jax.grad(lambda z: per_image("loss_fn", loss_fn, z).sum())(x)


def losses_and_gradient(loss_fn: LossFn, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The losses `[N]` and their `input_gradient`, neither to be differentiated."""

    def total(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = per_image("loss_fn", loss_fn, z)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(x)
    return jax.lax.stop_gradient((losses, gradient))


def per_image(name: str, function: LossFn, x: jax.Array) -> jax.Array:
    """`function(x)`, one value per image, as the argument `name` promises."""
    values = function(x)
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"{name} returned shape {values.shape} for {x.shape[0]} images; it must return per-example losses, "
            f"shape ({x.shape[0]},), neither summed nor averaged"
        )
    return values


def broadcast(values: jax.Array, like: jax.Array) -> jax.Array:
    """`[N]` as `[N, 1, ...]`, to stand beside images."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def like_sharded(values: jax.Array, like: jax.Array) -> jax.Array:
    """A constant that inside shard_map may differ between devices where `like` may: what a loop starts from must."""
    return jnp.where((like != like).any(), values, values)  # the type is what counts; the compiler drops the choice


def per_image_keys(name: str, key: jax.Array, n: int) -> jax.Array:
    """One key per image, `[n]`, from one key or from n."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # a raw uint32 key of the older jax.random.PRNGKey
    if key.shape == (n,):
        return key
    if key.shape != ():
        raise ValueError(f"{name}: key has shape {key.shape}; it must be one key, or one for each of the {n} images")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
