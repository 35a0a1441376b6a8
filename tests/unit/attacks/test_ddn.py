"""DDN: distances of linear models, its steps by hand, no farther than DeepFool on a network, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks
from tests.unit.attacks.helpers import size
from tests.unit.attacks.test_deepfool import B, D, N, W, exact, images, linear, network, stretched

pytestmark = pytest.mark.usefixtures("unoptimized")


@pytest.mark.parametrize("classes", [2, 5])
def test_of_a_linear_model_it_finds_the_nearest_boundary(classes):
    """With logits so far apart that the cross-entropy is that of two classes."""
    x, (distance, _) = images(), exact(classes, "l2")
    logits_fn = lambda z: 30 * linear(classes)(z)  # noqa: E731
    got = jax.jit(lambda z: attacks.ddn(logits_fn, z))(x)
    assert (linear(classes)(got).argmax(1) != linear(classes)(x).argmax(1)).all()
    assert (size(got - x, "l2") >= 0.999 * distance).all()
    near = size(got - x, "l2") <= 1.02 * distance
    assert near.sum() >= (N if classes == 2 else N - 1), "it follows the class that leads, not all of them"


def by_hand(x: np.ndarray, y: np.ndarray, steps: int) -> np.ndarray:
    """Algorithm 1 of the paper without its rounding, in float64, on `linear(5)`."""
    x, d, radius = x.reshape(N, D), np.zeros((N, D)), np.ones(N)
    best, least = x.copy(), np.full(N, np.inf)
    for k in range(steps + 1):
        z = (x + d - 0.5) @ np.float64(W) + B
        size, wrong = np.linalg.norm(d, axis=1), z.argmax(1) != y
        nearer = wrong & (size < least)
        best[nearer], least[nearer] = (x + d)[nearer], size[nearer]
        p = np.exp(z - z.max(1, keepdims=True))
        g = (p / p.sum(1, keepdims=True) - np.eye(5)[y]) @ np.float64(W).T
        alpha = 0.01 + 0.99 * (1 + np.cos(np.pi * k / steps)) / 2
        radius = radius * np.where(wrong, 0.95, 1.05)
        d = d + alpha * g / np.linalg.norm(g, axis=1, keepdims=True)
        d = radius[:, None] * d / np.linalg.norm(d, axis=1, keepdims=True)
        d = np.clip(x + d, 0, 1) - x
    return best


@pytest.mark.parametrize("steps", [1, 2, 15])
def test_its_steps_are_those_of_the_paper(steps):
    x = images()
    y = np.asarray(linear(5)(x)).argmax(1)
    got = jax.jit(lambda z: attacks.ddn(linear(5), z, steps=steps))(x)
    want = by_hand(np.float64(x), y, steps)
    assert (want != np.float64(x).reshape(N, D)).any()
    np.testing.assert_allclose(np.reshape(got, (N, D)), want, rtol=0, atol=1e-5)


def test_on_a_network_it_comes_nearer_than_deepfool():
    """Of logits so far apart that the cross-entropy is not that of many classes; DeepFool knows no scale."""
    x = images()
    labels, sharp = network(x).argmax(1), lambda z: 10 * network(z)
    near, rough = (jax.jit(lambda z, a=attack: a(sharp, z, labels))(x) for attack in (attacks.ddn, attacks.deepfool))
    assert (network(near).argmax(1) != labels).all()
    assert size(near - x, "l2").mean() < size(rough - x, "l2").mean()
    assert (size(near - x, "l2") < 1.05 * size(rough - x, "l2")).all()


def test_an_image_without_a_boundary_or_of_another_class_stays():
    """However far the radius grows, beyond the largest number too."""
    x = images()
    flat = lambda z: jnp.broadcast_to(jnp.array([1.0, 0.0]), (len(z), 2))  # noqa: E731
    away = lambda z: jnp.stack([1 + jnp.square(z - 0.5).sum((1, 2, 3)), jnp.zeros(len(z))], axis=1)  # noqa: E731
    for bounds in ((0.0, 1.0), None):
        for logits_fn in (flat, away):
            np.testing.assert_array_equal(attacks.ddn(logits_fn, x, steps=100, radius=1e37, bounds=bounds), x)
    wrong = (linear(3)(x).argmax(1) + 1) % 3
    np.testing.assert_array_equal(attacks.ddn(linear(3), x, wrong), x)


def test_a_far_boundary_is_found_after_the_radius_has_grown_past_the_range():
    """One corner of the range alone fools; a radius without end would take many steps to come back from."""
    x = images()
    corner = lambda z: jnp.stack([z.sum((1, 2, 3)) - 0.5, jnp.zeros(len(z))], axis=1)  # noqa: E731
    got = attacks.ddn(corner, x, radius=1e6, steps=300)
    assert (got.sum((1, 2, 3)) < 0.5).all()
    assert (size(got - x, "l2") < size(x, "l2")).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_it_stays_in_any_range_and_dtype(dtype):
    stretched(attacks.ddn, dtype)
