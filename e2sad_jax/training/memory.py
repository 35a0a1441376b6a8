"""The memory of a run: what is kept of each training image from one epoch to the next, for the start of its next attack.

A perturbation is kept in units of the budget, so that it grows with a budget that rises. As int8 the unit has 127 levels: a
pixel is off by at most 1/254 of the budget. In the l2 ball, where perturbations have small pixels, an
image of D pixels is then off by about sqrt(D / 12) / 127 of the budget: bf16 is better there.

It is kept where the stored image has its pixels: an augmentation that moves pixels applies to what `recall` returns, and its
inverse to what `note` takes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import core
from e2sad_jax.training.config import Config

DTYPES: Mapping[str, Any] = {"int8": jnp.int8, "bf16": jnp.bfloat16}
LEVELS = 127  # of int8 on either side of 0

# By name: [rows, H W C], with rows of `rows_of`. In this shape an image's pixels lie side by side on every device; of
# [rows, 28, 28, 1] a TPU would lay the images side by side, and pad what it takes out of them.
Memory = dict[str, jax.Array]


def rows_of(config: Config, training_images: int) -> int:
    """The rows of a memory: one for each training image, and unused ones up to a multiple of the batch.

    So the devices of any mesh that the batch can be split over can share the rows.
    """
    return math.ceil(training_images / config.batch_size) * config.batch_size


def nbytes(config: Config, training_images: int, image_shape: Sequence[int]) -> int:
    """The bytes of a run's memory, 0 where it has none."""
    if config.memory == "none":
        return 0
    pixels = rows_of(config, training_images) * math.prod(image_shape)
    return pixels * jnp.dtype(DTYPES[config.memory]).itemsize * len(config.entry.remembers)


def begin(config: Config, training_images: int, image_shape: Sequence[int], key: jax.Array) -> Memory | None:
    """The memory before the first step: perturbations uniform in the ball, zeros for all else; None without memory."""
    if config.memory == "none":
        return None
    dtype = DTYPES[config.memory]
    shape = (rows_of(config, training_images), math.prod(image_shape))
    memory = {name: jnp.zeros(shape, dtype) for name in config.entry.remembers}
    if "delta" in memory:
        ball = core.ball(config.norm, jnp.zeros((1, *image_shape)), 1.0, None)

        def draw(row: jax.Array) -> jax.Array:  # row by row: floats of all at once would take four times the memory
            drawn = ball.sample(jax.random.fold_in(key, row)[None], jnp.zeros((1, *image_shape)))
            return stored(drawn.reshape(-1), dtype)

        memory["delta"] = jax.lax.map(draw, jnp.arange(shape[0]), batch_size=256)
    return memory


def check_rows(config: Config, memory: Memory | None, training_images: int) -> None:
    """Refuses a memory of another number of images: a gather past its end would take its last row.

    Raises:
      ValueError: with both numbers.
    """
    wanted = rows_of(config, training_images)
    for kept in (memory or {}).values():
        if kept.shape[0] != wanted:
            raise ValueError(
                f"the state's memory has {kept.shape[0]} rows; for {training_images} training images in batches of "
                f"{config.batch_size} it must have {wanted}: init_state(..., training_images={training_images})"
            )


def recall(
    memory: Memory, batch: jax.Array, eps: jax.typing.ArrayLike, image_shape: Sequence[int]
) -> dict[str, jax.Array]:
    """What is remembered of the images of a batch, `[N, H, W, C]`, float32, perturbations in the images' units.

    Args:
      memory: the memory.
      batch: places of the images in the training set, int `[N]`.
      eps: the budget now.
      image_shape: (H, W, C).
    """
    found = {}
    for name, kept in memory.items():
        rows = kept[batch].reshape(-1, *image_shape).astype(jnp.float32)
        rows = rows / LEVELS if kept.dtype == jnp.int8 else rows
        found[name] = rows * eps if name == "delta" else rows
    return found


def note(memory: Memory, batch: jax.Array, values: Mapping[str, jax.Array], eps: jax.typing.ArrayLike) -> Memory:
    """The memory with the values of a batch, as `recall` returns them.

    An image that is twice in the batch, where one epoch ends and the next begins, keeps its later value. With a budget of
    0, where every perturbation is 0, what was there stays.
    """
    n = len(batch)
    again = ((batch[:, None] == batch[None, :]) & (jnp.arange(n)[:, None] < jnp.arange(n)[None, :])).any(1)
    rows = next(iter(memory.values())).shape[0]
    places = jnp.where(again | (jnp.asarray(eps) <= 0), rows, batch)  # past the end: dropped
    noted = {}
    for name, kept in memory.items():
        new = values[name] / jnp.where(jnp.asarray(eps) > 0, eps, 1) if name == "delta" else values[name]
        noted[name] = kept.at[places].set(stored(new, kept.dtype).reshape(n, -1), mode="drop")
    return noted


def stored(values: jax.Array, dtype: Any) -> jax.Array:
    """Values in [-1, 1] as they are kept."""
    values = jnp.clip(values, -1, 1)
    return jnp.round(values * LEVELS).astype(dtype) if dtype == jnp.int8 else values.astype(dtype)
