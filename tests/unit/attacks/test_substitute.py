"""The practical black box: what it asks, what it trains on, and how far its images carry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from e2sad_jax import attacks, data, evaluation, losses
from tests import cited
from tests.unit.attacks.helpers import KEY

D, K = 20, 3
W = np.random.RandomState(3).randn(D, K).astype(np.float32)
X = jnp.asarray(np.random.RandomState(4).rand(24, D), jnp.float32)
START = {"w": jnp.zeros((D, K)), "b": jnp.zeros((1, K))}
pytestmark = pytest.mark.usefixtures("standard_promotion", "all_unoptimized")


def apply(params, x):
    return x.reshape(len(x), -1) @ params["w"] + params["b"]


class Oracle:
    """A model that nobody sees but through its classes: no JAX in it, and a record of what it was asked."""

    def __init__(self, w=W):
        self.w, self.asked = w, []

    def __call__(self, images):
        self.asked.append(np.asarray(images))
        return [int(k) for k in (np.asarray(images).reshape(len(images), -1) @ self.w).argmax(1)]


def trained(oracle, x=X, key=KEY, **kwargs):
    given = {"rounds": 4, "epochs": 20, "batch_size": 16, "optimizer": optax.adam(3e-2), **kwargs}
    return attacks.substitute(key, oracle, apply, START, x, **given)


@pytest.fixture(scope="module")
def asked(all_unoptimized):
    """An oracle that was asked, and the substitute."""
    oracle = Oracle()
    with jax.numpy_dtype_promotion("standard"):
        return oracle, trained(oracle)


# --- augmentation


@pytest.mark.parametrize(("name", "step"), [("plus", 0.1), ("minus", -0.1)])
def test_reference_values_of_the_augmentation(name, step, shared):
    """By the column of the oracle's class, which is often not the linear network's own."""
    net, want = cited.networks(shared), cited.values(shared, "augmentation")
    oracle = jnp.asarray(want["oracle"])
    got = np.asarray(attacks.augment(net.logits["linear"], net.x, oracle, step=step))
    w = cited.values(shared, "networks")["linear_kernel"].T[want["oracle"]].reshape(got.shape)
    np.testing.assert_allclose(got[np.abs(w) > 1e-9], want[f"linear_{name}"][np.abs(w) > 1e-9], atol=1e-6)
    assert (np.abs(got - np.asarray(net.x)) > 0.05).mean() > 0.25


def test_augmentation_inside_the_range_and_of_the_images_own_dtype():
    x = jnp.asarray(X, jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        f = lambda z: z.astype(jnp.float32) @ jnp.asarray(W)  # noqa: E731
        got = jax.jit(lambda z: attacks.augment(f, z, jnp.zeros(24, jnp.int32), step=0.3))(x)
    assert got.dtype == jnp.bfloat16
    moved = np.asarray(got, np.float32) - np.asarray(x, np.float32)
    assert np.abs(moved).max() <= 0.3 + 1e-6
    assert 0 <= np.asarray(got, np.float32).min() <= np.asarray(got, np.float32).max() <= 1
    np.testing.assert_array_equal(
        np.sign(moved)[np.abs(moved) > 0.05], np.sign(W[:, 0] + 0 * moved)[np.abs(moved) > 0.05]
    )


# --- the loop


def test_each_image_is_asked_once_and_doubles(asked):
    oracle, result = asked
    assert [len(asked) for asked in oracle.asked] == [24, 24, 48, 96]
    assert result.queries == 24 * 2**3 == len(result.images) == len(result.labels)
    np.testing.assert_array_equal(result.images, np.concatenate(oracle.asked))
    np.testing.assert_array_equal(result.labels, Oracle()(result.images))
    np.testing.assert_array_equal(result.images[:24], X)
    assert len(np.unique(np.asarray(result.images), axis=0)) > 24 * 2**2, "a flipped step may lead back"
    own = np.asarray(apply(result.params, result.images)).argmax(1)
    assert result.agreement == np.mean(own == np.asarray(result.labels))


def test_the_step_changes_its_sign_by_period():
    """Up, up, down, down: each new image lies a step from an old one, along the substitute's slope for its class."""
    oracle = Oracle()
    start = {"w": jnp.asarray(W), "b": jnp.zeros((1, K))}  # already the oracle: it does not move
    frozen = optax.sgd(0.0)
    attacks.substitute(KEY, oracle, apply, start, X, rounds=5, epochs=1, period=2, optimizer=frozen, bounds=None)
    seen = oracle.asked[0]
    for round, new in enumerate(oracle.asked[1:]):
        slope = W.T[Oracle()(seen)]
        np.testing.assert_allclose(new, seen + (0.1 if round < 2 else -0.1) * np.sign(slope), atol=1e-6)
        seen = np.concatenate([seen, new])


def test_a_reservoir_bounds_what_is_asked():
    oracle = Oracle()
    result = trained(oracle, reservoir=30)
    assert [len(asked) for asked in oracle.asked] == [24, 24, 30, 30]
    assert result.queries == 108


@pytest.mark.slow
def test_a_linear_oracle_is_learnt_and_attacked_as_if_it_were_known():
    """From 24 images: nearly every answer, and the signs of FGSM's step where they matter."""
    result = trained(Oracle(), rounds=6)
    assert result.agreement > 0.97
    fresh = jnp.asarray(np.random.RandomState(5).rand(400, D), jnp.float32)
    labels = jnp.asarray(Oracle()(fresh))
    assert (np.asarray(apply(result.params, fresh)).argmax(1) == np.asarray(labels)).mean() > 0.85
    hard = losses.soft_labels(labels, K, 0)
    points = {
        name: attacks.fgsm(lambda z, f=f: losses.cross_entropy(f(z), hard), fresh, eps=0.2)
        for name, f in {"own": lambda z: z @ W, "substitute": functools.partial(apply, result.params)}.items()
    }
    points["random"] = jnp.clip(fresh + 0.2 * jax.random.rademacher(KEY, fresh.shape, jnp.float32), 0, 1)
    right = {name: float(np.mean(np.asarray(Oracle()(z)) == np.asarray(labels))) for name, z in points.items()}
    assert np.mean(np.sign(points["own"] - fresh) == np.sign(points["substitute"] - fresh)) > 0.75
    assert right["substitute"] < 0.5 * right["random"]
    assert right["own"] <= right["substitute"] + 0.02


def test_a_small_batch_is_filled_up_without_effect():
    """24 images in batches of 64 train as in batches of 24."""
    one, two = (trained(Oracle(), rounds=1, epochs=3, batch_size=size).params for size in (24, 64))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)
    assert np.abs(one["w"]).max() > 0.01


def test_repeats_by_key_and_goes_on_from_where_it_was(asked):
    first, again = asked[1], trained(Oracle())
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    other = trained(Oracle(), key=jax.random.key(9))
    assert np.abs(first.params["w"] - other.params["w"]).max() > 1e-3
    longer, shorter = first.params["w"], trained(Oracle(), rounds=1).params["w"]
    assert np.linalg.norm(longer) > np.linalg.norm(shorter) > 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rounds": 0}, ValueError, "rounds=0; .*at least 1"),
        ({"reservoir": 0}, ValueError, "reservoir=0; .*at least 1"),
        ({"period": 0}, ValueError, "period=0; .*at least 1"),
        ({"step": -0.1}, ValueError, "step=-0.1; .*at least 0"),
        ({"x": X[:0]}, ValueError, "at least one"),
        ({"x": 2 * X}, ValueError, r"beyond bounds=\(0.0, 1.0\)"),
        ({"key": None}, TypeError, "must be a random key"),
        ({"oracle": lambda x: np.zeros(len(x) - 1, np.int32)}, ValueError, "the oracle's answers have shape"),
        ({"oracle": lambda x: np.full(len(x), 3)}, ValueError, r"the oracle's answers contain 3; .*\[0, 3\)"),
        ({"oracle": lambda x: x @ W}, TypeError, "the oracle's answers are float32; they must be integer"),
    ],
)
def test_refuses(changes, error, message):
    given = {"oracle": Oracle(), **changes}
    with pytest.raises(error, match=f"substitute: .*{message}"):
        trained(**given)


@pytest.mark.slow
def test_transfer_on_the_digits():
    """From 100 images and 1,600 questions to a network of another kind; on other images; more than random signs do."""
    digits = data.load("digits")
    x, y = np.float32(digits.x_train / 255), digits.y_train
    test, labels = np.float32(digits.x_test / 255)[100:], digits.y_test[100:]

    def net(params, z):
        return jnp.tanh(z.reshape(len(z), -1) @ params["w1"]) @ params["w2"]

    def weights(key):
        keys = jax.random.split(key)
        return {
            "w1": 0.05 * jax.random.normal(keys[0], (x[0].size, 64)),
            "w2": 0.1 * jax.random.normal(keys[1], (64, 10)),
        }

    target = attacks.substitute(  # an ordinary training: the oracle knows the labels
        KEY, lambda z: y, net, weights(KEY), jnp.asarray(x), rounds=1, epochs=30
    ).params
    oracle = lambda z: net(target, z).argmax(-1)  # noqa: E731
    wide = {"w": 0.01 * jax.random.normal(KEY, (x[0].size, 10)), "b": jnp.zeros((1, 10))}
    found = attacks.substitute(KEY, oracle, apply, wide, jnp.asarray(np.float32(digits.x_test / 255)[:100]), rounds=5)
    assert found.queries == 1600
    clean = np.mean(np.asarray(oracle(test)) == labels)
    images = attacks.fgsm(
        lambda z: losses.cross_entropy(apply(found.params, z), losses.soft_labels(jnp.asarray(labels), 10, 0)),
        jnp.asarray(test),
        eps=0.2,
    )
    fooled = np.mean(np.asarray(oracle(images)) == labels)
    noise = jnp.clip(test + 0.2 * jax.random.rademacher(KEY, test.shape, jnp.float32), 0, 1)
    assert clean > 0.9
    assert fooled < np.mean(np.asarray(oracle(noise)) == labels) - 0.2
    (outcome,) = evaluation.transfer(
        (apply, found.params), [(net, target)], test, labels, evaluation.Attack("FGSM", "fgsm", 0.2, 1)
    )
    np.testing.assert_allclose(outcome.correct.mean(), fooled, atol=0.01)
