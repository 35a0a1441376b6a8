"""The ball: projection, direction and random points against NumPy, and what rounding may not do; keys for each image."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks
from e2sad_jax.attacks import core
from tests.unit.attacks.helpers import KEY, promotion, size, wide

pytestmark = pytest.mark.usefixtures("unoptimized")
NORMS = ("linf", "l2")
every_norm = pytest.mark.parametrize("norm", NORMS)


def points(n: int = 6, shape: tuple[int, ...] = (4, 3, 1)) -> tuple[np.ndarray, np.ndarray]:
    """Images in [0, 1], and points at all distances from them."""
    rs = np.random.RandomState(0)
    x = rs.rand(n, *shape).astype(np.float32)
    return x, (x + np.logspace(-4, 1, n).reshape(-1, 1, 1, 1) * rs.randn(n, *shape)).astype(np.float32)


@every_norm
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 3.0), None])
def test_project_and_contains(norm, bounds):
    """By the formula: clipped to the box, or scaled onto the sphere and then clipped to the range."""
    x, z = points()
    eps = 0.3
    offset = wide(z) - wide(x)
    if norm == "linf":
        want = wide(x) + offset.clip(-eps, eps)
    else:
        length = size(offset, "l2").reshape(-1, 1, 1, 1)
        want = wide(x) + offset * np.minimum(1, eps / length)
    want = want if bounds is None else want.clip(*bounds)
    limits = core.ball(norm, jnp.asarray(x), eps, bounds)
    got = limits.project(jnp.asarray(z))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert (size(wide(got) - wide(x), norm) <= eps + (1e-6 if norm == "linf" else 0)).all()
    inside = np.abs(wide(z) - want).reshape(6, -1).max(1) < 1e-6
    np.testing.assert_array_equal(limits.contains(jnp.asarray(z)), inside)
    assert 0 < inside.sum() < 6
    assert limits.contains(got).all()


@every_norm
def test_steepest_has_norm_1_and_is_zero_without_a_gradient(norm):
    gradient = points()[1] * np.array([1, 0, 1e-30, 1e30, 1, 1], np.float32).reshape(-1, 1, 1, 1)
    gradient[4, 0, 0, 0], gradient[5, 1] = np.nan, np.inf
    limits = core.ball(norm, jnp.zeros(gradient.shape), 0.1, None)
    got = np.asarray(limits.steepest(jnp.asarray(gradient)))
    known = np.where(np.isfinite(gradient), gradient, 0).astype(np.float64)
    for i in (0, 2, 3, 4, 5):
        want = np.sign(known[i]) if norm == "linf" else known[i] / np.linalg.norm(known[i])
        np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got[1], 0)


def test_sample_is_uniform_in_the_linf_ball():
    limits = core.ball("linf", jnp.zeros((64, 100)), 0.3, None)
    offset = np.asarray(limits.sample(jax.random.split(KEY, 64), jnp.zeros((64, 100))))
    assert np.abs(offset).max() <= 1
    counts, _ = np.histogram(offset, 10, (-1, 1))
    np.testing.assert_allclose(counts, 640, atol=5 * np.sqrt(640))
    assert (np.abs(offset.mean(1)) < 5 / np.sqrt(300)).all()
    for i in range(4):
        assert len(np.unique(offset[i])) == 100
        assert all((offset[i] != offset[j]).mean() > 0.9 for j in range(i))


def test_sample_is_uniform_in_the_l2_ball():
    """The share within r is r^D, and no direction is preferred."""
    limits = core.ball("l2", jnp.zeros((4000, 3)), 2.0, None)
    offset = np.asarray(limits.sample(jax.random.split(KEY, 4000), jnp.zeros((4000, 3))))
    radius = size(offset, "l2")
    for r in (0.3, 0.5, 0.8, 0.95):
        np.testing.assert_allclose((radius < r).mean(), r**3, rtol=0, atol=5 * np.sqrt(0.25 / 4000))
    np.testing.assert_allclose(offset.mean(0), 0, atol=5 * np.sqrt(0.2 / 4000))
    np.testing.assert_allclose((offset.T @ offset) / 4000, np.eye(3) / 5, atol=0.02)


@pytest.mark.parametrize("eps", [1e-4, 0.5, 20.0])
def test_rounding_does_not_add_up_in_large_images(eps):
    """150,528 pixels, each rounded by itself, and a sum of as many squares."""
    rs, shape = np.random.RandomState(2), (2, 224, 224, 3)
    x, c = (jnp.asarray(a, jnp.float32) for a in (rs.rand(*shape), rs.randn(*shape)))
    one = attacks.fgsm(lambda z: (z * c).sum((1, 2, 3)), x, eps=eps, norm="l2", bounds=None)
    limits = core.ball("l2", x, eps, None)
    far = limits.project(limits.project(x + 3 * eps * c / 400) + eps * c / 800)
    for got in (one, far):
        moved = size(np.float64(got) - np.float64(x), "l2")
        assert (moved <= eps).all()
        assert (moved > (0.85 if eps == 1e-4 else 0.99) * eps).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_norm
def test_cast_inside_rounds_to_the_next_number_inside(norm, dtype):
    """Half of all points would leave the ball; a point in it moves by at most one number."""
    with promotion(dtype):
        x = jnp.asarray(points(40)[0], dtype)
        limits = core.ball(norm, x, 0.03, (0.0, 1.0))
        point = limits.project(core.as_float32(x) + jnp.sign(jnp.asarray(points(40)[1])))
        got = core.cast_inside(point, jnp.dtype(dtype), limits)
        assert got.dtype == dtype
        assert (size(wide(got) - wide(x), norm) <= 0.03 + 1e-6).all()
        plain = np.asarray(point.astype(dtype))
        next_to = np.maximum(np.abs(np.nextafter(plain, np.asarray(np.inf, plain.dtype)) - plain), 1e-6)
        assert (np.abs(wide(got) - wide(plain)) <= 1.001 * wide(next_to)).all()
        if norm == "linf":
            assert (size(wide(plain) - wide(x), norm) > 0.03 + 1e-6).any()


def test_images_of_one_number_have_the_same_ball_in_both_norms():
    x, up = jnp.array([0.1, 0.5, 0.95]), jnp.array([1.0, -1.0, 1.0])
    runs: dict[str, Any] = {
        "fgsm": lambda norm: attacks.fgsm(lambda z: z * up, x, eps=0.2, norm=norm),
        "pgd": lambda norm: attacks.pgd(KEY, lambda z: z * up, x, eps=0.2, steps=3, norm=norm),
        "apgd": lambda norm: attacks.apgd(KEY, lambda z: z * up, x, eps=0.2, norm=norm),
    }
    for attack in runs.values():
        for norm in NORMS:
            np.testing.assert_allclose(jax.jit(attack, static_argnums=0)(norm), [0.3, 0.3, 1.0], rtol=0, atol=1e-5)


def test_keys_for_each_image():
    one = core.per_image_keys("pgd", KEY, 4)
    assert one.shape == (4,)
    np.testing.assert_array_equal(jax.random.key_data(core.per_image_keys("pgd", KEY, 2)), jax.random.key_data(one[:2]))
    assert len(np.unique(jax.random.key_data(one), axis=0)) == 4
    assert core.per_image_keys("pgd", one, 4) is one
    raw = core.per_image_keys("pgd", jax.random.PRNGKey(7), 4)
    np.testing.assert_array_equal(jax.random.key_data(raw), jax.random.key_data(one))
    for wrong in (jax.random.split(KEY, 3), jax.random.split(KEY, (2, 2)), jax.random.split(jax.random.PRNGKey(0), 3)):
        with pytest.raises(ValueError, match=r"pgd: key has shape .*one key, or one for each of the 4 images"):
            core.per_image_keys("pgd", wrong, 4)
