"""The second step of e2SAD: what each objective differentiates, and where the second point may lie."""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from e2sad_jax.attacks import core
from tests.unit.attacks.helpers import KEY, SHAPE, D, K, N, images, promotion, wide

RS = np.random.RandomState(0)
W1, W2 = 0.5 * RS.randn(D, 16), 0.5 * RS.randn(16, K)
pytestmark = pytest.mark.usefixtures("unoptimized")


def net(z: jax.Array) -> jax.Array:
    """Smooth, so that rounding turns no sign."""
    return jnp.tanh(z.reshape(z.shape[0], -1) @ W1.astype(np.float32)) @ W2.astype(np.float32)


def softmax(z: np.ndarray) -> np.ndarray:
    exps = np.exp(np.tanh(z.reshape(len(z), -1) @ W1) @ W2)
    return exps / exps.sum(-1, keepdims=True)


def loss(z: jax.Array) -> jax.Array:
    return losses.cross_entropy(net(z), losses.soft_labels(jnp.zeros(N, int), K))


def signs_of_differences(function: Any, at: np.ndarray) -> np.ndarray:
    """Of `function`'s slope in each pixel, by finite differences in float64."""
    flat, step = np.float64(at).reshape(N, D), 1e-5
    columns = []
    for pixel in range(D):
        unit = step * np.eye(D)[pixel]
        columns.append(np.sign(function(flat + unit) - function(flat - unit)))
    return np.stack(columns, 1)


@pytest.mark.parametrize("objective", ["total", "noise", "loss"])
def test_follows_the_gradient_of_its_objective(objective):
    """total: the entropy at x_adv; noise: CE(f(x_adv), f(z)) at the noisy point; loss: the training loss."""
    x, eps = images(), 0.1
    fixed, at = softmax(wide(x)), wide(x)
    if objective == "noise":
        at = at + eps * np.asarray(jax.random.uniform(KEY, x.shape, jnp.float32, -1, 1), np.float64)
    function = {
        "total": lambda z: -(softmax(z) * np.log(softmax(z))).sum(-1),
        "noise": lambda z: -(fixed * np.log(softmax(z))).sum(-1),
        "loss": lambda z: -np.log(softmax(z)) @ np.array([0.75, 0.125, 0.125]),
    }[objective]
    settings: dict[str, Any] = {"eps": eps, "objective": objective, "loss_fn": loss, "key": KEY}
    got = jax.jit(lambda z: attacks.second_step(net, z, **settings))(x)
    np.testing.assert_array_equal(
        np.sign(wide(got) - wide(x)).reshape(N, D), signs_of_differences(function, at.astype(np.float32))
    )


def test_literal_has_only_rounding_noise_to_follow(monkeypatch):
    """Eq. 7 as it stands, where the attack takes its gradient: below 1e-6 of the total one."""
    seen = {}

    def watched(function: Any, x: jax.Array) -> jax.Array:
        seen[objective] = core.input_gradient(function, x)
        return seen[objective]

    monkeypatch.setattr(sys.modules["e2sad_jax.attacks.second_step"], "input_gradient", watched)
    for objective in ("total", "literal"):
        attacks.second_step(net, images(), eps=0.1, objective=objective)
    assert np.abs(seen["total"]).max() > 1e-2
    assert np.abs(seen["literal"]).max() < 1e-6 * np.abs(seen["total"]).max()


def test_random_draws_both_signs():
    x = jnp.full((50, 20), 0.5)
    run = functools.partial(attacks.second_step, lambda z: z, x, eps=0.1, objective="random")
    move = np.asarray(run(key=KEY)) - 0.5
    np.testing.assert_allclose(np.abs(move), 0.1, rtol=0, atol=1e-6)
    assert 0.4 < (move > 0).mean() < 0.6
    np.testing.assert_array_equal(run(key=KEY), run(key=KEY))
    assert 0.4 < (run(key=KEY) != run(key=jax.random.key(8))).mean() < 0.6


@pytest.mark.parametrize("objective", attacks.OBJECTIVES)
def test_the_second_point_lies_around_the_first_and_is_clipped_only_when_asked(objective):
    """Exactly eps away in each pixel that moves: neither in a ball around the clean image nor in the range."""
    x = images()
    settings: dict[str, Any] = {"eps": 0.3, "objective": objective, "loss_fn": loss, "key": KEY}

    def run(**bounds: Any) -> np.ndarray:
        return np.asarray(jax.jit(lambda z: attacks.second_step(net, z, **settings, **bounds))(x))

    got = run()
    np.testing.assert_allclose(np.abs(got - x)[got != x], 0.3, rtol=0, atol=1e-6)
    if objective != "literal":  # rounding noise may well be 0
        assert got.min() < -0.1
        assert got.max() > 1.1
        assert (got != x).mean() > 0.9
    np.testing.assert_allclose(run(bounds=(0.0, 1.0)), got.clip(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", attacks.OBJECTIVES)
def test_in_bfloat16_the_second_point_is_within_eps_and_the_range(objective):
    """In the images' own dtype; what rounding would lead out goes to the next number inside."""
    with promotion("bfloat16"):
        x = images(jnp.bfloat16)

        def f(z: jax.Array) -> jax.Array:
            return net(z.astype(jnp.float32))

        def own_loss(z: jax.Array) -> jax.Array:
            return loss(z.astype(jnp.float32))

        settings: dict[str, Any] = {"eps": 0.3, "objective": objective, "loss_fn": own_loss, "bounds": (0.0, 1.0)}
        got = jax.jit(lambda z: attacks.second_step(f, z, key=KEY, **settings))(x)
    assert got.dtype == jnp.bfloat16
    assert np.abs(wide(got) - wide(x)).max() <= 0.3 + 1e-6
    assert 0 <= wide(got).min() <= wide(got).max() <= 1
    if objective != "literal":  # rounding noise may well be 0
        assert (wide(got) != wide(x)).mean() > 0.8


def test_a_pixel_without_a_gradient_stays():
    mask = (np.arange(D).reshape(1, *SHAPE) % 2).astype(np.float32)
    got, x = attacks.second_step(lambda z: net(z * mask), images(), eps=0.1), images()
    np.testing.assert_array_equal(got[:, mask[0] == 0], x[:, mask[0] == 0])
    assert (got[:, mask[0] == 1] != x[:, mask[0] == 1]).mean() > 0.8
