"""Training: settings, state, the jitted step of every defense, and the loop around it."""

from e2sad_jax.training.config import SCHEDULES, Config, configure
from e2sad_jax.training.flops import function_counts, step_counts, step_flops
from e2sad_jax.training.loop import STEPS_PER_DISPATCH, fit, steps_at_once
from e2sad_jax.training.memory import nbytes
from e2sad_jax.training.optimizer import adversarial_weights, learning_rate, optimizer
from e2sad_jax.training.presets import PRESETS, RECIPE, SCHEDULE, preset
from e2sad_jax.training.state import (
    TrainState,
    gather,
    init_state,
    place,
    population_key,
    stack,
    unstack,
    varied_settings,
)
from e2sad_jax.training.step import TrainStep, epoch_order, make_train_step, settings_at

__all__ = [
    "PRESETS",
    "RECIPE",
    "SCHEDULE",
    "SCHEDULES",
    "STEPS_PER_DISPATCH",
    "Config",
    "TrainState",
    "TrainStep",
    "adversarial_weights",
    "configure",
    "epoch_order",
    "fit",
    "function_counts",
    "gather",
    "init_state",
    "learning_rate",
    "make_train_step",
    "nbytes",
    "optimizer",
    "place",
    "population_key",
    "preset",
    "settings_at",
    "stack",
    "step_counts",
    "step_flops",
    "steps_at_once",
    "unstack",
    "varied_settings",
]
