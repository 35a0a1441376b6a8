"""Convolutions that are fast on the CPU too.

XLA's CPU backend takes its time over convolutions: over their gradients, over those with few channels, and over all that
stand in a compiled loop. As matrix products with patches of a few images at a time, which stay in the cache, they are faster
(`experiments.step_cost --peer=xla`). So a convolution, its input gradient and its kernel gradient are primitives here,
lowered to that form on the CPU and to XLA's own operation everywhere else. All three are bilinear and the transposes of
one another, so derivatives of every order are made of these three again.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from e2sad_jax import _tracing

Padding = tuple[tuple[int, int], tuple[int, int]]

CHUNK_BYTES = 5 << 19  # of patches: what a core's caches hold
CHUNK_IMAGES = 16
FEW_CHANNELS = 4
SMALL = 1 << 24  # multiplications: below, XLA's own is fast enough, and sooner compiled


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
    mesh = jax.sharding.get_abstract_mesh()
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    ours = (
        lhs.ndim == 4
        and numbers == jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
        and {*window_strides, *(lhs_dilation or ()), *(rhs_dilation or ()), feature_group_count} == {1}
        and lhs.dtype == rhs.dtype
        and lhs.dtype in (jnp.float32, jnp.float64)
        and not (mesh.explicit_axes or mesh.manual_axes)  # whose bookkeeping of shards only JAX's own operations keep
    )
    if ours:
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
        if all(low >= 0 <= high for low, high in padding):
            return conv(lhs, rhs, padding=padding, precision=precision)
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


conv_p = Primitive("conv")  # x [N, H, W, C], w [kh, kw, C, F] -> y [N, h, w, F]
input_gradient_p = Primitive("conv_input_gradient")  # of y, w -> of x; size: (H, W)
kernel_gradient_p = Primitive("conv_kernel_gradient")  # x, of y -> of w; size: (kh, kw)


# XLA's own operations.


def _conv(x: jax.Array, w: jax.Array, *, padding: Padding, precision: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


def _input_gradient(g: jax.Array, w: jax.Array, *, size: tuple[int, int], **kwargs: Any) -> jax.Array:
    x = jax.ShapeDtypeStruct((g.shape[0], *size, w.shape[2]), g.dtype)
    return jax.linear_transpose(lambda x: _conv(x, w, **kwargs), x)(g)[0]


def _kernel_gradient(x: jax.Array, g: jax.Array, *, size: tuple[int, int], **kwargs: Any) -> jax.Array:
    w = jax.ShapeDtypeStruct((*size, x.shape[3], g.shape[3]), g.dtype)
    return jax.linear_transpose(lambda w: _conv(x, w, **kwargs), w)(g)[0]


# The same as matrix products.


def _cpu_conv(x: jax.Array, w: jax.Array, *, padding: Padding, precision: Any, forward: bool = True) -> jax.Array:
    def of(x: jax.Array) -> jax.Array:
        patches = _patches(x, w.shape[:2], padding)
        return jnp.einsum("nhwk,kf->nhwf", patches, w.reshape(-1, w.shape[3]), precision=precision)

    y = jax.eval_shape(functools.partial(_conv, padding=padding, precision=precision), x, w)
    if _products(y, w) < SMALL:
        return _conv(x, w, padding=padding, precision=precision)
    # XLA would keep memory full of zeros for all convolutions of a size, and copy it for each; not this.
    return _by_chunks(of, x, _turn(y, w), filler=x[0, 0, 0, 0] if forward else 0.0)


def _cpu_input_gradient(
    g: jax.Array, w: jax.Array, *, size: tuple[int, int], padding: Padding, precision: Any
) -> jax.Array:
    kh, kw, channels, _ = w.shape
    if _products(g, w) < SMALL:
        return _input_gradient(g, w, size=size, padding=padding, precision=precision)
    (above, below), (left, right) = padding
    if channels > FEW_CHANNELS and max(above, below) < kh and max(left, right) < kw:
        # A convolution with the kernel turned round.
        around = ((kh - 1 - above, kh - 1 - below), (kw - 1 - left, kw - 1 - right))
        return _cpu_conv(g, w[::-1, ::-1].swapaxes(2, 3), padding=around, precision=precision, forward=False)

    def of(g: jax.Array) -> jax.Array:  # the patches' gradients, added up where the patches overlap
        c = jnp.einsum("nhwf,kf->nhwk", g, w.reshape(-1, w.shape[3]), precision=precision)
        c = _overlap(c.reshape(*c.shape[:3], kh, kw * channels), 1)
        c = _overlap(c.reshape(*c.shape[:3], kw, channels), 2)
        return c[:, above : above + size[0], left : left + size[1]]

    return _by_chunks(of, g, _turn(g, w))


def _cpu_kernel_gradient(
    x: jax.Array, g: jax.Array, *, size: tuple[int, int], padding: Padding, precision: Any
) -> jax.Array:
    shape = (*size, x.shape[3], g.shape[3])
    w = jax.ShapeDtypeStruct(shape, g.dtype)
    if _products(g, w) < SMALL:
        return _kernel_gradient(x, g, size=size, padding=padding, precision=precision)
    # A product has to turn one of its factors round: the smaller.
    turned = g.shape[3] < size[0] * size[1] * x.shape[3]

    def of(x: jax.Array, g: jax.Array) -> jax.Array:
        patches = _patches(x, size, padding)
        if turned:
            return jnp.einsum("nhwf,nhwk->fk", g, patches, precision=precision)
        return jnp.einsum("nhwk,nhwf->kf", patches, g, precision=precision)

    turn = _turn(g, w)
    (xs, x_rest), (gs, g_rest) = _split(x, turn), _split(g, turn)

    def add(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        for x, g in zip(*map(_halves, pair), strict=True):
            total += of(x, g)
        return total, None

    zeros = jnp.zeros((w.size // shape[3], shape[3]), g.dtype)
    total, _ = jax.lax.scan(add, zeros.T if turned else zeros, (xs, gs))
    if len(x_rest):
        total += of(x_rest, g_rest)
    return (total.T if turned else total).reshape(shape)


def _patches(x: jax.Array, kernel: Sequence[int], padding: Padding) -> jax.Array:
    """`[N, H, W, C]` -> `[N, h, w, kh * kw * C]`: what a kernel sees at each place."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    h, w = (size - k + 1 for size, k in zip(x.shape[1:3], kernel, strict=True))
    x = jnp.concatenate([x[:, :, j : j + w] for j in range(kernel[1])], axis=-1)
    return jnp.concatenate([x[:, i : i + h] for i in range(kernel[0])], axis=-1)


def _overlap(x: jax.Array, axis: int) -> jax.Array:
    """`[N, h, w, k, C]` -> `[N, h, w, C]` with k - 1 places more along `axis`: sums over what falls on the same place."""
    k, width = x.shape[3], [(0, 0)] * 4
    total = jnp.zeros((), x.dtype)
    for i in range(k):
        width[axis] = (i, k - 1 - i)
        total = total + jnp.pad(x[:, :, :, i], width)
    return total


def _products(y: Any, w: Any) -> int:
    return y.size * w.size // w.shape[3]


def _turn(y: Any, w: Any) -> int:
    """Images that a turn of a loop takes: twice what a cache holds, of a number that divides the batch if one is near."""
    patches = y.shape[1] * y.shape[2] * w.size // w.shape[3] * y.dtype.itemsize
    most = max(1, min(y.shape[0], 2 * CHUNK_IMAGES, 2 * CHUNK_BYTES // patches))
    return next((n for n in range(most, most // 2, -1) if y.shape[0] % n == 0), most)


def _split(x: jax.Array, turn: int) -> tuple[jax.Array, jax.Array]:
    whole = len(x) // turn * turn
    return x[:whole].reshape(-1, turn, *x.shape[1:]), x[whole:]


def _halves(x: jax.Array) -> list[jax.Array]:
    """Two chunks, so that the patches of one can be cut while another core cuts the other's."""
    middle = (len(x) + 1) // 2
    return [part for part in (x[:middle], x[middle:]) if len(part)]


def _by_chunks(
    of: Callable[[jax.Array], jax.Array], x: jax.Array, turn: int, filler: jax.typing.ArrayLike = 0.0
) -> jax.Array:
    """`of(x)`, `turn` images at a time; `filler` is what the result's memory holds until then."""
    many, rest = _split(x, turn)
    shape = jax.eval_shape(of, many[0]).shape
    begin = jnp.broadcast_to(jnp.asarray(filler, x.dtype), (len(many), *shape))

    def put(i: jax.Array, y: jax.Array) -> jax.Array:
        return y.at[i].set(jnp.concatenate([of(part) for part in _halves(many[i])]))

    done = jax.lax.fori_loop(0, len(many), put, begin).reshape(-1, *shape[1:])
    return jnp.concatenate([done, of(rest)]) if len(rest) else done


def _define(primitive: Primitive, xla: Callable[..., jax.Array], cpu: Callable[..., jax.Array]) -> None:
    """What JAX has to know of a primitive beside its derivatives."""

    @functools.partial(jax.jit, static_argnames=("size", "padding", "precision"))
    def evaluate(*args: jax.Array, **params: Any) -> jax.Array:
        return primitive.bind(*args, **params)

    def shape_of(*avals: Any, **params: Any) -> Any:
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        result = jax.eval_shape(functools.partial(xla, **params), *shapes)
        return avals[0].update(shape=result.shape, dtype=result.dtype, weak_type=False)

    def lower_for_cpu(ctx: Any, *args: Any, **params: Any) -> Any:
        # Shards of one batch on several devices would have to be gathered for a loop over its images.
        devices = getattr(ctx.module_context.axis_context, "num_devices", None)
        chosen = cpu if devices == 1 and not _tracing.straight() else xla
        return mlir.lower_fun(chosen, multiple_results=False)(ctx, *args, **params)

    def batched(args: Sequence[jax.Array], axes: Sequence[int | None], **params: Any) -> tuple[jax.Array, int]:
        return jax.vmap(functools.partial(xla, **params), in_axes=tuple(axes))(*args), 0

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(shape_of)
    mlir.register_lowering(primitive, mlir.lower_fun(xla, multiple_results=False))
    mlir.register_lowering(primitive, lower_for_cpu, platform="cpu")
    batching.primitive_batchers[primitive] = batched


_define(conv_p, _conv, _cpu_conv)
_define(input_gradient_p, _input_gradient, _cpu_input_gradient)
_define(kernel_gradient_p, _kernel_gradient, _cpu_kernel_gradient)


def _to_image(image: Any, y: jax.Array, w: jax.Array, kwargs: Any) -> jax.Array:
    return input_gradient_p.bind(y, w, size=image.aval.shape[1:3], **kwargs)


def _to_kernel(kernel: Any, image: jax.Array, y: jax.Array, kwargs: Any) -> jax.Array:
    return kernel_gradient_p.bind(image, y, size=kernel.aval.shape[:2], **kwargs)


def _to_output(image: jax.Array, w: jax.Array, kwargs: Any) -> jax.Array:
    return conv_p.bind(image, w, **kwargs)


# Transposes, (cotangent, first, second operand): the operand that is asked for stands for its shape.
ad.defbilinear(
    conv_p,
    lambda ct, x, w, **kwargs: _to_image(x, ct, w, kwargs),
    lambda ct, x, w, **kwargs: _to_kernel(w, x, ct, kwargs),
)
ad.defbilinear(
    input_gradient_p,
    lambda ct, g, w, size, **kwargs: _to_output(ct, w, kwargs),
    lambda ct, g, w, size, **kwargs: _to_kernel(w, ct, g, kwargs),
)
ad.defbilinear(
    kernel_gradient_p,
    lambda ct, x, g, size, **kwargs: _to_image(x, g, ct, kwargs),
    lambda ct, x, g, size, **kwargs: _to_output(x, ct, kwargs),
)
