"""Directions and loss surfaces against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks
from e2sad_jax.evaluation import surfaces
from tests.helpers import mostly_slow

pytestmark = pytest.mark.usefixtures("all_unoptimized")


def images(n=4, shape=(5, 7, 2), seed=0):
    return jax.random.uniform(jax.random.key(seed), (n, *shape))


def dot(a, b):
    return np.asarray((a * b).reshape(len(a), -1).sum(-1))


@pytest.mark.parametrize("shape", [(5, 7, 2), (3,), (4, 4, 1)])
@pytest.mark.parametrize("seed", mostly_slow(range(3), [0]))
def test_random_direction_is_made_of_signs_and_exactly_orthogonal_for_each_image(shape, seed):
    x = images(6, shape)
    moves = jax.random.randint(jax.random.key(seed + 10), x.shape, -1, 2).astype(x.dtype)  # some pixels stay
    g1, g2 = surfaces.directions(x, x + 0.2 * moves, jax.random.key(seed))
    np.testing.assert_array_equal(g1, moves)
    np.testing.assert_array_equal(dot(g1, g2), 0.0)
    assert set(np.unique(g2)) <= {-1.0, 0.0, 1.0}
    moved = np.abs(np.asarray(moves)).reshape(6, -1).sum(-1)
    np.testing.assert_array_equal(dot(g2, g2), moved // 2 * 2)
    if shape == (5, 7, 2):
        others = surfaces.directions(x, x + 0.2 * moves, jax.random.key(seed + 1))[1]
        assert all(not np.array_equal(a, b) for a, b in zip(g2, others, strict=True)), "another key, another direction"
        assert not np.array_equal(g1[0] * g2[0], g1[1] * g2[1]), "another image, other pixels"


def test_direction_towards_a_displacement():
    x, towards = images(), images(seed=1) - 0.5
    x_adv = x + 0.3 * jnp.sign(images(seed=2) - 0.5)
    g1, g2 = surfaces.directions(x, x_adv, towards=towards)
    np.testing.assert_allclose(dot(g1, g2), 0, atol=1e-4)
    np.testing.assert_allclose(dot(g2, g2), dot(g1, g1), rtol=1e-5)
    along = dot(towards, g1) / dot(g1, g1)
    rest = np.asarray(towards) - along.reshape(-1, 1, 1, 1) * np.asarray(g1)
    cosine = dot(rest, g2) / np.sqrt(dot(rest, rest) * dot(g2, g2))
    np.testing.assert_allclose(cosine, 1, atol=1e-5)


def test_degenerate_directions_are_zero_not_nan():
    x = images()
    for arguments in ({"key": jax.random.key(0)}, {"towards": x}):
        g1, g2 = surfaces.directions(x, x, **arguments)
        assert not np.any(g1)
        assert not np.any(g2)
    x_adv = x + 0.1
    _, g2 = surfaces.directions(x, x_adv, towards=0.3 * (x_adv - x))
    assert not np.any(g2), "parallel to g1"


def test_coordinates_are_those_of_the_plane():
    x = images()
    g1, g2 = surfaces.directions(x, x + 0.1, jax.random.key(3))
    t1, t2 = surfaces.coordinates(0.3 * g1 - 0.2 * g2, g1, g2)
    np.testing.assert_allclose(t1, 0.3, rtol=1e-5)
    np.testing.assert_allclose(t2, -0.2, rtol=1e-5)
    t1, t2 = surfaces.coordinates(x, 0 * g1, 0 * g2)
    assert not np.any(t1)
    assert not np.any(t2)


def test_surface_of_a_quadratic_loss():
    """|x + a g1 + b g2|^2 multiplied out."""
    x = images()
    g1, g2 = surfaces.directions(x, x + 0.1 * jnp.sign(images(seed=1) - 0.5), jax.random.key(0))
    t1, t2 = jnp.array([0.0, 0.1, 0.4]), jnp.array([0.0, 0.2])
    got = surfaces.loss_surface(lambda z: (z**2).sum(axis=(1, 2, 3)), x, g1, g2, t1, t2)
    a, b = np.asarray(t1)[:, None, None], np.asarray(t2)[None, :, None]
    expected = dot(x, x) + 2 * a * dot(x, g1) + 2 * b * dot(x, g2) + a**2 * dot(g1, g1) + b**2 * dot(g2, g2)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got.shape == (3, 2, 4)


def test_images_leave_their_range_unless_bounds_are_given():
    x = images()
    ones = jnp.ones_like(x)
    t = jnp.array([0.0, 2.0])

    def loss_fn(z):
        return z.max(axis=(1, 2, 3))

    free = surfaces.loss_surface(loss_fn, x, ones, 0 * ones, t, t)
    assert float(free.max()) > 2
    assert float(surfaces.loss_surface(loss_fn, x, ones, 0 * ones, t, t, bounds=(0.0, 1.0)).max()) == 1.0


def test_under_jit_with_an_attack():
    def loss_fn(z):
        return jnp.tanh(z.sum(axis=(1, 2, 3)) / 10)

    @jax.jit
    def compute(x, key):
        g1, g2 = surfaces.directions(x, attacks.fgsm(loss_fn, x, eps=0.3), key)
        return surfaces.loss_surface(loss_fn, x, g1, g2, jnp.linspace(0, 0.4, 3), jnp.linspace(0, 0.4, 3))

    x = images()
    surface = compute(x, jax.random.key(0))
    np.testing.assert_allclose(surface[0, 0], loss_fn(x), rtol=1e-6)
    surface = np.asarray(surface)
    assert (surface[1:, 0] > surface[0, 0]).all(), "the loss rises along FGSM's direction"
    np.testing.assert_allclose(surface[0, 1], loss_fn(x), atol=1e-5)  # this loss is flat across it


def test_what_cannot_be_is_refused():
    x = images()
    with pytest.raises(ValueError, match="needs key, a random key, or towards"):
        surfaces.directions(x, x)
    with pytest.raises(ValueError, match=r"x_adv has shape \(2, 5, 7, 2\); it must be that of x, \(4, 5, 7, 2\)"):
        surfaces.directions(x, x[:2], jax.random.key(0))
    with pytest.raises(TypeError, match="must be floating point"):
        surfaces.directions(x.astype(jnp.uint8), x)
    with pytest.raises(ValueError, match="the lower must be below"):
        surfaces.loss_surface(lambda z: z[:, 0, 0, 0], x, x, x, jnp.zeros(1), jnp.zeros(1), bounds=(1.0, 0.0))
