"""Argument checks of attacks and defenses. A traced number has no value yet and passes."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax.attacks._ball import NORMS
from e2sad_jax.attacks._types import Bounds


def threat_model(
    name: str,
    x: jax.Array,
    *,
    bounds: Bounds,
    eps: object = 0.0,
    norm: str = "linf",
    step_size: object | None = None,
    **counts: int,
) -> None:
    """Checks what most attacks take.

    Args:
      name: the attack's name in the messages.
      x: images, floating point, with a leading batch axis.
      bounds: image range, the lower below the upper one, or None.
      eps: budget, finite and at least 0.
      norm: "linf" or "l2".
      step_size: finite and above 0, or None.
      **counts: whole numbers, at least 1 (`steps`, `restarts`, ...).

    Raises:
      TypeError: if the images are not floating point.
      ValueError: if another argument is out of range.
    """
    images(name, x)
    number(name, "eps", eps)
    for argument, count in counts.items():
        if not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"{name}: {argument}={count}; it must be a whole number, at least 1")
    if step_size is not None:
        number(name, "step_size", step_size, positive=True)
    if norm not in NORMS:
        raise ValueError(f"{name}: norm={norm!r}; it must be one of {', '.join(NORMS)}")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"{name}: bounds={bounds}; the lower must be below the upper one")


def images(name: str, x: jax.Array) -> None:
    """Refuses images that are not floating point or have no batch axis."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name}: images are {x.dtype}; they must be floating point, as the loss sees them (uint8: x / 255)"
        )
    if x.ndim < 1:
        raise ValueError(f"{name}: images need a leading batch axis [N, ...], got a scalar")


def number(name: str, argument: str, value: object, *, positive: bool = False) -> None:
    """Refuses a number that is negative, not finite or, if `positive`, 0."""
    if not is_number(value):
        return
    known = float(value)  # type: ignore[arg-type]
    if not math.isfinite(known) or known < 0 or (positive and known == 0):
        raise ValueError(f"{name}: {argument}={value}; it must be finite and {'above' if positive else 'at least'} 0")


def logits(name: str, shape: tuple[int, ...], n: int) -> None:
    """Refuses logits of another shape than `(n, K)`, K at least 2."""
    if len(shape) != 2 or shape[0] != n or shape[1] < 2:
        raise ValueError(f"{name}: logits have shape {shape}; it must be ({n}, K), K at least 2")


def classes(name: str, argument: str, values: jax.Array, shape: tuple[int, ...]) -> None:
    """Refuses classes that do not fit logits of shape `(N, K)`; of traced ones it checks type and shape."""
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise TypeError(f"{name}: {argument} are {values.dtype}; they must be integer classes of shape [N]")
    if values.shape != shape[:1]:
        raise ValueError(f"{name}: {argument} have shape {values.shape}; it must be {shape[:1]}, one class per image")
    if is_readable(values):
        wrong = np.asarray(values)[(np.asarray(values) < 0) | (np.asarray(values) >= shape[1])]
        if wrong.size:
            raise ValueError(f"{name}: {argument} contain {wrong[0]}; each must be a class in [0, {shape[1]})")


def is_number(value: object) -> bool:
    """Whether `value` is one number with a value now: Python's, NumPy's, or JAX's outside of a transformation."""
    if isinstance(value, (np.ndarray, jax.Array)):
        return value.ndim == 0 and not isinstance(value, jax.core.Tracer)
    return isinstance(value, numbers.Real)


def is_readable(values: jax.Array) -> bool:
    """Whether the values of an array can be read: not traced, and not on another host."""
    return not isinstance(values, jax.core.Tracer) and getattr(values, "is_fully_addressable", True)
