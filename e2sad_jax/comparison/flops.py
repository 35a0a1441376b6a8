"""Prices of a comparison's models: FLOPs by XLA's count of the CPU's program."""

import functools
import pathlib
from collections.abc import Sequence

from e2sad_jax import training
from e2sad_jax.comparison.request import REFERENCE, Request, checkpoint_every
from e2sad_jax.training import Config


def match_flops(request: Request, config: Config, image_shape: Sequence[int], num_classes: int) -> Config:
    """With `equal_flops` the run whose training costs what `request.steps` of e2SAD do; else the run itself.

    Args:
      request: the comparison.
      config: one of its runs, of `request.steps`.
      image_shape: of the data set, `[H, W, C]`.
      num_classes: number of classes K.

    Returns:
      The run, in a workdir of its own.

    Raises:
      ConfigError: if JAX has no CPU to count FLOPs for.
    """
    if not request.equal_flops:
        return config
    other = request.configs(REFERENCE)[0]
    spent = request.steps * step_flops(other, image_shape, num_classes)
    steps = max(1, round(spent / step_flops(config, image_shape, num_classes)))
    own = config.replace(steps=steps, checkpoint_every=checkpoint_every(steps))
    name = f"{pathlib.Path(own.default_workdir()).name}-{steps}"  # the same, whoever's steps are matched
    return own.replace(workdir=str(pathlib.Path(config.workdir).with_name(name)))


def step_flops(config: Config, image_shape: Sequence[int], num_classes: int) -> float:
    """FLOPs of one training step, counted once for all runs that differ in nothing that a step depends on.

    Raises:
      ConfigError: if JAX has no CPU to count FLOPs for.
    """
    any_run = config.replace(seed=0, steps=1, checkpoint_every=1, workdir="", data_dir="")
    return _step_flops(any_run, tuple(image_shape), num_classes)


_step_flops = functools.cache(training.step_flops)
