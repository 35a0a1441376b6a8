"""Training: the state, the one jitted step of every defense, and the loop around it.

Several runs of one defense may train together, as one step under `vmap`: a *population*. Its state, metrics and orders
carry a leading axis P, one entry for each run.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from e2sad_jax import _streams, defenses, distributed, networks
from e2sad_jax._compile import jit, platform, straight_line
from e2sad_jax.attacks._ball import is_number
from e2sad_jax.data import Dataset
from e2sad_jax.data.transforms import TRANSFORMS, Transform
from e2sad_jax.defenses._types import Parts
from e2sad_jax.losses import soft_labels
from e2sad_jax.networks import batch_stats
from e2sad_jax.training.config import Config

# Settings in which the runs of a population may differ, beside the seed. Not alpha: as a traced number it would keep XLA
# from merging the attack's backward pass with the training one.
VARIED = ("lam", "eps1", "eps2")
STEPS_PER_DISPATCH = 64  # on accelerators; each is too short there for the host to start them one by one

LossFn = Callable[..., tuple[jax.Array, Parts]]  # of logits_fn, x, y, key; see `training_loss`


class TrainState(flax.struct.PyTreeNode):
    """All that a run is at one step: saved whole, so that a resumed run goes on bit for bit.

    Attributes:
      step: updates done so far, int32 scalar.
      params: the network's variables: parameters, and running averages (`batch_stats`) where it has them.
      opt_state: the optimiser's state.
      key: random key of the run; step t draws from `fold_in(key, t)`.
      delta: the perturbation `[batch_size, H, W, C]` that free training keeps from step to step, None for others.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    key: jax.Array
    delta: jax.Array | None = None


TrainStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]  # see `make_train_step`


def learning_rate(config: Config, steps: int) -> float | optax.Schedule:
    """The learning rate, constant or as a function of the updates done so far, 0 before the first of all `steps`.

    * `"constant"`: the paper's;
    * `"cyclic"`: linearly up from 0 to the configured one at steps / 2, and linearly down to 0 (Fast AT's);
    * `"piecewise"`: a tenth of it from steps / 2 on, a hundredth from 3 steps / 4 on;
    * `"cosine"`: (1 + cos(pi t / steps)) / 2 of it.
    """
    peak, half = config.learning_rate, max(1, steps // 2)
    match config.schedule:
        case "cyclic":
            up, down = optax.linear_schedule(0.0, peak, half), optax.linear_schedule(peak, 0.0, steps - half)
            return optax.join_schedules([up, down], [half])
        case "piecewise":
            return optax.join_schedules(
                [optax.constant_schedule(value) for value in (peak, peak / 10, peak / 100)], [half, 3 * steps // 4]
            )
        case "cosine":
            return optax.cosine_decay_schedule(peak, steps)
    return peak


def optimizer(config: Config, steps: int | None = None) -> optax.GradientTransformation:
    """Adam at the configured learning rate.

    Args:
      config: the run's settings.
      steps: all the steps of the run, over which a schedule stretches; None for `config.steps`.
    """
    return optax.adam(learning_rate(config, steps or config.steps))


def init_state(config: Config, model: nn.Module, image_shape: Sequence[int]) -> TrainState:
    """A fresh state from the configuration's seed."""
    init_key, key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), _streams.INITIALIZATION))
    params = jax.jit(model.init)(init_key, jnp.zeros((1, *image_shape)))
    opt_state = jax.jit(optimizer(config).init)(batch_stats.parameters(params))
    delta = jnp.zeros((config.batch_size, *image_shape)) if config.defense == "free" else None
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state, key=key, delta=delta)


def training_loss(config: Config, bounds: tuple[float, float]) -> LossFn:
    """The configured defense as `(logits_fn, x, y, key) -> (loss, parts)`; that of free training takes `delta` too."""
    c = config
    step_size = None if is_number(c.attack_step_size) and c.attack_step_size == 0 else c.attack_step_size
    match config.defense:
        case "natural":
            return lambda f, x, y, key: defenses.natural(f, x, y)
        case "fgsm":
            return lambda f, x, y, key: defenses.fgsm_training(f, x, y, alpha=c.alpha, eps=c.eps1, bounds=bounds)
        case "ifgsm":
            return lambda f, x, y, key: defenses.ifgsm_training(
                f, x, y, alpha=c.alpha, eps=c.eps1, steps=c.attack_steps, step_size=step_size, bounds=bounds
            )
        case "pgd":
            return lambda f, x, y, key: defenses.pgd_minmax(
                f, x, y, key=key, eps=c.eps1, steps=c.attack_steps, step_size=step_size, bounds=bounds
            )
        case "hamm":
            return lambda f, x, y, key: defenses.hamm(f, x, y, alpha=c.alpha, eps=c.eps1, bounds=bounds)
        case "e2sad":
            return lambda f, x, y, key: defenses.e2sad(
                f,
                x,
                y,
                alpha=c.alpha,
                lam=c.lam,
                eps1=c.eps1,
                eps2=c.eps2,
                objective=c.second_step,
                clip_second=c.clip_second,
                random_start=c.random_start,
                ball_second=c.ball_second,
                bounds=bounds,
                key=key,
            )
        case "rs_fgsm":
            return lambda f, x, y, key: defenses.rs_fgsm(
                f, x, y, key=key, eps=c.eps1, step_size=step_size, bounds=bounds
            )
        case "n_fgsm":
            return lambda f, x, y, key: defenses.n_fgsm(
                f, x, y, key=key, eps=c.eps1, noise=c.noise, step_size=step_size, bounds=bounds
            )
        case "free":
            return lambda f, x, y, key, delta: defenses.free(f, x, y, delta=delta, eps=c.eps1, bounds=bounds)
        case "trades":
            return lambda f, x, y, key: defenses.trades(
                f, x, y, key=key, beta=c.beta, eps=c.eps1, steps=c.attack_steps, step_size=step_size, bounds=bounds
            )
        case "grad_align":
            return lambda f, x, y, key: defenses.grad_align(
                f, x, y, key=key, weight=c.align_weight, eps=c.eps1, bounds=bounds
            )
        case "input_gradient":
            return lambda f, x, y, key: defenses.input_gradient(f, x, y, weight=c.gradient_weight)
    raise ValueError(f"unknown defense {config.defense!r}")


def _settings_at(config: Config, varied: Mapping[str, Any], step: jax.Array, total: int) -> Any:
    """The settings as one step sees them: `varied` ones in place, and the budgets as far as they have grown."""
    values = {**dataclasses.asdict(config), **varied}
    if config.eps_warmup:
        grown = jnp.minimum(step.astype(jnp.float32) / config.warmup_steps(total), 1)
        for name in ("eps1", "eps2", *(["attack_step_size"] if config.attack_step_size else [])):
            values[name] *= grown
    return types.SimpleNamespace(**values) if varied or config.eps_warmup else config


@functools.partial(jax.jit, static_argnames="n")
def epoch_order(key: jax.Array, epoch: jax.Array, n: int) -> jax.Array:
    """The order of the images in `epoch` and in the next, two permutations of `range(n)` end to end, int32 `[2n]`.

    Batches are cut from the stream of all epochs' permutations, so one batch may end an epoch and begin the next: every
    image comes once an epoch, and none is dropped.
    """

    def permutation(e: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, e), n)

    return jnp.concatenate([permutation(epoch), permutation(epoch + 1)])


def make_train_step(
    config: Config,
    model: nn.Module,
    num_classes: int,
    transform: Transform,
    *,
    population: bool = False,
    steps: int = 1,
    mesh: Mesh | None = None,
) -> TrainStep:
    """The jitted step of the configured defense, `(state, images, labels, order) -> (state, metrics)`.

    `images` `[n, H, W, C]` and `labels` `[n]` are the whole training set, resident on the device, and `order` is
    `epoch_order` of the state's epoch. `metrics` are scalars on the device: loss, gradient norm and the defense's
    parts. The state is donated.

    Args:
      config: the run's settings.
      model: the network.
      num_classes: number of classes K.
      transform: from images to the network's input.
      population: whether to train P runs at once. Then `state` and `order` have a leading axis P and there is a fifth
        argument `settings`, `{name: [P]}`, with the values of those `VARIED` settings in which the runs differ.
        `metrics` are `[P]`.
      steps: at most so many steps in one dispatch. Above 1 there is a last argument `count`, int32: how many this time.
        All of them must begin in the same epoch. `metrics` have a leading axis `steps`, of which `count` are filled.
      mesh: devices to split each batch over (`distributed.mesh`); all arguments lie whole on each of them.
    """
    soft = config.delta if config.soft_label else 0.0

    def train_step(
        state: TrainState,
        images: jax.Array,
        labels: jax.Array,
        order: jax.Array,
        settings: Mapping[str, jax.Array] = types.MappingProxyType({}),
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        total = config.total_steps(images.shape[0])
        c = _settings_at(config, settings, state.step, total)
        loss_of = training_loss(c, transform.bounds)
        tx = optimizer(config, total)
        offset = state.step.astype(jnp.uint32) // config.steps_per_batch * config.batch_size % images.shape[0]
        batch = jax.lax.dynamic_slice_in_dim(order, offset, config.batch_size)
        rows = images[batch], labels[batch]
        if mesh is not None:
            rows = jax.lax.with_sharding_constraint(rows, distributed.split(mesh))
        x, y = transform.apply(rows[0]), soft_labels(rows[1], num_classes, soft)
        key = jax.random.fold_in(state.key, state.step)

        def loss_fn(params: Any, slots: Any, delta: jax.Array | None) -> tuple[jax.Array, Parts]:
            # With several runs convolutions are XLA's own, which the CPU does not have to find in a loop.
            unrolled = platform() == "cpu" and population
            with straight_line() if unrolled else contextlib.nullcontext():
                if slots:
                    logits_fn = batch_stats.training_logits_fn(model, {**state.params, **params}, slots)
                else:
                    logits_fn = networks.logits_fn(model, params)
                return loss_of(logits_fn, x, y, key, *([] if delta is None else [delta]))

        params = batch_stats.parameters(state.params)
        (loss, parts), (gradients, noted, ascent) = jax.value_and_grad(loss_fn, argnums=(0, 1, 2), has_aux=True)(
            params, batch_stats.slots(state.params), state.delta
        )
        updates, opt_state = tx.update(gradients, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        if noted:
            params = {**params, "batch_stats": batch_stats.updated(state.params["batch_stats"], noted)}
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        if state.delta is not None:
            state = state.replace(delta=defenses.free_ascent(state.delta, ascent, eps=c.eps1))
        return state, {"loss": loss, "grad_norm": optax.tree.norm(gradients), **parts}

    step: TrainStep = jax.vmap(train_step, in_axes=(0, None, None, 0, 0)) if population else train_step
    placed: dict[str, Any] = {} if mesh is None else {"out_shardings": distributed.whole(mesh)}
    if steps == 1:
        return jit(step, donate_argnums=0, **placed)

    def train_steps(state: TrainState, *arguments: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        *data, count = arguments
        metrics = jax.tree.map(
            lambda one: jnp.zeros((steps, *one.shape), one.dtype), jax.eval_shape(step, state, *data)[1]
        )

        def body(i: jax.Array, carry: tuple[TrainState, Any]) -> tuple[TrainState, Any]:
            state, one = step(carry[0], *data)
            return state, jax.tree.map(lambda all, new: all.at[i].set(new), carry[1], one)

        return jax.lax.fori_loop(0, count, body, (state, metrics))

    return jit(train_steps, donate_argnums=0, **placed)


def stack(states: Sequence[TrainState]) -> TrainState:
    """States of single runs as that of a population, leaves `[P, ...]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def unstack(state: TrainState) -> list[TrainState]:
    """The states of a population's runs."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(state.step.shape[0])]


def population_key(config: Config) -> Config:
    """What runs must have in common to train together: equal for those that differ in `seed` and `VARIED` settings only."""
    common = (*VARIED, "seed", "workdir")
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Config) if f.name in common}
    return dataclasses.replace(config, **defaults)


def step_flops(config: Config, image_shape: Sequence[int], num_classes: int) -> float:
    """FLOPs of one training step by XLA's own count, of a program without loops; compiled, not run."""
    return step_counts(config, image_shape, num_classes)["flops"]


def step_counts(config: Config, image_shape: Sequence[int], num_classes: int) -> dict[str, float]:
    """FLOPs and bytes of one training step by XLA's own count; compiled, not run.

    XLA counts a loop as one turn of its body. So the program that it counts is another than the one that training runs:
    attacks unrolled, convolutions by XLA's own operation.

    Returns:
      `flops`, and `bytes` that its operations read and write.
    """
    model = networks.create(config.model, num_classes, image_shape, config.precision)
    step = make_train_step(config, model, num_classes, TRANSFORMS[config.transform])
    n = config.batch_size
    shapes = jax.eval_shape(
        lambda: (
            init_state(config, model, image_shape),
            jnp.zeros((n, *image_shape), jnp.uint8),
            jnp.zeros(n, jnp.int32),
            epoch_order(jax.random.key(0), jnp.zeros((), jnp.uint32), n),
        )
    )
    with straight_line():
        return _counts(step.lower(*shapes))  # type: ignore[attr-defined]


def function_counts(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """As `step_counts`, of a step in a loop of your own; compiled, not run.

    Args:
      function: not jitted yet: what it would be compiled to for training may have loops.
      arguments: arrays, or shapes with dtypes (`jax.ShapeDtypeStruct`).
    """
    with straight_line():
        return _counts(jax.jit(lambda *values: function(*values)).lower(*arguments))


def _counts(lowered: jax.stages.Lowered) -> dict[str, float]:
    counts: Any = lowered.compile().cost_analysis()
    return {"flops": float(counts["flops"]), "bytes": float(counts["bytes accessed"])}


def steps_at_once() -> int:
    """Steps that the host starts at once where nothing else is asked for."""
    return 1 if platform() == "cpu" else STEPS_PER_DISPATCH


def fit(
    config: Config | Sequence[Config],
    model: nn.Module,
    dataset: Dataset,
    state: TrainState,
    *,
    steps: int,
    record: Callable[[int, dict[str, jax.Array], int], None],
    checkpoint: Callable[[int, TrainState], None],
    stop: Callable[[], bool] = lambda: False,
    steps_per_dispatch: int | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains from `state` to step `steps`, or until `stop()`.

    Args:
      config: the run's settings, or those of a population: they may differ in the seed and in `VARIED`.
      model: the network.
      dataset: images and labels.
      state: where to begin, of a population with a leading axis P; its buffers are donated and must not be used again.
      steps: step to end at.
      record: called after every dispatch with the last step's number, the metrics of its steps, and how many those are.
        The metrics are still on the device, and it must not wait for them. They are `[P]` for a population, and have a
        leading axis `steps_per_dispatch` where that is above 1.
      checkpoint: called every `checkpoint_every` steps, and at the end.
      stop: asked after every dispatch; True ends the loop, after a last checkpoint.
      steps_per_dispatch: steps that the host starts at once; None for 1 on the CPU, where each is long, and
        `STEPS_PER_DISPATCH` elsewhere.
      mesh: devices to train on, where that is more than the default one. `state` must lie whole on each of them.

    Returns:
      The state reached.
    """
    configs = [config] if isinstance(config, Config) else list(config)
    population, c = not isinstance(config, Config), configs[0]
    batch_size = c.batch_size
    at_once = steps_per_dispatch or steps_at_once()
    train_step = make_train_step(
        c, model, dataset.num_classes, TRANSFORMS[c.transform], population=population, steps=at_once, mesh=mesh
    )
    put = functools.partial(distributed.replicate, mesh)
    images, labels = put((dataset.x_train, dataset.y_train))
    n = len(dataset.x_train)
    keys = put([jax.random.fold_in(jax.random.key(c.seed), _streams.ORDER) for c in configs])
    order_of = functools.partial(epoch_order, keys[0], n=n)
    extra: list[Any] = []
    if population:
        order_of = functools.partial(_orders, jnp.stack(keys), n=n)
        varied = [name for name in VARIED if len({getattr(c, name) for c in configs}) > 1]
        extra = [put({name: np.array([getattr(c, name) for c in configs], np.float32) for name in varied})]
    step, epoch, order = int(state.step[0] if population else state.step), -1, jnp.zeros(0, jnp.int32)
    with jax.transfer_guard("disallow"):
        while step < steps:
            if step // c.steps_per_batch * batch_size // n != epoch:
                epoch = step // c.steps_per_batch * batch_size // n
                order = order_of(epoch=put(np.uint32(epoch)))
            count = min(
                at_once,
                steps - step,
                c.checkpoint_every - step % c.checkpoint_every,
                c.steps_per_batch * -(-(epoch + 1) * n // batch_size) - step,  # those that begin in this epoch
            )
            counted = [put(np.int32(count))] if at_once > 1 else []
            state, metrics = train_step(state, images, labels, order, *extra, *counted)
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
