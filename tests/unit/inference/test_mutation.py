"""Mutation testing: Wald's test on given sequences, rates in closed form, mutated parameters."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import inference
from tests import cited

KEY = jax.random.key(1)
SETTINGS = {"a": (0.0441, 0.00441), "b": (0.1, 0.02), "c": (0.3, 0.1)}
pytestmark = pytest.mark.usefixtures("unoptimized")


@pytest.mark.parametrize("name", SETTINGS)
def test_decisions_are_walds_on_given_sequences(shared, name):
    """Where the log ratio, in float64, comes near a bound and not over it, float32 may be a step off."""
    want, (rate, margin) = cited.values(shared, "closed_forms"), SETTINGS[name]
    changes = np.unpackbits(want["sprt_changes"], axis=-1).reshape(360, -1)
    columns = jnp.asarray(changes.T, bool)
    run = jax.jit(lambda: inference.sprt(KEY, lambda k, i: columns[i], 360, rate=rate, margin=margin, limit=2000))
    decision, steps = (np.asarray(part).reshape(9, 40) for part in run())
    up, down = math.log((rate + margin) / (rate - margin)), math.log((1 - rate - margin) / (1 - rate + margin))
    count = np.cumsum(changes, 1, dtype=np.int64)
    ratio = count * up + (np.arange(1, changes.shape[1] + 1)[None] - count) * down
    near = (np.abs(np.abs(ratio) - math.log(19)) < 1e-4).any(1).reshape(9, 40)
    assert near.mean() < 0.05
    np.testing.assert_array_equal(decision[~near], want[f"sprt_{name}_decision"][~near])
    np.testing.assert_array_equal(steps[~near], want[f"sprt_{name}_steps"][~near])
    assert len(np.unique(decision)) >= 2


@pytest.mark.parametrize(("name", "least", "most"), [("a", 320, 15), ("b", 67, 8), ("c", 11, 5)])
def test_images_that_never_and_always_change_take_the_fewest_steps(name, least, most):
    rate, margin = SETTINGS[name]
    decision, steps = inference.sprt(KEY, lambda k, i: jnp.asarray([False, True]), 2, rate=rate, margin=margin)
    assert decision.tolist() == [0, 1]
    assert steps.tolist() == [least, most]
    decision, steps = inference.sprt(
        KEY, lambda k, i: jnp.asarray([False, True]), 2, rate=rate, margin=margin, limit=most
    )
    assert decision.tolist() == [-1, 1]
    assert steps.tolist() == [most, most]


def test_errors_are_as_rare_as_asked():
    """2,000 images at each of the two rates, drawn afresh."""
    rate, margin, n = 0.3, 0.1, 2000
    shares = jnp.concatenate([jnp.full(n, rate - margin), jnp.full(n, rate + margin)])
    decision, steps = inference.sprt(
        KEY, lambda key, i: jax.random.bernoulli(key, shares), 2 * n, rate=rate, margin=margin, limit=2000
    )
    assert (decision >= 0).all()
    for wrong in (decision[:n] == 1, decision[n:] == 0):
        assert 0.01 < float(wrong.mean()) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n)
    assert 10 < float(steps.mean()) < 80


def test_a_gradient_flows_through_noise():
    """1 where the noise is not clipped: attacks that average over it depend on that."""
    x = jnp.full((2, 3), 0.5)
    keys = jax.random.split(KEY, 2)
    np.testing.assert_array_equal(jax.grad(lambda z: inference.noise(keys, z, size=0.1).sum())(x), jnp.ones((2, 3)))


def test_the_share_of_changes_under_gaussian_noise_has_a_closed_form(shared):
    want, nets = cited.values(shared, "closed_forms"), cited.networks(shared)
    first, second = want["two_classes"]
    samples = 200

    def two(x):
        return nets.logits["linear"](x)[:, jnp.asarray([first, second])]

    @jax.jit
    def share(sigma):
        def noisy(keys, x):
            return x + sigma * jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)

        return inference.label_change(KEY, noisy, two, nets.x, samples=samples)

    for name, sigma in (("sigma05", 0.5), ("sigma1", 1.0)):
        got = share(jnp.float32(sigma))
        rate = want[f"two_class_rate_{name}"]
        assert (np.abs(got - rate) < 4 * np.sqrt(rate * (1 - rate) / samples) + 1 / samples).all()
        assert rate.max() > 0.05


def test_noise_is_uniform_and_inside():
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(50, 4, 4, 1)), jnp.float32)
    got = inference.noise(jax.random.split(KEY, 50), x, size=0.2)
    change = np.asarray(got - x)
    assert got.min() >= 0
    assert got.max() <= 1
    inner = np.asarray((x > 0.2) & (x < 0.8))
    assert np.abs(change).max() <= 0.2 + 1e-6
    assert abs(change[inner].std() - 0.2 / math.sqrt(3)) < 0.01
    np.testing.assert_array_equal(inference.noise(jax.random.split(KEY, 50)[:3], x[:3], size=0.2), got[:3])


def test_sequential_test_tells_images_near_a_boundary_from_others():
    def f(x):
        return jnp.stack([-x[:, 0], x[:, 0]], 1)

    x = jnp.asarray([[0.01, 0.5], [0.9, 0.5]])
    perturb = functools.partial(inference.noise, size=0.1, bounds=None)
    changed = inference.changed_by_noise(perturb, f, x)
    decision, steps = inference.sprt(KEY, changed, 2, rate=0.2, margin=0.05)
    assert decision.tolist() == [1, 0]
    assert (steps > 1).all()


def params():
    rng = np.random.default_rng(0)
    layers = {"conv": ((3, 3, 2, 400), 400), "dense": ((64, 300), 300)}
    made = {
        name: {"kernel": rng.normal(0.5, 2, shape).astype(np.float32), "bias": rng.normal(size=size).astype(np.float32)}
        for name, (shape, size) in layers.items()
    }
    return {"net": made, "scale": np.float32(3)}


@pytest.mark.parametrize("operator", inference.OPERATORS)
def test_mutation_by_each_operator(operator):
    before = params()
    same = inference.mutate(KEY, before, operator=operator, rate=0.0)
    jax.tree.map(np.testing.assert_array_equal, same, before)
    after = jax.tree.map(np.asarray, inference.mutate(KEY, before, operator=operator, rate=0.2))
    assert after["scale"] == 3
    for name, layer in before["net"].items():
        size = layer["bias"].shape[0]
        w, m = layer["kernel"].reshape(-1, size), after["net"][name]["kernel"].reshape(-1, size)
        b, c = layer["bias"], after["net"][name]["bias"]
        moved = (w != m).any(0)
        if operator == "gaussian":
            anew = m[w != m]
            assert abs((w != m).mean() - 0.2) < 0.02
            assert abs(anew.mean() - w.mean()) < 0.15
            assert abs(anew.std() / w.std() - 1) < 0.05
            np.testing.assert_array_equal(b, c)
            continue
        assert abs(moved.mean() - 0.2) < 0.08
        if operator == "invert":
            np.testing.assert_array_equal(np.where(moved[None], -w, w), m)
            np.testing.assert_array_equal(np.where(moved, -b, b), c)
        elif operator == "shuffle":
            np.testing.assert_array_equal(np.sort(w, 0), np.sort(m, 0))
            np.testing.assert_array_equal(b, c)
            orders = np.argsort(np.argsort(m[:, moved], 0), 0) - np.argsort(np.argsort(w[:, moved], 0), 0)
            assert len(np.unique(orders, axis=1).T) == moved.sum()  # each neuron in its own order
        else:
            order = np.array([np.flatnonzero(b == value)[0] for value in c])  # the biases say which went where
            assert sorted(order) == list(range(size))
            np.testing.assert_array_equal(w[:, order], m)
    if operator == "invert":
        again = inference.mutate(KEY, after, operator=operator, rate=0.2)
        jax.tree.map(np.testing.assert_array_equal, again, before)


def test_mutants_are_nearly_as_accurate_and_tell_images_near_the_boundary():
    rng = np.random.default_rng(0)
    w = {"kernel": jnp.asarray(rng.normal(size=(20, 4)), jnp.float32), "bias": jnp.zeros(4)}

    def apply(p, x):
        return (x - 0.5) @ p["kernel"] + p["bias"][None]

    x = jnp.asarray(rng.uniform(size=(200, 20)), jnp.float32)
    labels = apply(w, x).argmax(-1)
    made = inference.mutants(KEY, apply, w, x, labels, operator="gaussian", rate=0.02, count=60, least=0.9)
    assert made["kernel"].shape == (60, 20, 4)
    right = np.asarray((jax.vmap(lambda mutant: apply(mutant, x))(made).argmax(-1) == labels[None]).mean(1))
    assert right.min() >= 0.9
    assert right.min() < 1
    margin = jnp.sort(apply(w, x))[:, -1] - jnp.sort(apply(w, x))[:, -2]
    some = jnp.asarray([int(margin.argmin()), int(margin.argmax())])
    changed = inference.changed_by_mutants(apply, w, made, x[some])
    decision, _ = inference.sprt(KEY, changed, 2, rate=0.15, margin=0.1, limit=60)
    assert decision.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"^sprt: limit=61; there are 60 mutants, so pass limit=60"):
        inference.sprt(KEY, changed, 2, rate=0.15, margin=0.1, limit=61)
    with pytest.raises(ValueError, match="lower rate=1"):
        inference.mutants(KEY, apply, w, x, labels, operator="gaussian", rate=1.0, count=2)


def test_what_cannot_be_is_refused():
    def run(**changed):
        return inference.sprt(KEY, lambda k, i: jnp.asarray([True]), 1, **{"rate": 0.1, "margin": 0.05, **changed})

    for message, refused in {
        "margin=0.1": lambda: run(margin=0.1),
        "rate=0.97": lambda: run(rate=0.97),
        "alpha=0.5": lambda: run(alpha=0.5),
        "limit=0": lambda: run(limit=0),
        "operator='no'": lambda: inference.mutate(KEY, params(), operator="no", rate=0.1),
        "rate=2": lambda: inference.mutate(KEY, params(), operator="invert", rate=2),
        "no layer": lambda: inference.mutate(KEY, {"scale": 1.0}, operator="invert", rate=0.1),
    }.items():
        with pytest.raises(ValueError, match=message):
            refused()
