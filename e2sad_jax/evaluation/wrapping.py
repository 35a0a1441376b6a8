"""Models from elsewhere: normalisation and layout inside the model, so that attacks work on images in [0, 1]."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax._compile import is_pure, pure
from e2sad_jax.attacks import core
from e2sad_jax.errors import quoted
from e2sad_jax.evaluation._entrance import Apply


def wrap(apply: Apply, *, mean: Any = None, std: Any = None, channels_first: bool = False) -> Apply:
    """Puts normalisation and layout inside a model: the result takes images `[N, H, W, C]` in [0, 1].

    Budgets are then in units of those images, and `bounds` are (0, 1).

    Args:
      apply: parameters and the model's own inputs to logits `[N, K]`; of a random model, of a key too.
      mean: subtracted from images in [0, 1]: a number in [0, 1], or one for each channel; None for 0.
      std: what they are then divided by: a number above 0, or one for each channel; None for 1. A model of pixels from 0 to 255
        takes `std=1 / 255`.
      channels_first: whether the model's inputs are `[N, C, H, W]`, as PyTorch's.

    Returns:
      The function `(params, images) -> logits`, for `evaluate`, `auto`, `of_function` and all others that take `apply`. The
      gradient is that in the images. It refuses images that are not floating point or have another number of channels.

    Raises:
      ValueError: if `apply` is no function, or `mean` or `std` are out of range or no numbers.

    >>> import jax.numpy as jnp
    >>> from e2sad_jax import evaluation
    >>> of_inputs = lambda params, x: params * x.mean((2, 3))  # [N, 2, H, W], from -1 to 1
    >>> apply = evaluation.wrap(of_inputs, mean=0.5, std=(0.5, 0.25), channels_first=True)
    >>> print(apply(jnp.float32(1), jnp.ones((1, 4, 4, 2))))
    [[1. 2.]]
    """
    if not callable(apply):
        kind = type(apply).__name__
        raise ValueError(f"wrap: apply is a {kind}; it must be a function (params, inputs) -> logits")
    center = _per_channel("mean", 0.0 if mean is None else mean, "a mean of images in [0, 1]")
    scale = _per_channel("std", 1.0 if std is None else std, "above 0")
    if (wrong := ~((center >= 0) & (center <= 1))).any():
        value = center[wrong][0]
        units = f"; of pixels from 0 to 255 take mean / 255, {value / 255:.3g}, and std / 255" if value > 1 else ""
        raise ValueError(f"wrap: mean={value:g}; it must lie in [0, 1], as the images do{units}")
    if (wrong := scale <= 0).any():
        raise ValueError(f"wrap: std={scale[wrong][0]:g}; it must be above 0: leave out what is not to be divided by")
    channels = {values.size for values in (center, scale) if values.ndim}
    if len(channels) > 1:
        raise ValueError(
            f"wrap: mean has {center.size} channels and std {scale.size}; both must have one number for each, or be one"
        )
    count = next(iter(channels), None)

    def normalised(params: Any, x: jax.Array, *key: jax.Array) -> jax.Array:
        x = core.checks.images("wrap", x)
        if count is not None and x.shape[-1] != count:
            how = ": make them so by images.transpose(0, 2, 3, 1)" if x.ndim == 4 and x.shape[1] == count else ""
            raise ValueError(
                f"wrap: images have shape {x.shape}; they must be [N, H, W, C] with the {count} channels of mean and std{how}"
            )
        own = [jnp.asarray(v.reshape(*(1,) * (x.ndim - v.ndim), *v.shape), x.dtype) for v in (center, scale)]
        x = (x - own[0]) / own[1]
        if channels_first:
            if x.ndim < 3:
                raise ValueError(f"wrap: images have shape {x.shape}; with channels_first they must be [N, H, W, C]")
            x = jnp.moveaxis(x, -1, 1)
        return apply(params, x, *key)

    return pure(normalised) if is_pure(apply) else normalised


def _per_channel(name: str, values: Any, must: str) -> np.ndarray:
    """A copy in float64, of no axis or one."""
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError):
        array = np.array(math.nan)
    if array.ndim > 1 or array.size == 0 or not np.isfinite(array).all():
        shape = f" of shape {array.shape}" if array.ndim > 1 else ""
        raise ValueError(
            f"wrap: {name}={quoted(values)}{shape}; it must be {must}: one finite number, or one for each channel"
        )
    return array
