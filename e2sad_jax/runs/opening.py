"""What a run is, and opening its folder: settings, data and workdir, checked against each other."""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import distributed, networks
from e2sad_jax.data import Dataset, hold_out, sample_tests
from e2sad_jax.data.transforms import TRANSFORMS, Transform
from e2sad_jax.errors import ConfigError, DataError, WorkdirError
from e2sad_jax.evaluation import Attack, Outcomes, evaluate
from e2sad_jax.runs import tracker
from e2sad_jax.runs.checkpoint import UNJUDGED, Checkpoints, quarantine_damaged
from e2sad_jax.runs.folder import open_workdir, steps_in, workdir_of, write_config
from e2sad_jax.runs.teacher import check_teacher
from e2sad_jax.runs.weights import check_source, given_weights, note_source
from e2sad_jax.training import TrainState, init_state
from e2sad_jax.training.config import Config
from e2sad_jax.training.stream import is_resident


@dataclasses.dataclass(frozen=True)
class Run:
    """An opened run: settings, data and workdir, checked against each other.

    Attributes:
      config: its settings.
      dataset: all its data.
      train_set: what it trains on.
      validation_set: as a test set, the images that choose its best checkpoint.
      model: the network.
      steps: training steps in all.
      workdir: its folder, locked.
      checkpoints: those in it.
      mesh: the devices it runs on, None for one.
      weights: the variables that it begins with, None for random ones.
    """

    config: Config
    dataset: Dataset
    train_set: Dataset
    validation_set: Dataset
    model: nn.Module
    steps: int
    workdir: pathlib.Path
    checkpoints: Checkpoints
    mesh: Mesh | None
    weights: Any = None

    @property
    def transform(self) -> Transform:
        """The transform from images to the network's input."""
        return TRANSFORMS[self.config.transform]

    @property
    def step(self) -> int:
        """Step of the last checkpoint, 0 where there is none."""
        return self.checkpoints.last_step or 0

    def init_state(self) -> TrainState:
        """Initialises a state; all of it lies on each of the run's devices."""
        state = self._new_state()
        if self.weights is not None:
            average = None if state.average is None else jax.tree.map(jnp.array, self.weights)
            state = state.replace(params=jax.tree.map(jnp.array, self.weights), average=average)
        return distributed.replicate(self.mesh, state)

    def _new_state(self) -> TrainState:
        return init_state(self.config, self.model, self.dataset.image_shape, len(self.train_set.x_train))

    def restore(self, step: int | None = None) -> TrainState:
        """Restores the checkpoint of `step`, by default the last one; another number of devices may have written it.

        All of it lies on each of the run's devices.
        """
        shapes = jax.eval_shape(self._new_state)
        place = None if self.mesh is None else distributed.whole(self.mesh)
        return self.checkpoints.restore(shapes, step=step, place=place)

    def test_set(self) -> Dataset:
        """The data set, cut to the test images that the run evaluates: all, or a sample."""
        return sample_tests(self.dataset, self.config.eval_examples)

    def attack(self, params: Any, dataset: Dataset, suite: Sequence[Attack], **kwargs: Any) -> Outcomes:
        """`evaluation.evaluate` on the test images of `dataset`, by the run's settings, on all of this process's devices.

        Args:
          params: the network's variables.
          dataset: whose test images are attacked.
          suite: the attacks.
          **kwargs: passed on, `progress` for example.
        """
        mesh = self.mesh
        if distributed.is_multiprocess():  # the other processes wait
            mesh, params = None, distributed.local(params)
        return evaluate(
            networks.apply_fn(self.model),
            params,
            dataset.x_test,
            dataset.y_test,
            suite,
            transform=self.transform.apply,
            bounds=self.transform.bounds,
            batch_size=self.config.eval_batch_size,
            seed=self.config.seed,
            mesh=mesh,
            **kwargs,
        )

    @property
    def chosen_on(self) -> str:
        """The images that choose the best checkpoint, in words."""
        kind = "held-out" if self.config.validation_examples else "training"
        return f"{len(self.validation_set.x_test):,} {kind} images"

    def best(self) -> tuple[int, str] | None:
        """Step of the best checkpoint, the later of equals, and what chose it, in words; None if none was validated."""
        step = self.checkpoints.best_step
        if step is None or self.checkpoints.score(step) == UNJUDGED:
            return None
        skipped = self.checkpoints.score(self.step) == UNJUDGED
        return step, self.chosen_on + (
            " (the last, saved when the run was stopped, did not compete)" if skipped else ""
        )

    def saved(self) -> str:
        """The checkpoint to resume from, in words."""
        steps = steps_in(self.workdir)
        return (
            f"the checkpoint of step {steps[-1]:,} is intact in {self.workdir}"
            if steps
            else "there is no checkpoint yet"
        )


@contextlib.contextmanager
def open_runs(configs: Sequence[Config], dataset: Dataset) -> Iterator[list[Run]]:
    """Opens runs on the same data, each in its workdir; if one is refused, no workdir changes.

    Of several processes the first alone locks and writes; all read.

    Raises:
      ConfigError, DataError: if settings do not fit the data or the devices, or the data have one class.
      WorkdirError: if a workdir belongs to another run, is in use, damaged, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(_opened(config, dataset)) for config in configs]
        for run in runs if distributed.is_main() else ():
            write_config(run.workdir, run.config, dataset)
            if run.weights is not None:
                note_source(run.config, run.workdir)
        yield runs


@contextlib.contextmanager
def open_run(config: Config, dataset: Dataset) -> Iterator[Run]:
    """Opens one run, as `open_runs` does."""
    with open_runs([config], dataset) as (run,):
        yield run


@contextlib.contextmanager
def _opened(config: Config, dataset: Dataset) -> Iterator[Run]:
    model = networks.create(num_classes=dataset.num_classes, image_shape=dataset.image_shape, **config.network())
    train_set, validation_set = hold_out(dataset, config.validation_examples)
    steps = config.total_steps(len(train_set.x_train))
    _check_sizes(config, train_set, steps)
    if config.entry.learns:
        check_teacher(config, dataset, workdir_of(config))
    if config.tracker:
        tracker.module(config.tracker)
    if config.init_from:
        check_source(config, workdir_of(config))
    mesh = distributed.mesh(config.devices, config.batch_size)
    workdir = workdir_of(config)
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(open_workdir(workdir, config, dataset))
        resident = is_resident(config, train_set.x_train)
        distributed.check_same(
            json.dumps([config.identity(), steps, config.checkpoint_every, dataset.sha256, resident])
        )
        start = max([0, *steps_in(workdir)])
        if start and not config.resume:
            raise WorkdirError(
                f"{workdir} holds a run at step {start:,} and --resume is off; choose another --workdir, or delete that one"
            )
        if start > steps:
            raise ConfigError(
                f"--steps={steps}: {workdir} is at step {start:,} already; it must be at least that, or choose another "
                "--workdir"
            )
        if not distributed.is_multiprocess():  # else all would have to find the same
            shapes = jax.eval_shape(lambda: init_state(config, model, dataset.image_shape, len(train_set.x_train)))
            quarantine_damaged(workdir, shapes)
        checkpoints = stack.enter_context(Checkpoints(workdir))
        weights = given_weights(config, model, dataset) if config.init_from and not start else None
        yield Run(config, dataset, train_set, validation_set, model, steps, workdir, checkpoints, mesh, weights)


def _check_sizes(config: Config, train_set: Dataset, steps: int) -> None:
    """Refuses settings that do not fit the data, and data of one class; warns of a rise that the run does not see the end of.

    Raises:
      ConfigError, DataError: with flag or data, value and range.
    """
    n, tests = len(train_set.x_train), len(train_set.x_test)
    if len(classes := np.unique(train_set.y_train)) == 1:
        raise DataError(
            f"{train_set.name}: every label of the {n:,} training images is {classes[0]}; it must have images of at least two "
            "classes to train on"
        )
    shortest = min(train_set.image_shape[:2])
    for name, flag in (("crop", "crop_padding"), ("cutout", "cutout_size")):
        pixels = getattr(config, flag)
        if name in config.augmentation.names and pixels >= shortest:
            raise ConfigError(f"--{flag}={pixels}: must be below the shorter side of the images, {shortest} pixels")
    if config.batch_size > n:
        raise ConfigError(
            f"--batch_size={config.batch_size}: must be at most the {n:,} training images of {train_set.name}"
        )
    if config.eval_examples > tests:
        raise ConfigError(
            f"--eval_examples={config.eval_examples}: must be at most the {tests:,} test images, or 0 for all"
        )
    for flag, what in (("eps_warmup", "every budget"), ("lr_warmup", "the learning rate")):
        if (rise := config.in_effect().get(flag, 0)) > max(1, steps) and distributed.is_main():  # more steps may follow
            print(
                f"warning: --{flag}={rise:g}: the rise of {what} is cut off at {steps / rise:.2g} of it, for the run has "
                f"{steps:,} steps; give at most {steps:,}, or a fraction below 1",
                file=sys.stderr,
            )
    if steps * config.batch_size >= 2**32:  # the place in the order is counted in 32 bits
        raise ConfigError(f"--steps={steps}: steps * batch_size must be below {2**32:,}")
