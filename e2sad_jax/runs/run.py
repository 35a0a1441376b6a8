"""A whole run: data, training with checkpoints, evaluation, results. What the binaries in `experiments/` call."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from e2sad_jax import data, distributed, networks
from e2sad_jax._io import write_text
from e2sad_jax.errors import ConfigError, Stopped, as_device_error
from e2sad_jax.evaluation import SUITES, Attack, Outcome
from e2sad_jax.evaluation.model import apply_of
from e2sad_jax.reporting import plots, provenance
from e2sad_jax.reporting import results as reported
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs import jobs
from e2sad_jax.runs.folder import check_there, describe_dataset, write_config
from e2sad_jax.runs.jobs import Job, workdir_of
from e2sad_jax.training import TrainState
from e2sad_jax.training.config import Config


def run(config: Config, suite: str) -> dict[str, Any]:
    """Trains, evaluates and reports one model in `config.workdir`; goes on where an earlier run stopped.

    Args:
      config: the settings, `workdir` among them.
      suite: attacks to evaluate with, a key of `evaluate.SUITES`.

    Returns:
      What `results.json` holds; empty in all processes but the first.

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
    provenance.commit()  # of the code that runs, not of what a checkout may hold when the run ends
    dataset = data.load(configs[0].data, configs[0].data_dir or None)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(jobs.open_job(config, dataset)) for config in configs]
        for job in opened:  # now that none of them is refused
            if distributed.is_main():
                write_config(job.workdir, job.config, dataset)
        return [_train_and_report(job, SUITES[suite]) for job in opened]


def _train_and_report(job: Job, suite: Sequence[Attack]) -> dict[str, Any]:
    config, dataset = job.config, job.dataset
    with jobs.interruptible() as interrupted:
        state, seconds = jobs.train(job, interrupted)
        if told := distributed.max_over_processes(interrupted()):
            raise _stopped(job, int(state.step), told)
    chosen = jobs.best(job)
    apart = job.restore(chosen[0]) if chosen and chosen[0] != job.steps else None  # by all processes
    if not distributed.is_main():
        distributed.barrier()  # the first evaluates
        return {}
    outcomes = _evaluate(job, state, suite)
    best = chosen and reported.Best(*chosen, _evaluate(job, apart, suite) if apart else outcomes)
    results = reported.build(
        config,
        describe_dataset(dataset),
        suite,
        outcomes,
        steps=job.steps,
        parameters=networks.count_parameters(state.params),
        train_seconds=seconds,
        best=best,
    )
    check_there(job.workdir)
    reported.write(job.workdir, results, outcomes, best)
    settings = config.settings
    shown = np.array([np.flatnonzero(dataset.y_test == k)[0] for k in np.unique(dataset.y_test)])
    plots.examples(
        job.workdir / "examples.png",
        apply_of(job.model),
        distributed.local(state.params),
        np.asarray(job.transform.apply(dataset.x_test[shown])),
        dataset.y_test[shown],
        num_classes=dataset.num_classes,
        title=f"{dataset.name}, {config.defense}, {job.steps:,} steps: predicted class (probability)",
        eps1=config.eps1,
        eps2=settings.get("eps2", config.eps1 / 3),
        second_step=settings.get("second_step", "total"),
        bounds=job.transform.bounds,
        clip_second=settings.get("clip_second", False),
        seed=config.seed,
    )
    distributed.barrier()
    return results


def _stopped(job: Job, step: int, signal_number: int) -> Stopped:
    how = "The same command" if job.config.resume else "The same command without --noresume"
    return Stopped(
        f"Stopped at step {step:,} of {job.steps:,}; everything is saved in {job.workdir}. {how} goes on from there:\n"
        f"  {provenance.again()}",
        signal_number,
    )


def _evaluate(job: Job, state: TrainState, suite: Sequence[Attack]) -> dict[str, Outcome]:
    tested = jobs.tested(job)
    total = len(tested.x_test) * sum(attack.gradients() for attack in suite)
    which = "" if (step := int(state.step)) == job.steps else f", best checkpoint, step {step:,}"
    with Bar(f"attack {job.config.defense} on {tested.name}{which}", total, "gradients") as bar:
        try:
            return jobs.attack(
                job, state.params, tested, suite, progress=lambda name, gradients: bar.update(gradients, name)
            )
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            kept = f"the checkpoints are whole in {job.workdir}, and the same command attacks them again"
            lower = f"--eval_batch_size (now {job.config.eval_batch_size})"
            if named := as_device_error(error, f"in the attacks on step {step:,}", kept, lower):
                raise named from error
            raise


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
    results = {r["config"]["defense"]: r for r in _run_all(configs, suite) if r}
    if not distributed.is_main():
        return
    config = configs[-1]
    workdir = workdir_of(config)
    write_text(workdir / "results.md", reported.markdown(results))
    print(f"\n{reported.summary(results)}\n")
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
    if known := data.KNOWN.get(config.data):
        shape, num_classes = known.image_shape, known.num_classes
    else:
        dataset = data.load(config.data, config.data_dir or None)
        shape, num_classes = dataset.image_shape, dataset.num_classes
    model = networks.create(config.model, num_classes, shape, config.precision)
    return networks.describe(model, shape)
