"""What platform a program is made for, and how an attack repeats its step there."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def platform() -> str:
    """Where the program that is being traced will run: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # a Device, a platform's name, or None
    return getattr(device, "platform", device) or jax.default_backend()


def repeat(times: int, body: Callable[[int | jax.Array, T], T], init: T) -> T:
    """`body(times - 1, ... body(1, body(0, init)))`, unrolled on the CPU and one compiled loop elsewhere.

    XLA's CPU backend runs convolutions inside a compiled loop two to four times slower than outside one, while the
    unrolled graph of a 40-step attack compiles in seconds; accelerators have no such penalty and prefer the small
    graph.
    """
    if platform() != "cpu":
        return jax.lax.fori_loop(0, times, body, init)
    value = init
    for i in range(times):
        value = body(i, value)
    return value


def each(values: jax.Array, body: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`body` of each of `values`, stacked: unrolled on the CPU, one compiled loop elsewhere, as `repeat`."""
    if platform() != "cpu":
        return jax.lax.map(body, values)
    return jnp.stack([body(values[i]) for i in range(values.shape[0])])
