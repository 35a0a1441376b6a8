"""What changes in the course of training: learning rate and budgets; and resuming a run in the middle of both."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import training
from e2sad_jax.defenses import DEFENSES
from e2sad_jax.errors import ConfigError
from e2sad_jax.training import configure
from tests.helpers import count_compilations, register_loss, tiny_config

pytestmark = pytest.mark.usefixtures("little", "standard_promotion")


class Sum(nn.Module):
    """Three parameters, which are the logits."""

    @nn.compact
    def __call__(self, x):
        return self.param("w", lambda key: jnp.zeros((1, 3))) + 0 * x.sum()


@pytest.mark.parametrize("steps", [10, 11, 1])
@pytest.mark.parametrize("schedule", ["cyclic", "piecewise", "cosine"])
def test_learning_rate_is_the_closed_form(schedule, steps):
    half, three_quarters, t = max(1, steps // 2), 3 * steps // 4, np.arange(steps + 1)
    want = {
        "cyclic": np.interp(t, [0, half, max(steps, 2 * half)], [0, 0.4, 0]),
        "piecewise": np.where(t < half, 0.4, np.where(t < three_quarters, 0.04, 0.004)),
        "cosine": 0.2 * (1 + np.cos(np.pi * t / steps)),
    }[schedule]
    rate = training.learning_rate(configure(schedule=schedule, learning_rate=0.4), steps)
    if steps > 1:
        np.testing.assert_allclose([rate(i) for i in t], want, atol=1e-6)
    assert np.isfinite([float(rate(i)) for i in t]).all()


@pytest.mark.parametrize("steps", [20, 200])
def test_one_cycle_is_pytorchs(steps):
    """`OneCycleLR` with its defaults: cosines from a 25th up to the peak, and down to a 250,000th."""
    rate = training.learning_rate(configure(schedule="onecycle", learning_rate=0.4), steps)
    top = int(0.3 * steps)
    t = np.arange(steps)
    low, last = 0.4 / 25, 0.4 / 25 / 1e4

    def between(a, b, part):
        return b + (a - b) * (1 + np.cos(np.pi * part)) / 2

    want = np.where(t < top, between(low, 0.4, t / top), between(0.4, last, (t - top) / (steps - top)))
    np.testing.assert_allclose([rate(i) for i in t], want, rtol=1e-4, atol=1e-6)


def test_milestones():
    config = configure(schedule="piecewise", learning_rate=1.0, milestones="0.2,0.5,0.9")
    rate = training.learning_rate(config, 10)
    np.testing.assert_allclose([rate(i) for i in range(10)], [1, 1, *[0.1] * 3, *[0.01] * 4, 0.001], rtol=1e-6)


@pytest.mark.parametrize("warmup", [4, 0.4])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_rises_to_that_of_the_schedule(schedule, warmup):
    rate, plain = (
        training.learning_rate(configure(schedule=schedule, learning_rate=0.4, lr_warmup=w), 10) for w in (warmup, 0)
    )
    for i in range(10):
        want = min(i / 4, 1) * (plain(i) if callable(plain) else plain)
        np.testing.assert_allclose(rate(i), want, rtol=1e-6)


def test_a_warmup_is_counted_in_steps_where_several_make_an_update():
    """8 steps are 4 updates of two, as 0.2 of 40 steps are."""
    for warmup in (8, 0.2):
        rate = training.learning_rate(configure(learning_rate=0.4, lr_warmup=warmup, accumulate=2), 20)
        np.testing.assert_allclose([rate(i) for i in range(6)], [0, 0.1, 0.2, 0.3, 0.4, 0.4], rtol=1e-6)


def test_a_constant_rate_is_a_number():
    assert training.learning_rate(configure(learning_rate=0.4), 10) == 0.4


def test_updates_follow_the_schedule_over_all_steps_of_the_run(tiny, monkeypatch):
    """With constant gradients Adam moves every parameter by the learning rate: 4 epochs are 13 steps of 16."""

    def plane(logits_fn, x, y):
        return logits_fn(jnp.ones_like(x[:1])).sum(), {}

    register_loss(monkeypatch, "plane", plane)
    config = tiny_config(defense="plane", epochs=4.0, schedule="cyclic", learning_rate=0.1)
    state, seen = training.init_state(config, Sum(), tiny.image_shape, len(tiny.x_train)), []
    training.fit(
        dataclasses.replace(config, checkpoint_every=1),
        Sum(),
        tiny,
        state,
        steps=13,
        record=lambda *a: None,
        checkpoint=lambda step, state: seen.append(
            (float(np.asarray(state.params["params"]["w"])[0, 0]), counts(state))
        ),
    )
    want = np.interp(np.arange(13), [0, 6, 13], [0, 0.1, 0])
    np.testing.assert_allclose(-np.diff([0, *(value for value, _ in seen)]), want, rtol=1e-3, atol=1e-6)
    assert [count for _, count in seen] == [[i, i] for i in range(1, 14)], (
        "Adam's count and the schedule's are the step"
    )


def counts(state: training.TrainState) -> list[int]:
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return [int(leaf) for path, leaf in leaves if "count" in jax.tree_util.keystr(path)]


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("warmup", [4, 0.5])
def test_budgets_rise_linearly_and_nothing_else_does(defense, warmup):
    given = {s.name: 0.2 for s in DEFENSES[defense].settings if s.budget}
    config = configure(defense=defense, eps1=0.4, eps_warmup=warmup, steps=8, **given)
    for step in (0, 1, 3, 4, 7):
        eps, settings = training.settings_at(config, jnp.int32(step), 8)
        grown = min(step / 4, 1)
        np.testing.assert_allclose(eps, grown * 0.4, rtol=1e-6)
        for name in given:
            np.testing.assert_allclose(settings.pop(name), grown * 0.2, rtol=1e-6)
        assert settings == {name: value for name, value in config.settings.items() if name not in given}


def test_the_losses_of_a_run_have_the_budget_of_their_step(tiny, monkeypatch):
    """In one compilation."""

    def loss(logits_fn, x, y, *, eps):
        return logits_fn(x).sum(), {"eps": jnp.asarray(eps, jnp.float32)}

    register_loss(monkeypatch, "budgets", loss)
    made, seen = count_compilations(monkeypatch), []
    config = tiny_config(defense="budgets", eps_warmup=4, eps1=0.4, eps_scale=1.5, steps=8)
    training.fit(
        config,
        Sum(),
        tiny,
        training.init_state(config, Sum(), tiny.image_shape, len(tiny.x_train)),
        steps=8,
        record=lambda step, metrics, count: seen.append(float(metrics["eps"])),
        checkpoint=lambda *a: None,
    )
    np.testing.assert_allclose(seen, 0.6 * np.minimum(np.arange(8) / 4, 1), rtol=1e-6)
    assert made[0]._cache_size() == 1


def test_scaled_budgets():
    """Those of training alone, and no more than the images' range is wide."""
    config = configure(eps1=0.2, eps2=0.1, lam=2.0, eps_scale=1.5)
    eps, settings = training.settings_at(config, jnp.int32(0), 8)
    assert (eps, settings["eps2"], settings["lam"]) == (pytest.approx(0.3), pytest.approx(0.15), 2.0)
    assert config.eps1 == 0.2, "that of validation"
    assert config.digest() != config.replace(eps_scale=1.0).digest() == configure(eps1=0.2, eps2=0.1, lam=2.0).digest()
    with pytest.raises(ConfigError, match=r"--eps1=0.7 times --eps_scale=1.5: must be in \[0, 1.0\]"):
        configure(eps1=0.7, eps_scale=1.5)


def test_a_step_size_that_the_loss_chooses_stays_unset():
    """0 times anything would be a traced number, which no loss can tell from a step of that size."""
    config = configure(defense="pgd", eps_warmup=4)
    _, settings = training.settings_at(config, jnp.int32(2), 8)
    assert settings["attack_step_size"] == 0.0
    assert type(settings["attack_step_size"]) is float


def test_without_warm_up_the_settings_are_numbers_and_varied_ones_replace_them():
    config = configure(lam=2.0)
    assert training.settings_at(config, jnp.int32(2), 8) == (0.3, dict(config.settings))
    eps, settings = training.settings_at(config, jnp.int32(2), 8, {"eps1": jnp.float32(0.1), "lam": jnp.float32(3.0)})
    assert (float(eps), float(settings["lam"]), settings["eps2"]) == (pytest.approx(0.1), 3.0, 0.1)
    assert set(settings) == set(config.settings)
