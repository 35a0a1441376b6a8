"""Layers that compute in bfloat16 while their kernel and, on accelerators, its gradient stay float32.

Flax rounds the kernel to bfloat16 first, so the gradient of each use of it is rounded, too. On several devices that is
what each sends: e2SAD looks at the kernels three times, and on TPUs three sums in bfloat16 are sent where float32 has one.
Here the products that make up a kernel's gradient add up in float32, and XLA sends their one sum.

GPUs have no convolution from bfloat16 to float32: XLA would widen images and cotangents first. There, and on the CPU,
convolutions stay as Flax has them, and on the CPU dense layers, too. Values are Flax's everywhere, and so are the
gradients of images and biases.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2sad_jax.networks import cpu_conv
from e2sad_jax.networks._bilinear import bilinear, with_transposes


def promote_dtype(*args: jax.Array | None, dtype: Any = None, inexact: bool = True) -> list[Any]:
    """`flax.linen.dtypes.promote_dtype` of a layer's (x, kernel, bias); a float32 kernel stays where `dtype` is bfloat16."""
    x, kernel, *bias = nn.dtypes.promote_dtype(*args, dtype=dtype, inexact=inexact)
    given = args[1]
    assert x is not None
    assert given is not None
    return [x, given if _is_mixed(x, given) else kernel, *bias]


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    precision: Any = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of bfloat16 images and a float32 kernel; what is of one dtype goes to `cpu_conv`."""
    if not _is_mixed(lhs, rhs):
        return cpu_conv.conv_general_dilated(lhs, rhs, window_strides, padding, precision=precision, **options)
    if not cpu_conv.plain(lhs, rhs, **options):
        return jax.lax.conv_general_dilated(lhs, rhs.astype(lhs.dtype), window_strides, padding, **options)
    pads = cpu_conv.pads_of(lhs, rhs, window_strides, padding)
    return conv_p.bind(lhs, rhs, strides=tuple(window_strides), padding=pads)


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **kwargs: Any) -> jax.Array:
    """`jax.lax.dot_general` of bfloat16 features `[..., D]` and a float32 kernel `[D, K]`; all else is JAX's."""
    if not _is_mixed(x, kernel):
        return jax.lax.dot_general(x, kernel, dimension_numbers, **kwargs)
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())) or cpu_conv.shards_are_tracked(x):
        return jax.lax.dot_general(x, kernel.astype(x.dtype), dimension_numbers, **kwargs)
    return dot_p.bind(x, kernel)


Conv = functools.partial(nn.Conv, promote_dtype=promote_dtype, conv_general_dilated=conv_general_dilated)
Dense = functools.partial(nn.Dense, promote_dtype=promote_dtype, dot_general=dot_general)


def _is_mixed(x: jax.Array, kernel: jax.Array) -> bool:
    return x.dtype == jnp.bfloat16 and kernel.dtype == jnp.float32


def _conv(x: jax.Array, w: jax.Array, *, strides: tuple[int, int], padding: cpu_conv.Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(x, w.astype(x.dtype), strides, padding, dimension_numbers=cpu_conv.IMAGES_FIRST)


def _wide_conv_kernel(
    x: jax.Array, g: jax.Array, *, shape: tuple[int, ...], strides: tuple[int, int], padding: cpu_conv.Padding
) -> jax.Array:
    # Channels take the place of images and images that of channels; what the strides leave over is cut off.
    pads = [
        (low, kernel + (outputs - 1) * stride - size - low)
        for (low, _), kernel, outputs, stride, size in zip(
            padding, shape[:2], g.shape[1:3], strides, x.shape[1:3], strict=True
        )
    ]
    return jax.lax.conv_general_dilated(
        x,
        g,
        (1, 1),
        pads,
        rhs_dilation=strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=jnp.float32,
    )


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())))


def _wide_dot_kernel(x: jax.Array, g: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    images = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, g, ((images, images), ((), ())), preferred_element_type=jnp.float32)


CONV, DOT = (with_transposes(product, jnp.float32) for product in (_conv, _dot))
WIDE_CONV, WIDE_DOT = (*CONV[:2], _wide_conv_kernel), (*DOT[:2], _wide_dot_kernel)
conv_p = bilinear("mixed_conv", CONV, static=("strides", "padding"), on={"tpu": WIDE_CONV})
dot_p = bilinear("mixed_dot", DOT, static=(), on={"tpu": WIDE_DOT, "cuda": WIDE_DOT})
