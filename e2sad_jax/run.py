"""A whole run: data, training with checkpoints, evaluation, results. What the binaries in `experiments/` call."""

import contextlib
import dataclasses
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

from e2sad_jax import data, models, report
from e2sad_jax.checkpoint import Checkpoints
from e2sad_jax.config import Config
from e2sad_jax.data import Dataset
from e2sad_jax.errors import ConfigError, Error, NonFiniteError, WorkdirError
from e2sad_jax.evaluate import SUITES, Attack, evaluate
from e2sad_jax.progress import Bar, Recorder
from e2sad_jax.train import TrainState, fit, init_state
from e2sad_jax.transforms import TRANSFORMS
from e2sad_jax.workdir import open_workdir, write_text

WATCHED = 500  # images that choose the best checkpoint where none are held out


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
    report.commit()  # of the code that runs, not of what a checkout may hold when the run ends
    dataset = data.load(config.data, config.data_dir or None)
    model = models.create(config.model, dataset.num_classes, dataset.image_shape, config.precision)
    train_set, watched = _hold_out(dataset, config)
    steps = config.total_steps(len(train_set.x_train))
    _check_sizes(config, train_set, steps)
    workdir = pathlib.Path(config.workdir)
    open_workdir(workdir, config, dataset)
    state = init_state(config, model, dataset.image_shape)
    with Checkpoints(workdir) as checkpoints, _interruptible() as interrupted:
        state, seconds = _train(config, model, train_set, watched, state, steps, checkpoints, interrupted)
    outcomes = _evaluate(config, model, state, dataset, SUITES[suite])
    results = report.build(
        config,
        dataset,
        SUITES[suite],
        outcomes,
        steps=steps,
        parameters=models.count_parameters(state.params),
        train_seconds=seconds,
    )
    report.write(workdir, results, outcomes)
    from e2sad_jax import plots

    plots.examples(
        workdir / "examples.png",
        config,
        model,
        state.params,
        dataset.x_test,
        dataset.y_test,
        title=f"{dataset.name}, {config.defense}, {steps:,} steps: predicted class (probability)",
        num_classes=dataset.num_classes,
    )
    return results


def _train(
    config: Config,
    model: nn.Module,
    train_set: Dataset,
    watched: Dataset,
    state: TrainState,
    steps: int,
    checkpoints: Checkpoints,
    interrupted: Callable[[], int],
) -> tuple[TrainState, float]:
    """Trains from the last checkpoint, or `state`, to `steps`; returns the state and the seconds it took in all."""
    workdir, start, spent = pathlib.Path(config.workdir), 0, 0.0
    if checkpoints.last_step is not None:
        start = checkpoints.last_step
        if not config.resume:
            raise WorkdirError(
                f"{workdir} holds a run at step {start:,} and --resume is off; choose another --workdir, or delete that one"
            )
        if start > steps:
            raise ConfigError(f"--steps={steps}: {workdir} is at step {start:,} already; it must be at least that")
        state, spent = checkpoints.restore(state), checkpoints.metrics(start)["seconds"]
        if start < steps:
            print(f"Going on from step {start:,} in {workdir}", file=sys.stderr)
    if start == steps:
        return state, spent
    began = time.monotonic()
    title = f"train {config.defense} on {train_set.name}"
    with Bar(title, steps, "steps", initial=start) as bar:
        record = Recorder(workdir, bar, start=start, log_every=config.log_every, batch_size=config.batch_size)

        def checkpoint(step: int, state: TrainState) -> None:
            record.flush()  # only a state that all metrics vouch for is kept
            with jax.transfer_guard("allow"):
                metrics = _watch(config, model, state, watched)
                record.write(step, {f"validation_{name}": value for name, value in metrics.items()})
                checkpoints.save(step, state, {**metrics, "seconds": spent + time.monotonic() - began})

        try:
            state = fit(
                config,
                model,
                train_set,
                state,
                steps=steps,
                record=record,
                checkpoint=checkpoint,
                stop=lambda: bool(interrupted()),
            )
        except NonFiniteError as error:
            checkpoints.wait()
            last = checkpoints.last_step
            kept = f"the checkpoint of step {last:,} stays in {workdir}" if last else "there is no checkpoint yet"
            raise NonFiniteError(
                f"{error}; training stopped, {kept}. Try a lower --learning_rate (now {config.learning_rate}), or "
                "--precision=float32, with another --workdir"
            ) from None
        finally:
            record.close()
        checkpoints.wait()
    step = int(state.step)
    if step < steps:
        raise Stopped(
            f"Stopped at step {step:,} of {steps:,}; everything is saved in {workdir}. The same command goes on from there:\n"
            f"  {report.command()}",
            interrupted(),
        )
    return state, spent + time.monotonic() - began


def _watch(config: Config, model: nn.Module, state: TrainState, watched: Dataset) -> dict[str, float]:
    """Clean and robust accuracy on the watched images, and the score that orders checkpoints by robust, then by clean."""
    suite = [Attack("clean", "clean"), Attack("robust", "pgd", config.eps1, 10, config.eps1 / 4)]
    outcomes = evaluate(
        model,
        state.params,
        watched.x_test,
        watched.y_test,
        suite,
        transform=TRANSFORMS[config.transform],
        num_classes=watched.num_classes,
        batch_size=config.eval_batch_size,
    )
    clean, robust = (int(outcomes[name].correct.sum()) for name in ("clean", "robust"))
    n = len(watched.x_test)
    return {"clean": clean / n, "robust": robust / n, "score": robust + clean / (n + 1)}


def _evaluate(
    config: Config, model: nn.Module, state: TrainState, dataset: Dataset, suite: Sequence[Attack]
) -> dict[str, Any]:
    count = config.eval_examples or len(dataset.x_test)
    images, labels = dataset.x_test[:count], dataset.y_test[:count]
    total = len(images) * sum(attack.gradients() for attack in suite)
    with Bar(f"attack {config.defense} on {dataset.name}", total, "gradients") as bar:
        return evaluate(
            model,
            state.params,
            images,
            labels,
            suite,
            transform=TRANSFORMS[config.transform],
            num_classes=dataset.num_classes,
            batch_size=config.eval_batch_size,
            seed=config.seed,
            progress=lambda name, gradients: bar.update(gradients, name),
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
    caught = 0
    previous: dict[int, Any] = {}

    def catch(number: int, frame: Any) -> None:
        nonlocal caught
        caught = number
        print("\nStopping after this step; once more to stop at once.", file=sys.stderr)
        restore()

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


def run_beside(config: Config, suite: str, baseline: str) -> None:
    """`run`, after the same run with the defense `baseline` ("" for none); prints the table and where everything lies."""
    results = {}
    if baseline and baseline != config.defense:
        other = dataclasses.replace(config, defense=baseline, workdir=f"{config.workdir}-{baseline}")
        results[baseline] = run(other, suite)
    results[config.defense] = run(config, suite)
    workdir = pathlib.Path(config.workdir)
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
