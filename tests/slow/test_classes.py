"""Two classes and a thousand through every attack and defense."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, evaluation, losses
from tests.unit.attacks.helpers import FAST, FASTER
from tests.unit.defenses import toy

N, SHAPE = 8, (4, 4, 1)
EPS = {
    2: {"linf": 0.03, "l2": 0.1},
    1000: {"linf": 0.005, "l2": 0.015},
}  # between the distances of the images
KEY = jax.random.key(0)
REGISTERED = [(name, norm) for name in attacks.ATTACKS for norm in attacks.ATTACKS[name].norms if norm != "l0"]
COUNTING = [name for name, method in attacks.ATTACKS.items() if "l0" in method.norms]


@pytest.fixture(autouse=True)
def _unoptimized(unoptimized):
    """Few runs of many programs."""


@functools.cache
def model(k):
    """A linear model of `k` classes, images and what it says of them."""
    rs = np.random.RandomState(k)
    w = rs.randn(16, k)
    w, x = jnp.asarray(w - w.mean(0), jnp.float32), jnp.asarray(0.5 + 0.1 * rs.randn(N, *SHAPE), jnp.float32)
    return w, x, (x.reshape(N, -1) @ w).argmax(-1)


def margin(w, x, y):
    """By how much the best wrong class leads, in float64."""
    logits = np.float64(x).reshape(N, -1) @ np.float64(w)
    own = np.take_along_axis(logits, np.asarray(y)[:, None], 1)[:, 0]
    np.put_along_axis(logits, np.asarray(y)[:, None], -np.inf, 1)
    return logits.max(1) - own


@pytest.mark.parametrize("k", [2, 1000])
@pytest.mark.parametrize(("name", "norm"), REGISTERED)
def test_an_attack(name, norm, k):
    """The ball is kept and the margin raised; an image falls where a hyperplane is nearer than the budget, and no other."""
    (w, x, y), eps = model(k), EPS[k][norm]
    method, settings = attacks.ATTACKS[name], dict(FAST.get(name, {}))
    settings |= (
        {"steps": 200} if name in ("carlini_wagner", "square", "ddn") else {"steps": 20} if name != "fgsm" else {}
    )

    def attack(w, x, y):
        def logits_fn(z):
            return z.reshape(len(z), -1) @ w

        return method.run(logits_fn, x, y, key=KEY, eps=eps, norm=norm, bounds=(0.0, 1.0), **settings)

    got = jax.jit(attack)(w, x, y)
    change = np.float64(got - x).reshape(N, -1)
    size = np.abs(change).max(1) if norm == "linf" else np.sqrt((change**2).sum(1))
    assert (size <= eps + 1e-6).all()
    logits, normals = (np.float64(v) for v in (x.reshape(N, -1) @ w, w))
    normals = normals[:, None, :] - normals[:, np.asarray(y)][:, :, None]  # [D, N, K], to each other class
    lengths = np.abs(normals).sum(0) if norm == "linf" else np.sqrt((normals**2).sum(0))
    gaps = np.take_along_axis(logits, np.asarray(y)[:, None], 1) - logits
    least = np.where(lengths > 0, gaps / np.where(lengths > 0, lengths, 1), np.inf).min(1)
    fooled = margin(w, got, y) > 0
    assert not fooled[least > eps].any()
    if method.family == "minimum-norm":
        assert (fooled | (size == 0)).all()
    else:
        assert (margin(w, got, y) > margin(w, x, y)).all()
    slack = {"square": 2.0, "carlini_wagner": 1.2, "deepfool": 1.05, "ddn": 1.05, "fab": 1.01}.get(name, 1.001)
    if k == 2 or name in ("fab", "deepfool"):  # one hyperplane, or all are looked at
        assert fooled[slack * least < eps].all()
        assert 0 < (slack * least < eps).sum() < N
    assert fooled.any()


@pytest.mark.parametrize("k", [2, 1000])
@pytest.mark.parametrize("name", COUNTING)
def test_an_attack_on_few_pixels(name, k):
    """No more pixels change than the budget says, and half of them are enough for some image."""
    w, x, y = model(k)
    method = attacks.ATTACKS[name]
    method = dataclasses.replace(method, function=FASTER.get(name, method.function))

    def attack(w, x, y):
        def logits_fn(z):
            return z.reshape(len(z), -1) @ w

        settings = {"steps": 30} if name == "few_pixels" else {}
        return method.run(logits_fn, x, y, key=KEY, eps=8, norm="l0", bounds=(0.0, 1.0), **settings)

    got = np.asarray(jax.jit(attack)(w, x, y))
    changed = (got != np.asarray(x)).reshape(N, -1).sum(1)
    fooled = margin(w, got, y) > 0
    assert fooled.any()
    assert (changed <= 8).all()
    assert method.family != "minimum-norm" or (fooled | (changed == 0)).all()


@pytest.mark.parametrize("k", [2, 1000])
@pytest.mark.parametrize("name", toy.VARIANTS)
def test_a_defense(name, k):
    """A finite loss with a gradient that descends: a small step along it lowers the loss."""
    x, _ = toy.batch()
    rs = np.random.RandomState(0)
    w = {**toy.draw(), "w2": jnp.asarray(0.5 * rs.randn(toy.HIDDEN, k), jnp.float32)}
    y = losses.soft_labels(jnp.arange(toy.N) * (k - 1) // (toy.N - 1), k, 0)
    teacher = {**toy.draw(9), "w2": w["w2"][::-1]}
    own = {"teacher_fn": toy.net(teacher)} if name == "distillation" else {}
    both = jax.jit(jax.value_and_grad(lambda w: toy.VARIANTS[name](toy.net(w), x, y, **own)[0]))
    loss, gradient = both(w)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    squares = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient))
    assert squares > 0
    if name == "strong_adversary alpha":
        return  # after a step another one of many classes may be the nearest
    lower, _ = both(jax.tree.map(lambda a, b: a - 1e-4 / squares**0.5 * b, w, gradient))
    assert lower < loss


@pytest.mark.parametrize("k", [2, 1000])
def test_a_suite(k):
    """Every attack by name through the evaluator; the targeted loss at a thousand classes, the margin at two."""
    w, x, y = model(k)
    stages = []
    for name, norm in REGISTERED:
        if norm == "linf":
            method = attacks.ATTACKS[name]
            steps = 5 if method.counts else 0
            loss = "targeted_dlr" if k > 2 and method.family == "gradient" else "margin"
            stages.append(evaluation.Attack(name, name, steps=steps, loss=loss, targets=2))

    def apply(w, z):
        return z.reshape(len(z), -1) @ w

    result = evaluation.auto(
        apply, w, np.asarray(x), np.asarray(y), eps=EPS[k]["linf"], stages=stages, keep=True, batch_size=N
    )
    assert result.accuracy["clean"] == 1
    np.testing.assert_array_equal(np.asarray(apply(w, result.adversarial)).argmax(-1) == np.asarray(y), result.robust)
    assert not result.robust.all()
