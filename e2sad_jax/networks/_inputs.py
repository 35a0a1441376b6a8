"""What a network does to its images first."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def standardized(x: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(x - mean) / std of images `[N, H, W, C]`; nothing where both are empty.

    It is a part of the network, not of the data: attacks and budgets stay in the units of the images.

    Args:
      x: images, floating point.
      mean: of each channel, or one for all.
      std: likewise, above 0.
    """
    for values, operation in ((mean, jnp.subtract), (std, jnp.divide)):
        if values:
            x = operation(x, jnp.asarray(values, x.dtype).reshape(1, 1, 1, -1))
    return x
