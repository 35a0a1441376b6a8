"""CPU only: convolutions and max pooling that XLA's CPU backend runs fast. Other platforms get XLA's own operations.

Why: XLA's CPU backend has one fast convolution kernel, for images `[N, H, W, C]` and kernels `[kh, kw, C, F]`, neither of
them reversed or transposed. It rewrites the gradients of convolutions into that form, but not inside a compiled loop, where
they run several times slower. The kernel is also slow for few output channels, as in the input gradient of a first layer,
for images of one channel, and for the kernel gradient of a large batch.

How: a convolution, its input gradient and its kernel gradient are three JAX primitives. On the CPU each is lowered to a
convolution in the fast form, or to products and sums; elsewhere to XLA's own operation. The three are bilinear and
transposes of one another, so derivatives of every order consist of the same three. Max pooling and its gradient are done
likewise. A model can do without this module: `flax.linen.Conv` and `flax.linen.max_pool` compute the same.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad

from e2sad_jax import _compile
from e2sad_jax.networks._bilinear import bilinear, define, with_transposes

Shape = tuple[int, ...]
Padding = tuple[tuple[int, int], tuple[int, int]]

IMAGES_FIRST = ("NHWC", "HWIO", "NHWC")
FEW_CHANNELS = 4
MOST_TAPS = 49  # positions of a kernel for one channel that becomes as many products
TOGETHER = 16  # images of one turn of a kernel's gradient, whose sums over a whole batch would leave the caches
LEAST_TURNS = 4  # that are faster than all images at once


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `flax.linen.Conv(..., conv_general_dilated=...)`.

    Two-dimensional convolutions of stride 1 in float32 or float64, without dilation or groups, are this module's `conv`;
    all others are JAX's, and so are those inside of `shard_map` or on a mesh with explicit axes.

    Args:
      lhs: images, `[N, H, W, C]` for `conv`.
      rhs: kernel, `[kh, kw, C, F]` for `conv`.
      window_strides: strides.
      padding: (before, after) of each axis, or what else JAX takes.
      lhs_dilation: as JAX takes it.
      rhs_dilation: as JAX takes it.
      dimension_numbers: as JAX takes it.
      feature_group_count: groups of channels.
      precision: of the products.
    """
    ours = (
        plain(lhs, rhs, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count)
        and set(window_strides) == {1}
        and lhs.dtype == rhs.dtype
        and lhs.dtype in (jnp.float32, jnp.float64)
    )
    if ours:
        pads = pads_of(lhs, rhs, window_strides, padding)
        if all(low >= 0 <= high for low, high in pads):
            return conv(lhs, rhs, padding=pads, precision=precision)
    return jax.lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        precision=precision,
    )


def conv(x: jax.Array, w: jax.Array, *, padding: Sequence[tuple[int, int]], precision: Any = None) -> jax.Array:
    """Cross-correlation of images with a kernel, at stride 1.

    Args:
      x: images `[N, H, W, C]`, float32 or float64.
      w: kernel `[kh, kw, C, F]`, of the same dtype.
      padding: rows above and below, columns left and right, at least 0.
      precision: of the products (`jax.lax.Precision`).

    Returns:
      `[N, H + rows - kh + 1, W + columns - kw + 1, F]`.

    Raises:
      ValueError: if shapes do not fit or the kernel is larger than the padded image.
    """
    rows, columns = ((int(low), int(high)) for low, high in padding)
    height, width = x.shape[1] + sum(rows) - w.shape[0] + 1, x.shape[2] + sum(columns) - w.shape[1] + 1
    if x.shape[3] != w.shape[2] or min(height, width) < 1:
        raise ValueError(
            f"conv: a kernel of shape {w.shape} does not fit images of shape {x.shape} with padding {(rows, columns)}"
        )
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # of now, not of the lowering
    return conv_p.bind(x, w, padding=(rows, columns), precision=precision)


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 2x2 windows, a last odd row or column left out: `flax.linen.max_pool(x, (2, 2), strides=(2, 2))`.

    On the CPU and the GPU it is taken over four strided slices, and its gradient is put together of four arrays. XLA's own
    pooling is more than ten times slower on the CPU: half the time of a training step. On the GPU it keeps four arrays of
    indices and scatters. On the TPU, where XLA's own moves fewer bytes, it stays. Values are the same, NaN included, and so is
    the gradient, but where there is NaN: where several are largest it goes to the first.

    Args:
      x: `[N, H, W, C]`.

    Returns:
      `[N, H // 2, W // 2, C]`.
    """
    if _compile.platform() == "tpu" or shards_are_tracked(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))
    return _max_pool(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])


def plain(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
) -> bool:
    """Whether it is of images `[N, H, W, C]` and kernels `[kh, kw, C, F]`, without dilation or groups, outside `shard_map`."""
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    return (
        lhs.ndim == 4
        and numbers == jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, IMAGES_FIRST)
        and {*(lhs_dilation or ()), *(rhs_dilation or ()), feature_group_count} == {1}
        and not shards_are_tracked(lhs)
    )


def pads_of(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: str | Sequence[tuple[int, int]]
) -> Padding:
    """(before, after) of rows and columns, of what else JAX takes as `padding`."""
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    rows, columns = ((int(low), int(high)) for low, high in padding)
    return rows, columns


def shards_are_tracked(x: jax.Array) -> bool:
    """Inside of `shard_map` or on a mesh with explicit axes, where only JAX's own operations say what is split and how."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.explicit_axes or mesh.manual_axes or jax.typeof(x).sharding.mesh.explicit_axes)


# XLA's own operations.


def _conv(x: jax.Array, w: jax.Array, *, padding: Padding, precision: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=IMAGES_FIRST, precision=precision)


XLA = with_transposes(_conv)


# The same in those forms that XLA's CPU backend hands to its fast kernels, in a compiled loop too: images [N, H, W, C],
# kernels [kh, kw, C, F], nothing turned round.


def _cpu_conv(x: jax.Array, w: jax.Array, *, padding: Padding, precision: Any) -> jax.Array:
    kh, kw, channels, features = w.shape
    if channels > 1 or kh * kw > MOST_TAPS:
        return _conv(x, w, padding=padding, precision=precision)
    # The kernel would gather patches of one channel number by number. So the shifted images times the weights, which XLA
    # computes in one pass.
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = padded.shape[1] - kh + 1, padded.shape[2] - kw + 1
    total = jnp.zeros((), x.dtype)
    for i, j in np.ndindex(kh, kw):
        total = total + padded[:, i : i + height, j : j + width] * w[i, j].reshape(1, 1, 1, features)
    return total


def _cpu_input_gradient(g: jax.Array, w: jax.Array, *, shape: Shape, padding: Padding, precision: Any) -> jax.Array:
    kh, kw, channels, _ = w.shape
    (above, below), (left, right) = padding
    if max(above, below) >= kh or max(left, right) >= kw:
        return XLA[1](g, w, shape=shape, padding=padding, precision=precision)
    rows, columns = (kh - 1 - above, kh - 1 - below), (kw - 1 - left, kw - 1 - right)
    if channels > FEW_CHANNELS:  # a convolution with the kernel turned round
        return _conv(g, w[::-1, ::-1].swapaxes(2, 3), padding=(rows, columns), precision=precision)
    # One with few channels leaves most of the processor idle. So each row of the kernel by itself, as channels, and then
    # their sums where they fall on the same row.
    by_row = w[:, ::-1].transpose(1, 3, 0, 2).reshape(1, kw, w.shape[3], kh * channels)
    y = _conv(g, by_row, padding=((0, 0), columns), precision=precision)
    y = y.reshape(*y.shape[:3], kh, channels)
    total = jnp.zeros((), y.dtype)
    for i in range(kh):
        total = total + jnp.pad(y[:, :, :, i], ((0, 0), (i, kh - 1 - i), (0, 0), (0, 0)))
    return total[:, above : above + shape[1]]


def _cpu_kernel_gradient(x: jax.Array, g: jax.Array, *, shape: Shape, padding: Padding, precision: Any) -> jax.Array:
    # Channels take the place of images and images that of channels.
    y = _conv(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), padding=padding, precision=precision)
    return y.transpose(1, 2, 0, 3)


def _cpu_kernel_gradient_in_turns(x: jax.Array, g: jax.Array, **settings: Any) -> jax.Array:
    n = x.shape[0]
    if not isinstance(n, int) or n < LEAST_TURNS * TOGETHER:  # no int in a program for any number of images
        return _cpu_kernel_gradient(x, g, **settings)
    turns, rest = divmod(n, TOGETHER)

    def of(i: int | jax.Array) -> jax.Array:
        some = (jax.lax.dynamic_slice_in_dim(a, i * TOGETHER, TOGETHER) for a in (x, g))
        return _cpu_kernel_gradient(*some, **settings)

    first = _cpu_kernel_gradient(x[-rest:], g[-rest:], **settings) if rest else of(0)
    return jax.lax.fori_loop(0 if rest else 1, turns, lambda i, total: total + of(i), first)


conv_p = bilinear(
    "conv",
    XLA,
    static=("padding", "precision"),
    on={"cpu": (_cpu_conv, _cpu_input_gradient, _cpu_kernel_gradient_in_turns)},
    on_cpus=(_cpu_conv, _cpu_input_gradient, _cpu_kernel_gradient),  # else each turn would be summed over the devices
    by_image=True,
)


# Pooling. The masks say of each window: the first above, the first below, the one above.


def _first(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x >= y) | jnp.isnan(x)


def _quarters(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    return x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2]


def _choose(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    a, b, c, d = _quarters(x)
    above, below = _first(a, b), _first(c, d)
    upper, lower = jnp.where(above, a, b), jnp.where(below, c, d)
    up = _first(upper, lower)
    return jnp.where(up, upper, lower), (above, below, up)


@jax.custom_jvp
def _max_pool(x: jax.Array) -> jax.Array:
    return _choose(x)[0]


@_max_pool.defjvp
def _max_pool_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    _, masks = _choose(*primals)
    return _max_pool(*primals), pick_p.bind(*tangents, *masks)


pick_p = Primitive("max_pool_pick")  # x [N, 2h, 2w, C], three masks [N, h, w, C] -> y [N, h, w, C]
place_p = Primitive("max_pool_place")  # of y, masks -> of x


def _pick(x: jax.Array, above: jax.Array, below: jax.Array, up: jax.Array) -> jax.Array:
    a, b, c, d = _quarters(x)
    return jnp.where(up, jnp.where(above, a, b), jnp.where(below, c, d))


def _place(g: jax.Array, above: jax.Array, below: jax.Array, up: jax.Array) -> jax.Array:
    # Slices have padding with gaps as their gradient, which XLA's CPU backend computes number by number.
    n, h, w, channels = g.shape
    zero = jnp.zeros((), g.dtype)
    rows = []
    for half, first in ((jnp.where(up, g, zero), above), (jnp.where(up, zero, g), below)):
        pair = [jnp.where(first, half, zero)[..., None, :], jnp.where(first, zero, half)[..., None, :]]
        rows.append(jnp.concatenate(pair, axis=3).reshape(n, h, 1, 2 * w, channels))
    return jnp.concatenate(rows, axis=2).reshape(n, 2 * h, 2 * w, channels)


def _define_linear(primitive: Primitive, transposed: Primitive) -> None:
    """Derivatives of what is linear in its first operand, the others being masks."""

    def tangent(t: jax.Array, x: jax.Array, *masks: jax.Array) -> jax.Array:
        return primitive.bind(t, *masks)

    def transpose(ct: Any, x: Any, *masks: jax.Array) -> list[Any]:
        result = ad.Zero(x.aval) if type(ct) is ad.Zero else transposed.bind(ct, *masks)
        return [result, *(None for _ in masks)]

    ad.defjvp(primitive, tangent, *[None] * 3)
    ad.primitive_transposes[primitive] = transpose


define(pick_p, _pick)
define(place_p, _place)
_define_linear(pick_p, place_p)
_define_linear(place_p, pick_p)
