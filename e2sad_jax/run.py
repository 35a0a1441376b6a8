"""A whole run: data, training with checkpoints, evaluation, results. What the binaries in `experiments/` call."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from e2sad_jax import data, models, plots, report
from e2sad_jax.checkpoint import Checkpoints
from e2sad_jax.config import Config
from e2sad_jax.data import Dataset
from e2sad_jax.errors import ConfigError, Error, NonFiniteError, WorkdirError
from e2sad_jax.evaluate import SUITES, Attack, Outcome, evaluate
from e2sad_jax.progress import Bar, Recorder
from e2sad_jax.train import TrainState, fit, init_state
from e2sad_jax.transforms import TRANSFORMS, Transform
from e2sad_jax.workdir import open_workdir, write_config, write_text

WATCHED = 500  # images that choose the best checkpoint where none are held out
UNJUDGED = -1.0  # score of a checkpoint that was saved because the run was stopped: below all others


class Stopped(Error):
    """The run was interrupted after a checkpoint; its message says how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def run(config: Config, suite: str) -> dict[str, Any]:
    """Trains, evaluates and reports one model in `config.workdir`; goes on where an earlier run stopped.

    Args:
      config: the settings, `workdir` among them.
      suite: attacks to evaluate with, a key of `evaluate.SUITES`.

    Returns:
      What `results.json` holds.

    Raises:
      DataError, ConfigError, WorkdirError: before anything is trained.
      NonFiniteError: if training diverged; the last good checkpoint stays.
      Stopped: after Ctrl-C or SIGTERM and a checkpoint.
    """
    (results,) = _run_all([config], suite)
    return results


def _run_all(configs: Sequence[Config], suite: str) -> list[dict[str, Any]]:
    """`run` of each, on the same data; all are found possible before the first is trained."""
    if suite not in SUITES:
        raise ConfigError(f"suite={suite!r}: must be one of {', '.join(SUITES)}")
    report.commit()  # of the code that runs, not of what a checkout may hold when the run ends
    dataset = data.load(configs[0].data, configs[0].data_dir or None)
    with contextlib.ExitStack() as stack:
        jobs = [stack.enter_context(_open(config, dataset)) for config in configs]
        for job in jobs:  # now that none of them is refused
            write_config(job.workdir, job.config, dataset)
        return [_train_and_report(job, SUITES[suite]) for job in jobs]


def workdir_of(config: Config) -> pathlib.Path:
    """Where a run is kept."""
    return pathlib.Path(config.workdir or config.default_workdir()).expanduser()


@dataclasses.dataclass(frozen=True)
class _Job:
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
    """

    config: Config
    dataset: Dataset
    train_set: Dataset
    watched: Dataset
    model: nn.Module
    steps: int
    workdir: pathlib.Path
    checkpoints: Checkpoints

    @property
    def transform(self) -> Transform:
        return TRANSFORMS[self.config.transform]


@contextlib.contextmanager
def _open(config: Config, dataset: Dataset) -> Iterator[_Job]:
    """Checks everything about a run and opens its workdir; a refused run changes nothing there."""
    model = models.create(config.model, dataset.num_classes, dataset.image_shape, config.precision)
    train_set, watched = _hold_out(dataset, config)
    steps = config.total_steps(len(train_set.x_train))
    _check_sizes(config, train_set, steps)
    workdir = workdir_of(config)
    with open_workdir(workdir, config, dataset), Checkpoints(workdir) as checkpoints:
        start = checkpoints.last_step or 0
        if start and not config.resume:
            raise WorkdirError(
                f"{workdir} holds a run at step {start:,} and --resume is off; choose another --workdir, or delete that one"
            )
        if start > steps:
            raise ConfigError(f"--steps={steps}: {workdir} is at step {start:,} already; it must be at least that")
        yield _Job(config, dataset, train_set, watched, model, steps, workdir, checkpoints)


def _train_and_report(job: _Job, suite: Sequence[Attack]) -> dict[str, Any]:
    config, dataset = job.config, job.dataset
    with _interruptible() as interrupted:
        state, seconds = _train(job, interrupted)
        if interrupted():
            raise _stopped(job, int(state.step), interrupted())
    outcomes = _evaluate(job, state, suite)
    results = report.build(
        config,
        dataset,
        suite,
        outcomes,
        steps=job.steps,
        parameters=models.count_parameters(state.params),
        train_seconds=seconds,
    )
    report.write(job.workdir, results, outcomes)
    plots.examples(
        job.workdir / "examples.png",
        config,
        job.model,
        state.params,
        dataset.x_test,
        dataset.y_test,
        title=f"{dataset.name}, {config.defense}, {job.steps:,} steps: predicted class (probability)",
        num_classes=dataset.num_classes,
    )
    return results


def _train(job: _Job, interrupted: Callable[[], int]) -> tuple[TrainState, float]:
    """Trains from the last checkpoint, or from scratch, to `job.steps`; returns the state and the seconds it took in all."""
    config, checkpoints, steps = job.config, job.checkpoints, job.steps
    fresh = functools.partial(init_state, config, job.model, job.dataset.image_shape)
    start = checkpoints.last_step or 0
    if start:
        state, spent = checkpoints.restore(jax.eval_shape(fresh)), checkpoints.seconds(start)
        if start == steps:
            return state, spent
        print(f"Going on from step {start:,} in {job.workdir}", file=sys.stderr)
    else:
        state, spent = fresh(), 0.0
    began = time.monotonic()
    logits = jax.jit(lambda params, images: models.logits_fn(job.model, params)(job.transform.apply(images)))
    probe = job.watched.x_test[: config.eval_batch_size]

    with Bar(f"train {config.defense} on {job.train_set.name}", steps, "steps", initial=start) as bar:
        record = Recorder(job.workdir, bar, start=start, log_every=config.log_every, batch_size=config.batch_size)

        def checkpoint(step: int, state: TrainState) -> None:
            # Only a state is kept that all metrics vouch for, and that the last update, which they have not seen, left whole.
            record.flush()
            with jax.transfer_guard("allow"):
                if not np.isfinite(logits(state.params, probe)).all():
                    raise NonFiniteError(f"step {step}: its update left logits that are not finite")
                if interrupted():  # who stops a run does not wait for an attack
                    metrics = {"score": UNJUDGED}
                else:
                    metrics = _watch(job, state)
                    record.write(step, {f"validation_{name}": value for name, value in metrics.items()})
                checkpoints.save(step, state, {**metrics, "seconds": spent + time.monotonic() - began})
            record.restart_clock()

        try:
            state = fit(
                config,
                job.model,
                job.train_set,
                state,
                steps=steps,
                record=record,
                checkpoint=checkpoint,
                stop=lambda: bool(interrupted()),
            )
        except NonFiniteError as error:
            checkpoints.wait()
            last = checkpoints.last_step
            kept = f"the checkpoint of step {last:,} stays in {job.workdir}" if last else "there is no checkpoint yet"
            raise NonFiniteError(
                f"{error}; training stopped, {kept}. Try a lower --learning_rate (now {config.learning_rate}), or "
                "--precision=float32, with another --workdir"
            ) from None
        finally:
            record.close()
        checkpoints.wait()
    return state, spent + time.monotonic() - began


def _stopped(job: _Job, step: int, signal_number: int) -> Stopped:
    how = "The same command" if job.config.resume else "The same command without --noresume"
    return Stopped(
        f"Stopped at step {step:,} of {job.steps:,}; everything is saved in {job.workdir}. {how} goes on from there:\n"
        f"  {report.command()}",
        signal_number,
    )


def _watch(job: _Job, state: TrainState) -> dict[str, float]:
    """Clean and robust accuracy on the watched images, and the score that orders checkpoints by robust, then by clean."""
    eps = job.config.eps1
    suite = [Attack("clean", "clean"), Attack("robust", "pgd", eps, 10, eps / 4 or None)]
    outcomes = _attack(job, state, job.watched, suite)
    clean, robust = (int(outcomes[name].correct.sum()) for name in ("clean", "robust"))
    n = len(job.watched.x_test)
    return {"clean": clean / n, "robust": robust / n, "score": robust + clean / (n + 1)}


def _evaluate(job: _Job, state: TrainState, suite: Sequence[Attack]) -> dict[str, Outcome]:
    dataset = job.dataset
    count = job.config.eval_examples or len(dataset.x_test)
    tested = _subset(dataset, x_test=dataset.x_test[:count], y_test=dataset.y_test[:count])
    total = count * sum(attack.gradients() for attack in suite)
    with Bar(f"attack {job.config.defense} on {dataset.name}", total, "gradients") as bar:
        return _attack(job, state, tested, suite, progress=lambda name, gradients: bar.update(gradients, name))


def _attack(
    job: _Job, state: TrainState, tested: Dataset, suite: Sequence[Attack], **kwargs: Any
) -> dict[str, Outcome]:
    """`evaluate` on the test set of `tested`, as the run's settings say."""
    return evaluate(
        job.model,
        state.params,
        tested.x_test,
        tested.y_test,
        suite,
        transform=job.transform,
        num_classes=tested.num_classes,
        batch_size=job.config.eval_batch_size,
        seed=job.config.seed,
        **kwargs,
    )


def _hold_out(dataset: Dataset, config: Config) -> tuple[Dataset, Dataset]:
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
def _interruptible() -> Iterator[Callable[[], int]]:
    """Catches the first Ctrl-C or SIGTERM and yields a function that says which (0: none yet); a second one interrupts."""
    caught, first = 0, 0.0
    previous: dict[int, Any] = {}

    def catch(number: int, frame: Any) -> None:
        nonlocal caught, first
        if caught and time.monotonic() - first < 1:
            return  # who signals a process and its group means it once
        if caught:
            restore()
            os.kill(os.getpid(), number)
            return
        caught, first = number, time.monotonic()
        # Not print: the signal may come while the same stream is being written.
        os.write(2, b"\nStopping after this step; once more to stop at once.\n")

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, catch)
    try:
        yield lambda: caught
    finally:
        restore()


def run_beside(configs: Sequence[Config], suite: str) -> None:
    """`run` of each, on the same data, the last one with the table of all; prints it and where everything lies.

    Args:
      configs: settings of the runs, of different defenses and in workdirs of their own.
      suite: as of `run`.

    Raises:
      As `run`; before anything is trained if one of the runs is not possible.
    """
    for what, values in {
        "defense": [c.defense for c in configs],
        "workdir": [str(workdir_of(c)) for c in configs],
    }.items():
        if len(set(values)) < len(values):
            raise ConfigError(f"--{what}={values[-1]}: runs beside each other must each have another one")
    results = {r["config"]["defense"]: r for r in _run_all(configs, suite)}
    config = configs[-1]
    workdir = workdir_of(config)
    write_text(workdir / "results.md", report.markdown(results))
    print(f"\n{report.heading(results[config.defense])}\n\n{report.text_table(results)}\n")
    for what, name in [
        ("checkpoint", "checkpoints"),
        ("results", "results.json"),
        ("table", "results.md"),
        ("picture", "examples.png"),
        ("training curves", "metrics.jsonl"),
    ]:
        print(f"{what + ':':16} {workdir / name}")


def describe(config: Config) -> str:
    """The layer table of the configured network: for the paper's data sets without loading them."""
    known = {"mnist": (28, 28, 1), "svhn": (32, 32, 3), "digits": (28, 28, 1)}
    if config.data in known:
        shape, num_classes = known[config.data], 10
    else:
        dataset = data.load(config.data, config.data_dir or None)
        shape, num_classes = dataset.image_shape, dataset.num_classes
    model = models.create(config.model, num_classes, shape, config.precision)
    return models.describe(model, shape)
