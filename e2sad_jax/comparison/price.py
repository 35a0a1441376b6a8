"""What training costs, in FLOPs by XLA's count for the CPU."""

import dataclasses
import functools
import pathlib

from e2sad_jax import training
from e2sad_jax.comparison.request import REFERENCE, Request
from e2sad_jax.data import Dataset
from e2sad_jax.training.config import Config


def affordable(request: Request, config: Config, dataset: Dataset) -> Config:
    """With `equal_flops` as many steps as `request.steps` of e2SAD cost.

    Raises:
      ConfigError: if JAX has no CPU to count FLOPs for.
    """
    if not request.equal_flops:
        return config
    (other,) = dataclasses.replace(request, seeds=1).configs(REFERENCE)
    steps = max(1, round(request.steps * step_flops(other, dataset) / step_flops(config, dataset)))
    if steps == config.steps:
        return config
    folder = pathlib.Path(config.workdir)
    config = dataclasses.replace(config, steps=steps, checkpoint_every=min(500, max(1, steps // 4)))
    return dataclasses.replace(config, workdir=str(folder.with_name(f"{folder.name}-{steps}")))


def step_flops(config: Config, dataset: Dataset) -> float:
    """XLA's count of one training step, compiled for the CPU once for all seeds.

    Raises:
      ConfigError: if JAX has no CPU.
    """
    any_run = {f: getattr(Config, f) for f in ("seed", "steps", "checkpoint_every", "workdir", "data_dir")}
    return _flops(dataclasses.replace(config, **any_run), dataset.image_shape, dataset.num_classes)


_flops = functools.cache(training.step_flops)
