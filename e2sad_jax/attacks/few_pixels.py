"""Few pixels by differential evolution: the one-pixel attack, from the network's outputs alone."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax import _arguments
from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._ball import linf_ball, pixels_of, project_and_cast
from e2sad_jax.attacks._numerics import as_float32, like_sharded, per_image, per_image_keys, select
from e2sad_jax.attacks._types import Bounds, LossFn

IMAGES = 1024  # that the network sees at once


class _State(NamedTuple):
    genes: jax.Array  # [population, N, pixels, axes + channels], in [0, 1]
    loss: jax.Array  # [population, N]
    done: jax.Array  # bool [N]


def few_pixels(
    key: jax.Array,
    loss_fn: LossFn,
    x: jax.Array,
    *,
    pixels: int = 1,
    population: int = 400,
    steps: int = 100,
    differential: float = 0.5,
    misclassified_fn: LossFn | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """One-pixel attack, with one or more pixels: a search by differential evolution that uses no gradients.

    A candidate is a place and a colour for each of the `pixels`, which replace those of the image. In each generation every
    candidate i has a child

        c_i = c_r1 + F (c_r2 - c_r3)

    of three candidates, drawn at random and distinct, without crossover. The child replaces it if its loss is higher. Places
    are uniform at first, colours normal around the middle of the range; what leaves the range is clipped, a place reflected.

    With more than one pixel the search is far from exhaustive: where it finds nothing, `greedy_l0` often does. With three, 400
    generations come within 5% of the best on average, of a linear model of MNIST, 100 within 25%. It takes
    `population * (steps + 1)` forward passes.

    Args:
      key: one random key, or keys `[N]`, one per image. With keys per image the result of an image does not depend on
        its place in the batch nor on the batch around it.
      loss_fn: images `[N, ...]` to losses `[N]`, to be maximised: the cross-entropy of the label, or the negative one of a
        target. It need not be differentiable, and is called under `vmap`.
      x: images `[N, H, W, C]`, floating point, inside `bounds`. A pixel is a place with all of its C channels. Images of
        another number of axes have none: each number is a pixel.
      pixels: number of pixels that may change, at least 0.
      population: number of candidates, at least 3.
      steps: number of generations, at least 1.
      differential: F, at least 0.
      misclassified_fn: images `[N, ...]` to bool `[N]`. An image whose best candidate is misclassified is done, and when all
        are, the attack ends. None: it runs to the end.
      bounds: range of valid images, finite; the attack needs one.

    Returns:
      Images, same shape and dtype as `x`: the candidate of the highest loss, or the image itself where none is higher. No
      gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point, or `key` is no random key.
      ValueError: if an argument is out of range, `bounds` is None, `key` has neither one key nor N, or `loss_fn` does not
        return one value per image.

    Reference: Su et al., 2019, https://arxiv.org/abs/1710.08864
    """
    x, _, _, checked = _checks.threat_model("few_pixels", x, bounds=bounds, steps=steps)
    _arguments.count("few_pixels: pixels", pixels, least=0)
    _arguments.count("few_pixels: population", population, least=3)
    _checks.number("few_pixels", "differential", differential)
    _checks.finite_range("few_pixels", bounds, checked, "it draws colours from the range")
    x = jax.lax.stop_gradient(x)
    n, count, channels = len(x), *pixels_of(x.shape)
    keys, pixels = per_image_keys("few_pixels", key, n), min(pixels, count)
    if not n or not pixels:  # nothing to draw
        return x
    everywhere, dtype = linf_ball(x, jnp.inf, checked), as_float32(x).dtype
    lower, upper = (jnp.broadcast_to(end, x.shape).reshape(n, count, channels) for end in everywhere)
    clean = as_float32(x).reshape(n, count, channels)
    sizes = x.shape[1:3] if x.ndim == 4 else x.shape[1:] or (1,)
    axes = len(sizes)
    shape = (population, pixels, axes + channels)
    together = max(i for i in range(1, population + 1) if population % i == 0 and i <= max(1, IMAGES // n))

    def image(genes: jax.Array) -> jax.Array:
        """The images of one candidate each, `[N, pixels, axes + channels]`."""

        def paint(own: jax.Array, low: jax.Array, high: jax.Array, genes: jax.Array) -> jax.Array:
            scaled = (genes[:, :axes] * jnp.asarray(sizes, dtype)[None]).astype(jnp.int32)
            place = jnp.minimum(scaled, jnp.asarray(sizes, jnp.int32)[None] - 1)
            flat = (place * jnp.asarray([math.prod(sizes[i + 1 :]) for i in range(axes)], jnp.int32)[None]).sum(1)
            # Of two at one place the later one is seen.
            top = jnp.zeros(count, jnp.int32).at[flat].max(jnp.arange(1, pixels + 1, dtype=jnp.int32))[:, None]
            colours = low + (high - low) * jnp.take(genes[:, axes:], jnp.maximum(top[:, 0] - 1, 0), axis=0)
            return jnp.where(top > 0, colours, own)

        return project_and_cast(everywhere, jax.vmap(paint)(clean, lower, upper, genes).reshape(x.shape), x.dtype)

    def loss(z: jax.Array) -> jax.Array:
        values = as_float32(jax.lax.stop_gradient(per_image("loss_fn", loss_fn, z)))
        return jnp.where(jnp.isnan(values), -jnp.inf, values)

    def losses(genes: jax.Array) -> jax.Array:
        return jax.lax.map(lambda g: loss(image(g)), genes, batch_size=together)

    def best(s: _State) -> jax.Array:
        i = s.loss.argmax(0)
        return image(jnp.take_along_axis(s.genes, i.reshape(1, n, 1, 1), 0)[0])

    def judged(genes: jax.Array, loss: jax.Array, done: jax.Array) -> _State:
        s = _State(genes, loss, done)
        if misclassified_fn is None:
            return s
        wrong = misclassified_fn(best(s)).astype(bool) & (loss.max(0) > unchanged)
        return s._replace(done=done | wrong)

    def generation(i: int | jax.Array, s: _State) -> _State:
        parents = jax.vmap(lambda k: _three(jax.random.fold_in(k, i), population), out_axes=2)(rest)
        one, two, three = (jnp.take_along_axis(s.genes, r[:, :, None, None], 0) for r in parents)
        children = one + differential * (two - three)
        children = jnp.concatenate(
            [1 - jnp.abs(1 - jnp.abs(children[..., :axes])), children[..., axes:]], axis=-1
        ).clip(0, 1)
        found = losses(children)
        better = (found > s.loss) & ~s.done[None]
        genes = jnp.where(better[:, :, None, None], children, s.genes)
        return judged(genes, jnp.where(better, found, s.loss), s.done)

    def first(key: jax.Array) -> jax.Array:
        places, colours = jax.random.split(key)
        return jnp.concatenate(
            [
                jax.random.uniform(places, (*shape[:2], axes), dtype),
                (jax.random.normal(colours, (*shape[:2], channels), dtype) / 2 + 0.5).clip(0, 1),
            ],
            axis=-1,
        )

    pairs = jax.vmap(jax.random.split)(keys)
    rest, unchanged = pairs[:, 1], loss(x)
    genes = jax.vmap(first, out_axes=1)(pairs[:, 0])
    already = like_sharded(jnp.zeros(n, bool), x) if misclassified_fn is None else misclassified_fn(x).astype(bool)
    start = judged(genes, losses(genes), already)
    end = _loops.repeat_while(lambda s: ~s.done.all(), steps, generation, start)
    return jax.lax.stop_gradient(select((end.loss.max(0) > unchanged) & ~already, best(end), x))


def _three(key: jax.Array, population: int) -> jax.Array:
    """Three distinct candidates for each child, `[3, population]`."""
    draws = jax.random.uniform(key, (3, population))
    most = population - jnp.arange(3, dtype=jnp.int32)[:, None]
    a, b, c = jnp.minimum((draws * most.astype(draws.dtype)).astype(jnp.int32), most - 1)
    b = b + (b >= a).astype(b.dtype)  # the others than a, in order
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    c = c + (c >= low).astype(c.dtype)
    return jnp.stack([a, b, c + (c >= high).astype(c.dtype)])
