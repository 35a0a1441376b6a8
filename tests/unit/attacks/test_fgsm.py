"""FGSM: closed forms in both balls, and pixels without a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks
from tests.unit.attacks.helpers import SHAPE, N, images, wide

pytestmark = pytest.mark.usefixtures("unoptimized")
C = (np.random.RandomState(2).choice([-1, 1], (N, *SHAPE)) * (0.1 + np.random.RandomState(3).rand(N, *SHAPE))).astype(
    np.float32
)


def linear(z: jax.Array) -> jax.Array:
    return (z.astype(jnp.float32) * C).sum((1, 2, 3))


@pytest.mark.parametrize("eps", [0.05, 0.3])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), None])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_loss_is_highest_at_the_corner_or_the_tip(norm, bounds, eps):
    """X + eps sign(c), or x + eps c / ||c||, clipped to the range."""
    way = np.sign(C) if norm == "linf" else C / np.sqrt((np.float64(C) ** 2).sum((1, 2, 3), keepdims=True))
    want = wide(images()) + eps * way
    got = jax.jit(lambda x: attacks.fgsm(linear, x, eps=eps, norm=norm, bounds=bounds))(images())
    np.testing.assert_allclose(got, want if bounds is None else want.clip(*bounds), rtol=0, atol=1e-6)


def test_a_pixel_without_a_gradient_stays():
    """sign(0) = 0."""
    mask = (np.arange(C[0].size).reshape(1, *SHAPE) % 2).astype(np.float32)
    x = images()
    got = attacks.fgsm(lambda z: linear(z * mask), x, eps=0.1, bounds=None)
    np.testing.assert_array_equal(got[:, mask[0] == 0], x[:, mask[0] == 0])
    np.testing.assert_allclose(np.abs(got - x)[:, mask[0] == 1], 0.1, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(attacks.fgsm(lambda z: jnp.zeros(N), x, eps=0.3), x)


def test_a_gradient_of_any_size_has_a_direction():
    """Its square is 0 in float32."""
    want = attacks.fgsm(linear, images(), eps=0.3, norm="l2")
    np.testing.assert_allclose(
        attacks.fgsm(lambda z: 1e-30 * linear(z), images(), eps=0.3, norm="l2"), want, rtol=0, atol=1e-6
    )
