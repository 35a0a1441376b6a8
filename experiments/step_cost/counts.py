"""The memory that a step holds, and the most work that this device does in a second."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from e2sad_jax import networks
from e2sad_jax._compile import platform
from experiments.step_cost.step import Timer

CPU_PRODUCT, PRODUCT = 2048, 8192  # rows of the square matrices whose product is the ceiling


def peak_bytes(compiled: Any) -> int | None:
    """Most bytes that a compiled program holds: temporary ones, arguments, and outputs that take no argument's place."""
    memory = compiled.memory_analysis()
    if memory is None:  # not every backend says
        return None
    return int(
        memory.temp_size_in_bytes
        + memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def product(precision: str) -> tuple[Timer, float]:
    """A timer of one large product of square matrices, the best of three, in the arithmetic of a network's layers.

    Args:
      precision: a key of `networks.PRECISIONS`.

    Returns:
      The timer, and the FLOPs of the product.
    """
    n = CPU_PRODUCT if platform() == "cpu" else PRODUCT
    settings = networks.PRECISIONS[precision]
    matrix = jax.random.normal(jax.random.key(0), (n, n), settings.get("dtype", jnp.float32))
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=settings.get("precision")))
    jax.block_until_ready(multiply(matrix))

    def once() -> float:
        began = time.perf_counter()
        jax.block_until_ready(multiply(matrix))
        return time.perf_counter() - began

    return lambda: min(once() for _ in range(3)), 2.0 * n**3
