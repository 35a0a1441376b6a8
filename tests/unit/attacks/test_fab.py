"""FAB: its projection against linear programming, distances of linear models and of other attacks, restarts, its budget."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from e2sad_jax import attacks, losses
from e2sad_jax._compile import straight_line
from e2sad_jax.attacks.fab import project
from tests.unit.attacks.helpers import compiled_for, size

N, SHAPE, K = 6, (3, 4, 1), 4
D = int(np.prod(SHAPE))
RS = np.random.RandomState(0)
W = RS.randn(D, K).astype(np.float32)
B = np.array([[1.2, 0.1, 0.0, -0.1]], np.float32)  # every image well inside a class
W1, W2 = RS.randn(D, 16).astype(np.float32), RS.randn(16, K).astype(np.float32)
KEY = jax.random.key(3)
pytestmark = pytest.mark.usefixtures("all_unoptimized")
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def images(dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(0.3 + 0.4 * np.random.RandomState(1).rand(N, *SHAPE), dtype)


def linear(z: jax.Array) -> jax.Array:
    return (z.reshape(z.shape[0], -1) - 0.5) @ W + B


def network(z: jax.Array) -> jax.Array:
    return jnp.tanh((z.astype(jnp.float32).reshape(z.shape[0], -1) - 0.5) @ W1) @ W2


def run(f: Callable[..., jax.Array], x: jax.Array, labels: jax.Array, **kwargs: Any) -> jax.Array:
    return jax.jit(lambda z, y: attacks.fab(f, z, y, **kwargs))(x, labels)


# --- the projection


def nearest(x: np.ndarray, w: np.ndarray, value: float, norm: str, bounds: Any) -> np.ndarray | None:
    """The same by SciPy, in float64: a linear program, or in l2 the root of the dual; None where there is none."""
    low, high = (-1e6, 1e6) if bounds is None else bounds
    if norm == "linf":
        rows = np.block([[np.eye(len(x)), -np.ones((len(x), 1))], [-np.eye(len(x)), -np.ones((len(x), 1))]])
        limits = [*zip(low - x, high - x, strict=True), (0, None)]
        got = optimize.linprog([*np.zeros(len(x)), 1], rows, np.zeros(2 * len(x)), [[*w, 0]], [-value], bounds=limits)
        return got.x[:-1] if got.status == 0 else None

    def missed(t: float) -> float:
        return value + w @ ((x + t * w).clip(low, high) - x)

    if missed(-1e9) > 0 or missed(1e9) < 0:
        return None
    return (x + optimize.brentq(missed, -1e9, 1e9, xtol=1e-15) * w).clip(low, high) - x


@norms
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 2.5), None])
def test_projection_is_the_nearest_point_of_the_hyperplane_in_the_range(norm, bounds):
    """Of normals whose entries are of all sizes, and zero; pixels at both ends; and corners where there is no point."""
    rs, n, d = np.random.RandomState(0), 40, 15
    low, high = bounds or (0, 1)
    x = low + (high - low) * rs.rand(n, d)
    x[:, 0], x[:, 1] = low, high
    w = rs.randn(n, d) * 10 ** rs.uniform(-2, 1, (n, d))
    w[:, 2] = 0
    value = rs.uniform(-0.5, 0.5, n) * (high - low) * np.abs(w).sum(1)
    got = project(*(jnp.asarray(a, jnp.float32) for a in (x, w, value)), norm=norm, bounds=bounds)
    got, reached = np.float64(got), 0
    for i in range(n):
        want = nearest(x[i], w[i], value[i], norm, bounds)
        if want is None:
            corner = np.where(value[i] * w[i] < 0, high - x[i], low - x[i]) * (w[i] != 0)
            np.testing.assert_allclose(got[i], corner, rtol=0, atol=1e-6)
            continue
        reached += 1
        np.testing.assert_allclose(size(got[i][None], norm), size(want[None], norm), rtol=1e-5)
        assert abs(value[i] + w[i] @ got[i]) < 1e-5 * np.abs(w[i]).sum()
        if bounds is not None:
            assert (x[i] + got[i]).min() > low - 1e-6
            assert (x[i] + got[i]).max() < high + 1e-6
    assert reached == n if bounds is None else 10 < reached < n


@norms
def test_projection_of_nothing_is_nothing(norm):
    x = jnp.full((3, 4), 0.5)
    got = project(x, x.at[0].set(0), jnp.array([1, 0, jnp.nan]), norm=norm, bounds=(0.0, 1.0))
    np.testing.assert_array_equal(got, jnp.zeros((3, 4)))
    tiny = project(x, 1e-30 * jnp.ones_like(x), jnp.full(3, 1e-30), norm=norm, bounds=(0.0, 1.0))
    np.testing.assert_allclose(tiny, -0.25, rtol=1e-5)


# --- distances


@pytest.mark.parametrize(
    ("norm", "bounds", "targeted"),
    [
        *[("linf", (0.0, 1.0), False), ("linf", (0.3, 0.7), True)],
        *[("l2", (0.0, 1.0), True), ("l2", (0.3, 0.7), False)],
    ],
)
def test_of_a_linear_model_it_finds_the_nearest_image(norm, bounds, targeted):
    """Where the range cuts the change too; towards each class in turn, the nearest of those."""
    x = images()
    labels = linear(x).argmax(1)
    want = np.full((K, N), np.inf)
    for i, y in enumerate(np.asarray(labels)):
        logits = np.float64(linear(x[i : i + 1])[0])
        for k in set(range(K)) - {int(y)}:
            way = nearest(np.float64(x[i]).ravel(), np.float64(W[:, k] - W[:, y]), logits[k] - logits[y], norm, bounds)
            want[k, i] = np.inf if way is None else size(way[None], norm)[0]
    got = np.full((K, N), np.inf)
    attack_to = functools.partial(attacks.fab, linear, steps=30, norm=norm, bounds=bounds)
    attack = jax.jit(lambda z, y, t: attack_to(z, y, targets=t if targeted else None))
    for rank in (1, 2, 3) if targeted else (0,):
        made = attack(x, labels, (labels + rank) % K)
        fooled = losses.margin(linear(made), labels) > 0
        np.testing.assert_array_equal(made[~fooled], x[~fooled])
        got[rank] = np.where(fooled, size(made - x, norm), np.inf)
    assert np.isfinite(want.min(0)).all()
    assert (got.min(0) > 0.9999 * want.min(0)).all()
    assert (got.min(0) < 1.005 * want.min(0)).all()


@pytest.fixture(scope="module")
def found() -> dict[str, jax.Array]:
    """By norm, what FAB finds of the network in 60 steps."""
    x = images()
    return {norm: run(network, x, network(x).argmax(1), steps=60, norm=norm) for norm in ("linf", "l2")}


@norms
def test_finds_nearer_images_of_a_network_than_deepfool(norm, found):
    """And in l2 ones as near as Carlini and Wagner's, at a hundredth of its gradients."""
    x = images()
    labels = network(x).argmax(1)
    deep = jax.jit(lambda z: attacks.deepfool(network, z, labels, norm=norm))(x)
    assert (losses.margin(network(found[norm]), labels) > 0).all()
    ratio = size(found[norm] - x, norm) / size(deep - x, norm)
    assert (ratio < 0.999).all()
    assert ratio.mean() < 0.99
    if norm == "l2":
        run_cw = {"steps": 120, "binary_steps": 7, "learning_rate": 0.03, "initial_c": 0.1}
        near = jax.jit(lambda z: attacks.carlini_wagner(network, z, labels, **run_cw))(x)
        assert (size(found[norm] - x, norm) < 1.01 * size(near - x, norm)).all()
    pgd = jax.jit(
        lambda eps: attacks.pgd(KEY, lambda z: losses.margin(network(z), labels), x, eps=eps, steps=40, norm=norm)
    )
    within = np.asarray(pgd(jnp.asarray(0.9 * size(found[norm] - x, norm), jnp.float32).reshape(-1, 1, 1, 1)))
    assert (losses.margin(network(within), labels) < 0).mean() > 0.8, "PGD finds nothing much nearer"


def hidden(z: jax.Array) -> jax.Array:
    """At .5 the gradient leads to a boundary at .3; in the other coordinate there is one at .1, unseen from there."""
    beyond = jnp.maximum(z[:, 0] - 0.8, jnp.maximum(jnp.abs(z[:, 1] - 0.5) - 0.05, 0) * 20 - 1)
    return jnp.stack([jnp.zeros(len(z)), beyond], 1)


@norms
def test_what_it_finds_fools_beyond_rounding(norm, found):
    """In float64 too, and the boundary is no farther away than that asks for."""
    z = np.float64(found[norm]).reshape(N, -1)
    logits = np.tanh((z - 0.5) @ np.float64(W1)) @ np.float64(W2)
    lead = np.asarray(
        [max(np.delete(row, y)) - row[y] for row, y in zip(logits, network(images()).argmax(1), strict=True)]
    )
    lead /= np.abs(logits).max(1)
    assert (lead > 8e-6).all()
    assert (lead < 1e-3).all()


def test_restarts_find_a_nearer_boundary_than_the_one_ahead():
    x, labels = jnp.full((8, 2), 0.5), jnp.zeros(8, int)
    one = run(hidden, x, labels)
    many = run(hidden, x, labels, restarts=6, key=jax.random.split(KEY, 8), eps=0.4)
    np.testing.assert_allclose(size(one - x, "linf"), 0.3, rtol=1e-3)
    assert (size(many - x, "linf") <= size(one - x, "linf")).all()
    np.testing.assert_allclose(np.sort(size(many - x, "linf"))[:5], 0.1, rtol=1e-2)


# --- what each image keeps


@pytest.mark.parametrize(("norm", "dtype"), [("l2", "float32"), ("linf", "bfloat16")])
def test_stays_in_another_range_and_fools_in_the_images_own_dtype(norm, dtype):
    with compiled_for(dtype, optimized=dtype == "bfloat16"):
        x = (3 * images().at[:, 0, :2].set(0.0).at[:, 0, 2:].set(1.0) - 1).astype(dtype)

        def f(z: jax.Array) -> jax.Array:
            return network((z.astype(jnp.float32) + 1) / 3)

        labels = f(x).argmax(1)
        got = run(f, x, labels, steps=20, norm=norm, bounds=(-1.0, 2.0))
        assert got.dtype == dtype
        assert np.float64(got).min() >= -1
        assert np.float64(got).max() <= 2
        assert (losses.margin(f(got), labels) > 0).all()
        deep = jax.jit(lambda z: attacks.deepfool(f, z, labels, norm=norm, bounds=(-1.0, 2.0)))(x)
        assert (size(got - x, norm) < 1.02 * size(deep - x, norm)).all()


def test_restarts_belong_to_the_keys():
    x, keys, labels = jnp.full((12, 2), 0.5), jax.random.split(KEY, 12), jnp.zeros(12, int)
    attack = jax.jit(lambda k, z, y: attacks.fab(hidden, z, y, steps=20, restarts=2, key=k, eps=0.4))
    whole = attack(keys, x, labels)
    np.testing.assert_array_equal(whole, attack(keys, x, labels))
    np.testing.assert_allclose(attack(keys[::-1], x[::-1], labels), whole[::-1], rtol=0, atol=1e-5)
    assert (jnp.abs(whole - attack(keys[::-1], x, labels)) > 0.05).any()


def test_takes_one_gradient_per_step():
    """Towards a target each step takes one gradient and one look; in the end there are a few looks more."""
    x, calls = images(), []
    labels = network(x).argmax(1)

    def counted(z: jax.Array) -> jax.Array:
        calls.append(1)
        return network(z)

    with straight_line():
        jax.eval_shape(lambda z: attacks.fab(counted, z, labels, targets=(labels + 1) % K, steps=7), x)
    assert 2 * 7 <= len(calls) <= 2 * 7 + 7


# --- as an attack of a suite


@norms
def test_in_a_suite_those_within_the_budget_fall(norm):
    """Exactly them, on a linear model of three classes."""
    rs = np.random.RandomState(4)
    x, w = rs.uniform(0.3, 0.7, (40, 4, 4, 1)).astype(np.float32), rs.randn(16, 3).astype(np.float32)

    def apply(z: jax.Array) -> jax.Array:
        return (z.reshape(len(z), -1) - 0.5) @ w

    logits = np.float64(apply(jnp.asarray(x)))
    labels = logits.argmax(1)
    dual = (lambda v: np.abs(v).sum()) if norm == "linf" else np.linalg.norm
    distance = np.array(
        [
            min((logits[i, y] - logits[i, k]) / dual(w[:, y] - w[:, k]) for k in {0, 1, 2} - {y})
            for i, y in enumerate(labels)
        ]
    )
    eps = float(np.median(distance)) * 1.02
    run = functools.partial(attacks.ATTACKS["fab"].run, apply, norm=norm, eps=eps, steps=20, restarts=2)
    got = jax.jit(lambda z, y: run(z, y, key=KEY))(x, labels)
    fallen = np.asarray(apply(got)).argmax(1) != labels
    clear = np.abs(distance / eps - 1) > 0.006
    assert clear.sum() > 30
    np.testing.assert_array_equal(fallen[clear], (distance <= eps)[clear])
    assert 10 < fallen.sum() < 30
    assert (size(np.float64(got) - x, norm) <= eps + 1e-6).all()
    np.testing.assert_array_equal(got[~fallen], x[~fallen])
