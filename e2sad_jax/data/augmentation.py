"""Random changes of training images that keep their class: pure functions of a key, on the device, inside `jit`.

>>> import jax
>>> import jax.numpy as jnp
>>> from e2sad_jax.data import augmentation
>>> crop_key, flip_key = jax.random.split(jax.random.key(0))
>>> x = jnp.ones((8, 32, 32, 3))
>>> x = augmentation.flip(flip_key, augmentation.pad_and_crop(crop_key, x, padding=4))
>>> x.shape
(8, 32, 32, 3)
"""

import dataclasses

import jax
import jax.numpy as jnp

from e2sad_jax import _arguments

NAMES = ("crop", "flip", "cutout")


def pad_and_crop(key: jax.Array, x: jax.Array, *, padding: int = 4) -> jax.Array:
    """Pads images with zeros and cuts one of their size out at a random place.

    Args:
      key: one random key.
      x: images `[N, H, W, C]`.
      padding: pixels on each side, at least 1; an image moves by at most so many in each direction.

    Returns:
      Images, same shape and dtype.

    Raises:
      ValueError: if `x` has another number of axes or `padding` is below 1.
    """
    return _shifted(_checked("pad_and_crop", x, padding=padding), _offsets(key, len(x), padding), padding)


def flip(key: jax.Array, x: jax.Array) -> jax.Array:
    """Mirrors images left to right, each with probability 1/2.

    Args:
      key: one random key.
      x: images `[N, H, W, C]`.

    Returns:
      Images, same shape and dtype.

    Raises:
      ValueError: if `x` has another number of axes.
    """
    return _mirrored(_checked("flip", x), jax.random.bernoulli(key, shape=(len(x),)))


def cutout(key: jax.Array, x: jax.Array, *, size: int = 8) -> jax.Array:
    """Sets a square of each image to 0. Its centre is any pixel, so that it may reach beyond the image.

    Args:
      key: one random key.
      x: images `[N, H, W, C]`.
      size: side of the square in pixels, at least 1.

    Returns:
      Images, same shape and dtype.

    Raises:
      ValueError: if `x` has another number of axes or `size` is below 1.

    Reference: DeVries & Taylor, 2017, https://arxiv.org/abs/1708.04552
    """
    return _cut(_checked("cutout", x, size=size), _centres(key, x), size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn for a batch: where each image is cut out, whether it is mirrored, where its hole is; None: not at all."""

    offsets: jax.Array | None
    mirrored: jax.Array | None
    centres: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Several augmentations, in the order of `NAMES`, and what they do to a perturbation of each image.

    Attributes:
      names: of `NAMES`.
      padding: as of `pad_and_crop`.
      size: as of `cutout`.
    """

    names: tuple[str, ...] = ()
    padding: int = 4
    size: int = 8

    def draw(self, key: jax.Array, x: jax.Array) -> Drawn:
        """Draws what happens to each image of `x` `[N, H, W, C]`."""
        crop, mirror, hole = jax.random.split(key, 3)
        return Drawn(
            _offsets(crop, len(x), self.padding) if "crop" in self.names else None,
            jax.random.bernoulli(mirror, shape=(len(x),)) if "flip" in self.names else None,
            _centres(hole, x) if "cutout" in self.names else None,
        )

    def apply(self, drawn: Drawn, x: jax.Array) -> jax.Array:
        """The augmented images of `x` `[N, H, W, C]`, in its dtype."""
        x = self.moved(drawn, x)
        return x if drawn.centres is None else _cut(x, drawn.centres, self.size)

    def moved(self, drawn: Drawn, values: jax.Array) -> jax.Array:
        """What belongs to pixels, `[N, H, W, C]`, at the places that they have in the augmented images; 0 where none was."""
        if drawn.offsets is not None:
            values = _shifted(values, drawn.offsets, self.padding)
        return values if drawn.mirrored is None else _mirrored(values, drawn.mirrored)

    def moved_back(self, drawn: Drawn, values: jax.Array, kept: jax.Array) -> jax.Array:
        """The inverse of `moved`; pixels that the augmented image has lost are those of `kept`, `[N, H, W, C]`."""
        if drawn.mirrored is not None:
            values = _mirrored(values, drawn.mirrored)
        if drawn.offsets is None:
            return values
        back = 2 * self.padding - drawn.offsets
        seen = _shifted(jnp.ones((*values.shape[:3], 1), bool), back, self.padding)
        return jnp.where(seen, _shifted(values, back, self.padding), kept)


def _checked(name: str, x: jax.Array, **counts: int) -> jax.Array:
    for argument, value in counts.items():
        _arguments.count(f"{name}: {argument}", value)
    x = jnp.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"{name}: images have shape {x.shape}; they must be [N, H, W, C]")
    return x


def _offsets(key: jax.Array, n: int, padding: int) -> jax.Array:
    return jax.random.randint(key, (n, 2), 0, 2 * padding + 1)


def _centres(key: jax.Array, x: jax.Array) -> jax.Array:
    return jax.random.randint(key, (len(x), 2), 0, jnp.asarray(x.shape[1:3])[None])


def _shifted(x: jax.Array, offsets: jax.Array, padding: int) -> jax.Array:
    around = ((padding, padding), (padding, padding), (0, 0))

    def one(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(jnp.pad(image, around), (*offset, 0), image.shape)

    return jax.vmap(one)(x, offsets)


def _mirrored(x: jax.Array, which: jax.Array) -> jax.Array:
    return jnp.where(which[:, None, None, None], x[:, :, ::-1], x)


def _cut(x: jax.Array, centres: jax.Array, size: int) -> jax.Array:
    def near(axis: int) -> jax.Array:  # [N, pixels along this axis]
        low = centres[:, axis, None] - size // 2
        place = jnp.arange(x.shape[1 + axis])[None]
        return (low <= place) & (place < low + size)

    hole = near(0)[:, :, None, None] & near(1)[:, None, :, None]
    return jnp.where(hole, jnp.zeros((), x.dtype), x)
