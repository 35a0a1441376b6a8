"""Training: the state, the one jitted step of every defense, and the loop around it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from e2sad_jax import defenses, models
from e2sad_jax.config import Config
from e2sad_jax.data import Dataset
from e2sad_jax.defenses._types import LogitsFn, Parts
from e2sad_jax.losses import soft_labels
from e2sad_jax.transforms import TRANSFORMS, Transform

LossFn = Callable[[LogitsFn, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Parts]]


class TrainState(flax.struct.PyTreeNode):
    """All that a run is at one step: saved whole, so that a resumed run goes on bit for bit.

    Attributes:
      step: updates done so far, int32 scalar.
      params: the network's variables.
      opt_state: the optimiser's state.
      key: random key of the run; step t draws from `fold_in(key, t)`.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    key: jax.Array


TrainStep = Callable[
    [TrainState, jax.Array, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]
]  # (state, images, labels, order) -> (state, metrics)


def optimizer(config: Config) -> optax.GradientTransformation:
    """Adam at a constant learning rate, the paper's."""
    return optax.adam(config.learning_rate)


def init_state(config: Config, model: nn.Module, image_shape: Sequence[int]) -> TrainState:
    """A fresh state from the configuration's seed."""
    init_key, key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    params = jax.jit(model.init)(init_key, jnp.zeros((1, *image_shape)))
    opt_state = jax.jit(optimizer(config).init)(params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state, key=key)


def training_loss(config: Config, bounds: tuple[float, float]) -> LossFn:
    """The configured defense as `(logits_fn, x, y, key) -> (loss, parts)`."""
    c, step_size = config, config.attack_step_size or None
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
                bounds=bounds,
                key=key,
            )
    raise ValueError(f"unknown defense {config.defense!r}")


@functools.partial(jax.jit, static_argnums=2)
def epoch_order(key: jax.Array, epoch: jax.Array, n: int) -> jax.Array:
    """The order of the images in `epoch` and in the next, two permutations of `range(n)` end to end, int32 `[2n]`.

    Batches are cut from the stream of all epochs' permutations, so one batch may end an epoch and begin the next: every
    image comes once an epoch, and none is dropped.
    """

    def permutation(e: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, e), n)

    return jnp.concatenate([permutation(epoch), permutation(epoch + 1)])


def make_train_step(config: Config, model: nn.Module, num_classes: int, transform: Transform) -> TrainStep:
    """The jitted step of the configured defense, `(state, images, labels, order) -> (state, metrics)`.

    `images` `[n, H, W, C]` and `labels` `[n]` are the whole training set, resident on the device, and `order` is
    `epoch_order` of the state's epoch. `metrics` are scalars on the device: loss, gradient norm and the defense's
    parts. The state is donated.
    """
    loss_of = training_loss(config, transform.bounds)
    tx = optimizer(config)
    delta = config.delta if config.soft_label else 0.0

    def train_step(
        state: TrainState, images: jax.Array, labels: jax.Array, order: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        offset = state.step.astype(jnp.uint32) * config.batch_size % images.shape[0]
        batch = jax.lax.dynamic_slice_in_dim(order, offset, config.batch_size)
        x, y = transform.apply(images[batch]), soft_labels(labels[batch], num_classes, delta)
        key = jax.random.fold_in(state.key, state.step)

        def loss_fn(params: Any) -> tuple[jax.Array, Parts]:
            return loss_of(models.logits_fn(model, params), x, y, key)

        (loss, parts), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {"loss": loss, "grad_norm": optax.tree.norm(gradients), **parts}

    return jax.jit(train_step, donate_argnums=0)


def step_flops(config: Config, image_shape: Sequence[int], num_classes: int) -> float:
    """FLOPs of one training step by XLA's own count for the first device; compiled, not run.

    Loops are counted as one turn of their body, so the number is right only for attacks that are unrolled: on the CPU
    all are.
    """
    model = models.create(config.model, num_classes, image_shape, config.precision)
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
    return float(step.lower(*shapes).compile().cost_analysis()["flops"])  # type: ignore[attr-defined]


def fit(
    config: Config,
    model: nn.Module,
    dataset: Dataset,
    state: TrainState,
    *,
    steps: int,
    record: Callable[[int, dict[str, jax.Array]], None],
    checkpoint: Callable[[int, TrainState], None],
    stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Trains from `state` to step `steps`, or until `stop()`.

    Args:
      config: the run's settings.
      model: the network.
      dataset: images and labels.
      state: where to begin; its buffers are donated and must not be used again.
      steps: step to end at.
      record: called after every step with its number and its metrics, still on the device: it must not wait for them.
      checkpoint: called every `config.checkpoint_every` steps, and at the end.
      stop: asked after every step; True ends the loop, after a last checkpoint.

    Returns:
      The state reached.
    """
    train_step = make_train_step(config, model, dataset.num_classes, TRANSFORMS[config.transform])
    images, labels = jax.device_put((dataset.x_train, dataset.y_train))
    order_key = jax.random.fold_in(jax.random.key(config.seed), 1)
    n, step = len(dataset.x_train), int(state.step)
    epoch, order = -1, jnp.zeros(0, jnp.int32)
    with jax.transfer_guard("disallow"):
        while step < steps:
            if step * config.batch_size // n != epoch:
                epoch = step * config.batch_size // n
                order = epoch_order(order_key, jax.device_put(np.uint32(epoch)), n)
            state, metrics = train_step(state, images, labels, order)
            step += 1
            record(step, metrics)
            stopping = stop()
            if stopping or step == steps or step % config.checkpoint_every == 0:
                checkpoint(step, state)
            if stopping:
                break
    return state
