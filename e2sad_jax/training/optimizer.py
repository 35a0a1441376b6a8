"""The optimiser and the schedule of its learning rate, all of them optax's."""

from typing import Any

import jax
import optax

from e2sad_jax.training.config import Config, number_of_steps


def learning_rate(config: Config, updates: int) -> float | optax.Schedule:
    """The learning rate of a run: constant, or a function of the updates done so far, 0 before the first of all `updates`.

    * `"constant"`: the paper's;
    * `"cyclic"`: linearly up from 0 to the configured one at updates / 2, and linearly down to 0 (Fast AT's);
    * `"piecewise"`: a tenth of it after each of `milestones`, fractions of the updates;
    * `"cosine"`: (1 + cos(pi t / updates)) / 2 of it;
    * `"onecycle"`: by half a cosine up from a 25th to all of it at 0.3 updates, and down to almost 0 (PyTorch's `OneCycleLR`).

    With `lr_warmup` it is t / w of that, over the first w updates.
    """
    rate = _scheduled(config, updates)
    if not config.lr_warmup:
        return rate
    steps = number_of_steps(config.lr_warmup, updates * config.accumulate)
    rise = optax.linear_schedule(0.0, 1.0, max(1, round(steps / config.accumulate)))
    return lambda t: rise(t) * (rate(t) if callable(rate) else rate)


def _scheduled(config: Config, updates: int) -> float | optax.Schedule:
    peak, half = config.learning_rate, max(1, updates // 2)
    match config.schedule:
        case "cyclic":
            up, down = optax.linear_schedule(0.0, peak, half), optax.linear_schedule(peak, 0.0, updates - half)
            return optax.join_schedules([up, down], [half])
        case "piecewise":
            falls = [max(1, int(part * updates + 1e-6)) for part in config.falls()]  # 0.29 * 100 is 28.999...
            values = [optax.constant_schedule(peak / 10**i) for i in range(len(falls) + 1)]
            return optax.join_schedules(values, falls)
        case "cosine":
            return optax.cosine_decay_schedule(peak, updates)
        case "onecycle":
            return optax.cosine_onecycle_schedule(max(2, updates), peak)
    return peak


def optimizer(config: Config, steps: int | None = None) -> optax.GradientTransformation:
    """The configured optimiser at the configured learning rate.

    Args:
      config: the run's settings.
      steps: all the steps of the run, over which a schedule stretches; None for `config.steps`.
    """
    steps = steps or config.steps
    rate = learning_rate(config, steps // config.accumulate)
    decay, mask = config.weight_decay, _kernels if config.decay_kernels_only else None
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if decay and config.optimizer != "adamw":
        parts.append(optax.add_decayed_weights(decay, mask))
    match config.optimizer:
        case "adamw":
            parts.append(optax.adamw(rate, weight_decay=decay, mask=mask))
        case "sgd":
            parts.append(optax.sgd(rate, config.momentum or None, config.nesterov))
        case _:
            parts.append(optax.adam(rate))
    whole = optax.chain(*parts) if len(parts) > 1 else parts[0]
    return optax.MultiSteps(whole, config.accumulate).gradient_transformation() if config.accumulate > 1 else whole


def adversarial_weights(params: Any, gradients: Any, size: float) -> Any:
    """Adversarial weight perturbation (AWP): each kernel one step up the loss, as long as a fraction of its own norm.

    w + size ||w||_2 g / ||g||_2. Biases and parameters of batch normalisation stay, as does a kernel without a gradient.

    Args:
      params: the weights.
      gradients: of the loss in them, like `params`.
      size: the fraction gamma, at least 0; the paper takes 0.01 (0.005 with TRADES).

    Reference: Wu et al., 2020, https://arxiv.org/abs/2004.05884, Eq. 12
    """

    def moved(is_kernel: bool, w: jax.Array, g: jax.Array) -> jax.Array:
        if not is_kernel:
            return w
        return w + size * optax.safe_norm(w, 0) * g / optax.safe_norm(g, 1e-20)  # above 0

    return jax.tree.map(moved, _kernels(params), params, gradients)


def _kernels(params: Any) -> Any:
    """What is neither a bias nor a parameter of batch normalisation: these are vectors."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)
