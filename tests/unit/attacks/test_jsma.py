"""JSMA: pixel for pixel what a reference in float64 changes, and on linear models a search over all pairs by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks
from tests import cited
from tests.helpers import mostly_slow

FIRST = 4  # images of each case in every run of the tests
CASES = [
    (net, theta, kind, some)
    for net in ("cnn", "linear")
    for theta, kind in ((1.0, "logits"), (-1.0, "logits"), (0.25, "logits"), (1.0, "softmax"))
    for some in (FIRST, 32)
]
FAST = [("cnn", 1.0, "logits", FIRST), ("linear", 0.25, "logits", FIRST)]


@pytest.mark.parametrize(("net", "theta", "kind", "some"), mostly_slow(CASES, FAST))
def test_changes_the_pixels_that_the_reference_changes(net, theta, kind, some, shared):
    """Where no second pair is within rounding of the best one; the others reach their target as often."""
    given, golden = cited.networks(shared), cited.values(shared, "jsma")
    want, reached, clear, steps = (
        golden[f"{net}_theta{theta:g}_{kind}_{value}"][:some] for value in ("image", "success", "least_gap", "steps")
    )
    x, targets = given.x[: len(want)], jnp.asarray(golden["target"][: len(want)])
    logits = given.logits[net]
    f = logits if kind == "logits" else lambda z: jax.nn.softmax(logits(z))
    got = jax.jit(lambda x, targets: attacks.jsma(f, x, targets=targets, theta=theta))(x, targets)
    np.testing.assert_array_equal(logits(got).argmax(1) == targets, reached)
    np.testing.assert_array_equal(got[~reached], x[~reached])
    same = reached & (clear > 1e-5)
    assert same.any() or some == FIRST
    np.testing.assert_allclose(got[same], want[same], rtol=0, atol=1e-6)
    changed = (got != x).reshape(len(x), -1).sum(1)
    assert (changed[reached] > 0).all()
    assert (changed <= 2 * steps).all()


D, K = 9, 4
RS = np.random.RandomState(5)
W = RS.randn(D, K).astype(np.float32)
X = jnp.asarray(RS.uniform(0.2, 0.8, (12, D)), jnp.float32)


def linear(z: jax.Array) -> jax.Array:
    return (z - 0.5) @ W


LABELS = np.asarray(linear(X)).argmax(1)
TARGETS = np.int32((LABELS + 1 + np.arange(12) % (K - 1)) % K)


def by_hand(x: np.ndarray, target: int, theta: float, steps: int) -> np.ndarray:
    """All pairs in Python, until the image is of its target; `x` where it does not come to be."""
    z, sign = np.array(x, np.float64), np.sign(theta)
    a, b = sign * W[:, target], sign * (W.sum(1) - W[:, target])
    for _ in range(steps):
        inside = [p for p in range(D) if (z[p] < 1 if theta > 0 else z[p] > 0)]
        pairs = [(p, q) for p, q in itertools.combinations(inside, 2) if a[p] + a[q] > 0 > b[p] + b[q]]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: -(a[list(pair)].sum() * b[list(pair)].sum()))
        z[list(best)] = np.clip(z[list(best)] + theta, 0, 1)
        if ((z - 0.5) @ W).argmax() == target:
            return z
    return np.float64(x)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(("theta", "gamma"), [(1.0, 1.0), (-1.0, 1.0), (0.3, 1.0), (1.0, 0.3)])
def test_of_a_linear_model_the_pairs_are_the_best_of_all(theta, gamma):
    steps = int(gamma * D / 2)
    attack = jax.jit(lambda x, t: attacks.jsma(linear, x, targets=t, theta=theta, gamma=gamma))
    got = np.asarray(attack(X, jnp.asarray(TARGETS)))
    want = np.stack([by_hand(x, t, theta, steps) for x, t in zip(np.asarray(X), TARGETS, strict=True)])
    assert (want != np.asarray(X)).any()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert (np.sign(theta) * (got - np.asarray(X)) >= 0).all()
    assert ((got != np.asarray(X)).sum(1) <= gamma * D).all()


@pytest.mark.usefixtures("unoptimized")
def test_without_targets_it_goes_to_the_likeliest_other_class_and_any_other_is_a_success():
    likeliest = np.argsort(np.asarray(linear(X)), axis=1)[:, -2]
    attack = jax.jit(lambda labels, targets: attacks.jsma(linear, X, labels, targets=targets, gamma=1.0))
    got = np.asarray(attack(None, None))
    want = np.asarray(attack(None, likeliest))
    there = (want != X).any(1)
    assert there.sum() > 3
    assert (linear(got)[there].argmax(1) != LABELS[there]).all()
    np.testing.assert_array_equal((got != X).any(1) | ~there, True)
    other = (LABELS + 1) % K  # already of another class, and already of the target
    np.testing.assert_array_equal(attack(other, None), X)
    np.testing.assert_array_equal(attack(other, LABELS), X)


@pytest.mark.usefixtures("unoptimized")
def test_an_image_without_an_admissible_pair_stays():
    """Where every pixel raises all logits alike, there is no pair: not even that of pixel 0 with itself."""
    same = jnp.ones((D, 2))
    np.testing.assert_array_equal(attacks.jsma(lambda z: z @ same + jnp.array([[1.0, 0.0]]), X, gamma=1.0), X)


def test_the_number_of_pixels_is_that_of_the_share_though_binary_fractions_are_a_little_less():
    """58 % of 100 pixels are 58, in binary 57.99999999999999; no fewer reach the target."""
    x = jnp.zeros((1, 100))

    def needs(pixels: int):
        return lambda z: jnp.stack([-z.sum(1), z.sum(1) - 2 * pixels + 1], 1)

    assert attacks.jsma(needs(58), x, gamma=0.58).sum() == 58
    assert attacks.jsma(needs(59), x, gamma=0.58).sum() == 0
