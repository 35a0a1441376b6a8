"""Minimum-norm attacks towards a class: success is that class, and no nearer point of it exists."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from e2sad_jax import attacks, losses
from tests.helpers import mostly_slow
from tests.unit.attacks.helpers import size

pytestmark = pytest.mark.usefixtures("all_unoptimized")

D, K, N = 6, 4, 5
RS = np.random.RandomState(3)
W = RS.randn(D, K).astype(np.float32)
X = jnp.asarray(RS.uniform(0.3, 0.7, (N, D)), jnp.float32)


def logits(z: jax.Array) -> jax.Array:
    return z.reshape(-1, D) @ W


LABELS = np.asarray(logits(X)).argmax(1)
TARGETS = jnp.asarray((LABELS + 1 + np.arange(N) % (K - 1)) % K)
ATTACKS = {
    "deepfool": (attacks.deepfool, "l2"),
    "deepfool linf": (functools.partial(attacks.deepfool, norm="linf"), "linf"),
    "carlini_wagner": (functools.partial(attacks.carlini_wagner, steps=300, binary_steps=5, initial_c=0.1), "l2"),
    "lbfgs": (functools.partial(attacks.lbfgs, initial_c=0.1, history=4), "l2"),
    "fmn": (attacks.fmn, "l2"),
    "fmn linf": (functools.partial(attacks.fmn, norm="linf"), "linf"),
    "ddn": (attacks.ddn, "l2"),
    "fab": (attacks.fab, "linf"),
    "fab l2": (functools.partial(attacks.fab, norm="l2"), "l2"),
}


@functools.cache
def nearest(norm: str) -> np.ndarray:
    """The distance of each image from its target's region of the linear network, by a solver that knows no attack."""
    result = []
    for x, target in zip(np.float64(X), np.asarray(TARGETS), strict=True):
        lead = (np.float64(W)[:, [target]] - np.float64(W))[:, np.arange(K) != target].T
        inside = scipy.optimize.LinearConstraint(lead, -lead @ x, np.inf)
        if norm == "l2":
            found = scipy.optimize.minimize(
                lambda d: d @ d, np.zeros(D), jac=lambda d: 2 * d, constraints=[inside], method="SLSQP"
            )
            result.append(np.linalg.norm(found.x))
        else:  # the least t with |d| <= t
            rows = np.block(
                [[-lead, np.zeros((K - 1, 1))], [np.eye(D), -np.ones((D, 1))], [-np.eye(D), -np.ones((D, 1))]]
            )
            right = np.concatenate([lead @ x, np.zeros(2 * D)])
            result.append(
                scipy.optimize.linprog([*[0] * D, 1], rows, right, bounds=[*[(None, None)] * D, (0, None)]).fun
            )
    return np.array(result)


@functools.cache
def compiled(name: str) -> Callable[..., jax.Array]:
    """The one program of an attack for several tests."""
    return jax.jit(functools.partial(ATTACKS[name][0], logits, bounds=(-2.0, 3.0)))


@pytest.mark.parametrize("name", ATTACKS)
def test_reaches_the_target_nearby(name):
    attack, norm = compiled(name), ATTACKS[name][1]
    found = attack(X, jnp.asarray(LABELS), targets=TARGETS)
    np.testing.assert_array_equal(np.asarray(logits(found)).argmax(1), TARGETS)
    way = size(np.float64(found) - np.float64(X), norm)
    assert (way >= nearest(norm) * (1 - 1e-4)).all()
    assert (way / nearest(norm)).mean() < (1.6 if "deepfool" in name else 1.2)  # DeepFool's steps may turn a corner
    # Any class is nearer than a given one.
    free = size(np.float64(attack(X, jnp.asarray(LABELS))) - np.float64(X), norm)
    assert (free <= way * 1.05).all()
    assert free.mean() < 0.9 * way.mean()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_image_of_its_target_stays(name):
    others = jnp.asarray((LABELS + 1) % K)
    found = compiled(name)(X, others, targets=jnp.asarray(LABELS, TARGETS.dtype))
    np.testing.assert_array_equal(found, X)


@pytest.mark.parametrize("name", ["deepfool", "carlini_wagner", "fab"])
def test_what_is_no_class_gives_nan(name):
    """Refused where it can be seen; under jit the image becomes NaN, and the others are right."""
    attack, _ = ATTACKS[name]
    run = jax.jit(lambda y, t: attack(logits, X, y, targets=t, bounds=(-2.0, 3.0)))
    plain = run(jnp.asarray(LABELS), TARGETS)
    for wrong in (-1, K):
        for argument in ("labels", "targets"):
            given = {"labels": jnp.asarray(LABELS), "targets": TARGETS}
            given[argument] = given[argument].at[1].set(wrong)
            with pytest.raises(ValueError, match=rf"{name}: {argument} contain {wrong}; .*\[0, 4\)"):
                attack(logits, X, bounds=(-2.0, 3.0), **given)
            got = np.asarray(run(given["labels"], given["targets"]))
            assert np.isnan(got[1]).all()
            np.testing.assert_array_equal(np.delete(got, 1, 0), np.delete(plain, 1, 0))
    with pytest.raises(ValueError, match=rf"{name}: targets\[0\] is that image's label"):
        attack(logits, X, jnp.asarray(LABELS), targets=jnp.asarray(LABELS), bounds=(-2.0, 3.0))


def test_fab_may_count_any_wrong_class():
    """As AutoAttack's FAB-T does: on the way to a far class a nearer one is a success."""
    fab = functools.partial(attacks.fab, logits, X, jnp.asarray(LABELS), targets=TARGETS, bounds=(-2.0, 3.0))
    strict, loose = (size(np.asarray(fab(any_wrong=a)) - X, "linf") for a in (False, True))
    assert (loose <= strict * 1.02).all()
    assert loose.sum() < strict.sum()


@pytest.mark.parametrize(
    ("name", "masked"),
    mostly_slow([(name, -1e9) for name in ATTACKS if name != "fab l2"] + [("fab", -jnp.inf)], [("deepfool", -1e9)]),
)
def test_a_masked_class_is_no_class(name, masked):
    """One far logit must not hide the boundary of the others: their rounding is their own."""
    attack, norm = ATTACKS[name]

    def widened(z: jax.Array) -> jax.Array:
        return jnp.concatenate([logits(z), jnp.full((len(z), 2), masked)], axis=1)

    run = jax.jit(lambda f, t: attack(f, X, jnp.asarray(LABELS), targets=t, bounds=(-2.0, 3.0)), static_argnums=0)
    for targets in (None, TARGETS):
        want, got = run(logits, targets), run(widened, targets)
        assert (np.asarray(logits(got)).argmax(1) != LABELS).all()
        np.testing.assert_allclose(size(np.asarray(got) - X, norm), size(np.asarray(want) - X, norm), rtol=0.02)


def test_losses_of_what_is_no_class():
    z = jnp.asarray(RS.randn(3, 5), jnp.float32)
    for name in ("margin", "dlr", "targeted_dlr"):
        loss = {"targeted_dlr": lambda z, y: losses.targeted_dlr(z, y, (y + 1) % 5)}.get(name, getattr(losses, name))
        for wrong in (-1, 5, 100):
            y = jnp.array([0, wrong, 2])
            with pytest.raises(ValueError, match=rf"{name}: labels contain {wrong}; each must be a class in \[0, 5\)"):
                loss(z, y)
            got = jax.jit(loss)(z, y)
            np.testing.assert_array_equal(np.isnan(got), [False, True, False])
