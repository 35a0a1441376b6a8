"""Feature squeezing: images with fewer grey levels, or smoothed by a median."""

import jax
import jax.numpy as jnp

from e2sad_jax import _arguments
from e2sad_jax.attacks import core
from e2sad_jax.attacks.core import Bounds


def bit_depth(x: jax.Array, bits: int, *, bounds: Bounds = (0.0, 1.0)) -> jax.Array:
    """Rounds pixels to 2^bits equally spaced levels, from one end of the range to the other.

        rint(x (2^bits - 1)) / (2^bits - 1)

    Its gradient is zero: attack it through `attacks.bpda`.

    Args:
      x: images `[N, ...]`, floating point, inside `bounds`.
      bits: at least 1, at most 16.
      bounds: range of valid images.

    Returns:
      Images, same shape and dtype as `x`.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if `bits` is out of range, or `bounds` is None or out of order.

    >>> import jax.numpy as jnp
    >>> print(bit_depth(jnp.array([[0.2, 0.4, 0.9]]), 1), bit_depth(jnp.array([[0.2, 0.4, 0.9]]), 2))
    [[0. 0. 1.]] [[0.33333334 0.33333334 1.        ]]

    Reference: Xu et al., 2018, https://arxiv.org/abs/1704.01155
    """
    levels = 2 ** _arguments.count("bit_depth: bits", bits, most=16) - 1
    x = core.checks.images("bit_depth", x)
    checked = core.checks.image_range("bit_depth", bounds, x)
    if checked is None:
        raise ValueError(
            "bit_depth: bounds=None; it needs the range of valid images, whose ends are the first and last level"
        )
    wide = core.as_float32(x)
    lower, upper = (jnp.asarray(end, wide.dtype) for end in checked)
    width = upper - lower
    return (jnp.rint((wide - lower) / width * levels) / levels * width + lower).astype(x.dtype)


def median(x: jax.Array, size: int = 2) -> jax.Array:
    """Replaces each pixel by the median of the window around it, channel by channel.

    Images are reflected at their edges, the edge pixel included. Of a window of even size the pixel is to the lower right of
    the middle, and of the two middle values the larger is taken; as SciPy's `median_filter` does. A gradient flows to the
    pixel that is the median.

    Args:
      x: images `[N, H, W, C]`, floating point.
      size: of the square window, at least 2. The paper takes 2 and 3.

    Returns:
      Images, same shape and dtype as `x`.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if `x` has not four axes, or `size` is out of range.

    Reference: Xu et al., 2018, https://arxiv.org/abs/1704.01155
    """
    x = core.checks.images("median", x)
    if x.ndim != 4:
        raise ValueError(f"median: images have shape {x.shape}; it must be [N, H, W, C]")
    _arguments.count("median: size", size, least=2, most=min(x.shape[1:3]))
    around = (size // 2, size - 1 - size // 2)
    padded = jnp.pad(x, ((0, 0), around, around, (0, 0)), mode="symmetric")
    height, width = x.shape[1:3]
    window = [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return jnp.sort(jnp.stack(window), axis=0)[size * size // 2]
