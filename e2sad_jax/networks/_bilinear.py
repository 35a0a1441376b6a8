"""Products of images and a kernel as JAX primitives, one for each derivative: their derivatives are one another."""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from e2sad_jax import _compile

Function = Callable[..., jax.Array]
Three = tuple[Function, Function, Function]


def with_transposes(product: Function, kernel_dtype: Any = None) -> Three:
    """A product and its transposes in images and in kernel, as `bilinear` takes them, by JAX.

    Args:
      product: (x, w) to y.
      kernel_dtype: of w; None for that of y.
    """

    def of_image(y: jax.Array, w: jax.Array, *, shape: tuple[int, ...], **kwargs: Any) -> jax.Array:
        x = jax.ShapeDtypeStruct(shape, y.dtype)
        return jax.linear_transpose(lambda x: product(x, w, **kwargs), x)(y)[0]

    def of_kernel(x: jax.Array, y: jax.Array, *, shape: tuple[int, ...], **kwargs: Any) -> jax.Array:
        w = jax.ShapeDtypeStruct(shape, kernel_dtype or y.dtype)
        return jax.linear_transpose(lambda w: product(x, w, **kwargs), w)(y)[0]

    return product, of_image, of_kernel


def bilinear(
    name: str,
    functions: Three,
    *,
    static: Sequence[str],
    on: Mapping[str, Three] = types.MappingProxyType({}),
    on_cpus: Three | None = None,
    by_image: bool = False,
) -> Primitive:
    """A product that is linear in images and in kernel, with derivatives of every order.

    Args:
      name: of the primitive.
      functions: the product, (x, w) to y; its transpose in the images, (y, w) to x; and in the kernel, (x, y) to w. The
        last two take `shape`, that of their result, too.
      static: names of further arguments of all three.
      on: the same for platforms that have their own: "cpu", "cuda", "tpu".
      on_cpus: the same for programs of several devices that are CPUs; None for those of "cpu".
      by_image: whether x and y have a first axis of images, each of which is multiplied by itself.
    """
    names = (name, f"{name}_input_gradient", f"{name}_kernel_gradient")
    product, of_image, of_kernel = (Primitive(one) for one in names)
    static = (*static, "shape")
    for i, primitive in enumerate((product, of_image, of_kernel)):
        own_functions = {platform: own[i] for platform, own in on.items()}
        split = on_cpus[i] if on_cpus else None
        define(primitive, functions[i], static, own_functions, split, by_image and primitive is not of_kernel)

    def to_image(image: Any, y: jax.Array, w: jax.Array, kwargs: Any) -> jax.Array:
        return of_image.bind(y, w, shape=image.aval.shape, **kwargs)

    def to_kernel(kernel: Any, image: jax.Array, y: jax.Array, kwargs: Any) -> jax.Array:
        return of_kernel.bind(image, y, shape=kernel.aval.shape, **kwargs)

    def to_output(image: jax.Array, w: jax.Array, kwargs: Any) -> jax.Array:
        return product.bind(image, w, **kwargs)

    # Transposes, (cotangent, first, second operand): the operand that is asked for stands for its shape.
    ad.defbilinear(
        product,
        lambda ct, x, w, **kwargs: to_image(x, ct, w, kwargs),
        lambda ct, x, w, **kwargs: to_kernel(w, x, ct, kwargs),
    )
    ad.defbilinear(
        of_image,
        lambda ct, y, w, shape, **kwargs: to_output(ct, w, kwargs),
        lambda ct, y, w, shape, **kwargs: to_kernel(w, ct, y, kwargs),
    )
    ad.defbilinear(
        of_kernel,
        lambda ct, x, y, shape, **kwargs: to_image(x, y, ct, kwargs),
        lambda ct, x, y, shape, **kwargs: to_output(x, ct, kwargs),
    )
    return product


def define(
    primitive: Primitive,
    xla: Function,
    static: Sequence[str] = (),
    on: Mapping[str, Function] = types.MappingProxyType({}),
    on_cpus: Function | None = None,
    by_image: bool = False,
) -> None:
    """What JAX has to know of a primitive, its derivatives aside.

    Args:
      primitive: to be defined.
      xla: what it is.
      static: names of its parameters.
      on: what it is on platforms that have their own; that of the CPU not in programs without loops, nor under `vmap`, but for
        that of images alone where it works `by_image`.
      on_cpus: what it is in programs of several devices that are CPUs; None for that of "cpu".
      by_image: whether the first axis of its first operand and of its result is of images, each computed by itself.
    """

    @functools.partial(jax.jit, static_argnames=tuple(static))
    def compiled(*args: jax.Array, **params: Any) -> jax.Array:
        return primitive.bind(*args, **params)

    def evaluate(*args: jax.Array, **params: Any) -> jax.Array:
        with jax.disable_jit(False):  # without it, this would be called again by `compiled`
            return compiled(*args, **params)

    def shape_of(*avals: Any, **params: Any) -> Any:
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        result = jax.eval_shape(functools.partial(xla, **params), *shapes)
        return avals[0].update(shape=result.shape, dtype=result.dtype, weak_type=False)

    elsewhere = {platform: own for platform, own in on.items() if platform != "cpu" and own is not xla}

    def batched(args: Sequence[jax.Array], axes: Sequence[int | None], **params: Any) -> tuple[jax.Array, int]:
        if by_image and axes[0] is not None and set(axes[1:]) == {None}:  # that many more images
            images = jnp.moveaxis(args[0], axes[0], 0)
            size, n = images.shape[:2]
            if "shape" in params:
                params["shape"] = (size * n, *params["shape"][1:])
            result = primitive.bind(images.reshape(size * n, *images.shape[2:]), *args[1:], **params)
            return result.reshape(size, n, *result.shape[1:]), 0

        def many(function: Function) -> Function:
            return jax.vmap(functools.partial(function, **params), in_axes=tuple(axes))

        if not elsewhere:
            return many(xla)(*args), 0
        own = {platform: many(function) for platform, function in elsewhere.items()}
        return jax.lax.platform_dependent(*args, default=many(xla), **own), 0

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(shape_of)
    mlir.register_lowering(primitive, mlir.lower_fun(xla, multiple_results=False))
    for platform, own in on.items():
        if own is not xla:
            split = on_cpus if platform == "cpu" and on_cpus else own
            mlir.register_lowering(primitive, _lowering(xla, own, split, platform), platform=platform)
    batching.primitive_batchers[primitive] = batched


def _lowering(xla: Function, own: Function, split: Function, platform: str) -> Any:
    def lower(ctx: Any, *args: Any, **params: Any) -> Any:
        # Inside `shard_map` the context has no such number: there a program is that of one device.
        devices = getattr(ctx.module_context.axis_context, "num_devices", None) or 1
        chosen = xla if platform == "cpu" and _compile.straight() else own if devices == 1 else split
        return mlir.lower_fun(chosen, multiple_results=False)(ctx, *args, **params)

    return lower
