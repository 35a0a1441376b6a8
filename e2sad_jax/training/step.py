"""The one jitted step of every defense: a batch, the defense's loss, its gradient, the update.

Several runs of one defense may train together, as one step under `vmap`: a *population*. Its state, metrics and orders
carry a leading axis P, one entry for each run.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from e2sad_jax import _streams, distributed, networks
from e2sad_jax._compile import jit, platform, straight_line
from e2sad_jax.attacks import core
from e2sad_jax.data.transforms import Transform
from e2sad_jax.defenses._types import LogitsFn, Parts
from e2sad_jax.losses import soft_labels
from e2sad_jax.networks import batch_stats
from e2sad_jax.training.config import Config
from e2sad_jax.training.memory import check_rows, note, recall
from e2sad_jax.training.optimizer import adversarial_weights, optimizer
from e2sad_jax.training.state import TrainState, init_state, shardings

AUGMENTATION = 2**32 - 1  # in place of a step, to draw from a run's key
TrainStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]  # see `make_train_step`


def settings_at(
    config: Config, step: jax.Array, total: int, varied: Mapping[str, jax.Array] = types.MappingProxyType({})
) -> tuple[jax.typing.ArrayLike, dict[str, Any]]:
    """Computes the budget `eps1` and the defense's settings at one step, under `eps_scale` and `eps_warmup`.

    Args:
      config: the run's settings.
      step: updates done so far.
      total: all the steps of the run.
      varied: values that replace the configured ones, by name.

    Returns:
      The budget, and the settings by name; budgets are as large as they have grown by `step`.
    """
    eps, settings = varied.get("eps1", config.eps1), {**config.settings, **varied}
    settings.pop("eps1", None)
    if config.eps_warmup or config.eps_scale != 1:
        grown: Any = config.eps_scale
        if config.eps_warmup:
            grown *= jnp.minimum(step.astype(jnp.float32) / config.warmup_steps(total), 1)
        eps *= grown
        for one in config.entry.settings:
            if one.budget and not (one.zero_is_none and config.settings[one.name] == 0):
                settings[one.name] *= grown
    return eps, settings


@functools.partial(jax.jit, static_argnames="n")
def epoch_order(key: jax.Array, epoch: jax.Array, n: int) -> jax.Array:
    """The order of the images in `epoch` and in the next, two permutations of `range(n)` end to end, int32 `[2n]`.

    Batches are cut from the stream of all epochs' permutations, so one batch may end an epoch and begin the next: every
    image comes once an epoch, and none is dropped.
    """

    def permutation(e: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, e), n).astype(jnp.int32)

    return jnp.concatenate([permutation(epoch), permutation(epoch + 1)])


def step_arguments(
    config: Config, model: nn.Module, image_shape: Sequence[int], num_classes: int, examples: int
) -> tuple[Any, ...]:
    """Shapes and dtypes of what the step of one run takes: state, images, labels, order; to lower it without data.

    Args:
      config: the run's settings.
      model: the network.
      image_shape: (H, W, C).
      num_classes: number of classes K.
      examples: number of training images n.
    """

    def arguments() -> tuple[Any, ...]:
        labels = jnp.zeros(examples, jnp.int32)
        return (
            init_state(config, model, image_shape, examples),
            jnp.zeros((examples, *image_shape), jnp.uint8),
            (labels, jnp.zeros((examples, num_classes))) if config.entry.learns else labels,
            epoch_order(_streams.key(0, _streams.ORDER), jnp.zeros((), jnp.uint32), examples),
        )

    return jax.eval_shape(arguments)


def make_train_step(
    config: Config,
    model: nn.Module,
    num_classes: int,
    transform: Transform,
    *,
    population: bool = False,
    steps: int = 1,
    mesh: Mesh | None = None,
    streamed: int = 0,
) -> TrainStep:
    """Makes the jitted step of the configured defense, `(state, images, labels, order) -> (state, metrics)`.

    `images` `[n, H, W, C]` and `labels` `[n]` are the whole training set, resident on the device, and `order` is
    `epoch_order` of the state's epoch. Where the defense learns from a teacher, `labels` is the pair of the labels and the
    teacher's logits `[n, K]`. `metrics` are scalars on the device: loss, gradient norm and the defense's
    parts. The state is donated.

    Args:
      config: the run's settings.
      model: the network.
      num_classes: number of classes K.
      transform: from images to the network's input.
      population: whether to train P runs at once. Then `state` and `order` have a leading axis P and there is a fifth
        argument `varied`, `{name: [P]}`, with the values of those settings in which the runs differ
        (`state.varied_settings`). `metrics` are `[P]`.
      steps: at most so many steps in one dispatch. Above 1 there is a last argument `count`, int32: how many this time.
        All of them must begin in the same epoch. `metrics` have a leading axis `steps`, of which `count` are filled.
      mesh: devices to split each batch over (`distributed.mesh`); all arguments are replicated on each of them, but for
        the state's memory, of which each has its share (`state.place`).
      streamed: 0 where the training images lie on the device, else their number. Above 0 `images` is a pair: those of the
        next batches, `[batches, batch_size, H, W, C]` (`stream.Stream`), and the number of the first batch.
    """
    soft = config.delta if config.soft_label else 0.0
    defense, augmentation = config.entry, config.augmentation

    def train_step(
        state: TrainState,
        images: jax.Array | tuple[jax.Array, jax.Array],
        labels: jax.Array | tuple[jax.Array, jax.Array],
        order: jax.Array,
        varied: Mapping[str, jax.Array] = types.MappingProxyType({}),
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        n = streamed or images.shape[0]  # type: ignore[union-attr]
        total = config.total_steps(n)
        eps, settings = settings_at(config, state.step, total, varied)
        tx = optimizer(config, total)
        number = state.step // config.steps_per_batch  # of the batch: steps that replay it see it as it was
        offset = number.astype(jnp.uint32) * config.batch_size % n
        batch = jax.lax.dynamic_slice_in_dim(order, offset, config.batch_size)
        if isinstance(images, tuple):
            of_batches, first = images
            own = jax.lax.dynamic_index_in_dim(of_batches, number - first, keepdims=False)
        else:
            own = images[batch]
        rows = own, jax.tree.map(lambda values: values[batch], labels)
        check_rows(config, state.memory, n)
        remembered = None if state.memory is None else recall(state.memory, batch, eps, own.shape[1:])
        if mesh is not None:
            rows, remembered = jax.lax.with_sharding_constraint((rows, remembered), distributed.split(mesh))
        drawn = augmentation.draw(jax.random.fold_in(jax.random.fold_in(state.key, AUGMENTATION), number), rows[0])
        moved = None if remembered is None else {n: augmentation.moved(drawn, kept) for n, kept in remembered.items()}
        own_labels, taught = rows[1] if defense.learns else (rows[1], None)
        x, y = transform.apply(augmentation.apply(drawn, rows[0])), soft_labels(own_labels, num_classes, soft)
        key = jax.random.fold_in(state.key, state.step)

        def model_of(params: Any, slots: Any) -> LogitsFn:
            if slots:
                return batch_stats.training_logits_fn(model, {**state.params, **params}, slots)
            return networks.logits_fn(model, {**state.params, **params})

        params, slots = batch_stats.parameters(state.params), batch_stats.slots(state.params)
        apart = config.awp or config.attack_statistics == "average"
        attacked = model_of(params, slots if config.attack_statistics == "batch" else {})

        def loss_fn(params: Any, slots: Any, delta: jax.Array | None) -> tuple[jax.Array, Parts]:
            # With several runs convolutions are XLA's own, which the CPU does not have to find in a loop.
            unrolled = platform() == "cpu" and population
            straight = straight_line() if unrolled else contextlib.nullcontext()
            logits_fn = model_of(params, slots)
            with straight, core.told_apart() if apart else contextlib.nullcontext():
                return defense(
                    _apart(logits_fn, attacked) if apart else logits_fn,
                    x,
                    y,
                    settings=settings,
                    eps=eps,
                    bounds=transform.bounds,
                    key=key,
                    delta=delta,
                    memory=moved,
                    taught=taught,
                )

        differentiate = jax.value_and_grad(loss_fn, argnums=(0, 1, 2), has_aux=True)
        (loss, parts), (gradients, noted, ascent) = differentiate(params, slots, state.delta)
        if config.awp:  # a perturbation that is carried climbs at the weights themselves
            at = adversarial_weights(params, gradients, config.awp)
            (loss, parts), (gradients, noted, _) = differentiate(at, slots, state.delta)
        updates, opt_state = tx.update(gradients, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        if noted:
            params = {**params, "batch_stats": batch_stats.updated(state.params["batch_stats"], noted)}
        delta = defense.ascent(state.delta, ascent, eps=eps) if defense.ascent else None
        memory, average = state.memory, state.average
        if memory is not None and remembered is not None:
            ended = {n: augmentation.moved_back(drawn, parts.pop(n), kept) for n, kept in remembered.items()}
            if drawn.offsets is not None and "delta" in ended:
                # The new perturbation and what is kept of the old one may be too long together.
                limits = core.ball(config.norm, jnp.zeros_like(ended["delta"]), eps, None)
                ended["delta"] = limits.project(ended["delta"])
            memory = note(memory, batch, ended, eps)
            if mesh is not None:
                memory = jax.lax.with_sharding_constraint(memory, distributed.split(mesh))
        if average is not None:
            done = state.step // config.accumulate  # updates
            decay = jnp.minimum(config.ema, (1 + done) / (10 + done))
            if config.accumulate > 1:
                decay = jnp.where((state.step + 1) % config.accumulate == 0, decay, 1)
            average = optax.incremental_update(params, average, 1 - decay)
        state = state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, delta=delta, memory=memory, average=average
        )
        return state, {"loss": loss, "grad_norm": optax.tree.norm(gradients), **parts}

    step: TrainStep = jax.vmap(train_step, in_axes=(0, None, None, 0, 0)) if population else train_step
    placed: dict[str, Any] = {}
    if mesh is not None:
        placed["out_shardings"] = shardings(mesh, population=population), distributed.whole(mesh)
    if steps == 1:
        return jit(step, mesh=mesh, donate_argnums=0, **placed)

    def train_steps(state: TrainState, *arguments: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        *data, count = arguments
        metrics = jax.tree.map(
            lambda one: jnp.zeros((steps, *one.shape), one.dtype), jax.eval_shape(step, state, *data)[1]
        )

        def body(i: jax.Array, carry: tuple[TrainState, Any]) -> tuple[TrainState, Any]:
            state, one = step(carry[0], *data)
            return state, jax.tree.map(lambda all, new: all.at[i].set(new), carry[1], one)

        return jax.lax.fori_loop(0, count, body, (state, metrics))

    return jit(train_steps, mesh=mesh, donate_argnums=0, **placed)


def _apart(logits_fn: LogitsFn, attacked: LogitsFn) -> LogitsFn:
    """The model of a loss whose attacks take another one."""
    return lambda x: (attacked if core.within_attack() else logits_fn)(x)
