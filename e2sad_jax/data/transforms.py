"""Named input transforms: from stored images to what the network, the attacks and every eps see."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax._compile import pure


class Transform(NamedTuple):
    """How stored images become the network's input.

    Attributes:
      name: what `--transform` calls it.
      apply: images `[N, H, W, C]`, uint8 or float in [0, 1], to float32 `[N, H, W, C]` inside `bounds`.
      bounds: range of the network's input; attacks clip to it, and every eps is in its units.
    """

    name: str
    apply: Callable[[jax.Array], jax.Array]
    bounds: tuple[float, float]


@pure
def unit(images: jax.Array) -> jax.Array:
    """Pixels scaled to [0, 1]: uint8 divided by 255, floats as they are.

    Args:
      images: `[N, H, W, C]`, uint8, or floating point in [0, 1].

    Returns:
      float32 `[N, H, W, C]` in [0, 1].
    """
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    return images.astype(jnp.float32)


@pure
def standardize(images: jax.Array) -> jax.Array:
    """The paper's SVHN normalisation: each image minus its own mean, over its own standard deviation, scaled to [-1, 1].

    clip((x - mean) / (3 max(std, 1 / sqrt(H W C))), -1, 1), mean and std over all pixels and channels of one image.

    The paper (Section 4.2) says only that the normalised pixels lie within [-1, 1]; here three standard deviations are
    mapped to 1 and what lies beyond is clipped. The floor under std keeps a flat image finite. An eps is
    meant in this space: there eps stands for 3 eps std in pixels, so an image of low contrast is attacked with less.

    Args:
      images: `[N, H, W, C]`, uint8, or floating point in [0, 1].

    Returns:
      float32 `[N, H, W, C]` in [-1, 1].
    """
    x = unit(images)
    axes = tuple(range(1, x.ndim))
    mean, std = x.mean(axes, keepdims=True), x.std(axes, keepdims=True)
    floor = math.prod(x.shape[1:]) ** -0.5
    return jnp.clip((x - mean) / (3 * jnp.maximum(std, floor)), -1, 1)


TRANSFORMS = {
    "unit": Transform("unit", unit, (0.0, 1.0)),
    "standardize": Transform("standardize", standardize, (-1.0, 1.0)),
}
