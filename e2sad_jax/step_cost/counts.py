"""What XLA counts of a step's work, and the most work that this device does in a second."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from e2sad_jax import models, train
from e2sad_jax.attacks._loops import platform
from e2sad_jax.config import Config
from e2sad_jax.step_cost.step import Timer
from e2sad_jax.transforms import TRANSFORMS

CPU_PRODUCT, PRODUCT = 2048, 8192  # rows of the square matrices whose product is the ceiling


def flops(config: Config, image_shape: tuple[int, ...], num_classes: int) -> float | None:
    """FLOPs of a step (`train.step_flops`) by the CPU's program, where no loop hides an attack's steps from XLA's count.

    None where JAX was told to leave the CPU out.
    """
    return _on_cpu(lambda: train.step_flops(config, image_shape, num_classes))


def bytes_accessed(config: Config, image_shape: tuple[int, ...], num_classes: int) -> float | None:
    """Bytes that the operations of the CPU's program read and write, by XLA's count, caches left aside; None as `flops`."""

    def count() -> float:
        model = models.create(config.model, num_classes, image_shape, config.precision)
        step: Any = train.make_train_step(config, model, num_classes, TRANSFORMS[config.transform])
        n = config.batch_size
        shapes = jax.eval_shape(
            lambda: (
                train.init_state(config, model, image_shape),
                jnp.zeros((n, *image_shape), jnp.uint8),
                jnp.zeros(n, jnp.int32),
                train.epoch_order(jax.random.key(0), jnp.zeros((), jnp.uint32), n),
            )
        )
        return float(step.lower(*shapes).compile().cost_analysis()["bytes accessed"])

    return _on_cpu(count)


def _on_cpu(count: Callable[[], float]) -> float | None:
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others only
        return None
    with jax.default_device(cpu):
        return count()


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
      precision: a key of `models.PRECISIONS`.

    Returns:
      The timer, and the FLOPs of the product.
    """
    n = CPU_PRODUCT if platform() == "cpu" else PRODUCT
    settings = models.PRECISIONS[precision]
    matrix = jax.random.normal(jax.random.key(0), (n, n), settings.get("dtype", jnp.float32))
    multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=settings.get("precision")))
    jax.block_until_ready(multiply(matrix))

    def once() -> float:
        began = time.perf_counter()
        jax.block_until_ready(multiply(matrix))
        return time.perf_counter() - began

    return lambda: min(once() for _ in range(3)), 2.0 * n**3
