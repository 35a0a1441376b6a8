"""The state of a run at one step, or of several runs that train together."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from e2sad_jax import _streams
from e2sad_jax.networks import batch_stats
from e2sad_jax.training.config import COMMON, Config
from e2sad_jax.training.optimizer import optimizer


class TrainState(flax.struct.PyTreeNode):
    """The complete state of a run at one step; a checkpoint holds it, so that a run resumes bit for bit.

    Attributes:
      step: updates done so far, int32 scalar.
      params: the network's variables: parameters, and running averages (`batch_stats`) where it has them.
      opt_state: the optimiser's state.
      key: random key of the run; step t draws from `fold_in(key, t)`.
      delta: the perturbation `[batch_size, H, W, C]` that a defense keeps from step to step, None for others.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    key: jax.Array
    delta: jax.Array | None = None


def init_state(config: Config, model: nn.Module, image_shape: Sequence[int]) -> TrainState:
    """Initialises a state from the configuration's seed."""
    init_key, key = jax.random.split(_streams.key(config.seed, _streams.INITIALIZATION))
    params = jax.jit(model.init)(init_key, jnp.zeros((1, *image_shape)))
    opt_state = jax.jit(optimizer(config).init)(batch_stats.parameters(params))
    delta = jnp.zeros((config.batch_size, *image_shape)) if config.entry.carries else None
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state, key=key, delta=delta)


def stack(states: Sequence[TrainState]) -> TrainState:
    """Stacks the states of P runs into the state of a population, leaves `[P, ...]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def unstack(state: TrainState) -> list[TrainState]:
    """Splits the state of a population into the states of its runs, the inverse of `stack`."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(state.step.shape[0])]


def varied_settings(configs: Sequence[Config]) -> list[str]:
    """The settings, other than the seed, in which the runs of a population differ.

    These are `eps1`, and the defense's own that say so. Not alpha: as a traced number it would keep XLA from merging the
    attack's backward pass with the training one.
    """
    may = ["eps1", *(one.name for one in configs[0].entry.settings if one.varies)]
    values = [config.to_json() for config in configs]
    return [name for name in may if len({each[name] for each in values}) > 1]


def population_key(config: Config) -> Config:
    """A key that is equal for runs that may train together in one population.

    They may differ in the seed, the workdir and the settings of `varied_settings`.
    """
    defaults = {field.name: field.default for field in COMMON if field.name in ("eps1", "seed", "workdir")}
    own = {one.name: one.default for one in config.entry.settings if one.varies}
    return config.replace(**defaults, **own)
