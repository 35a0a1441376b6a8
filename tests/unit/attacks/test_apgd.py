"""Auto-PGD: the paper's checkpoints, Algorithm 1 step by step in NumPy, strength, and what is returned."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from e2sad_jax._compile import straight_line
from e2sad_jax.attacks.apgd import checkpoints
from tests.helpers import mostly_slow

pytestmark = pytest.mark.usefixtures("unoptimized")

N, D, EPS = 6, 5, 0.4
KEY = jax.random.key(3)
NORM = {"linf": lambda v: np.abs(v).max(-1), "l2": lambda v: np.sqrt((v**2).sum(-1))}
every_norm = pytest.mark.parametrize("norm", NORM)
WAVES = np.random.RandomState(0).randn(D, 7) * 4


def wavy(z: jax.Array) -> jax.Array:
    """Many local maxima."""
    return jnp.sin(z @ WAVES.astype(z.dtype)).sum(1) + z.sum(1) / 4


def images(n: int = N) -> np.ndarray:
    return np.random.RandomState(1).rand(n, D)


def paper_checkpoints(steps: int) -> list[int]:
    """As the paper writes them, in floating point; rounded so that .41 * 100 is 41."""
    p = [0.0, 0.22]
    while p[-1] <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    return [math.ceil(round(q * steps, 6)) for q in p[:-1]]


def test_checkpoints_are_the_papers():
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 7, 40, 100, 1000):
        assert checkpoints(steps) == sorted(set(paper_checkpoints(steps)))


def algorithm(
    x: np.ndarray, start: np.ndarray, norm: str, steps: int, rho: float
) -> tuple[list[np.ndarray], list[str]]:
    """Algorithm 1 to the letter for one image without a range: the points in the order seen, and why it halved."""

    def f(z: np.ndarray) -> float:
        return float(np.sin(z @ WAVES).sum() + z.sum() / 4)

    def direction(z: np.ndarray) -> np.ndarray:
        gradient = WAVES @ np.cos(z @ WAVES) + 0.25
        return np.sign(gradient) if norm == "linf" else gradient / NORM["l2"](gradient)

    def project(z: np.ndarray) -> np.ndarray:
        if norm == "linf":
            return z.clip(x - EPS, x + EPS)
        return x + (z - x) * min(1, EPS / NORM["l2"](z - x))

    marks, eta, why = paper_checkpoints(steps), 2 * EPS, []
    points, seen = [start, project(start + eta * direction(start))], []
    seen += points
    best = max(points, key=f)
    etas, bests = {0: eta}, {0: f(start)}
    for k in range(1, steps):
        etas[k], bests[k] = eta, f(best)
        z = project(points[k] + eta * direction(points[k]))
        new = project(points[k] + 0.75 * (z - points[k]) + 0.25 * (points[k] - points[k - 1]))
        seen.append(new)
        if f(new) > f(best):
            best = new
        if k in marks:
            last = marks[marks.index(k) - 1]
            few = sum(f(points[i + 1]) > f(points[i]) for i in range(last, k)) < rho * (k - last)
            stuck = etas[last] == etas[k] and bests[last] == bests[k]
            why.append("few" * few + "stuck" * stuck)
            if few or stuck:
                eta, new = eta / 2, best
        points.append(new)
    return seen, why


@pytest.mark.parametrize(("norm", "rho"), mostly_slow([("linf", 0.75), ("l2", 0.75), ("linf", 0.3)], [("linf", 0.75)]))
def test_equals_algorithm_1_in_numpy(norm, rho):
    """In float64, every point that is looked at, from the same start."""
    steps, seen = 40, []

    def watch(z: jax.Array) -> jax.Array:
        seen.append(np.asarray(z))
        return jnp.zeros(N, bool)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), straight_line():
        x = jnp.asarray(images())
        got = attacks.apgd(KEY, wavy, x, eps=EPS, steps=steps, rho=rho, norm=norm, bounds=None, misclassified_fn=watch)
        assert got.dtype == jnp.float64
    assert len(seen) == steps + 1
    reasons = []
    for i in range(N):
        want, why = algorithm(images()[i], seen[0][i], norm, steps, rho)
        np.testing.assert_allclose([z[i] for z in seen], want, rtol=0, atol=1e-9)
        values = np.sin(np.array(want) @ WAVES).sum(1) + np.array(want).sum(1) / 4
        np.testing.assert_allclose(got[i], want[values.argmax()], rtol=0, atol=1e-9)
        reasons += why
    assert "" in reasons
    assert {"few"} <= set(reasons) if rho == 0.75 else {"stuck"} <= {r[-5:] for r in reasons}


@every_norm
def test_at_least_as_strong_as_pgd_of_the_same_steps(norm):
    """On the margins of a random network, in images fooled and in the mean."""
    rs, n, d = np.random.RandomState(4), 256, 20
    w1, w2 = (3 * rs.randn(d, 32) / np.sqrt(d)).astype(np.float32), rs.randn(32, 5).astype(np.float32)
    x = jnp.asarray(rs.rand(n, d), jnp.float32)

    def logits(z: jax.Array) -> jax.Array:
        return jnp.tanh((z - 0.5) @ w1) @ w2

    labels = logits(x).argmax(1)
    loss, eps = lambda z: losses.margin(logits(z), labels), 0.06 if norm == "linf" else 0.2
    run = {"eps": eps, "steps": 30, "norm": norm}
    auto, plain = (loss(jax.jit(functools.partial(a, KEY, loss, **run))(x)) for a in (attacks.apgd, attacks.pgd))
    assert 0.1 < (plain > 0).mean() < 0.9
    assert (auto > 0).sum() >= (plain > 0).sum()
    assert (auto >= plain - 1e-4).mean() > 0.95
    assert auto.mean() >= plain.mean()


@every_norm
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_finds_a_peak_inside_the_ball_and_the_face_before_one_outside(norm, bounds):
    peaks = np.array([[0.6, 0.45, 0.5, 0.55, 0.4], [0.5, 0.5, 0.9, 0.5, 0.5]], np.float32)
    run = functools.partial(attacks.apgd, KEY, lambda z: -((z - peaks) ** 2).sum(1), eps=0.3, norm=norm, bounds=bounds)
    got = jax.jit(run)(jnp.full((2, D), 0.5))
    want = peaks.copy()
    want[1, 2] = 0.8
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3)


def test_more_restarts_find_higher_peaks():
    x, run = jnp.asarray(images(32), jnp.float32), functools.partial(attacks.apgd, KEY, wavy, eps=EPS, steps=12)
    reached = [wavy(jax.jit(functools.partial(run, restarts=r))(x)) for r in (1, 4)]
    assert (reached[1] >= reached[0]).all()
    assert (reached[1] > reached[0] + 0.05).mean() > 0.3


@pytest.mark.parametrize(("fooled", "restarts"), [("none", 1), ("low_loss", 3), ("once", 1), ("nan", 3)])
def test_returns_the_worst_point_of_the_way(fooled, restarts):
    """Misclassified before any other, then the highest loss, a NaN last; the oracle sees all points."""
    seen: list[np.ndarray] = []
    x = jnp.asarray(images(), jnp.float32)

    def loss(z: jax.Array) -> jax.Array:
        return jnp.where(z[:, 0] > 0.8, jnp.nan, wavy(z)) if fooled == "nan" else wavy(z)

    def is_fooled(z: Any) -> Any:
        z = jnp.asarray(z)
        return {"none": z[:, 0] > 9, "nan": z[:, 0] > 9, "low_loss": wavy(z) < 2, "once": z[:, 0] < x[:, 0] - 0.2}[
            fooled
        ]

    def watch(z: jax.Array) -> jax.Array:
        seen.append(np.asarray(z))
        return is_fooled(z)

    run: Callable[..., jax.Array] = functools.partial(attacks.apgd, KEY, loss, x, eps=EPS, steps=9, restarts=restarts)
    with straight_line():
        got = run(misclassified_fn=watch)
    assert len(seen) == 10 * restarts
    values = np.nan_to_num([np.asarray(loss(jnp.asarray(z))) for z in seen], nan=-np.inf)
    success = np.array([np.asarray(is_fooled(z)) for z in seen])
    chosen = np.lexsort((values, success), axis=0)[-1]
    real = np.isfinite(values).any(0)
    assert real.sum() >= N / 2
    np.testing.assert_allclose(got[real], np.stack(seen)[chosen, np.arange(N)][real], rtol=0, atol=1e-6)
    assert (chosen != len(seen) - 1).any()  # not merely the last
    if fooled == "low_loss":
        assert success.any(0).all()
        assert (chosen != values.argmax(0)).any()
    if fooled == "none":
        np.testing.assert_array_equal(run(), run(misclassified_fn=is_fooled))


def test_flat_loss_stays_at_its_start_and_a_nan_everywhere_at_the_image():
    x = jnp.asarray(images(), jnp.float32)
    for norm in NORM:
        got = jax.jit(lambda z, n=norm: attacks.apgd(KEY, lambda z: jnp.zeros(N), z, eps=0.1, steps=5, norm=n))(x)
        assert (NORM[norm](np.asarray(got) - np.asarray(x)) <= 0.1 + 1e-7).all()
        assert (got != x).any(1).all()
    nowhere = functools.partial(attacks.apgd, KEY, lambda z: jnp.full(N, jnp.nan) * z[:, 0], eps=0.1, steps=5)
    np.testing.assert_array_equal(jax.jit(nowhere)(x), x)
