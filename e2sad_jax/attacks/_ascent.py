"""Steps up a loss inside a ball: what IFGSM, PGD and TRADES share."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _loops
from e2sad_jax.attacks._ball import Ball, cast_inside
from e2sad_jax.attacks._numerics import as_float32, input_gradient
from e2sad_jax.attacks._types import LossFn
from e2sad_jax.attacks._within import as_attack


@as_attack
def ascend(
    loss_fn: LossFn,
    start: jax.Array,
    limits: Ball,
    dtype: jnp.dtype,
    step_size: jax.typing.ArrayLike,
    steps: int,
    unrolled: int = 0,
) -> jax.Array:
    """Takes `steps` steps of `step_size` up the loss, each projected onto the ball.

    Args:
      loss_fn: images `[N, ...]` of `dtype` to losses `[N]`.
      start: first point, `[N, ...]`, float32 or wider, in the ball.
      limits: the ball.
      dtype: of the images.
      step_size: length of a step in the ball's norm.
      steps: number of steps.
      unrolled: how many of the steps, the first ones, stay outside of the compiled loop.

    Returns:
      The last point, `[N, ...]`, of `dtype`, in the ball. Gradients are not stopped.
    """

    def step(_: int | jax.Array, z: jax.Array) -> jax.Array:
        gradient = input_gradient(loss_fn, z.astype(dtype))
        return limits.project(z + step_size * limits.steepest(as_float32(gradient)))

    for i in range(unrolled):
        start = step(i, start)
    return cast_inside(_loops.repeat(steps - unrolled, step, start), dtype, limits)
