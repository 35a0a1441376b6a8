"""Square Attack: the paper's schedule, every query as the paper draws it, hidden gradients, and what ends it."""

import functools
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from e2sad_jax._compile import straight_line
from e2sad_jax.attacks.square import sides, window

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


@pytest.mark.parametrize("queries", [20_000, 5000, 500])
def test_l2_squares_shrink_by_the_query_whatever_their_number(queries):
    """As in AutoAttack's code, which calls the paper's schedule with the query's number itself; sides are odd, at least 3."""
    got = sides(queries, 0.8, 28, 28, "l2")
    assert len(got) == queries - 1
    shares = [0.8 / 2**k for k in range(10)]
    begins = (0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)
    for first, share, end in zip(begins, shares, (*begins[1:], queries), strict=True):
        nearest = max(round(math.sqrt(share * 28 * 28)), 3)
        assert set(got[first:end]) <= {nearest if nearest % 2 else nearest + 1}


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_first_query_is_vertical_stripes(bounds):
    x = images()
    low, high = bounds or (-9, 9)
    got = jax.jit(lambda z: attacks.square(KEY, never_fooled, z, eps=EPS, queries=1, bounds=bounds))(x)
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


def paper_window(side: int) -> np.ndarray:
    """Eq. 2 with the paper's indices, which start at 1, and the split beside it."""

    def part(h1: int, h2: int) -> np.ndarray:
        n, eta = h1 // 2, np.zeros((h1, h2))
        for r in range(1, h1 + 1):
            for s in range(1, h2 + 1):
                m = n - max(abs(r - h1 // 2 - 1), abs(s - h2 // 2 - 1))
                eta[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))
        return eta

    eta = np.concatenate([part(side, side // 2), -part(side, side - side // 2)], 1)
    return eta / np.linalg.norm(eta)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 9])
def test_the_l2_window_is_a_hill_beside_a_pit(side):
    np.testing.assert_allclose(window(side), paper_window(side), rtol=1e-12)


def moves(change: np.ndarray, side: int, eps: float) -> Iterator[np.ndarray]:
    """All that the paper's Algorithm 3 may make of the `change` of an image, for two channels."""
    spots = list(itertools.product(range(SHAPE[0] - side + 1), range(SHAPE[1] - side + 1)))
    for (r1, s1), (r2, s2), lying in itertools.product(spots, spots, (False, True)):
        w1, w2 = np.zeros(SHAPE[:2], bool), np.zeros(SHAPE[:2], bool)
        w1[r1 : r1 + side, s1 : s1 + side] = w2[r2 : r2 + side, s2 : s2 + side] = True
        unused = max(eps**2 - (change**2).sum(), 0)
        eta = (paper_window(side).T if lying else paper_window(side)).ravel()
        for signs in itertools.product((-1, 1), repeat=SHAPE[2]):
            new = change.copy()
            for channel, sign in enumerate(signs):
                here = change[w1, channel]
                towards = sign * eta + here / max(np.linalg.norm(here), 1e-12)
                available = np.sqrt((change[w1 | w2, channel] ** 2).sum() + unused / SHAPE[2])
                new[w2, channel] = 0
                new[w1, channel] = towards / np.linalg.norm(towards) * available
            yield new


@pytest.mark.slow
def test_every_l2_query_moves_length_between_two_squares():
    """Query by query, as the paper's algorithm in NumPy could have drawn it; kept if the margin rises."""
    seen: list[np.ndarray] = []
    margins: list[np.ndarray] = []
    queries, x, eps = 8, images(2), 0.5

    def margin(z: jax.Array) -> jax.Array:
        seen.append(np.float64(z) - np.float64(x))
        margins.append((seen[-1] * C[:2]).sum((1, 2, 3)) - 1000)
        return jnp.asarray(margins[-1], jnp.float32)

    with straight_line():
        got = attacks.square(KEY, margin, x, eps=eps, queries=queries, p_init=0.2, norm="l2", bounds=None)
    size, kept = sides(queries, 0.2, *SHAPE[:2], "l2"), 0
    assert set(size) == {3}
    for i in range(2):
        now, value = seen[1][i], margins[1][i]
        for query in range(queries - 1):
            tried = seen[query + 2][i]
            np.testing.assert_allclose(np.linalg.norm(tried), eps, rtol=1e-5)
            assert any(np.abs(tried - move).max() < 1e-5 for move in moves(now, size[query], eps))
            if margins[query + 2][i] > value:
                now, value, kept = tried, margins[query + 2][i], kept + 1
        np.testing.assert_allclose(np.float64(got[i]) - np.float64(x[i]), now, atol=1e-7)
    assert kept > 1


@pytest.mark.parametrize("bounds", [(0.0, 1.0), pytest.param(None, marks=pytest.mark.slow)])
def test_climbs_a_linear_margin_in_the_l2_ball(bounds):
    """The longer the farther, to more than half of what the best change, eps C / ||C||, gains without the range."""
    x, eps = images(), 0.5
    gains = []
    for queries in (1, 100, 1500) if bounds is None else (1, 1500):
        run = jax.jit(
            lambda k, q=queries: attacks.square(k, never_fooled, x, eps=eps, queries=q, norm="l2", bounds=bounds)
        )
        change = np.float64(run(KEY)) - np.float64(x)
        assert (np.sqrt((change**2).sum((1, 2, 3))) <= eps).all()
        gains.append((change * C).sum((1, 2, 3)) / (eps * np.sqrt((C**2).sum((1, 2, 3)))))
    assert (gains[1] > np.maximum(gains[0], 0)).all(), "after the first query only what raises the margin is kept"
    assert (np.diff(np.mean(gains, 1)) > 0.02).all()
    assert (gains[-1] > 0.5).all()


def test_the_first_l2_query_is_a_grid_of_squares():
    """Of 2 x 2 pixels in an image of 11 x 10; each is the window of Eq. 2, up or down, and all have one height."""
    x = jnp.full((3, 11, 10, 2), 0.5)
    seen: list[np.ndarray] = []

    def margin(z: jax.Array) -> jax.Array:
        seen.append(np.float64(z) - 0.5)
        return -jnp.ones(3)

    with straight_line():
        attacks.square(KEY, margin, x, eps=0.5, queries=1, norm="l2")
    change = seen[1]
    np.testing.assert_allclose(np.sqrt((change**2).sum((1, 2, 3))), 0.5, rtol=1e-5)
    blocks = change[:, :10].reshape(3, 5, 2, 5, 2, 2).transpose(0, 1, 3, 5, 2, 4) / (0.5 / np.sqrt(50))
    up = (np.abs(blocks - paper_window(2)) < 1e-4).all((-1, -2))
    down = (np.abs(blocks + paper_window(2)) < 1e-4).all((-1, -2))
    assert (up ^ down).all()
    assert 0.3 < up.mean() < 0.7
    assert (up[..., 0] != up[..., 1]).any()


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

    pgd = functools.partial(attacks.pgd, steps=20, restarts=3, misclassified_fn=lambda z: margin(z) > 0)
    attacked = [
        jax.jit(lambda z, a=attack: a(KEY, margin, z, eps=0.1))(x)
        for attack in (functools.partial(attacks.square, queries=300), pgd)
    ]
    assert fooled(attacked[0]) > 0.9
    assert fooled(attacked[1]) < 0.5


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

    def margin(z: jax.Array) -> jax.Array:
        return jnp.where(z[:, 0, 0, 0] > 0.5, jnp.nan, z.sum((1, 2, 3))) - 1000

    got = jax.jit(lambda z: attacks.square(KEY, margin, z, eps=EPS, queries=30))(x)
    assert np.isfinite(got).all()
