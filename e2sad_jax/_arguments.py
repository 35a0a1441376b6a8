"""Checks of arguments that losses and attacks share. What is traced has no value yet: only its shape and type are checked."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax.errors import quoted

ONE_LOGIT = "of a model with one logit, losses.binary_logits makes two"


def is_number(value: object) -> bool:
    """Whether `value` is one number with a value now: Python's, NumPy's, or JAX's outside of a transformation."""
    if isinstance(value, (np.ndarray, jax.Array)):
        return value.ndim == 0 and not isinstance(value, jax.core.Tracer)
    return isinstance(value, numbers.Real)


def is_readable(values: Any) -> bool:
    """Whether the values of an array can be read: not traced, and not on another host."""
    return not isinstance(values, jax.core.Tracer) and getattr(values, "is_fully_addressable", True)


def read(values: Any) -> np.ndarray:
    """The values of an array that `is_readable`."""
    return np.asarray(jax.device_get(values))


def count(argument: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """A whole number in [least, most] as a Python integer.

    Args:
      argument: whose value it is, as the message names it.
      value: the number.
      least: the lowest one allowed.
      most: the highest one allowed, None for no bound.

    Raises:
      ValueError: if it is none.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bound = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{argument}={quoted(value)}; it must be {bound}, a whole number")
    return int(value)


def wide(dtype: Any) -> Any:
    """float32, or `dtype` where that is wider; `jnp.promote_types` does not say under strict promotion."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    return dtype if floating and jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def logits(name: str, values: Any, n: int | None = None, *, least: int = 2, remedy: str = ONE_LOGIT) -> jax.Array:
    """Refuses what is not an array of logits `[N, K]`.

    Args:
      name: the function's name in the messages.
      values: what a model returned: an array, or its shape and dtype.
      n: N, None for any.
      least: smallest K.
      remedy: what to do with fewer classes.

    Returns:
      The logits, as an array of JAX.

    Raises:
      TypeError: if it is not one array.
      ValueError: if its shape is another one.
    """
    if not isinstance(values, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        raise TypeError(
            f"{name}: the model returned a {type(values).__name__}; it must return one array, logits [N, K]: of several "
            "outputs pass the logits alone, lambda x: f(x)[0]"
        )
    if len(values.shape) != 2 or values.shape[1] < least or n not in (None, values.shape[0]):
        raise ValueError(
            f"{name}: logits have shape {values.shape}; it must be {'[N, K]' if n is None else f'({n}, K)'}, K at least "
            f"{least} ({remedy})"
        )
    return jnp.asarray(values) if isinstance(values, np.ndarray) else values  # type: ignore[return-value]


def classes(name: str, argument: str, values: Any, n: int, num_classes: int) -> jax.Array:
    """Refuses what is not one class in `[0, num_classes)` for each of `n` images.

    Raises:
      TypeError: if `values` are not integers.
      ValueError: if their number is another one, or one of them, where they can be read, is no class.

    Returns:
      The classes, int32.
    """
    values = values if isinstance(values, (jax.Array, np.ndarray)) else np.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{name}: {argument} are {values.dtype}; they must be integer classes of shape [N]")
    if values.shape != (n,):
        raise ValueError(f"{name}: {argument} have shape {values.shape}; it must be ({n},), one class per image")
    if is_readable(values):
        known = read(values)
        if (wrong := known[(known < 0) | (known >= num_classes)]).size:
            raise ValueError(f"{name}: {argument} contain {wrong[0]}; each must be a class in [0, {num_classes})")
    values = jnp.asarray(values)
    if values.dtype.itemsize >= 4 and values.dtype != jnp.int32:  # what int32 does not hold is no class, and stays none
        least = -1 if jnp.issubdtype(values.dtype, jnp.signedinteger) else 0
        values = jnp.clip(values, least, jnp.iinfo(jnp.int32).max)
    return values.astype(jnp.int32)  # in a narrow type the number of classes would wrap around


def nan_without_class(values: jax.Array, classes: jax.Array, num_classes: int) -> jax.Array:
    """`values` `[N, ...]`, NaN where one of the `classes` `[N]` is outside `[0, num_classes)`, which nobody could refuse.

    There is a NaN only then, 0 / 0: a constant would stop every program under `jax_debug_nans`.
    """
    if is_readable(classes):  # and so refused
        return values
    ok = ((classes >= 0) & (classes < num_classes)).reshape(-1, *[1] * (values.ndim - 1))
    return jnp.where(ok, values, 0) / ok.astype(values.dtype)
