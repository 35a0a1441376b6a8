"""Fixtures of the tests of runs: a linear network, and no attacks where they are not asked about."""

import pathlib

import jax
import pytest

from e2sad_jax import data, networks
from e2sad_jax.runs import opening, run, trainer
from tests.unit.runs.helpers import Linear, config_of


@pytest.fixture(scope="module", autouse=True)
def linear():
    """For all tests of a module: `digits_cnn` is linear, and JAX promotes as Optax's Adam needs it."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setitem(networks.NETWORKS, "digits_cnn", Linear)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def little_attacks(monkeypatch, tiny):
    """Whole runs on `tiny`, with two attacks afterwards and no picture."""
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    monkeypatch.setitem(run.SUITES, "mnist", run.SUITES["mnist"][:2])
    monkeypatch.setattr("e2sad_jax.reporting.plots.examples", lambda *args, **kwargs: None)


@pytest.fixture
def scores(monkeypatch) -> dict[int, float]:
    """Scores of checkpoints by step, 0 for all others, in place of an attack's."""
    scores: dict[int, float] = {}
    real = trainer.validate

    def validate(run, state, stop):
        return {"score": scores.get(int(state.step), 0.0)} if not stop() else real(run, state, stop)

    monkeypatch.setattr(trainer, "validate", validate)
    return scores


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory, linear) -> pathlib.Path:
    """The workdir of a run of 12 steps, whose best checkpoint is that of step 10; to be copied, not changed."""
    workdir = tmp_path_factory.mktemp("trained") / "w"
    scores = {5: 1.0, 10: 2.0, 12: 1.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "validate", lambda run, state, stop: {"score": scores[int(state.step)]})
        with opening.open_run(config_of(workdir), tiny) as opened:
            trainer.train(opened, lambda: 0)
    return workdir
