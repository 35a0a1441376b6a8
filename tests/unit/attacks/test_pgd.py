"""PGD: iterates by hand, peaks inside and outside of the ball, random starts, and the worst of several restarts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from e2sad_jax._compile import straight_line
from e2sad_jax.attacks import core
from tests.unit.attacks.helpers import KEY, SHAPE, D, K, N, compiled_for, draw, images, logits_of, wide
from tests.unit.attacks.test_ifgsm import gradient, smooth

pytestmark = pytest.mark.usefixtures("unoptimized")


def flat(z: jax.Array) -> jax.Array:
    """No gradient: the attack stays where it started."""
    return jnp.zeros(z.shape[0])


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize(("steps", "step_size"), [(1, None), (5, None), (5, 0.17)])
def test_iterates_by_hand(steps, step_size, bounds):
    """From the clean image; 2.5 eps / steps is the default step."""
    eps = 0.2
    z = clean = wide(images())
    low, high = bounds or (-np.inf, np.inf)
    for _ in range(steps):
        z = z + (step_size or 2.5 * eps / steps) * np.sign(gradient(z))
        z = z.clip(clean - eps, clean + eps).clip(low, high)
    run = functools.partial(attacks.pgd, KEY, random_start=False)
    got = jax.jit(lambda x: run(smooth, x, eps=eps, steps=steps, step_size=step_size, bounds=bounds))(images())
    np.testing.assert_allclose(got, z, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.4, 0.6), (-5.0, 5.0), None])
def test_finds_a_peak_inside_the_ball(bounds):
    """From any start to within a step of the peak; a peak outside leaves it at the nearest face."""
    x = jnp.full((N, 5), 0.5)
    peak = np.array([[0.41, 0.55, 0.9, -3.0, 0.59]], np.float32)
    settings: dict[str, Any] = {"eps": 0.2, "steps": 60, "step_size": 0.01, "bounds": bounds}
    got = jax.jit(lambda z: attacks.pgd(KEY, lambda u: -((u - peak) ** 2).sum(1), z, **settings))(x)
    low, high = (0.3, 0.7) if bounds is None else (max(0.3, bounds[0]), min(0.7, bounds[1]))
    np.testing.assert_allclose(got, np.broadcast_to(peak.clip(low, high), x.shape), rtol=0, atol=0.01 + 1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("restarts", [1, 2])
def test_a_linear_loss_is_highest_at_the_corner_or_the_tip(norm, restarts):
    c = np.random.RandomState(2).randn(N, *SHAPE).astype(np.float32)
    way = np.sign(c) if norm == "linf" else c / np.sqrt((c**2).sum((1, 2, 3), keepdims=True))
    settings: dict[str, Any] = {"eps": 0.25, "steps": 20, "step_size": 0.5, "bounds": None}
    run = functools.partial(attacks.pgd, KEY, lambda z: (z * c).sum((1, 2, 3)), norm=norm, restarts=restarts)
    got = jax.jit(lambda x: run(x, **settings))(images())
    np.testing.assert_allclose(got, wide(images()) + 0.25 * way, rtol=0, atol=1e-6 if norm == "linf" else 2e-3)


def test_a_pixel_without_a_gradient_stays_if_it_starts_at_the_image():
    mask = (np.arange(D).reshape(1, *SHAPE) % 2).astype(np.float32)
    x = images()
    got = attacks.pgd(KEY, lambda z: smooth(z * mask), x, eps=0.1, steps=2, random_start=False, bounds=None)
    np.testing.assert_array_equal(got[:, mask[0] == 0], x[:, mask[0] == 0])
    assert (got[:, mask[0] == 1] != x[:, mask[0] == 1]).mean() > 0.8


@pytest.mark.parametrize("name", ["fgsm", "ifgsm", "pgd"])
def test_targeted_by_the_negated_loss(name):
    """The target's probability rises for every image, far above what the untargeted attack leaves it."""
    x, network = images(), draw()

    def to_target(z: jax.Array) -> jax.Array:
        return losses.cross_entropy(logits_of(network, z), losses.soft_labels(jnp.full(N, 2), K, 0))

    def run(objective: Any) -> jax.Array:
        kwargs = {} if name == "fgsm" else {"steps": 5}
        attack = functools.partial(attacks.pgd, KEY) if name == "pgd" else getattr(attacks, name)
        with compiled_for("float32"):
            return to_target(jax.jit(lambda z: attack(objective, z, eps=0.3, **kwargs))(x))

    reached = run(lambda z: -to_target(z))
    assert (reached <= to_target(x)).all()
    assert (reached < run(to_target)).all()
    assert (reached < 0.5 * to_target(x)).mean() > 0.5


# --- random starts


def starts(key: jax.Array, x: jax.Array, **kwargs: Any) -> np.ndarray:
    return wide(jax.jit(lambda k, z: attacks.pgd(k, flat, z, eps=0.3, steps=1, **kwargs))(key, x))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_starts_at_a_uniform_point_of_the_ball_cut_to_the_range(norm):
    """That `sample` draws for the first restart; another key is another start."""
    x = images()
    keys = jax.vmap(jax.random.fold_in, (0, None))(core.per_image_keys("pgd", KEY, N), 0)
    want = x + 0.3 * core.ball(norm, x, 0.3, None).sample(keys, x)
    np.testing.assert_allclose(starts(KEY, x, norm=norm, bounds=None), want, rtol=0, atol=1e-6)
    np.testing.assert_allclose(starts(KEY, x, norm=norm), np.clip(want, 0, 1), rtol=0, atol=1e-6)
    assert (starts(jax.random.key(8), x, norm=norm, bounds=None) != want).mean() > 0.99
    np.testing.assert_array_equal(starts(KEY, x, norm=norm, random_start=False), x)
    np.testing.assert_array_equal(starts(KEY, x)[:3], starts(KEY, x[:3]), "whatever follows it in the batch")


# --- restarts


def wavy(z: jax.Array) -> jax.Array:
    """Many local maxima of different height."""
    return (jnp.sin(25 * z) + z).sum((1, 2, 3))


def distance(z: jax.Array) -> jax.Array:
    """Grows with the distance from grey; no gradient, so each restart ends where it began."""
    return jax.lax.stop_gradient(jnp.abs(z - 0.5).sum((1, 2, 3)))


def sometimes_nan(z: jax.Array) -> jax.Array:
    return jnp.where(z[:, 0, 0, 0] > 0.5, jnp.nan, distance(z))


@pytest.mark.parametrize(
    ("loss", "fooled", "restarts"),
    [
        *[(wavy, fooled, 6) for fooled in (None, "low_loss", "all")],
        *[(distance, fooled, 6) for fooled in ("low_loss", "none")],
        *[(sometimes_nan, fooled, 6) for fooled in (None, "low_loss")],
        (distance, "low_loss", 2),
    ],
)
def test_keeps_the_worst_restart(loss, fooled, restarts):
    """Misclassified first, then by loss, a NaN last: against an oracle that sees all end points.

    With "low_loss" the restart of the highest loss is still classified correctly.
    """
    n, ends = 32, []
    x = jnp.full((n, *SHAPE), 0.5)
    middle = {wavy: 10.0, distance: 0.15 * D, sometimes_nan: 0.15 * D}[loss]

    def watched(z: jax.Array) -> jax.Array:
        if not isinstance(z, jax.core.Tracer):
            ends.append(np.asarray(z))
        return loss(z)

    def is_fooled(z: jax.Array) -> jax.Array:
        value = loss(z)
        return {"low_loss": value < middle, "all": value == value, "none": value != value}[fooled]

    def plain(z: jax.Array) -> jax.Array:
        return jnp.zeros(n, bool) if fooled is None or fooled == "none" else is_fooled(z)

    kwargs = {} if fooled is None else {"misclassified_fn": plain}
    budget = {"eps": 0.3, "steps": 2, "step_size": 0.01, "restarts": restarts}
    with straight_line():  # outside of a compiled loop each restart can be watched
        got = attacks.pgd(KEY, watched, x, **budget, **kwargs)
    assert len(ends) == restarts
    if loss is not wavy:  # which makes much of a rounding
        np.testing.assert_allclose(attacks.pgd(KEY, loss, x, **budget, **kwargs), got, atol=1e-6)
    values = np.nan_to_num(np.stack([np.asarray(loss(jnp.asarray(z))) for z in ends]), nan=-np.inf)
    success = np.stack([np.asarray(plain(jnp.asarray(z))) for z in ends])
    best = np.lexsort((values, success), axis=0)[-1]
    real = np.isfinite(values).any(0)  # all NaN: any of them will do
    assert real.sum() > n / 2
    np.testing.assert_array_equal(got[real], np.stack(ends)[best, np.arange(n)][real])
    assert len(np.unique(best)) == restarts
    if fooled == "low_loss" and restarts == 6:
        assert (best != values.argmax(0)).mean() > 0.3
    assert np.isfinite(got).all()


def test_with_the_margin_it_is_carlini_and_wagners_loss_in_the_box():
    """Ends in the corner that a linear margin of two classes is highest in."""
    w = np.random.RandomState(0).randn(D, 2).astype(np.float32)
    x = jnp.asarray(0.3 + 0.4 * np.random.RandomState(1).rand(6, *SHAPE), jnp.float32)

    def f(z: jax.Array) -> jax.Array:
        return (z.reshape(z.shape[0], -1) - 0.5) @ w

    labels = f(x).argmax(1)
    got = jax.jit(lambda u: attacks.pgd(KEY, lambda z: losses.margin(f(z), labels), u, eps=0.1, steps=10))(x)
    side = np.where(np.asarray(labels)[:, None] == 0, 1, -1) * np.sign(w[:, 1] - w[:, 0])
    np.testing.assert_allclose(got, np.asarray(x) + 0.1 * side.reshape(6, *SHAPE), rtol=0, atol=1e-6)
