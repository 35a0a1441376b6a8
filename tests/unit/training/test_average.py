"""Averaged weights: the recursion by hand, beside raw weights that are those of training without."""

import chex
import jax
import numpy as np
import pytest

from e2sad_jax import networks, training
from e2sad_jax.errors import ConfigError
from tests.helpers import tiny_config
from tests.unit.networks.test_batch_stats import Normed
from tests.unit.runs.helpers import Linear

pytestmark = pytest.mark.usefixtures("all_unoptimized", "standard_promotion")

STEPS, EMA = 6, 0.3  # the decay rises with the steps up to the fourth, and is EMA from there on


@pytest.fixture(autouse=True)
def smallest(monkeypatch):
    """A linear network, and one with batch normalisation, by name."""
    monkeypatch.setitem(networks.NETWORKS, "digits_cnn", Linear)
    monkeypatch.setitem(networks.NETWORKS, "preact_resnet18", lambda num_classes, **_: Normed(num_classes))


def config_of(**changes):
    usual = {"defense": "natural", "learning_rate": 1e-2, "steps": STEPS, "checkpoint_every": 1, "ema": EMA}
    return tiny_config(**{**usual, **changes})


def trained(configs, dataset, **kwargs):
    """The states of a run, or of runs that train together, before the first step and after each."""
    first = configs[0] if isinstance(configs, list) else configs
    model = networks.create(first.model, dataset.num_classes, dataset.image_shape)
    states = [training.init_state(c, model, dataset.image_shape) for c in ([configs] if configs is first else configs)]
    state = states[0] if configs is first else training.stack(states)
    seen = [jax.device_get(state.replace(key=None))]

    def checkpoint(step, state):
        seen.append(jax.device_get(state.replace(key=None)))

    given = {"steps": first.steps, "record": lambda *a: None, "checkpoint": checkpoint}
    training.fit(configs, model, dataset, state, **given, **kwargs)
    return seen


def check_recursion(seen, ema=EMA):
    """By hand: average' = d average + (1 - d) params', d = min(ema, (1 + t) / (10 + t)), from the initial weights."""
    average = jax.tree.map(np.float64, seen[0].params)
    chex.assert_trees_all_equal(seen[0].average, seen[0].params)
    for t, state in enumerate(seen[1:]):
        d = min(ema, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, new, d=d: d * a + (1 - d) * np.float64(new), average, state.params)
        chex.assert_trees_all_close(state.average, average, atol=1e-6)
    decays = [min(ema, (1 + t) / (10 + t)) for t in range(len(seen) - 1)]
    assert decays[0] == 0.1
    assert decays[-1] == ema > decays[1]
    apart = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), seen[-1].average, seen[-1].params)
    assert min(jax.tree.leaves(apart)) > 1e-3


def test_the_average_is_the_recursion_and_the_raw_weights_are_those_of_training_without(tiny):
    seen = trained(config_of(), tiny)
    assert [int(state.step) for state in seen] == list(range(STEPS + 1))
    check_recursion(seen)
    without = trained(config_of(ema=0.0), tiny)
    assert [state.average for state in without] == [None] * (STEPS + 1)
    chex.assert_trees_all_equal(seen[-1].params, without[-1].params)
    chex.assert_trees_all_equal(seen[-1].opt_state, without[-1].opt_state)


@pytest.mark.slow
def test_of_runs_that_train_together_each_has_its_own(tiny):
    seen = trained([config_of(seed=1), config_of(seed=2)], tiny)
    members = list(zip(*map(training.unstack, seen), strict=True))
    for member in members:
        check_recursion(member)
    first, second = (member[-1].average["params"]["Dense_0"]["kernel"] for member in members)
    assert np.abs(first - second).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{"steps_per_dispatch": 4}, {"steps_per_dispatch": 1}])
def test_running_averages_of_batch_normalisation_are_averaged_too(kwargs, tiny):
    seen = trained(config_of(model="preact_resnet18"), tiny, **kwargs)
    assert set(seen[-1].average) == {"params", "batch_stats"}
    check_recursion(seen)


@pytest.mark.slow
def test_on_two_devices_it_is_that_of_one(tiny):
    from e2sad_jax import distributed

    config = config_of(devices=2)
    mesh = distributed.mesh(2, config.batch_size)
    model = networks.create(config.model, tiny.num_classes, tiny.image_shape)
    state = distributed.replicate(mesh, training.init_state(config, model, tiny.image_shape))
    given = {"steps": STEPS, "record": lambda *a: None, "checkpoint": lambda *a: None, "mesh": mesh}
    state = training.fit(config, model, tiny, state, **given)
    chex.assert_trees_all_close(jax.device_get(state.average), trained(config_of(), tiny)[-1].average, atol=1e-5)


def test_without_ema_a_run_is_named_as_before_and_the_decay_is_below_1():
    assert "ema" not in config_of(ema=0.0).identity()
    assert config_of().identity()["ema"] == EMA
    assert config_of().digest() != config_of(ema=0.5).digest()
    assert training.population_key(config_of()) != training.population_key(config_of(ema=0.5))
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=rf"--ema={wrong}: must be in \[0, 0.999999\]"):
            config_of(ema=wrong)
