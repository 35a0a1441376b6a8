"""Adam and the schedule of its learning rate."""

import optax

from e2sad_jax.training.config import Config


def learning_rate(config: Config, steps: int) -> float | optax.Schedule:
    """The learning rate of a run: constant, or a function of the updates done so far, 0 before the first of all `steps`.

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
