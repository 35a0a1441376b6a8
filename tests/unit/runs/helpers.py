"""A small run: a linear network on three classes of 50 images, a few steps, a folder of its own."""

import pathlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2sad_jax import networks, training
from e2sad_jax.training import Config, configure

SHAPE = (8, 8, 1)


class Linear(nn.Module):
    """Stands for `digits_cnn`: compiled in a fraction of the time."""

    num_classes: int
    dtype: object = None
    precision: object = None

    min_size = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


def config_of(workdir: pathlib.Path, **changes) -> Config:
    """Twelve steps, with checkpoints at 5, 10 and 12."""
    settings = dict(data="tiny.npz", model="digits_cnn", steps=12, batch_size=16, checkpoint_every=5, log_every=2)
    return configure(**{**settings, "defense": "natural", "learning_rate": 1e-2, "workdir": str(workdir), **changes})


def state_of(config: Config, step: int = 0) -> training.TrainState:
    """A fresh state, said to be of a step; each step's parameters are other ones."""
    state = training.init_state(config, networks.create(config.model, 3, SHAPE), SHAPE)
    return state.replace(step=jnp.int32(step), params=jax.tree.map(lambda a: a + step, state.params))


def stop_after(times: int, number: int = 15) -> Callable[[], int]:
    """A stop that comes when it has been asked about so many times: after each step, and in each validation."""
    asked = 0

    def stop() -> int:
        nonlocal asked
        asked += 1
        return number if asked >= times else 0

    return stop
