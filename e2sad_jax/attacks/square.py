"""Square Attack: random search, with no gradient at all."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax.attacks import _ball, _loops
from e2sad_jax.attacks._worst import select

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of p, in queries of 10,000


class _State(NamedTuple):
    image: jax.Array
    margin: jax.Array


def sides(queries: int, p_init: float, height: int, width: int) -> list[int]:
    """Side of the square that each query after the first changes: its area is a share p of the image's."""
    result = []
    for i in range(queries - 1):
        p = p_init / 2 ** sum(i * 10_000 // queries > halving for halving in HALVINGS)
        result.append(min(max(round(math.sqrt(p * height * width)), 1), height, width))
    return result


def square(
    key: jax.Array,
    margin_fn: _ball.LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    queries: int = 5000,
    p_init: float = 0.8,
    bounds: _ball.Bounds | None = (0.0, 1.0),
) -> jax.Array:
    """Square Attack in the l-infinity ball: what only looks at the network's outputs.

    The first query adds vertical stripes of width 1, for each channel of random sign and height eps. Each further one
    adds a square at a random place, 2 eps or -2 eps in each channel, projected onto the ball, and keeps it if the
    margin rises. The squares shrink by the paper's schedule, stretched to the number of queries. An image that is
    misclassified changes no more, one that is so from the start not at all; when all are, the attack ends.

    It finds what a network hides from `pgd` by gradients that are zero or misleading, at the price of many queries.

    Args:
      key: one random key, or keys `[N]`, one per image. With keys per image the result of an image does not depend on
        its place in the batch nor on the batch around it.
      margin_fn: images `[N, H, W, C]` to `[N]`, to be maximised, above 0 where the image is misclassified:
        `lambda z: losses.margin(logits_fn(z), labels)`. It need not be differentiable.
      x: images `[N, H, W, C]`, floating point, inside `bounds`.
      eps: l-infinity budget, at least 0, in the images' own units.
      queries: number of calls of `margin_fn`, at least 1; one more looks at `x` itself.
      p_init: share of the image that the first squares cover, above 0, at most 1.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Adversarial images, same shape and dtype as `x`, within `eps` of it; no gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if `x` is not `[N, H, W, C]`, a budget is out of range, `key` has neither one key nor N, or
        `margin_fn` does not return one value per image.

    Reference: Andriushchenko et al., 2020, https://arxiv.org/abs/1912.00049
    """
    _ball.check_images("square", x)
    _ball.check_number("square", "eps", eps)
    _ball.check_steps("square", "queries", queries)
    _ball.check_bounds("square", bounds)
    if x.ndim != 4:
        raise ValueError(f"square: images have shape {x.shape}; squares need a height and a width, [N, H, W, C]")
    if not 0 < p_init <= 1:
        raise ValueError(f"square: p_init={p_init}; it must lie in (0, 1], the paper takes 0.8 (l-infinity)")
    x = jax.lax.stop_gradient(x)
    n, height, width, channels = x.shape
    keys = _ball.per_image_keys("square", key, n)
    limits, clean = _ball.box(x, eps, bounds), _ball.widen(x)
    side = jnp.asarray(np.array([*sides(queries, p_init, height, width), 1], np.int32))

    def signs(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.vmap(lambda k: jax.random.rademacher(k, shape, clean.dtype))(keys)

    def look(image: jax.Array) -> _State:
        margin = jax.lax.stop_gradient(_ball.per_image("margin_fn", margin_fn, image))
        return _State(image, jnp.where(jnp.isnan(margin), -jnp.inf, margin).astype(clean.dtype))

    def moved(image: jax.Array, pattern: jax.Array, size: jax.typing.ArrayLike) -> _State:
        return look(_ball.narrow(limits.clip(_ball.widen(image) + pattern * size), x.dtype, limits))

    def within(first: jax.Array, size: jax.Array, length: int) -> jax.Array:
        """Which of `length` rows or columns a square of `size` covers, bool `[N, length]`."""
        places = jnp.arange(length)[None]
        return (places >= first[:, None]) & (places < first[:, None] + size)

    def query(i: int | jax.Array, s: _State) -> _State:
        draws = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, i), 3))(own)
        top, left = (
            jax.vmap(lambda k, room: jax.random.randint(k, (), 0, room), (0, None))(draws[:, j], length + 1 - side[i])
            for j, length in enumerate((height, width))
        )
        covered = within(top, side[i], height)[:, :, None, None] & within(left, side[i], width)[:, None, :, None]
        tried = moved(s.image, signs(draws[:, 2], (1, 1, channels)) * covered.astype(clean.dtype), 2 * eps)
        return select((s.margin <= 0) & (tried.margin > s.margin), tried, s)

    def unfinished(s: _State) -> jax.Array:
        return (s.margin <= 0).any()

    pairs = jax.vmap(jax.random.split)(keys)
    own, untouched = pairs[:, 1], look(x)
    striped = moved(x, signs(pairs[:, 0], (1, width, channels)), eps)
    start = select(untouched.margin <= 0, striped, untouched)
    return jax.lax.stop_gradient(_loops.repeat_while(unfinished, queries - 1, query, start).image)
