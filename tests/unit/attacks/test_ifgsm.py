"""IFGSM and MI-FGSM: their iterates by hand in NumPy, closed forms, and steps that bfloat16 would lose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks
from tests.unit.attacks.helpers import SHAPE, D, N, images, promotion, wide

pytestmark = pytest.mark.usefixtures("unoptimized")
W = np.random.RandomState(0).randn(D, 16) * 0.3


def smooth(z: jax.Array) -> jax.Array:
    """So that rounding turns no sign."""
    return jnp.sin(z.reshape(z.shape[0], -1) @ W.astype(np.float32)).sum(1)


def gradient(z: np.ndarray) -> np.ndarray:
    return (np.cos(z.reshape(len(z), -1) @ W) @ W.T).reshape(z.shape)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize(("steps", "step_size"), [(1, None), (5, None), (2, 0.17), (5, 0.17)])
def test_iterates_by_hand(steps, step_size, bounds):
    eps = 0.2
    z = clean = wide(images())
    low, high = bounds or (-np.inf, np.inf)
    for _ in range(steps):
        z = z + (step_size or eps / steps) * np.sign(gradient(z))
        z = z.clip(clean - eps, clean + eps).clip(low, high)
    settings = {"eps": eps, "steps": steps, "step_size": step_size, "bounds": bounds}
    got = jax.jit(lambda x: attacks.ifgsm(smooth, x, **settings))(images())
    np.testing.assert_allclose(got, z, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("step_size", "where"), [(None, 0.5), (0.625 * 0.2, 0.0), (0.2, 0.0)])
def test_default_step_and_a_gradient_that_turns(step_size, where):
    """Towards a peak at 0.55 eps in steps of eps / 4: .25, .5, .75, .5 eps; longer steps jump over it and back."""
    eps, x = 0.2, jnp.full((2, 3), 0.5)
    got = attacks.ifgsm(lambda z: -((z - 0.5 - 0.55 * eps) ** 2).sum(1), x, eps=eps, steps=4, step_size=step_size)
    np.testing.assert_allclose(got, 0.5 + where * eps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), None])
@pytest.mark.parametrize("attack", ["ifgsm", "mi_fgsm"])
def test_a_linear_loss_ends_in_the_corner(attack, bounds):
    """With steps beyond eps in all, so a projection around the previous iterate would leave the ball."""
    c = np.random.RandomState(2).randn(N, *SHAPE).astype(np.float32)
    want = wide(images()) + 0.25 * np.sign(c)
    run = getattr(attacks, attack)
    for step_size in (None, 0.3):
        settings = {"eps": 0.25, "steps": 4, "step_size": step_size, "bounds": bounds}
        got = jax.jit(lambda x, s=settings: run(lambda z: (z * c).sum((1, 2, 3)), x, **s))(images())
        np.testing.assert_allclose(got, want if bounds is None else want.clip(*bounds), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [100, 300])
def test_steps_below_bfloat16_rounding_still_move(steps):
    """0.3 / 300 near 1 is under half a unit in the last place (1/256): each step alone would be rounded away."""
    with promotion("bfloat16"):
        x = jnp.full((2, 3), 0.99609375, jnp.bfloat16)

        def descend(z: jax.Array) -> jax.Array:
            return -z.astype(jnp.float32).sum(1)

        assert (x - jnp.asarray(0.3 / 300, jnp.bfloat16) == x).all()
        for got in (
            attacks.ifgsm(descend, x, eps=0.3, steps=steps),
            attacks.pgd(jax.random.key(0), descend, x, eps=0.3, steps=steps, step_size=0.3 / steps, random_start=False),
        ):
            np.testing.assert_allclose(wide(got), 0.99609375 - 0.3, rtol=0, atol=2.0**-8)


@pytest.mark.parametrize("attack", ["ifgsm", "mi_fgsm"])
def test_a_pixel_without_a_gradient_stays(attack):
    mask = (np.arange(D).reshape(1, *SHAPE) % 2).astype(np.float32)
    x = images()
    got = getattr(attacks, attack)(lambda z: smooth(z * mask), x, eps=0.1, steps=2, bounds=None)
    np.testing.assert_array_equal(got[:, mask[0] == 0], x[:, mask[0] == 0])
    assert (got[:, mask[0] == 1] != x[:, mask[0] == 1]).mean() > 0.8


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_mi_fgsm_by_hand(decay):
    """Dong et al., Algorithm 1, dividing by the l1 norm, in NumPy."""
    peak, eps, steps = np.random.RandomState(8).rand(N, 5), 0.3, 6
    x = np.full((N, 5), 0.5)
    z, g = x.copy(), np.zeros_like(x)
    for _ in range(steps):
        slope = -4 * (z - peak) ** 3
        g = decay * g + slope / np.abs(slope).sum(1, keepdims=True)
        z = (z + eps / steps * np.sign(g)).clip(x - eps, x + eps).clip(0, 1)

    def loss(u: jax.Array) -> jax.Array:
        return -((u - peak.astype(np.float32)) ** 4).sum(1)

    start = jnp.asarray(x, jnp.float32)
    got = jax.jit(lambda u: attacks.mi_fgsm(loss, u, eps=eps, steps=steps, decay=decay))(start)
    np.testing.assert_allclose(got, z, rtol=0, atol=1e-6)
    if decay == 0:
        plain = jax.jit(lambda u: attacks.ifgsm(loss, u, eps=eps, steps=steps))(start)
        np.testing.assert_array_equal(got, plain)
