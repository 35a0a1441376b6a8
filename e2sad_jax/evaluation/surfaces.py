"""Loss surfaces: the loss around images, along an attack's direction and one orthogonal to it (Appendix A.2, A.3).

Works with any loss from images `[N, ...]` to `[N]`, as the attacks do:

>>> import jax, jax.numpy as jnp
>>> from e2sad_jax import attacks
>>> loss_fn = lambda x: (x**2).sum(axis=(1, 2))
>>> x = jax.random.uniform(jax.random.key(0), (3, 4, 4))
>>> g1, g2 = directions(x, attacks.fgsm(loss_fn, x, eps=0.1), jax.random.key(1))
>>> t = jnp.linspace(0, 0.4, 5)
>>> loss_surface(loss_fn, x, g1, g2, t, t).shape
(5, 5, 3)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import core


def directions(
    x: jax.Array, x_adv: jax.Array, key: jax.Array | None = None, *, towards: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes the two directions of the loss surfaces of Figures 3 and 4 for each image.

    g1 = sign(x_adv - x), and g2 orthogonal to it. The paper leaves g2 open. Here it is either drawn at random, g1 with
    the signs of half of its pixels flipped: then both are made of -1, 0 and 1, t is an l-infinity distance along either,
    and they are orthogonal exactly. (Of an odd number of pixels that moved, one is left out of g2.) Or it is the part
    of `towards` that is orthogonal to g1, made as long as g1.

    Args:
      x: images `[N, ...]`, floating point.
      x_adv: adversarial images, same shape.
      key: random key for g2, or one for each image; not needed with `towards`.
      towards: a displacement of the same shape, say e2SAD's second step, whose orthogonal part is to be g2.

    Returns:
      g1 and g2, `[N, ...]`, float32 at least. Both are zero for an image that the attack left alone; with `towards`, g2
      is zero where that is parallel to g1.

    Raises:
      ValueError: if shapes differ, or neither `key` nor `towards` is given.
    """
    core.checks.images("directions", x)
    for name, other in (("x_adv", x_adv), ("towards", towards)):
        if other is not None and other.shape != x.shape:
            raise ValueError(f"directions: {name} has shape {other.shape}; it must be that of x, {x.shape}")
    n = x.shape[0]
    g1 = jnp.sign(core.as_float32(x_adv) - core.as_float32(x)).reshape(n, -1)
    if towards is not None:
        length = (g1**2).sum(-1, keepdims=True)
        along = core.as_float32(towards).reshape(n, -1)
        rest = along - (along * g1).sum(-1, keepdims=True) / jnp.maximum(length, 1) * g1
        size = (rest**2).sum(-1, keepdims=True)
        # What rounding leaves of a parallel direction is no direction.
        real = size > 1e-10 * (along**2).sum(-1, keepdims=True)
        g2 = jnp.where(real, rest * jnp.sqrt(length / jnp.where(real, size, 1)), 0)
    elif key is not None:
        # Pixels that moved, in random order: the first half keeps its sign, the second half turns.
        keys = core.per_image_keys("directions", key, n)
        draw = jnp.where(g1 != 0, jax.vmap(lambda k: jax.random.uniform(k, g1.shape[1:]))(keys), 2.0)
        place = jnp.argsort(jnp.argsort(draw, axis=-1), axis=-1)
        half = (jnp.abs(g1) > 0).sum(-1, keepdims=True) // 2
        g2 = jnp.where(place < half, g1, jnp.where(place < 2 * half, -g1, 0))
    else:
        raise ValueError("directions: g2 needs key, a random key, or towards, a displacement [N, ...]")
    return g1.reshape(x.shape), g2.reshape(x.shape)


def coordinates(displacement: jax.Array, g1: jax.Array, g2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the coordinates (t1, t2) of displacements in the plane of g1 and g2.

    Args:
      displacement: from the clean images, `[N, ...]`.
      g1: first direction, `[N, ...]`.
      g2: second direction, orthogonal to g1, `[N, ...]`.

    Returns:
      t1 and t2, `[N]`; 0 along a direction that is zero.
    """
    n = displacement.shape[0]
    flat = core.as_float32(displacement).reshape(n, -1)

    def along(g: jax.Array) -> jax.Array:
        g = g.reshape(n, -1)
        return (flat * g).sum(-1) / jnp.maximum((g**2).sum(-1), 1e-12)

    return along(g1), along(g2)


def loss_surface(
    loss_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    g1: jax.Array,
    g2: jax.Array,
    t1: jax.Array,
    t2: jax.Array,
    *,
    bounds: tuple[float, float] | None = None,
) -> jax.Array:
    """Computes the loss at x + t1 g1 + t2 g2, for each image and each pair of t1 and t2.

    Args:
      loss_fn: images `[N, ...]` to per-example losses `[N]`.
      x: images `[N, ...]`, floating point.
      g1: first direction, `[N, ...]`.
      g2: second direction, `[N, ...]`.
      t1: `[T1]`, distances along g1.
      t2: `[T2]`, distances along g2.
      bounds: range to clip the images to. None, as in the paper: they leave it.

    Returns:
      `[T1, T2, N]`; the paper's surface is the sum over N. `T2 * N` images go through `loss_fn` at once.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if `bounds` is out of order.
    """
    core.checks.threat_model("loss_surface", x, bounds=bounds)

    def loss(a: jax.Array, b: jax.Array) -> jax.Array:
        z = core.as_float32(x) + a * g1 + b * g2
        return loss_fn((z if bounds is None else jnp.clip(z, *bounds)).astype(x.dtype))

    return core.each(t1, lambda a: jax.vmap(lambda b: loss(a, b))(t2))
