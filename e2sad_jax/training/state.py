"""The state of a run at one step, or of several runs that train together."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from e2sad_jax import _streams, distributed
from e2sad_jax._compile import once
from e2sad_jax.networks import batch_stats
from e2sad_jax.training.config import COMMON, Config
from e2sad_jax.training.memory import Memory, begin
from e2sad_jax.training.optimizer import optimizer


class TrainState(flax.struct.PyTreeNode):
    """The complete state of a run at one step; a checkpoint holds it, so that a run resumes bit for bit.

    Attributes:
      step: updates done so far, int32 scalar.
      params: the network's variables: parameters, and running averages (`batch_stats`) where it has them.
      opt_state: the optimiser's state.
      key: random key of the run; step t draws from `fold_in(key, t)`.
      delta: the perturbation that a defense keeps from step to step, `[batch_size, H, W, C]` or `[carried, H, W, C]`; None for
        others.
      memory: what is kept of each training image (`training.memory`), None for nothing.
      average: averaged variables under `ema`, else None.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    key: jax.Array
    delta: jax.Array | None = None
    memory: Memory | None = None
    average: Any = None


def init_state(
    config: Config, model: nn.Module, image_shape: Sequence[int], training_images: int | None = None
) -> TrainState:
    """Initialises a state from the configuration's seed.

    Args:
      config: the run's settings.
      model: the network.
      image_shape: (H, W, C).
      training_images: their number; needed with `memory`.

    Raises:
      ValueError: if it is missing.
    """
    if training_images is None and config.memory != "none":
        raise ValueError(f"init_state: memory={config.memory} keeps a perturbation per image and needs training_images")
    init_key, key = jax.random.split(_streams.key(config.seed, _streams.INITIALIZATION))
    params = once(model.init, init_key, jnp.zeros((1, *image_shape)))
    opt_state = once(optimizer(config).init, batch_stats.parameters(params))
    delta = jnp.zeros((config.entry.carried or config.batch_size, *image_shape)) if config.entry.carries else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        key=key,
        delta=delta,
        memory=begin(config, training_images or 0, image_shape, _streams.key(config.seed, _streams.MEMORY)),
        average=jax.tree.map(jnp.copy, params) if config.ema else None,
    )


def place(state: TrainState, mesh: Mesh | None, *, population: bool = False) -> TrainState:
    """Leaves each device of a run its share of the memory; all the rest lies on each.

    Args:
      state: replicated on the devices.
      mesh: the devices; None for one.
      population: whether the state has a leading axis P.
    """
    if mesh is None or state.memory is None:
        return state
    return state.replace(memory=jax.device_put(state.memory, rows_split(mesh, population)))


def gather(state: TrainState, mesh: Mesh | None) -> TrainState:
    """The state with all of its memory on each device, the inverse of `place`."""
    if mesh is None or state.memory is None:
        return state
    return state.replace(memory=_everywhere(distributed.whole(mesh))(state.memory))


@functools.cache
def _everywhere(place: NamedSharding) -> Any:
    return jax.jit(lambda memory: memory, out_shardings=place)


def shardings(mesh: Mesh, *, population: bool = False) -> TrainState:
    """Where the parts of a state lie, as a prefix of it, for `jax.jit`."""
    whole: Any = distributed.whole(mesh)
    return TrainState(whole, whole, whole, whole, whole, rows_split(mesh, population), whole)  # type: ignore[arg-type]


def rows_split(mesh: Mesh, population: bool) -> NamedSharding:
    """The sharding of a memory: its rows over the devices."""
    return distributed.split(mesh, axis=1 if population else 0)


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

    They may differ in the seed, the workdir and the settings of `varied_settings`. A run with a teacher trains alone.
    """
    if config.entry.learns:
        return config
    defaults = {field.name: field.default for field in COMMON if field.name in ("eps1", "seed", "workdir")}
    own = {one.name: one.default for one in config.entry.settings if one.varies}
    return config.replace(**defaults, **own)
