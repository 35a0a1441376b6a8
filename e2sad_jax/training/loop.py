"""The training loop: runs the step, passes on metrics and checkpoints, and stops."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import _streams, distributed
from e2sad_jax._compile import platform
from e2sad_jax.data import Dataset
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.training.config import Config
from e2sad_jax.training.state import TrainState, varied_settings
from e2sad_jax.training.step import epoch_order, make_train_step
from e2sad_jax.training.stream import Stream, is_resident, most_steps

STEPS_PER_DISPATCH = 64  # on accelerators; each is too short there for the host to start them one by one


def steps_at_once() -> int:
    """The default number of steps that the host starts at once on this platform."""
    return 1 if platform() == "cpu" else STEPS_PER_DISPATCH


def fit(
    config: Config | Sequence[Config],
    model: nn.Module,
    dataset: Dataset,
    state: TrainState,
    *,
    record: Callable[[int, dict[str, jax.Array], int], None],
    checkpoint: Callable[[int, TrainState], None],
    steps: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    steps_per_dispatch: int | None = None,
    mesh: Mesh | None = None,
    teacher: np.ndarray | jax.Array | None = None,
) -> TrainState:
    """Trains from `state` to step `steps`, or until `stop()`.

    The training images lie on the device, or stay on the host (`config.resident`); the steps are the same. Those of a
    population lie on the device.

    Args:
      config: the run's settings, or those of a population: they may differ in the seed and in the settings
        of `varied_settings`.
      model: the network, which normalises its images by itself: `mean` and `std` of the settings are for `networks.create`.
      dataset: images and labels.
      state: where to begin, of a population with a leading axis P; its buffers are donated and must not be used again.
      record: called after every dispatch with the last step's number, the metrics of its steps, and how many those are.
        The metrics are still on the device, and it must not wait for them. They are `[P]` for a population, and have a
        leading axis where several steps may start at once: `steps_per_dispatch`, or less where images stay on the host.
      checkpoint: called every `checkpoint_every` steps, and at the end.
      steps: step to end at; None for `config.total_steps`, over which the schedules stretch in any case.
      stop: asked after every dispatch; True ends the loop, after a last checkpoint.
      steps_per_dispatch: steps that the host starts at once; None for 1 on the CPU, where each is long, and
        `STEPS_PER_DISPATCH` elsewhere.
      mesh: devices to train on, where that is more than the default one. `state` must lie there (`place`).
      teacher: the logits of the training images, `[n, K]`, that a defense learns from which has a teacher.

    Returns:
      The state reached.

    Raises:
      ValueError: if the teacher is missing, or of another shape; if there are too many steps; or for a population whose
        images are to stay on the host.
    """
    configs = [config] if isinstance(config, Config) else list(config)
    population, c = not isinstance(config, Config), configs[0]
    batch_size = c.batch_size
    at_once, n = steps_per_dispatch or steps_at_once(), len(dataset.x_train)
    if population and c.resident == "host":
        raise ValueError("fit: resident='host' is for one run; the images of a population lie on the device")
    resident = population or is_resident(c, dataset.x_train)
    if not resident:
        at_once = min(at_once, most_steps(c, dataset.x_train))
    train_step = make_train_step(
        c,
        model,
        dataset.num_classes,
        TRANSFORMS[c.transform],
        population=population,
        steps=at_once,
        mesh=mesh,
        streamed=0 if resident else n,
    )
    put = functools.partial(distributed.replicate, mesh)
    steps = c.total_steps(n) if steps is None else steps
    if steps * batch_size >= 2**32:  # the place in the order is counted in 32 bits
        raise ValueError(f"fit: {steps:,} steps of {batch_size}; their product must be below {2**32:,}: fewer steps")
    wanted, given = (n, dataset.num_classes), None if teacher is None else teacher.shape
    if c.entry.learns and given != wanted:
        raise ValueError(
            f"fit: teacher has shape {given}; --defense={c.defense} needs its logits of the training images, {wanted}"
        )
    labels = put((dataset.y_train, teacher) if c.entry.learns else dataset.y_train)
    keys = put([_streams.key(c.seed, _streams.ORDER) for c in configs])
    order_of = functools.partial(epoch_order, keys[0], n=n)
    extra: list[Any] = []
    if population:
        order_of = functools.partial(_orders, jnp.stack(keys), n=n)
        values = [config.to_json() for config in configs]
        varied = {name: np.array([v[name] for v in values], np.float32) for name in varied_settings(configs)}
        extra = [put(varied)]
    step = int(state.step[0] if population else state.step)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> jax.Array:
        return order_of(epoch=put(np.uint32(epoch)))

    def dispatch(step: int) -> tuple[int, int]:
        """The epoch of a step, and how many steps start with it."""
        epoch = step // c.steps_per_batch * batch_size // n
        count = min(
            at_once,
            steps - step,
            c.checkpoint_every - step % c.checkpoint_every,
            c.steps_per_batch * -(-(epoch + 1) * n // batch_size) - step,  # those that begin in this epoch
        )
        return epoch, count

    @functools.lru_cache(maxsize=1)
    def on_host(epoch: int) -> np.ndarray:
        return jax.device_get(distributed.local(order(epoch)))

    def ask(step: int) -> None:
        epoch, count = dispatch(step)
        stream.ask(step, count, on_host(epoch))

    metrics: Any = ()
    with jax.transfer_guard("disallow"), Stream(c, dataset.x_train, at_once, mesh) as stream:
        images: Any = put(np.asarray(dataset.x_train)) if resident else None
        if not resident and step < steps:
            ask(step)
        while step < steps:
            epoch, count = dispatch(step)
            if not resident:
                sent, first = stream.take()
                images = sent, put(first)
            counted = [put(np.int32(count))] if at_once > 1 else []
            before = metrics
            state, metrics = train_step(state, images, labels, order(epoch), *extra, *counted)
            if not resident:
                jax.block_until_ready(before)  # so that no more than two dispatches hold images
                if step + count < steps:
                    ask(step + count)
            step += count
            record(step, metrics, count)
            stopping = stop()
            if stopping or step == steps or step % c.checkpoint_every == 0:
                checkpoint(step, state)
            if stopping:
                break
    return state


@functools.partial(jax.jit, static_argnames="n")
def _orders(keys: jax.Array, epoch: jax.Array, n: int) -> jax.Array:
    return jax.vmap(epoch_order, (0, None, None))(keys, epoch, n)
