"""Training of opened runs, with metrics, validation and checkpoints."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from e2sad_jax import distributed, networks
from e2sad_jax._compile import jit
from e2sad_jax.data.in_file import is_in_file
from e2sad_jax.errors import CheckpointError, LostProcessError, NonFiniteError, as_device_error, first_line
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs import tracker
from e2sad_jax.runs.checkpoint import UNJUDGED
from e2sad_jax.runs.folder import ensure_exists, note_training
from e2sad_jax.runs.metrics import Recorder
from e2sad_jax.runs.opening import Run, open_run
from e2sad_jax.runs.teacher import FILE, config_of, keep_logits, read_logits
from e2sad_jax.runs.validation import overfitting, validate
from e2sad_jax.training import TrainState, fit, gather, nbytes, place, stack, unstack
from e2sad_jax.training.stream import is_resident


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
