"""Fixtures of the tests of comparisons: small data, and outcomes without training."""

import pytest

from e2sad_jax import data
from e2sad_jax.comparison import evaluate_model, flops
from e2sad_jax.comparison import run as comparison
from e2sad_jax.errors import NonFiniteError
from tests.unit.reporting.helpers import PRICES


@pytest.fixture
def tiny_data(tiny, monkeypatch):
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    return tiny


@pytest.fixture
def prices(monkeypatch):
    """Prices by defense, so that nothing is compiled."""
    monkeypatch.setattr(comparison, "step_flops", lambda config, *about: PRICES[config.defense])
    monkeypatch.setattr(flops, "step_flops", lambda config, *about: PRICES[config.defense])


@pytest.fixture
def made_up(prices, monkeypatch):
    """Outcomes without training: robust accuracy by defense and seed. Returns the settings that were asked for."""
    seen = []

    def made(request, config, dataset):
        seen.append(config)
        if config.defense == "ifgsm" and config.seed:
            raise NonFiniteError("step 7: loss=nan")
        robust = PRICES[config.defense] / 40 + 0.1 * config.seed
        last = {"step": config.steps, "clean": 0.9, "after": {}, "robust": robust}
        best = {**last, "step": config.steps - 1, "robust": robust + 0.05} if config.defense == "pgd" else last
        asked = evaluate_model.question(request, dataset)
        about = {"asked": asked, "seed": config.seed, "eps": config.eps1, "images": 10, "workdir": config.workdir}
        return {**about, "last": last, "best": best, "chosen_on": "10 held-out images", "train_seconds": 1.0}

    monkeypatch.setattr(comparison, "evaluate_model", made)
    monkeypatch.setattr(comparison, "plot", lambda path, result: None)
    return seen
