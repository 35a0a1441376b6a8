"""The search of c in ||x' - x||^2 + c loss(x'), image by image, and the nearest image that it comes upon."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _loops
from e2sad_jax.attacks._numerics import broadcast, like_sharded


class Nearest(NamedTuple):
    """The nearest image so far that fooled the network, and whether one did under the present c.

    Attributes:
      image: `[N, ...]`.
      distance: its square, `[N]`, infinite where there is none.
      fooled: bool `[N]`.
    """

    image: jax.Array
    distance: jax.Array
    fooled: jax.Array

    def keep(self, image: jax.Array, distance: jax.Array, fooled: jax.Array) -> "Nearest":
        """Takes `image` where it fools the network and is nearer."""
        nearer = fooled & (distance < self.distance)
        return Nearest(
            jnp.where(broadcast(nearer, image), image, self.image),
            jnp.where(nearer, distance, self.distance),
            self.fooled | fooled,
        )


class _Search(NamedTuple):
    """Per image: tried in vain up to `low`, with success from `high`."""

    c: jax.Array
    low: jax.Array
    high: jax.Array


def search_c(
    attempt: Callable[[jax.Array, Nearest], Nearest],
    x: jax.Array,
    already: jax.Array,
    *,
    initial_c: float,
    tries: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """Tries `tries` values of c: from `initial_c` ten times larger until the image is fooled, then by bisection.

    Args:
      attempt: minimises under c `[N]`, and updates the nearest images, of which none has fooled yet.
      x: images `[N, ...]`.
      already: which fool the network as they are, bool `[N]`.
      initial_c: first c.
      tries: number of values.
      dtype: of c and distances.

    Returns:
      The nearest images, `[N, ...]`; that of `x` where there is none.
    """

    def search(_: int | jax.Array, state: tuple[_Search, Nearest]) -> tuple[_Search, Nearest]:
        (c, low, high), nearest = state
        nearest = attempt(c, nearest._replace(fooled=like_sharded(jnp.zeros(len(x), bool), x)))
        low, high = jnp.where(nearest.fooled, low, c), jnp.where(nearest.fooled, c, high)
        return _Search(jnp.where(jnp.isfinite(high), (low + high) / 2, 10 * c), low, high), nearest

    def filled(value: float) -> jax.Array:
        return like_sharded(jnp.full(len(x), value, dtype), x)

    nearest = Nearest(x, jnp.where(already, 0, filled(jnp.inf)), already)
    whole = (_Search(filled(initial_c), filled(0), filled(jnp.inf)), nearest)
    return _loops.repeat_long(tries, search, whole)[1].image
