"""A complete run, for the training commands: data, training with checkpoints, evaluation, results."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import data, distributed, networks
from e2sad_jax._io import write_text
from e2sad_jax.errors import ConfigError, NonFiniteError, Stopped, as_device_error
from e2sad_jax.evaluation import SUITES, Attack, Outcomes
from e2sad_jax.reporting import plots, provenance
from e2sad_jax.reporting import results as reported
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs.folder import describe_dataset, ensure_exists, workdir_of
from e2sad_jax.runs.opening import Run, open_runs
from e2sad_jax.runs.signals import stopping
from e2sad_jax.runs.trainer import train
from e2sad_jax.training import TrainState
from e2sad_jax.training.config import Config


def train_and_report(config: Config, suite: str) -> dict[str, Any]:
    """Trains, evaluates and reports one model in its workdir; resumes from the last checkpoint there.

    Args:
      config: the settings.
      suite: attacks to evaluate with, a key of `evaluation.SUITES`.

    Returns:
      What `results.json` holds; empty in all processes but the first.

    Raises:
      DataError, ConfigError, WorkdirError: before anything is trained.
      NonFiniteError: if training diverged; the last good checkpoint stays.
      Stopped: after Ctrl-C or SIGTERM and a checkpoint.
    """
    return train_with_baseline([config], suite).get(config.defense, {})


def train_with_baseline(configs: Sequence[Config], suite: str) -> dict[str, dict[str, Any]]:
    """Trains, evaluates and reports several models on the same data; each `results.md` also shows the earlier ones.

    Args:
      configs: settings of the runs, of different defenses and in workdirs of their own.
      suite: as of `train_and_report`.

    Returns:
      What each run's `results.json` holds, by defense; empty in all processes but the first.

    Raises:
      As `train_and_report`; before anything is trained if one of the runs is refused.
    """
    if suite not in SUITES:
        raise ConfigError(f"suite={suite!r}: must be one of {', '.join(SUITES)}")
    for what, values in {
        "defense": [config.defense for config in configs],
        "workdir": [str(workdir_of(config)) for config in configs],
    }.items():
        if len(set(values)) < len(values):
            raise ConfigError(f"--{what}={values[-1]}: is the baseline's too; each run must have another one")
    provenance.commit()  # of the code that runs, not of what a checkout may hold when the run ends
    dataset = data.load(configs[0].data, configs[0].data_dir or None)
    results: dict[str, dict[str, Any]] = {}
    with open_runs(configs, dataset) as runs:
        attacks = _suite(configs, suite)
        for run in runs:
            with stopping() as stop:
                state, seconds = train(run, stop)
                if number := distributed.max_over_processes(stop()):
                    raise _stopped(run, int(state.step), number)
            if result := _report(run, state, seconds, attacks, results):
                results[run.config.defense] = result
    return results


def _suite(configs: Sequence[Config], suite: str) -> tuple[Attack, ...]:
    """The attacks of a suite; where a run was trained in the l2 ball, that ball's, at its budget."""
    for config in configs:
        if config.norm == "l2":
            eps, ball = config.eps1, f"l2, {config.eps1:.4g}"
            return (
                Attack("clean", "clean"),
                Attack(f"FGSM {ball}", "fgsm", eps, 1, norm="l2"),
                Attack(f"PGD-40 {ball}", "pgd", eps, 40, norm="l2"),
            )
    return SUITES[suite]


def _report(
    run: Run, state: TrainState, seconds: float, suite: Sequence[Attack], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Attacks the last and the best checkpoint, and writes results.json, results.md, the model card and the picture."""
    chosen = run.best()
    averaged = bool(chosen and run.checkpoints.averaged(chosen[0]))
    other = run.restore(chosen[0]) if chosen and (averaged or chosen[0] != run.steps) else None  # by all processes
    if other is not None and averaged:
        other = other.replace(params=other.average)
    if not distributed.is_main():
        distributed.barrier()  # the first evaluates
        return {}
    outcomes = _evaluate(run, state, suite)
    best = chosen and reported.Best(*chosen, _evaluate(run, other, suite, averaged) if other else outcomes, averaged)
    results = reported.build(
        run.config,
        describe_dataset(run.dataset),
        suite,
        outcomes,
        classes=len(np.unique(run.test_set().y_test)),
        steps=run.steps,
        parameters=networks.count_parameters(state.params),
        train_seconds=seconds,
        best=best,
    )
    ensure_exists(run.workdir)
    reported.write(run.workdir, results, outcomes, best, before=before)
    _draw(run, state)
    distributed.barrier()
    return results


def _draw(run: Run, state: TrainState) -> None:
    """Writes examples.png: the first test images of up to eight classes with their adversarial points."""
    config, test = run.config, run.dataset
    rows = np.array([np.flatnonzero(test.y_test == k)[0] for k in np.unique(test.y_test)])
    plots.examples(
        run.workdir / "examples.png",
        networks.apply_fn(run.model),
        distributed.local(state.params),
        np.asarray(run.transform.apply(jnp.asarray(test.x_test[rows]))),
        test.y_test[rows],
        num_classes=test.num_classes,
        title=f"{test.name}, {config.defense}, {run.steps:,} steps: predicted class (probability)",
        eps1=config.eps1,
        eps2=config.settings.get("eps2", config.eps1 / 3),  # the paper's ratio
        bounds=run.transform.bounds,
        seed=config.seed,
        **{name: config.settings[name] for name in plots.POINTS if name in config.settings},
    )


def _evaluate(run: Run, state: TrainState, suite: Sequence[Attack], averaged: bool = False) -> Outcomes:
    test_set = run.test_set()
    total = len(test_set.x_test) * sum(attack.gradients(test_set.num_classes) for attack in suite)
    which = "" if (step := int(state.step)) == run.steps else f", best checkpoint, step {step:,}"
    which += ", averaged weights" if averaged else ""
    with Bar(f"attack {run.config.defense} on {test_set.name}{which}", total, "gradients") as bar:
        try:
            return run.attack(
                state.params, test_set, suite, progress=lambda name, gradients: bar.update(gradients, name)
            )
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            kept = f"the checkpoints are intact in {run.workdir}, and the same command attacks them again"
            lower = f"--eval_batch_size (now {run.config.eval_batch_size})"
            if named := as_device_error(error, f"in the attacks on step {step:,}", kept, lower):
                raise named from error
            raise


def _stopped(run: Run, step: int, number: int) -> Stopped:
    how = "The same command" if run.config.resume else "The same command without --noresume"
    return Stopped(
        f"Stopped at step {step:,} of {run.steps:,}; everything is saved in {run.workdir}. {how} resumes from there:\n"
        f"  {provenance.again()}",
        number,
    )


def summary(results: Mapping[str, Mapping[str, Any]], config: Config) -> str:
    """The table of all results and the paths of the files of `config`'s run, for a terminal."""
    files = {
        "checkpoint": "checkpoints",
        "results": "results.json",
        "table": "results.md",
        "picture": "examples.png",
        "training curves": "metrics.jsonl",
    }
    workdir = workdir_of(config)
    lines = (f"{what + ':':16} {workdir / name}" for what, name in files.items())
    return "\n\n".join([reported.summary(results), "\n".join(lines)])


def train_seeds(by_seed: Sequence[Sequence[Config]], suite: str) -> None:
    """Trains, evaluates and reports the runs of each seed, and prints their tables, and that of all seeds.

    Args:
      by_seed: for each seed what `train_with_baseline` takes.
      suite: as of `train_and_report`.

    Raises:
      NonFiniteError: if one diverged, after the others where there are several.
      As `train_with_baseline`.
    """
    found, diverged = [], []
    for configs in by_seed:
        seed = configs[-1].seed
        if len(by_seed) > 1 and distributed.is_main():
            print(f"Seed {seed}", file=sys.stderr, flush=True)
        try:
            results = train_with_baseline(configs, suite)
        except NonFiniteError as error:
            if len(by_seed) == 1:
                raise
            if distributed.is_main():
                print(f"seed {seed}: {error}", file=sys.stderr, flush=True)
            diverged.append(str(seed))
            continue
        if results:
            print(f"\n{summary(results, configs[-1])}", flush=True)
            found.append(results)
    if len(found) > 1:
        print(f"\n{summary_of_seeds(found, by_seed[0][-1])}", flush=True)
    if diverged:
        raise NonFiniteError(f"{len(diverged)} of {len(by_seed)} seeds diverged: {', '.join(diverged)}")


def summary_of_seeds(by_seed: Sequence[Mapping[str, Mapping[str, Any]]], config: Config) -> str:
    """The table of the mean over seeds for a terminal, which it writes to `seeds.md` in the folder of the first, too.

    Args:
      by_seed: what `train_with_baseline` returned for each.
      config: the first seed's.
    """
    table, path = reported.of_seeds(by_seed), workdir_of(config) / "seeds.md"
    ensure_exists(path.parent)
    write_text(path, table.markdown())
    return f"{table.text()}\n\ntable of the seeds: {path}"


def describe(config: Config) -> str:
    """The table of the configured network's layers; known data sets are not loaded for it."""
    if known := data.KNOWN.get(config.data):
        shape, num_classes = known.image_shape, known.num_classes
    else:
        dataset = data.load(config.data, config.data_dir or None)
        shape, num_classes = dataset.image_shape, dataset.num_classes
    model = networks.create(num_classes=num_classes, image_shape=shape, **config.network())
    return networks.describe(model, shape)
