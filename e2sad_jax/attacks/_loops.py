"""How an attack repeats its step on the platform that its program is made for."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from e2sad_jax._compile import platform, straight

T = TypeVar("T")


def repeat(times: int, body: Callable[[int | jax.Array, T], T], init: T) -> T:
    """`body(times - 1, ... body(1, body(0, init)))`, one compiled loop where that costs nothing, otherwise unrolled.

    XLA's CPU backend runs its own convolutions two to four times slower inside a compiled loop than outside one; those
    of `e2sad_jax.networks.cpu_conv` not.
    """
    if times > 0 and _loops_well(body, 0, init):
        return jax.lax.fori_loop(0, times, body, init)
    return _unrolled(times, body, init)


def repeat_long(times: int, body: Callable[[int | jax.Array, T], T], init: T) -> T:
    """As `repeat`, on every platform a compiled loop: for so many rounds that unrolled they would compile for ever."""
    return _unrolled(times, body, init) if straight() else jax.lax.fori_loop(0, times, body, init)


def repeat_while(
    unfinished: Callable[[T], jax.Array], times: int, body: Callable[[int | jax.Array, T], T], init: T
) -> T:
    """As `repeat_long`, ended early when the scalar `unfinished(value)` turns False; `body` must not change it then."""
    if straight():
        return _unrolled(times, body, init)

    def go_on(state: tuple[jax.Array, T]) -> jax.Array:
        return (state[0] < times) & unfinished(state[1])

    return jax.lax.while_loop(go_on, lambda state: (state[0] + 1, body(*state)), (jnp.int32(0), init))[1]


def _unrolled(times: int, body: Callable[[int | jax.Array, T], T], init: T) -> T:
    value = init
    for i in range(times):
        value = body(i, value)
    return value


def each(values: jax.Array, body: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`body` of each of `values`, stacked: one compiled loop or unrolled, as `repeat`."""
    if _loops_well(body, values[0]):
        return jax.lax.map(body, values)
    return jnp.stack([body(values[i]) for i in range(values.shape[0])])


def _loops_well(body: Callable[..., Any], *arguments: Any) -> bool:
    if straight():
        return False
    return platform() != "cpu" or "conv_general_dilated" not in str(jax.make_jaxpr(body)(*arguments))
