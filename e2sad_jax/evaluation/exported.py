"""Functions of images that `jax.export` wrote as StableHLO."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from e2sad_jax._compile import platform
from e2sad_jax.errors import DataError


def stablehlo(path: str | os.PathLike[str]) -> Callable[[jax.Array], jax.Array]:
    """The function of images that a file holds, as `of_stablehlo` evaluates it.

    Args:
      path: the file.

    Returns:
      Images `[N, ...]`, float32, to logits `[N, K]`, for any N. Its gradient raises a `DataError` where the file has none.

    Raises:
      DataError: if the file cannot be read, or holds no function of one array.
    """
    path = pathlib.Path(path).expanduser()
    try:
        exported = jax.export.deserialize(bytearray(path.read_bytes()))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except Exception as error:  # flatbuffers raises whatever it comes upon
        raise DataError(
            f"{path}: is no file that jax.export serialized; write it with exported.serialize(vjp_order=1)"
        ) from error
    inputs, outputs = exported.in_avals, exported.out_avals
    if len(inputs) != 1 or len(outputs) != 1 or not inputs[0].shape or len(outputs[0].shape) != 2:
        shapes = [[tuple(map(str, aval.shape)) for aval in avals] for avals in (inputs, outputs)]
        raise DataError(
            f"{path}: takes {shapes[0]} and returns {shapes[1]}; it must take images [N, ...] alone and return logits [N, K]"
        )
    if inputs[0].dtype != jnp.float32:
        raise DataError(f"{path}: takes {inputs[0].dtype}; export the function for float32 images")
    here = {"gpu": ("cuda", "rocm")}.get(platform(), (platform(),))
    if not set(here) & set(exported.platforms):
        raise DataError(
            f"{path}: was exported for {', '.join(exported.platforms)}, and JAX runs on {platform()}; export it with "
            f"platforms=[{here[0]!r}]"
        )
    size = inputs[0].shape[0]
    if outputs[0].shape[0] != size:
        raise DataError(f"{path}: returns {outputs[0].shape[0]} rows for {size} images; it must return one for each")

    forward = jax.custom_batching.sequential_vmap(exported.call)  # `jax.export` has no rule for `vmap`

    @jax.custom_vjp
    def without_gradient(x: jax.Array) -> jax.Array:
        return forward(x)  # type: ignore[no-any-return]

    def refuse(x: jax.Array) -> Any:
        raise DataError(
            f"{path}: was exported without its gradient; serialize(vjp_order=1), or attack it without gradients (Square)"
        )

    without_gradient.defvjp(refuse, lambda residuals, cotangent: (cotangent,))
    call = _with_batching(exported) if exported.has_vjp() else without_gradient

    def function(x: jax.Array) -> jax.Array:
        if not isinstance(size, int):
            return call(x)  # type: ignore[no-any-return]
        filled = jnp.concatenate([x, jnp.zeros((-len(x) % size, *x.shape[1:]), x.dtype)])
        logits = jax.lax.map(call, filled.reshape(-1, size, *x.shape[1:]))
        return logits.reshape(len(filled), -1)[: len(x)]  # type: ignore[no-any-return]

    return function


def _with_batching(exported: jax.export.Exported) -> Callable[[jax.Array], jax.Array]:
    """An exported function and its gradient, which `vmap` calls one after another: `jax.export` has no rule for it."""
    forward = jax.custom_batching.sequential_vmap(exported.call)
    backward = jax.custom_batching.sequential_vmap(exported.vjp().call)

    @jax.custom_vjp
    def call(x: jax.Array) -> jax.Array:
        return forward(x)  # type: ignore[no-any-return]

    call.defvjp(lambda x: (forward(x), x), backward)
    return call
