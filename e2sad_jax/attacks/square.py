"""Square Attack: random search, with no gradient at all."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._ball import ball, project_and_cast
from e2sad_jax.attacks._numerics import as_float32, length, per_image, per_image_keys, select, unit
from e2sad_jax.attacks._types import Bounds, LossFn

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of p, in queries of 10,000
LEAST = {"linf": 1, "l2": 3}  # side of a square
TILES = 5  # along the shorter side, of the first query in the l2 ball


class _State(NamedTuple):
    image: jax.Array
    margin: jax.Array


def sides(queries: int, p_init: float, height: int, width: int, norm: str = "linf") -> list[int]:
    """Side of the square that each query after the first changes: its area is a share p of the image's.

    Args:
      queries: number of queries, the first included.
      p_init: p of the first squares.
      height: of the image.
      width: of the image.
      norm: "linf" or "l2". In the l2 ball a side is odd, as in the authors' code, unless the image is smaller: its hill
        then has a middle.

    Returns:
      The sides, `queries - 1` of them.
    """
    result = []
    for i in range(queries - 1):
        counted = i * 10_000 // queries if norm == "linf" else i
        p = p_init / 2 ** sum(counted > halving for halving in HALVINGS)
        side = max(round(math.sqrt(p * height * width)), LEAST[norm])
        if norm == "l2":
            side += 1 - side % 2
        result.append(min(side, height, width))
    return result


def window(side: int) -> np.ndarray:
    """The change of an l2 square, `[side, side]` at length 1 (Eq. 2): a hill in one half, a pit in the other."""

    def hill(height: int, width: int) -> np.ndarray:
        n = height // 2
        away = np.maximum(np.abs(np.arange(height) - n)[:, None], np.abs(np.arange(width) - width // 2)[None])
        terms = np.array([1 / (n + 1 - k) ** 2 for k in range(n + 1)])
        return np.cumsum(terms)[n - away]

    half = side // 2
    both = np.concatenate([hill(side, half), -hill(side, side - half)], axis=1)
    return both / np.sqrt((both**2).sum())


def square(
    key: jax.Array,
    margin_fn: LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    queries: int = 5000,
    p_init: float = 0.8,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Square Attack: a random search that uses the network's outputs and no gradients.

    In the l-infinity ball the first query adds vertical stripes of width 1, for each channel of random sign and height
    eps. Each further one adds a square at a random place, 2 eps or -2 eps in each channel, projected onto the ball.

    In the l2 ball the first query is a grid of squares of random signs, at length eps. Each further one takes the change
    out of a square W2 at a random place and gives its length, with what the ball has left, to another one, W1 (the
    paper's Algorithm 3): there, in each channel, it becomes as long as that allows along

        +- h + v / ||v||_2

    with v the change so far and h a hill and a pit side by side, upright or lying. The whole change is then made eps long,
    as in the authors' code: what the range of images has cut off is used elsewhere.

    What is tried is kept if the margin rises. The squares shrink by the paper's schedule. It is for 10,000 queries. In the
    l-infinity ball it is scaled to the number of queries, as the paper has it. AutoAttack's code scales it in neither ball.
    In the l2 ball it is not scaled here, either: there large squares find more. An image that is misclassified changes no
    more, one that is so from the start not at all; when all are, the attack ends.

    It finds what a network hides from `pgd` by gradients that are zero or misleading, at the price of many queries.

    Args:
      key: one random key, or keys `[N]`, one per image. With keys per image the result of an image does not depend on
        its place in the batch nor on the batch around it.
      margin_fn: images `[N, H, W, C]` to `[N]`, to be maximised, above 0 where the image is misclassified:
        `lambda z: losses.margin(logits_fn(z), labels)`. It need not be differentiable.
      x: images `[N, H, W, C]`, floating point, inside `bounds`.
      eps: budget in `norm`, at least 0, in the images' own units.
      queries: number of calls of `margin_fn`, at least 1; one more looks at `x` itself.
      p_init: share of the image that the first squares cover, above 0, at most 1.
      norm: "linf" or "l2", of each image's perturbation.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Adversarial images, same shape and dtype as `x`, within `eps` of it; no gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if `x` is not `[N, H, W, C]`, a budget is out of range, `norm` is unknown, `key` has neither one key nor
        N, or `margin_fn` does not return one value per image.

    Reference: Andriushchenko et al., 2020, https://arxiv.org/abs/1912.00049
    """
    x, eps, _, bounds = _checks.threat_model("square", x, eps=eps, norm=norm, bounds=bounds, queries=queries)
    if x.ndim != 4:
        raise ValueError(f"square: images have shape {x.shape}; squares need a height and a width, [N, H, W, C]")
    if not 0 < p_init <= 1:
        raise ValueError(f"square: p_init={p_init}; it must lie in (0, 1], AutoAttack takes 0.8")
    if not len(x):  # nothing that a model could be asked
        return x
    x = jax.lax.stop_gradient(x)
    n, height, width, _ = x.shape
    keys = per_image_keys("square", key, n)
    limits, clean = ball(norm, x, eps, bounds), as_float32(x)
    size = sides(queries, p_init, height, width, norm)
    first, further = (_stripes, _squares) if norm == "linf" else (_tiles, _hills)
    change = further(clean, eps, size)

    def look(image: jax.Array) -> _State:
        margin = jax.lax.stop_gradient(per_image("margin_fn", margin_fn, image))
        return _State(image, jnp.where(jnp.isnan(margin), -jnp.inf, margin).astype(clean.dtype))

    def tried(point: jax.Array) -> _State:
        return look(project_and_cast(limits, point, x.dtype))

    def query(i: int | jax.Array, s: _State) -> _State:
        new = tried(change(i, jax.vmap(jax.random.fold_in, (0, None))(own, i), as_float32(s.image)))
        return select((s.margin <= 0) & (new.margin > s.margin), new, s)

    def unfinished(s: _State) -> jax.Array:
        return (s.margin <= 0).any()

    pairs = jax.vmap(jax.random.split)(keys)
    own, untouched = pairs[:, 1], look(x)
    start = select(untouched.margin <= 0, tried(first(pairs[:, 0], clean, eps)), untouched)
    return jax.lax.stop_gradient(_loops.repeat_while(unfinished, queries - 1, query, start).image)


Further = Callable[[int | jax.Array, jax.Array, jax.Array], jax.Array]  # number, keys [N] and image: what to try


def _signs(keys: jax.Array, shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """-1 or 1, the same whether JAX is set to 32 or 64 bits, as `jax.random.rademacher` is not."""
    positive = jax.vmap(lambda k: jax.random.bernoulli(k, jnp.float32(0.5), shape))(keys)
    return jnp.where(positive, 1, -1).astype(like.dtype)


def _places(keys: jax.Array, size: jax.Array, length: int) -> jax.Array:
    """Where along `length` rows or columns a square of `size` begins, `[N]`."""
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, length + 1 - size, jnp.int32))(keys)


def _covered(top: jax.Array, left: jax.Array, size: jax.Array, like: jax.Array) -> jax.Array:
    """Which pixels a square covers, `[N, H, W, 1]`, 0 or 1."""

    def within(first: jax.Array, length: int) -> jax.Array:
        places = jnp.arange(length)[None]
        return (places >= first[:, None]) & (places < first[:, None] + size)

    inside = within(top, like.shape[1])[:, :, None, None] & within(left, like.shape[2])[:, None, :, None]
    return inside.astype(like.dtype)


def _stripes(keys: jax.Array, clean: jax.Array, eps: jax.typing.ArrayLike) -> jax.Array:
    return clean + eps * _signs(keys, (1, *clean.shape[2:]), clean)


def _squares(clean: jax.Array, eps: jax.typing.ArrayLike, size: list[int]) -> Further:
    """Algorithm 2: a square of one colour."""
    side = jnp.asarray(np.array([*size, 1], np.int32))
    _, height, width, channels = clean.shape

    def change(i: int | jax.Array, keys: jax.Array, image: jax.Array) -> jax.Array:
        draws = jax.vmap(lambda k: jax.random.split(k, 3))(keys)
        top, left = _places(draws[:, 0], side[i], height), _places(draws[:, 1], side[i], width)
        pattern = _signs(draws[:, 2], (1, 1, channels), clean) * _covered(top, left, side[i], clean)
        return image + pattern * (2 * eps)

    return change


def _tiles(keys: jax.Array, clean: jax.Array, eps: jax.typing.ArrayLike) -> jax.Array:
    _, height, width, channels = clean.shape
    side = max(min(height, width) // TILES, 1)
    rows, columns = height // side, width // side
    grid = jnp.asarray(np.tile(window(side), (rows, columns))[None, :, :, None], clean.dtype)
    signs = _signs(keys, (rows, columns, channels), clean).repeat(side, 1).repeat(side, 2)
    top, left = height - rows * side, width - columns * side
    around = ((0, 0), (top // 2, top - top // 2), (left // 2, left - left // 2), (0, 0))
    return clean + eps * unit(jnp.pad(signs * grid, around))


def _hills(clean: jax.Array, eps: jax.typing.ArrayLike, size: list[int]) -> Further:
    """Algorithm 3: the length of the change moves from one square to another."""
    _, height, width, channels = clean.shape
    kinds = sorted({*size, 1})
    table = np.zeros((len(kinds), 2, height, width))
    for kind, one in zip(table, kinds, strict=True):
        kind[0, :one, :one] = window(one)
        kind[1, :one, :one] = window(one).T
    windows, side = jnp.asarray(table, clean.dtype), jnp.asarray(np.array(kinds, np.int32))
    which = jnp.asarray(np.array([*[kinds.index(one) for one in size], 0], np.int32))

    def by_channel(part: jax.Array) -> jax.Array:
        """The l2 norm of each channel, `[N, 1, 1, C]`."""
        return jnp.sqrt(jnp.square(part).sum((1, 2), keepdims=True))

    def unit_by_channel(part: jax.Array) -> jax.Array:
        long = by_channel(part)
        return part / jnp.where(long > 0, long, 1)

    def change(i: int | jax.Array, keys: jax.Array, image: jax.Array) -> jax.Array:
        now, edge = image - clean, side[which[i]]
        draws = jax.vmap(lambda k: jax.random.split(k, 6))(keys)
        tops, lefts = ([_places(draws[:, j + k], edge, m) for j in (0, 1)] for k, m in ((0, height), (2, width)))
        to, source = (_covered(top, left, edge, clean) for top, left in zip(tops, lefts, strict=True))
        lying = jax.vmap(lambda k: jax.random.randint(k, (), 0, 2, jnp.int32))(draws[:, 4])
        hill = jax.vmap(lambda kind, *place: jnp.roll(windows[which[i], kind], place, (0, 1)))(lying, tops[0], lefts[0])
        towards = unit_by_channel(
            _signs(draws[:, 5], (1, 1, channels), clean) * hill[..., None] + unit_by_channel(now * to)
        )
        left_over = jnp.maximum(jnp.square(jnp.asarray(eps, clean.dtype)) - jnp.square(length(now)), 0)
        available = jnp.sqrt(jnp.square(by_channel(now * jnp.maximum(to, source))) + left_over / channels)
        return clean + eps * unit(now * (1 - jnp.maximum(to, source)) + towards * available)

    return change
