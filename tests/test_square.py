"""Square Attack: the paper's schedule, every query as the paper draws it, hidden gradients, and what ends it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from e2sad_jax._tracing import straight_line
from e2sad_jax.attacks.square import sides

KEY = jax.random.key(11)
N, SHAPE, EPS = 4, (7, 6, 2), 0.2
pytestmark = pytest.mark.usefixtures("unoptimized")


def images(n: int = N) -> jax.Array:
    return jnp.asarray(np.random.RandomState(1).rand(n, *SHAPE), jnp.float32)


C = np.random.RandomState(2).randn(N, *SHAPE).astype(np.float32)


def never_fooled(z: jax.Array) -> jax.Array:
    return (z * C).sum((1, 2, 3)) - 1000


@pytest.mark.parametrize("queries", [10_000, 5000, 500])
@pytest.mark.parametrize("shape", [(32, 32), (28, 28), (40, 10)])
def test_squares_shrink_by_the_papers_schedule(queries, shape):
    """The share of 0.8 is halved at 10, 50, 200, ... of 10,000 queries; the side is the whole number nearest to its root."""
    got, p, last = sides(queries, 0.8, *shape), 0.8, 0
    assert len(got) == queries - 1
    for halving in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000, 10_000):
        upto = math.floor(halving * queries / 10_000)
        want = min(max(1, round(math.sqrt(p * shape[0] * shape[1]))), *shape)
        assert set(got[last + 1 : upto]) <= {want}
        p, last = p / 2, upto
    if queries == 10_000 and shape == (32, 32):
        assert (got[0], got[10], got[11], got[51], got[5000], got[-1]) == (29, 29, 20, 14, 3, 1)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_first_query_is_vertical_stripes(bounds):
    x = images()
    low, high = bounds or (-9, 9)
    got = attacks.square(KEY, never_fooled, x, eps=EPS, queries=1, bounds=bounds)
    ends = np.stack([(np.asarray(x) - EPS).clip(low, high), (np.asarray(x) + EPS).clip(low, high)])
    near = np.abs(np.asarray(got) - ends) < 1e-6
    up = near[1].all(1)  # by image, column and channel
    assert (near[0].all(1) ^ up).all()
    assert 0.2 < up.mean() < 0.8
    assert len(np.unique(up.reshape(N, -1), axis=0)) == N
    assert (up[..., 0] != up[..., 1]).any()


def test_every_query_is_one_square_kept_if_the_margin_rises():
    """What is shown to the network, query by query, outside of a compiled loop; the last image is soon fooled."""
    seen: list[np.ndarray] = []
    margins: list[np.ndarray] = []
    queries, x = 150, images()
    need = np.array([50, 50, 50, 0.6 * EPS * np.abs(C[3]).sum()], np.float32)

    def margin(z: jax.Array) -> jax.Array:
        seen.append(np.asarray(z))
        margins.append(np.asarray(((z - x) * C).sum((1, 2, 3)) - need))
        return jnp.asarray(margins[-1])

    with straight_line():
        got = attacks.square(KEY, margin, x, eps=EPS, queries=queries)
    assert len(seen) == queries + 1
    np.testing.assert_array_equal(seen[0], x)
    size, places, kept = sides(queries, 0.8, *SHAPE[:2]), set(), 0
    for i in range(N):
        now, value, ended = seen[1][i], margins[1][i], queries
        low, high = (np.asarray(x[i]) - EPS).clip(0, 1), (np.asarray(x[i]) + EPS).clip(0, 1)
        for query in range(queries - 1):
            tried = seen[query + 2][i]
            rows, columns, _ = np.nonzero(np.abs(tried - now) > 1e-6)
            assert ((np.abs(tried - low) < 1e-6) | (np.abs(tried - high) < 1e-6)).all()
            if len(rows):
                assert np.ptp(rows) < size[query]
                assert np.ptp(columns) < size[query]
                places.add((rows[0], columns[0]))
            if value <= 0 and margins[query + 2][i] > value:
                now, value, kept = tried, margins[query + 2][i], kept + 1
                ended = query if value > 0 else ended
        np.testing.assert_array_equal(got[i], now)
        assert (ended < 0.9 * queries) == (i == 3)
    assert len(places) > 30
    assert kept > 30


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_reaches_the_worst_point_of_a_linear_margin(bounds):
    x = images()
    corner = np.asarray(x) + EPS * np.sign(C)
    corner = corner if bounds is None else corner.clip(*bounds)
    run = jax.jit(lambda k: attacks.square(k, never_fooled, x, eps=EPS, queries=2000, bounds=bounds))
    gain = np.asarray(never_fooled(run(KEY)) - never_fooled(x))
    assert (gain > 0.97 * (np.float64(C) * (corner - np.asarray(x))).sum((1, 2, 3))).all()


def test_fools_a_network_whose_gradient_is_zero_where_pgd_cannot():
    """The input is rounded to eighths before the network sees it."""
    rs, n = np.random.RandomState(5), 32
    w = rs.randn(int(np.prod(SHAPE)), 3).astype(np.float32)
    x = images(n)

    def logits(z: jax.Array) -> jax.Array:
        return (jnp.round(z * 8) / 8 - 0.5).reshape(z.shape[0], -1) @ w

    labels = logits(x).argmax(1)

    def margin(z: jax.Array) -> jax.Array:
        return losses.margin(logits(z), labels)

    def fooled(z: jax.Array) -> float:
        return float((margin(z) > 0).mean())

    assert fooled(attacks.square(KEY, margin, x, eps=0.1, queries=300)) > 0.9
    assert (
        fooled(attacks.pgd(KEY, margin, x, eps=0.1, steps=20, restarts=3, misclassified_fn=lambda z: margin(z) > 0))
        < 0.5
    )


@pytest.mark.parametrize("all_fooled", [False, True])
def test_ends_when_all_are_fooled_and_leaves_what_is_misclassified_alone(all_fooled):
    """A margin that is above 0 for images 0 and 2 as they are, for the others after some queries or never."""
    x, calls = images(), []
    first = never_fooled(x)
    need = np.array([-1, 0.3, -1, 0.3 if all_fooled else 1e9], np.float32)

    def margin(z: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(1))
        return never_fooled(z) - first - need

    got = jax.jit(lambda z: attacks.square(KEY, margin, z, eps=EPS, queries=200))(x)
    jax.effects_barrier()
    np.testing.assert_array_equal(got[::2], x[::2])
    assert (margin(got) > 0).sum() == (4 if all_fooled else 3)
    assert len(calls) <= 60 if all_fooled else len(calls) >= 201


def test_a_margin_that_is_not_a_number_is_no_success():
    x = images()
    got = attacks.square(
        KEY, lambda z: jnp.where(z[:, 0, 0, 0] > 0.5, jnp.nan, z.sum((1, 2, 3))) - 1000, x, eps=EPS, queries=30
    )
    assert np.isfinite(got).all()


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": jnp.ones((2, 4, 4, 1), int)}, TypeError, "square: images are int32"),
    ({"x": jnp.ones((2, 16))}, ValueError, r"square: images have shape \(2, 16\); .*\[N, H, W, C\]"),
    ({"eps": -1}, ValueError, "square: eps=-1"),
    ({"queries": 0}, ValueError, "square: queries=0; .*at least 1"),
    ({"p_init": 0}, ValueError, r"square: p_init=0; it must lie in \(0, 1\]"),
    ({"p_init": 1.1}, ValueError, "square: p_init=1.1"),
    ({"bounds": (1, 0)}, ValueError, "square: bounds="),
    ({"key": jax.random.split(KEY, 3)}, ValueError, r"square: key has shape \(3,\)"),
    ({"margin_fn": lambda z: z.sum()}, ValueError, r"margin_fn returned shape \(\) for 2 images"),
]


@pytest.mark.parametrize(("kwargs", "error", "message"), REFUSED)
def test_refuses(kwargs, error, message):
    run = {"key": KEY, "margin_fn": lambda z: z.sum((1, 2, 3)), "x": jnp.full((2, 4, 4, 1), 0.5), "eps": 0.1, **kwargs}
    with pytest.raises(error, match=message):
        attacks.square(**run)
