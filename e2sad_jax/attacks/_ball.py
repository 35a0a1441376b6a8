"""The ball of images that an attack may return: projection, steepest direction, random points, rounding."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax.attacks._numerics import as_float32, finite, length, unit
from e2sad_jax.attacks._types import Bounds

NORMS = ("linf", "l2")


class LinfBall(NamedTuple):
    """The l-infinity ball around each image, cut to the image range.

    Attributes:
      lower: lowest value of every pixel, `[N, ...]`, float32 or wider.
      upper: highest value of every pixel, `[N, ...]`.
    """

    lower: jax.Array
    upper: jax.Array

    def project(self, x: jax.Array) -> jax.Array:
        """The point of the ball nearest to `x`, `[N, ...]`."""
        return jnp.clip(x, self.lower, self.upper)

    def contains(self, x: jax.Array) -> jax.Array:
        """Whether each image lies in the ball, so that `project` leaves it unchanged; bool `[N]`."""
        return ((x >= self.lower) & (x <= self.upper)).all(tuple(range(1, x.ndim)))

    def steepest(self, gradient: jax.Array) -> jax.Array:
        """The direction of norm 1 along which the loss rises fastest, `[N, ...]`."""
        return jnp.sign(finite(gradient))

    def sample(self, keys: jax.Array, like: jax.Array) -> jax.Array:
        """Uniform perturbations of norm at most 1, `[N, ...]`; image i is drawn from `keys[i]`."""
        return jax.vmap(lambda k: jax.random.uniform(k, like.shape[1:], like.dtype, -1, 1))(keys)


class L2Ball(NamedTuple):
    """The l2 ball around each image, cut to the image range.

    Attributes:
      center: the images, `[N, ...]`, float32 or wider.
      radius: of the balls, a number or `[N, 1, ...]`.
      bounds: the image range, or None.
    """

    center: jax.Array
    radius: jax.typing.ArrayLike
    bounds: Bounds

    def project(self, x: jax.Array) -> jax.Array:
        """A point of the ball for `x`, `[N, ...]`: first scaled onto the ball, then clipped to the range.

        Clipping brings every pixel nearer to the center, so the result is still in the ball.
        """
        radius, tiny = self._safe_radius(x), float(jnp.finfo(x.dtype).tiny)
        offset = x - self.center
        offset = offset * (radius / jnp.maximum(jnp.maximum(length(offset), radius), tiny))
        inside = self.center + offset
        # Many pixels that are each rounded outwards would add up.
        outwards = jnp.abs(inside - self.center) > jnp.abs(offset)
        inside = jnp.where(outwards, _next(inside, self.center), inside)
        return inside if self.bounds is None else jnp.clip(inside, *self.bounds)

    def _safe_radius(self, x: jax.Array) -> jax.typing.ArrayLike:
        """The radius, reduced by the rounding error of an image's l2 norm."""
        # A sum of D squares is rounded by about sqrt(D) roundings of one.
        return self.radius * (1 - float(jnp.finfo(x.dtype).eps) * (4 + math.sqrt(math.prod(x.shape[1:]))))

    def contains(self, x: jax.Array) -> jax.Array:
        """Whether each image lies in the ball, so that `project` leaves it unchanged; bool `[N]`."""
        inside = (length(x - self.center) <= self._safe_radius(x)).reshape(-1)
        if self.bounds is None:
            return inside
        return inside & ((x >= self.bounds[0]) & (x <= self.bounds[1])).all(tuple(range(1, x.ndim)))

    def steepest(self, gradient: jax.Array) -> jax.Array:
        """The direction of norm 1 along which the loss rises fastest, `[N, ...]`."""
        return unit(finite(gradient))

    def sample(self, keys: jax.Array, like: jax.Array) -> jax.Array:
        """Uniform perturbations of norm at most 1, `[N, ...]`; image i is drawn from `keys[i]`."""
        pairs = jax.vmap(jax.random.split)(keys)
        towards = unit(jax.vmap(lambda k: jax.random.normal(k, like.shape[1:], like.dtype))(pairs[:, 0]))
        share = jax.vmap(lambda k: jax.random.uniform(k, (1,) * (like.ndim - 1), like.dtype))(pairs[:, 1])
        return towards * share ** (1 / math.prod(like.shape[1:]))


class L0Ball(NamedTuple):
    """The images that differ from each image in few pixels, cut to the image range.

    Attributes:
      center: the images, `[N, ...]`, float32 or wider.
      radius: number of pixels that may differ, a number or `[N, 1, ...]`.
      bounds: the image range, or None.
    """

    center: jax.Array
    radius: jax.typing.ArrayLike
    bounds: Bounds

    def contains(self, x: jax.Array) -> jax.Array:
        """Whether each image lies in the ball; bool `[N]`."""
        count, channels = pixels_of(x.shape)
        differs = (x != self.center).reshape(len(x), count, channels).any(2).sum(1).astype(x.dtype)
        radius = jnp.asarray(self.radius, x.dtype)
        return (differs <= radius.reshape(-1)) & linf_ball(self.center, jnp.inf, self.bounds).contains(x)


def pixels_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of pixels and of channels of images of this shape: H W and C of `[N, H, W, C]`; of others every number is one."""
    return (shape[1] * shape[2], shape[3]) if len(shape) == 4 else (math.prod(shape[1:]), 1)


Ball = LinfBall | L2Ball


def ball(norm: str, x: jax.Array, eps: jax.typing.ArrayLike, bounds: Bounds) -> Ball:
    """The ball of radius `eps` around each image in `norm` ("linf" or "l2"), cut to `bounds`, both as `Checked` has them."""
    return linf_ball(x, eps, bounds) if norm == "linf" else L2Ball(as_float32(x), eps, bounds)


def linf_ball(x: jax.Array, eps: jax.typing.ArrayLike, bounds: Bounds) -> LinfBall:
    """The l-infinity ball of radius `eps` around each image, cut to `bounds` (`clamp` in Eq. 2), as `Checked` has them."""
    x = as_float32(x)
    lower, upper = x - eps, x + eps
    if bounds is not None:
        lower, upper = jnp.maximum(lower, bounds[0]), jnp.minimum(upper, bounds[1])
    return LinfBall(lower, upper)


def cast_inside(x: jax.Array, dtype: jnp.dtype, limits: Ball) -> jax.Array:
    """Casts points of the ball to `dtype`; where rounding leaves the ball, takes the next number inside."""
    if isinstance(limits, L2Ball):  # no pixel farther from the image than it was
        limits = LinfBall(jnp.minimum(x, limits.center), jnp.maximum(x, limits.center))
    result = x.astype(dtype)
    if jnp.finfo(dtype).bits >= 32:
        return result
    infinity = jnp.asarray(jnp.inf, dtype)
    result = jnp.where(as_float32(result) > limits.upper, _next(result, -infinity), result)
    return jnp.where(as_float32(result) < limits.lower, _next(result, infinity), result)


def project_and_cast(limits: Ball, point: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The image that an attack returns for `point`: in the ball, in the images' own dtype, without a gradient."""
    return jax.lax.stop_gradient(cast_inside(limits.project(point), dtype, limits))


def _next(x: jax.Array, towards: jax.Array) -> jax.Array:
    """The next representable number. JAX has no derivative for it, and no attack needs one."""
    return jnp.nextafter(*jax.lax.stop_gradient((x, towards)))
