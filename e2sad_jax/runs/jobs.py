"""Runs as jobs: a run's settings, data and workdir found to fit together, and its training with checkpoints."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import distributed, networks
from e2sad_jax._compile import jit
from e2sad_jax.data import Dataset
from e2sad_jax.data.transforms import TRANSFORMS, Transform
from e2sad_jax.errors import (
    CheckpointError,
    ConfigError,
    LostProcessError,
    NonFiniteError,
    WorkdirError,
    as_device_error,
    first_line,
)
from e2sad_jax.evaluation import Attack, Outcome, evaluate
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs.checkpoint import Checkpoints, set_damaged_aside
from e2sad_jax.runs.folder import check_there, note_training, open_workdir, read_training, steps_in
from e2sad_jax.runs.metrics import Recorder
from e2sad_jax.runs.signals import first_to
from e2sad_jax.training import TrainState, fit, init_state, stack, unstack
from e2sad_jax.training.config import Config

WATCHED = 500  # images that choose the best checkpoint where none are held out
UNJUDGED = -1.0  # score of a checkpoint that was saved because the run was stopped: below all others


@dataclasses.dataclass
class _Signals:
    """What `interruptible` knows: whether it listens, the signal caught, and whether there are steps that nobody saved."""

    listening: bool = False
    caught: int = 0
    unsaved: bool = False


_signals = _Signals()


def stuck() -> bool:
    """Whether a signal was not seen to and nothing is lost by ending the process: it is in the compiler, say."""
    return _signals.listening and not _signals.caught and not _signals.unsaved and not distributed.is_multiprocess()


def workdir_of(config: Config) -> pathlib.Path:
    """Where a run is kept."""
    return pathlib.Path(config.workdir or config.default_workdir()).expanduser()


@dataclasses.dataclass(frozen=True)
class Job:
    """A run whose settings, data and workdir are known to fit together.

    Attributes:
      config: its settings.
      dataset: all its data.
      train_set: what it trains on.
      watched: as a test set, what chooses its best checkpoint.
      model: the network.
      steps: training steps in all.
      workdir: its folder, locked.
      checkpoints: those in it.
      mesh: the devices it runs on, None for one.
    """

    config: Config
    dataset: Dataset
    train_set: Dataset
    watched: Dataset
    model: nn.Module
    steps: int
    workdir: pathlib.Path
    checkpoints: Checkpoints
    mesh: Mesh | None

    @property
    def transform(self) -> Transform:
        return TRANSFORMS[self.config.transform]

    @property
    def step(self) -> int:
        """Step of the last checkpoint, 0 where there is none."""
        return self.checkpoints.last_step or 0

    def init_state(self) -> TrainState:
        return distributed.replicate(self.mesh, init_state(self.config, self.model, self.dataset.image_shape))

    def restore(self, step: int | None = None) -> TrainState:
        """The state of the checkpoint of `step`, by default the last one, whatever number of devices wrote it."""
        shapes = jax.eval_shape(lambda: init_state(self.config, self.model, self.dataset.image_shape))
        place = None if self.mesh is None else distributed.whole(self.mesh)
        return self.checkpoints.restore(shapes, step=step, place=place)


@contextlib.contextmanager
def open_job(config: Config, dataset: Dataset) -> Iterator[Job]:
    """Checks everything about a run and opens its workdir; a refused run changes nothing there.

    Of several processes the first alone locks and writes; all read.
    """
    model = networks.create(config.model, dataset.num_classes, dataset.image_shape, config.precision)
    train_set, watched = hold_out(dataset, config)
    steps = config.total_steps(len(train_set.x_train))
    _check_sizes(config, train_set, steps)
    mesh = distributed.mesh(config.devices, config.batch_size)
    workdir = workdir_of(config)
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            stack.enter_context(open_workdir(workdir, config, dataset))
        distributed.check_same(json.dumps([config.identity(), steps, config.checkpoint_every, dataset.sha256]))
        start = max([0, *steps_in(workdir)])
        if start and not config.resume:
            raise WorkdirError(
                f"{workdir} holds a run at step {start:,} and --resume is off; choose another --workdir, or delete that one"
            )
        if start > steps:
            raise ConfigError(f"--steps={steps}: {workdir} is at step {start:,} already; it must be at least that")
        state = None
        if not distributed.is_multiprocess():  # else all would have to find the same
            state = set_damaged_aside(workdir, jax.eval_shape(lambda: init_state(config, model, dataset.image_shape)))
        checkpoints = stack.enter_context(Checkpoints(workdir, last_state=state))
        yield Job(config, dataset, train_set, watched, model, steps, workdir, checkpoints, mesh)


def train(job: Job, interrupted: Callable[[], int]) -> tuple[TrainState, float]:
    """Trains one run from its last checkpoint, or from scratch, to `job.steps`.

    Returns:
      The state reached, earlier than `job.steps` only if `interrupted()`, and the seconds that it took in all.
    """
    if job.step == job.steps:
        return job.restore(), job.checkpoints.seconds(job.steps)
    (state,), (seconds,) = _train([job], job.steps, interrupted)
    return state, seconds


def train_together(jobs: Sequence[Job], interrupted: Callable[[], int]) -> None:
    """Trains runs of one population (`train.population_key`) to `steps`, each with checkpoints in its own workdir.

    Those that are behind, because a process was killed while it saved them, catch up first.

    Raises:
      NonFiniteError: if one of them diverged; `member` is its place in `jobs`.
    """
    steps = jobs[0].steps
    while not interrupted() and (behind := min(job.step for job in jobs)) < steps:
        ahead = [job.step for job in jobs if job.step > behind]
        last = [job for job in jobs if job.step == behind]
        try:
            _train(last, min([*ahead, steps]), interrupted)
        except NonFiniteError as error:
            error.member = jobs.index(last[error.member])
            raise


def _train(jobs: Sequence[Job], steps: int, interrupted: Callable[[], int]) -> tuple[list[TrainState], list[float]]:
    """Trains runs that are all at the same step up to step `steps`; returns their states, and the seconds so far."""
    first, together = jobs[0], len(jobs) > 1
    config, start = first.config, first.step
    if start:
        states, spent = [job.restore() for job in jobs], [job.checkpoints.seconds(start) for job in jobs]
        if distributed.is_main():
            print(f"Going on from step {start:,} in {', '.join(str(job.workdir) for job in jobs)}", file=sys.stderr)
    else:
        states, spent = [job.init_state() for job in jobs], [0.0 for _ in jobs]
    began = time.monotonic()
    logits = jit(lambda params, images: networks.logits_fn(first.model, params)(first.transform.apply(images)))
    probe = first.watched.x_test[: config.eval_batch_size]
    title = f"train {config.defense} on {first.train_set.name}" + (f", {len(jobs)} together" if together else "")

    with Bar(title, steps, "steps", initial=start, silent=not distributed.is_main()) as bar:
        record = Recorder(
            [job.workdir for job in jobs],
            bar,
            start=start,
            log_every=config.log_every,
            batch_size=config.batch_size,
            silent=not distributed.is_main(),
        )

        def checkpoint(step: int, state: TrainState) -> None:
            # Only states are kept that all metrics vouch for, and that the last update, which they have not seen, left whole.
            record.flush()
            for job in jobs if distributed.is_main() else ():
                check_there(job.workdir)
            with jax.transfer_guard("allow"):
                singles = unstack(state) if together else [state]
                for i, (job, single) in enumerate(zip(jobs, singles, strict=True)):
                    if not np.isfinite(logits(distributed.local(single.params), probe)).all():
                        where = f" in {job.workdir.name}" if together else ""
                        raise NonFiniteError(f"step {step}{where}: its update left logits that are not finite", i)
                for i, (job, single) in enumerate(zip(jobs, singles, strict=True)):
                    metrics = {"score": UNJUDGED}
                    if not distributed.max_over_processes(interrupted()):  # who stops a run does not wait for an attack
                        metrics = _watch(job, single)
                    if metrics["score"] != UNJUDGED:
                        record.write(step, {f"validation_{name}": value for name, value in metrics.items()}, i)
                    seconds = spent[i] + time.monotonic() - began
                    job.checkpoints.save(step, single, {**metrics, "seconds": seconds})
                    note(job, step)
            record.restart_clock()

        def note(job: Job, step: int, **more: Any) -> None:
            if not distributed.is_main():
                return
            check_there(job.workdir)
            seconds = round(time.monotonic() - began, 1)
            segment = {"from_step": start, "to_step": step, "seconds": seconds, "runs_together": len(jobs)}
            if first.mesh is not None:
                more = {"devices": first.mesh.size, "processes": jax.process_count(), **more}
            note_training(job.workdir, {**segment, "command": provenance.command(), **provenance.environment(), **more})

        def stop() -> bool:
            _signals.unsaved = True
            return bool(distributed.max_over_processes(interrupted()))

        state = stack(states) if together else states[0]
        del states  # donated
        try:
            state = fit(
                [job.config for job in jobs] if together else config,
                first.model,
                first.train_set,
                state,
                steps=steps,
                record=record,
                checkpoint=checkpoint,
                stop=stop,
                mesh=first.mesh,
            )
        except NonFiniteError as error:
            for job in jobs:
                job.checkpoints.wait()
            last = first.checkpoints.last_step
            kept = f"the checkpoint of step {last:,} stays in {first.workdir}" if last else "there is no checkpoint yet"
            raise NonFiniteError(
                f"{error}; training stopped, {kept}. Try a lower --learning_rate (now {config.learning_rate}), or "
                "--precision=float32, with another --workdir",
                error.member,
            ) from None
        except (jax.errors.JaxRuntimeError, MemoryError, CheckpointError) as error:
            # A checkpoint's writer may be the one that waits for a process in vain.
            cause = error.__cause__ if isinstance(error, CheckpointError) else error
            own = any(word in str(cause) for word in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"))
            lost = distributed.is_multiprocess() and isinstance(cause, jax.errors.JaxRuntimeError) and not own
            if isinstance(error, CheckpointError) and not lost:
                raise  # nobody else's fault
            if lost:
                raise LostProcessError(
                    f"another of the {jax.process_count()} processes was lost after step {bar.done:,} "
                    f"({first_line(cause or error)}); {_whole(first)}. Start all of them again to go on from there"
                ) from error
            for job in jobs:
                with contextlib.suppress(CheckpointError):
                    job.checkpoints.wait()
            sizes = (
                f"--eval_batch_size (now {config.eval_batch_size}), or --batch_size (now {config.batch_size}) with another "
                "--workdir"
            )
            kept = f"{_whole(first)}, and the same command goes on"
            if named := as_device_error(error, f"in training, after step {bar.done:,}", kept, sizes):
                raise named from error
            raise
        finally:
            record.close()
        for job in jobs:
            job.checkpoints.wait()
        _signals.unsaved = False
    reached = unstack(state) if together else [state]
    for job, single in zip(jobs, reached, strict=True):
        if int(single.step) == job.steps:
            note(job, job.steps, weights=digest(single.params))
    return reached, [already + time.monotonic() - began for already in spent]


def _whole(job: Job) -> str:
    """What there is to go on from, in words."""
    steps = steps_in(job.workdir)
    return f"the checkpoint of step {steps[-1]:,} is whole in {job.workdir}" if steps else "there is no checkpoint yet"


def digest(params: Any) -> str:
    """Names the very numbers of a network's parameters."""
    sha = hashlib.sha256()
    for leaf in jax.device_get(jax.tree.leaves(params)):
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()[:16]


def weights(workdir: pathlib.Path, steps: int) -> str | None:
    """`digest` of the parameters of a run that is trained to `steps`, None if it is not, or nobody has noted it yet."""
    segments = read_training(workdir)
    done = bool(segments) and segments[-1]["to_step"] == steps and (workdir / "checkpoints" / str(steps)).is_dir()
    return segments[-1].get("weights") if done else None


def note_weights(job: Job) -> None:
    """Makes up for a process that was killed between the last checkpoint and the note of what it holds."""
    if job.step == job.steps and weights(job.workdir, job.steps) is None:
        segments = read_training(job.workdir)
        last = (
            segments[-1]
            if segments
            else {"from_step": 0, "seconds": 0.0, "runs_together": 1, **provenance.environment()}
        )
        note_training(job.workdir, {**last, "to_step": job.steps, "weights": digest(job.restore().params)})


def _watch(job: Job, state: TrainState) -> dict[str, float]:
    """Clean and robust accuracy on the watched images, and the score that orders checkpoints by robust, then by clean.

    `UNJUDGED` alone if the run is stopped meanwhile.
    """
    eps = job.config.eps1
    suite = [Attack("clean", "clean"), Attack("robust", "pgd", eps, 10, eps / 4 or None)]
    n, values = len(job.watched.x_test), {"clean": 0.0, "robust": 0.0, "score": UNJUDGED}

    def go_on(name: str, gradients: int) -> None:
        if _signals.caught:
            raise _Told

    if distributed.is_main():
        with contextlib.suppress(_Told):
            outcomes = attack(job, state.params, job.watched, suite, progress=go_on)
            clean, robust = (int(outcomes[name].correct.sum()) for name in ("clean", "robust"))
            values = {"clean": clean / n, "robust": robust / n, "score": robust + clean / (n + 1)}
    values = distributed.broadcast_from_main(values)
    return values if values["score"] != UNJUDGED else {"score": UNJUDGED}


class _Told(Exception):
    """Somebody stops the run."""


def best(job: Job) -> tuple[int, str] | None:
    """Step of the best checkpoint, the later of equals, and the images that chose it, in words; None if none was judged."""
    checkpoints = job.checkpoints
    step = checkpoints.best_step
    if step is None or checkpoints.score(step) == UNJUDGED:
        return None
    unjudged = checkpoints.score(job.step) == UNJUDGED
    return step, chosen_on(job) + (" (the last, saved when the run was stopped, did not compete)" if unjudged else "")


def chosen_on(job: Job) -> str:
    """The images that choose the best checkpoint, in words."""
    return f"{len(job.watched.x_test):,} {'held-out' if job.config.validation_examples else 'training'} images"


def tested(job: Job) -> Dataset:
    """The data set with those test images that the run is evaluated on."""
    count = job.config.eval_examples or len(job.dataset.x_test)
    return _subset(job.dataset, x_test=job.dataset.x_test[:count], y_test=job.dataset.y_test[:count])


def attack(job: Job, params: Any, tested: Dataset, suite: Sequence[Attack], **kwargs: Any) -> dict[str, Outcome]:
    """`evaluate` on the test set of `tested`, as the run's settings say, on all of this process's devices."""
    mesh = job.mesh
    if distributed.is_multiprocess():  # the others wait
        mesh, params = None, distributed.local(params)
    # Bound to their devices, as restored ones are: else the same program is compiled for either.
    params = jax.tree.map(lambda a: jax.device_put(a, a.sharding), params)
    return evaluate(
        job.model,
        params,
        tested.x_test,
        tested.y_test,
        suite,
        transform=job.transform,
        num_classes=tested.num_classes,
        batch_size=job.config.eval_batch_size,
        seed=job.config.seed,
        mesh=mesh,
        **kwargs,
    )


def hold_out(dataset: Dataset, config: Config) -> tuple[Dataset, Dataset]:
    """The training set, and the images (as a test set) that choose the best checkpoint.

    Without `validation_examples` these are training images: they betray a collapse under attack, not overfitting, and
    leave the paper's training set whole. The test set is never looked at.
    """
    n, count = len(dataset.x_train), config.validation_examples
    if count >= n:
        raise ConfigError(f"--validation_examples={count}: must be below the {n:,} training images of {dataset.name}")
    order = np.random.default_rng(0).permutation(n)
    watched, rest = order[: count or WATCHED], order[count:]
    train = dataset if count == 0 else _subset(dataset, x_train=dataset.x_train[rest], y_train=dataset.y_train[rest])
    return train, _subset(dataset, x_test=dataset.x_train[watched], y_test=dataset.y_train[watched])


def _subset(dataset: Dataset, **arrays: Any) -> Dataset:
    return dataclasses.replace(dataset, **arrays)


def _check_sizes(config: Config, train_set: Dataset, steps: int) -> None:
    """Refuses what only the data can tell to be wrong.

    Raises:
      ConfigError: with flag, value and range.
    """
    n, tests = len(train_set.x_train), len(train_set.x_test)
    if config.batch_size > n:
        raise ConfigError(
            f"--batch_size={config.batch_size}: must be at most the {n:,} training images of {train_set.name}"
        )
    if config.eval_examples > tests:
        raise ConfigError(
            f"--eval_examples={config.eval_examples}: must be at most the {tests:,} test images, or 0 for all"
        )
    if steps * config.batch_size >= 2**32:  # the place in the order is counted in 32 bits
        raise ConfigError(f"--steps={steps}: steps * batch_size must be below {2**32:,}")


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """Catches the first Ctrl-C or SIGTERM and yields a function that says which (0: none yet); a second one interrupts."""

    def told(number: int) -> None:
        _signals.caught = number
        # Not print: the signal may come while the same stream is being written.
        os.write(2, b"\nStopping after this step; once more to stop at once.\n")

    _signals.listening, _signals.caught, _signals.unsaved = True, 0, False
    try:
        with first_to(told):
            yield lambda: _signals.caught
    finally:
        _signals.listening, _signals.caught = False, 0
