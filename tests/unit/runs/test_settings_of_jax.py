"""A run is the same run under other settings of JAX: its random generator, and 64-bit numbers."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from e2sad_jax import _streams, evaluation, networks, training
from e2sad_jax.evaluation import Attack
from e2sad_jax.runs import opening, trainer
from e2sad_jax.runs.classifier import load
from tests.unit.runs.helpers import config_of

NOISE = {"defense": "e2sad", "second_step": "noise", "eps1": 0.1, "eps2": 0.05}  # draws random numbers in each step


@pytest.fixture(autouse=True)
def unjudged(monkeypatch):
    monkeypatch.setattr(trainer, "validate", lambda run, state, stop: {"score": 0.0})


def train(config, dataset):
    with opening.open_run(config, dataset) as run:
        return trainer.train(run, lambda: 0)[0]


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
@pytest.mark.parametrize("stream", [_streams.INITIALIZATION, _streams.ORDER, _streams.EVALUATION, _streams.MASKING])
def test_a_seed_gives_the_same_key_under_every_default(implementation, stream):
    expected = jax.random.fold_in(jax.random.key(7), stream)
    with jax.default_prng_impl(implementation):
        key = _streams.key(7, stream)
    assert key.dtype == expected.dtype
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(expected))


def test_a_run_under_another_generator_is_the_same_run_and_resumes_under_either(tiny, tmp_path):
    half, whole = ([config_of(tmp_path / name, steps=steps, **NOISE) for name in "ab"] for steps in (5, 12))
    train(half[0], tiny)
    with jax.default_prng_impl("rbg"):
        train(half[1], tiny)
        chex.assert_trees_all_equal(load(tmp_path / "a").params, load(tmp_path / "b").params)
        there = train(whole[0], tiny)  # from the other's checkpoint
    chex.assert_trees_all_equal(train(whole[1], tiny).params, there.params)


@pytest.mark.slow
def test_a_member_of_a_population_is_the_run_alone_under_another_generator(tiny):
    config = config_of("", steps=3, **NOISE)
    model = networks.create(config.model, tiny.num_classes, tiny.image_shape)

    def fit(configs):
        states = [training.init_state(config, model, tiny.image_shape, len(tiny.x_train)) for config in configs]
        state = states[0] if len(states) == 1 else training.stack(states)
        nothing = {"record": lambda *a: None, "checkpoint": lambda *a: None}
        return training.fit(configs[0] if len(states) == 1 else configs, model, tiny, state, steps=3, **nothing)

    both = [config.replace(seed=1), config.replace(seed=2)]
    with jax.default_prng_impl("rbg"):
        members = training.unstack(fit(both))
    chex.assert_trees_all_close(members[1].params, fit(both[1:]).params, atol=2e-6)


def test_attacks_of_an_evaluation_are_the_same_under_another_generator(trained, tiny):
    model = evaluation.of_classifier(load(trained), tiny.x_test[:10], tiny.y_test[:10])

    def made():
        apply = model.apply
        own = dataclasses.replace(model, apply=lambda params, x: apply(params, x))  # of which nothing is compiled yet
        return own.under(Attack("Square", "square", 0.1, 3))[1]

    usual = made()
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(made(), usual)


@pytest.mark.slow
def test_a_run_in_64_bits_resumes_bit_for_bit_and_is_read_without_them(tiny, tmp_path):
    usual = train(config_of(tmp_path / "usual", **NOISE), tiny)
    with jax.enable_x64(True):
        whole = train(config_of(tmp_path / "whole", **NOISE), tiny)
        train(config_of(tmp_path / "parts", steps=5, **NOISE), tiny)
        chex.assert_trees_all_equal(train(config_of(tmp_path / "parts", **NOISE), tiny).params, whole.params)
        chex.assert_trees_all_equal(load(tmp_path / "usual").params, usual.params)
        (right,) = evaluate(tmp_path / "whole", tiny)
    chex.assert_trees_all_equal(load(tmp_path / "whole").params, whole.params)
    chex.assert_trees_all_equal_dtypes(whole.params, usual.params)
    # The same random numbers; only sums round otherwise.
    chex.assert_trees_all_close(whole.params, usual.params, atol=2e-3)
    assert (evaluate(tmp_path / "whole", tiny)[0] == right).mean() > 0.9


def evaluate(workdir, dataset):
    model = evaluation.of_classifier(load(workdir), dataset.x_test, dataset.y_test)
    return [outcome.correct for outcome in model.evaluate([Attack("PGD-5", "pgd", 0.1, 5)]).values()]
