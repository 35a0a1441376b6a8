"""Training of runs on disk: what a run is, opening its folder, and training it with metrics, validation and checkpoints."""

import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import distributed, networks
from e2sad_jax._compile import jit
from e2sad_jax.data import Dataset, hold_out, sample_tests
from e2sad_jax.data.in_file import is_in_file
from e2sad_jax.data.transforms import TRANSFORMS, Transform
from e2sad_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LostProcessError,
    NonFiniteError,
    WorkdirError,
    as_device_error,
    first_line,
)
from e2sad_jax.evaluation import Attack, Outcomes, evaluate
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs import tracker
from e2sad_jax.runs.checkpoint import Checkpoints, quarantine_damaged
from e2sad_jax.runs.folder import ensure_exists, note_training, open_workdir, steps_in, workdir_of, write_config
from e2sad_jax.runs.metrics import Recorder
from e2sad_jax.runs.teacher import FILE, check_teacher, config_of, keep_logits, read_logits
from e2sad_jax.runs.validation import UNJUDGED, overfitting, validate
from e2sad_jax.runs.weights import check_source, given_weights, note_source
from e2sad_jax.training import TrainState, fit, gather, init_state, nbytes, place, stack, unstack
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


def train(run: Run, stop: Callable[[], int]) -> tuple[TrainState, float]:
    """Trains a run from its last checkpoint, or from scratch, to `run.steps`.

    Args:
      run: an open run.
      stop: asked after every dispatch; a number other than 0 ends training after a checkpoint.

    Returns:
      The state reached, and the seconds that training took in all.

    Raises:
      NonFiniteError: if training diverged; the last good checkpoint stays.
      CheckpointError, GoneError: if a checkpoint cannot be written.
      LostProcessError, OutOfMemoryError, DeviceError: naming the checkpoint to resume from.
    """
    if run.step == run.steps:
        return run.restore(), run.checkpoints.seconds(run.steps)
    if not _taught(run, stop):
        return run.init_state(), 0.0
    trainer = _Trainer([run], stop)
    (state,) = trainer.train(run.steps)
    return state, trainer.seconds(0)


def train_together(runs: Sequence[Run], stop: Callable[[], int]) -> None:
    """Trains the runs of one population (`training.population_key`) to their last step, each in its own workdir.

    Those that are behind, because a process was killed while it saved them, catch up first.

    Args:
      runs: open runs.
      stop: as of `train`.

    Raises:
      NonFiniteError: if one of them diverged; `member` is its place in `runs`.
    """
    steps = runs[0].steps
    if not all(_taught(run, stop) for run in runs):
        return
    while not stop() and (behind := min(run.step for run in runs)) < steps:
        ahead = [run.step for run in runs if run.step > behind]
        last = [run for run in runs if run.step == behind]
        try:
            _Trainer(last, stop).train(min([*ahead, steps]))
        except NonFiniteError as error:
            error.member = runs.index(last[error.member])
            raise


def _taught(run: Run, stop: Callable[[], int]) -> bool:
    """Gives a run that learns from a teacher its logits, unless it has them: trains the teacher first where none is named.

    Returns:
      False if it was stopped meanwhile.
    """
    if not run.config.entry.learns or (run.workdir / FILE).exists():
        return True
    folder = pathlib.Path(run.config.settings["teacher"]).expanduser()
    if not run.config.settings["teacher"]:
        with open_run(config_of(run.config, run.workdir), run.dataset) as teacher:
            train(teacher, stop)
            folder = teacher.workdir
        if distributed.max_over_processes(stop()):
            return False
    keep_logits(folder, run.train_set, run.workdir, run.config.eval_batch_size)
    return True


class _Trainer:
    """Trains runs that are at the same step as one program, and saves each of them."""

    def __init__(self, runs: Sequence[Run], stop: Callable[[], int]):
        self._runs, self._first, self._stop = runs, runs[0], stop
        self._start, self._began = self._first.step, time.monotonic()
        self._before = [run.checkpoints.seconds(self._start) if self._start else 0.0 for run in runs]
        first = self._first
        self._resident = len(runs) > 1 or is_resident(first.config, first.train_set.x_train)
        self._logits = jit(lambda params, x: networks.logits_fn(first.model, params)(first.transform.apply(x)))

    def seconds(self, member: int) -> float:
        """Seconds that a run has been trained for in all."""
        return self._before[member] + time.monotonic() - self._began

    def train(self, steps: int) -> list[TrainState]:
        """Trains to `steps`, or until asked to stop; returns the states reached."""
        runs, first = self._runs, self._first
        silent = not distributed.is_main()
        if self._start and not silent:
            where = ", ".join(str(run.workdir) for run in runs)
            print(f"Resuming from step {self._start:,} in {where}", file=sys.stderr)
        title = f"train {first.config.defense} on {first.train_set.name}"
        if len(runs) > 1:
            title += f", {len(runs)} together"
        if (
            size := len(runs) * nbytes(first.config, len(first.train_set.x_train), first.dataset.image_shape)
        ) and not silent:
            share = (
                f", {size / first.mesh.size / 1e6:,.1f} MB on each device between checkpoints"
                if first.mesh is not None
                else ""
            )
            print(f"Memory of perturbations ({first.config.memory}): {size / 1e6:,.1f} MB{share}", file=sys.stderr)
        if not (self._resident or silent):
            images = first.train_set.x_train
            where = "in their file" if is_in_file(images) else "on the host"
            print(
                f"Training images ({images.nbytes / 1e6:,.1f} MB) stay {where}; --resident=device sends them all to the device",
                file=sys.stderr,
            )
        with Bar(title, steps, "steps", initial=self._start, silent=silent) as bar:
            self._bar, self._told = bar, set[int]()
            tracked = [run for run in runs if run.config.tracker and not silent]
            self._record = Recorder(
                [run.workdir for run in runs],
                bar,
                start=self._start,
                log_every=first.config.log_every,
                batch_size=first.config.batch_size,
                silent=silent,
                trackers=[tracker.Tracker(run.config.tracker, run.workdir, run.config.to_json()) for run in tracked],
            )
            with contextlib.closing(self._record), self._explaining(bar):
                state = fit(
                    first.config if len(runs) == 1 else [run.config for run in runs],
                    first.model,
                    first.train_set,
                    self._states(),
                    steps=steps,
                    record=self._record,
                    checkpoint=self._save,
                    stop=lambda: bool(distributed.max_over_processes(self._stop())),
                    mesh=first.mesh,
                    teacher=read_logits(first.workdir) if first.config.entry.learns else None,
                )
            for run in runs:
                run.checkpoints.wait()
        return self._separate(gather(state, first.mesh))

    def _states(self) -> TrainState:
        """Where to begin: the one run's state, or all runs' as a population's."""
        states = [run.restore() if self._start else run.init_state() for run in self._runs]
        population = len(states) > 1
        return place(stack(states) if population else states[0], self._first.mesh, population=population)

    def _separate(self, state: TrainState) -> list[TrainState]:
        return [state] if len(self._runs) == 1 else unstack(state)

    def _save(self, step: int, state: TrainState) -> None:
        """Validates each run, notes what was done, and begins to write its checkpoint."""
        self._record.flush()  # refuses metrics that are not finite
        for run in self._runs if distributed.is_main() else ():
            ensure_exists(run.workdir)
        with jax.transfer_guard("allow"):
            states = self._separate(gather(state, self._first.mesh))
            self._refuse_broken(step, states)
            for member, (run, own) in enumerate(zip(self._runs, states, strict=True)):
                metrics = validate(run, own, self._stop)
                if metrics["score"] != UNJUDGED:
                    metrics |= self._watch(run, member, step, own.params, metrics)
                    self._record.write(step, {f"validation_{name}": value for name, value in metrics.items()}, member)
                self._note(run, step)
                run.checkpoints.save(step, own, {**metrics, "seconds": self.seconds(member)})
        self._record.restart_clock()

    def _watch(
        self, run: Run, member: int, step: int, params: Any, metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Measures whether training has overfitted to its one step, says so once, and returns what was measured."""
        config = run.config
        if "robust" not in metrics or not config.entry.attacks or not distributed.is_main():
            return {}
        if config.eps_warmup and step < config.warmup_steps(run.steps):
            return {}  # a network that has not seen the whole budget yet is not robust to it
        found = overfitting(run, params, metrics["robust"])
        if found["collapsed"] and member not in self._told:
            self._told.add(member)
            where = f" of {run.workdir.name}" if len(self._runs) > 1 else ""
            rising = "" if config.eps_warmup else "a rising budget (--eps_warmup=0.5), "
            if "attack_steps" in config.settings:
                stronger = "a larger --attack_steps"
            elif config.settings.get("first_point") == "start":
                stronger = "a step to the first point, too (--preset=robust2)"
            else:
                stronger = "an attack of several steps (--defense=pgd)"
            self._bar.say(
                f"step {step:,}{where}: catastrophic overfitting. Accuracy on {run.chosen_on} is {found['fgsm']:.3f} under "
                f"FGSM and {metrics['robust']:.3f} under PGD-10 (gradient alignment {found['alignment']:.2f}). Train with "
                f"{rising}{stronger}, or a lower --eps1"
            )
        return found

    def _refuse_broken(self, step: int, states: Sequence[TrainState]) -> None:
        """Refuses states that the last update, which no metric has seen, left with logits that are not finite."""
        images = self._first.validation_set.x_test[: self._first.config.eval_batch_size]
        for member, (run, state) in enumerate(zip(self._runs, states, strict=True)):
            if not np.isfinite(self._logits(distributed.local(state.params), images)).all():
                where = f" in {run.workdir.name}" if len(states) > 1 else ""
                raise NonFiniteError(f"step {step}{where}: its update left logits that are not finite", member)

    def _note(self, run: Run, step: int) -> None:
        """Writes into training.json what this process has done so far; before the checkpoint, so that none is without."""
        if not distributed.is_main():
            return
        ensure_exists(run.workdir)
        segment = {
            "from_step": self._start,
            "to_step": step,
            "seconds": round(time.monotonic() - self._began, 1),
            "runs_together": len(self._runs),
            "command": provenance.command(),
            **provenance.environment(),
        }
        if run.mesh is not None:
            segment |= {"devices": run.mesh.size, "processes": jax.process_count()}
        note_training(run.workdir, segment)

    @contextlib.contextmanager
    def _explaining(self, bar: Bar) -> Iterator[None]:
        """Raises what ends training as an error that names the checkpoint to resume from and what to change."""
        first, config = self._first, self._first.config
        try:
            yield
        except NonFiniteError as error:
            for run in self._runs:
                run.checkpoints.wait()
            last = first.checkpoints.last_step
            kept = f"the checkpoint of step {last:,} stays in {first.workdir}" if last else "there is no checkpoint yet"
            raise NonFiniteError(
                f"{error}; training stopped, {kept}. Try a lower --learning_rate (now {config.learning_rate}), or "
                "--precision=float32, with another --workdir",
                error.member,
            ) from None
        except (jax.errors.JaxRuntimeError, MemoryError, CheckpointError) as error:
            # The thread that writes a checkpoint may be the one that waits for a lost process.
            cause = error.__cause__ if isinstance(error, CheckpointError) else error
            own = any(word in str(cause) for word in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"))
            if distributed.is_multiprocess() and isinstance(cause, jax.errors.JaxRuntimeError) and not own:
                raise LostProcessError(
                    f"another of the {jax.process_count()} processes was lost after step {bar.done:,} "
                    f"({first_line(cause)}); {first.saved()}. Start all of them again to resume from there"
                ) from error
            if isinstance(error, CheckpointError):
                raise
            for run in self._runs:
                with contextlib.suppress(CheckpointError):
                    run.checkpoints.wait()
            lower = (
                f"--eval_batch_size (now {config.eval_batch_size}), or --batch_size (now {config.batch_size}) with another "
                "--workdir"
            )
            if len(self._runs) == 1 and self._resident:
                lower += ", or training images on the host (--resident=host)"
            kept = f"{first.saved()}, and the same command resumes from there"
            if named := as_device_error(error, f"in training, after step {bar.done:,}", kept, lower):
                raise named from error
            raise


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
