"""The presets of the training commands: e2SAD's points, and the schedules and labels of every defense."""

from collections.abc import Mapping
from typing import Any

from e2sad_jax.errors import ConfigError

PRESETS = ("robust", "robust2", "paper")
# Under which cheap defenses hold MNIST's budget of 0.3 (docs/e2sad.md).
SCHEDULE: Mapping[str, Any] = {"eps_warmup": 0.5, "schedule": "cyclic", "learning_rate": 5e-3}
RECIPE: Mapping[str, Any] = {**SCHEDULE, "eps_scale": 1.1, "soft_label": True}


def preset(name: str, eps1: float) -> dict[str, Any]:
    """The settings of a preset that differ from the defaults (docs/e2sad.md).

    "robust" has e2SAD's points, weights and memory, and for every defense `RECIPE`: soft labels, a budget of training that
    is larger than the one to defend against, and the schedules of budget and learning rate. "robust2" is that with a step
    to the first point, too.

    Args:
      name: one of `PRESETS`.
      eps1: the budget to defend against; each step of "robust" and "robust2" is half of it.

    Returns:
      Those that differ from the defaults, by name; none for "paper".

    Raises:
      ConfigError: if the name is unknown.
    """
    if name not in PRESETS:
        raise ConfigError(f"--preset={name}: must be one of {', '.join(PRESETS)}")
    if name == "paper":
        return {}
    points = {
        "alpha": 0.0,
        "lam": 0.3,
        "eps2": eps1 / 2,
        "first_point": "start",
        "adversarial_at": "second",
        "second_step": "loss",
        "hold_reference": True,
        "ball_second": True,
        "random_start": True,  # for who turns the memory off
        "memory": "int8",
    }
    if name == "robust2":
        points |= {"first_point": "step", "first_step_size": eps1 / 2}
    return {**points, **RECIPE}
