"""DeepFool: exact distances of linear models, the images' own dtype and range, and when it stops."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from tests.unit.attacks.helpers import compiled_for, size

N, SHAPE = 6, (3, 4, 1)
D = int(np.prod(SHAPE))
RS = np.random.RandomState(0)
W = RS.randn(D, 5).astype(np.float32)
B = np.array([[1.2, 0.1, 0.0, -0.1, -0.2]], np.float32)  # every image well inside a class
W1, W2 = RS.randn(D, 16).astype(np.float32), RS.randn(16, 4).astype(np.float32)
pytestmark = pytest.mark.usefixtures("unoptimized")


def images(dtype: Any = jnp.float32) -> jax.Array:
    """Away from the ends of the range, which then cuts no small change."""
    return jnp.asarray(0.3 + 0.4 * np.random.RandomState(1).rand(N, *SHAPE), dtype)


def linear(classes: int) -> Callable[[jax.Array], jax.Array]:
    return lambda z: (z.reshape(z.shape[0], -1) - 0.5) @ W[:, :classes] + B[:, :classes]


def network(z: jax.Array) -> jax.Array:
    return jnp.tanh((z.astype(jnp.float32).reshape(z.shape[0], -1) - 0.5) @ W1) @ W2


def exact(classes: int, norm: str, extra: float = 0) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest boundary of `linear`, where it leads by `extra`, and the point nearest on it, in NumPy."""
    x, nearest, points = np.float64(images()).reshape(N, -1), [], []
    for row in x:
        logits = (row - 0.5) @ W[:, :classes] + B[0, :classes]
        y, best = logits.argmax(), (np.inf, row)
        for k in set(range(classes)) - {y}:
            w, gap = np.float64(W[:, k] - W[:, y]), logits[y] - logits[k] + extra
            dual = np.abs(w).sum() if norm == "linf" else np.sqrt((w**2).sum())
            step = np.sign(w) * gap / dual if norm == "linf" else w * gap / dual**2
            best = min(best, (gap / dual, row + step), key=lambda pair: pair[0])
        nearest.append(best[0])
        points.append(best[1])
    return np.array(nearest), np.array(points).reshape(N, *SHAPE)


def stretched(attack: Callable[..., jax.Array], dtype: str) -> None:
    """An attack in the range (-2, 3) and in the images' own dtype: it stays inside, near the image, and fools."""
    with compiled_for(dtype, optimized=dtype == "bfloat16"):
        low, high = -2.0, 3.0
        x = (low + 5 * images().at[:, 0, :2].set(0.005).at[:, 0, 2:].set(0.995)).astype(dtype)

        def logits_fn(z: jax.Array) -> jax.Array:
            return network((z.astype(jnp.float32) - low) / 5)

        labels = logits_fn(x).argmax(1)
        got = jax.jit(lambda z: attack(logits_fn, z, labels, bounds=(low, high)))(x)
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        assert np.float64(got).min() >= low
        assert np.float64(got).max() <= high
        assert (logits_fn(got).argmax(1) != labels).all()
        assert (size(got - x, "l2") < 0.25 * 5 * np.sqrt(D)).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("classes", "overshoot"), [(2, 0.02), (3, 0.5), (5, 0.02)])
def test_of_a_linear_model_it_is_exact(norm, classes, overshoot):
    """|f| / ||w||_q along the dual vector, times 1 + overshoot, to the nearest of all boundaries."""
    x, (distance, point) = images(), exact(classes, norm)
    got = jax.jit(lambda z: attacks.deepfool(linear(classes), z, norm=norm, overshoot=overshoot))(x)
    want = np.asarray(x) + (1 + overshoot) * (point - np.asarray(x))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    np.testing.assert_allclose(size(got - x, norm), (1 + overshoot) * distance, rtol=1e-4)
    assert (linear(classes)(got).argmax(1) != linear(classes)(x).argmax(1)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stays_in_another_range_and_fools_in_the_images_own_dtype(dtype):
    stretched(attacks.deepfool, dtype)


def test_finds_images_as_near_as_a_single_step_of_the_right_length_does():
    """The first of many l2 steps of the gradient of the margin that fools, tried to 2 %."""
    x = images()
    labels = network(x).argmax(1)
    margin = jax.jit(lambda z: losses.margin(network(z), labels))
    fgsm = jax.jit(lambda eps: attacks.fgsm(margin, x, eps=eps, norm="l2"))
    reach = np.full(N, np.inf)
    for eps in 3 * 0.98 ** np.arange(250):
        reach = np.where(margin(fgsm(eps)) > 0, eps, reach)
    assert np.isfinite(reach).all()
    deep = jax.jit(lambda z: attacks.deepfool(network, z, labels))(x)
    assert (margin(deep) > 0).all()
    assert (size(deep - x, "l2") < 1.05 * reach).all()


def test_crosses_a_boundary_that_it_starts_on():
    """Both logits equal: the linear step is zero, and so is what it overshoots by."""
    got = jax.jit(lambda x: attacks.deepfool(lambda z: z[:, :2], x))(jnp.full((2, 3), 0.5))
    assert (got[:, 1] > got[:, 0]).all()
    np.testing.assert_allclose(got, 0.5, rtol=0, atol=1e-5)


def test_stops_by_itself_and_no_later_than_it_is_told():
    """More steps than are needed change nothing; a single one is one step of the linear model."""
    x = images()
    enough, more, one = (
        jax.jit(lambda z, s=steps: attacks.deepfool(network, z, steps=s, overshoot=0.0))(x) for steps in (25, 50, 1)
    )
    np.testing.assert_array_equal(enough, more)
    assert (one != enough).any()
    calls = []

    def counted(z: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(1))
        return linear(3)(z)

    jax.jit(lambda z: attacks.deepfool(counted, z))(x).block_until_ready()
    jax.effects_barrier()
    assert 1 <= len(calls) <= 5
