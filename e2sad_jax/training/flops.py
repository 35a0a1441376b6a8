"""FLOPs and bytes of a training step by XLA's own count: the only place that counts them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from e2sad_jax import networks
from e2sad_jax._compile import straight_line
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.errors import ConfigError
from e2sad_jax.training.config import Config
from e2sad_jax.training.step import make_train_step, step_arguments


def step_flops(config: Config, image_shape: Sequence[int], num_classes: int) -> float:
    """Counts the FLOPs of one training step, as `step_counts`.

    Raises:
      ConfigError: if JAX has no CPU to count for.
    """
    counted = step_counts(config, image_shape, num_classes)
    if counted is None:
        raise ConfigError("JAX_PLATFORMS leaves out the CPU, for which FLOPs are counted: add cpu, as in cuda,cpu")
    return counted["flops"]


def step_counts(config: Config, image_shape: Sequence[int], num_classes: int) -> dict[str, float] | None:
    """Counts FLOPs and bytes of one training step in its CPU program, which is compiled and not run.

    XLA counts a loop as one turn of its body. So the program that it counts is another than the one that training runs:
    attacks unrolled, convolutions by XLA's own operation.

    Returns:
      `flops`, and `bytes` that its operations read and write; None where JAX has no CPU backend.
    """
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others only
        return None
    model = networks.create(num_classes=num_classes, image_shape=image_shape, **config.network())
    with jax.default_device(cpu), straight_line():
        step = make_train_step(config, model, num_classes, TRANSFORMS[config.transform])
        shapes = step_arguments(config, model, image_shape, num_classes, config.batch_size)
        return _counts(step.lower(*shapes))  # type: ignore[attr-defined]


def function_counts(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Counts FLOPs and bytes of your own step function on JAX's default device; compiled, not run.

    Args:
      function: not jitted yet: what it would be compiled to for training may have loops.
      arguments: arrays, or shapes with dtypes (`jax.ShapeDtypeStruct`).
    """
    with straight_line():
        return _counts(jax.jit(lambda *values: function(*values)).lower(*arguments))


def _counts(lowered: jax.stages.Lowered) -> dict[str, float]:
    counts: Any = lowered.compile().cost_analysis()
    return {"flops": float(counts["flops"]), "bytes": float(counts["bytes accessed"])}
