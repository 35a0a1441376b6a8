"""GAT, NuAT and the quadratic upper bound against their equations in NumPy, in float64."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from e2sad_jax import defenses, losses
from e2sad_jax.attacks import core
from e2sad_jax.defenses._types import bernoulli_signs
from e2sad_jax.defenses.nuat import nuclear_norm
from tests.unit.defenses.test_points import watching
from tests.unit.defenses.toy import EPS, KEY, SHAPE, D, K, N, batch, draw, net

pytestmark = pytest.mark.usefixtures("unoptimized")
WEIGHT = {"gat": 2.0, "nuat": 3.0}


def net64(z: Any) -> np.ndarray:
    weights = {key: np.float64(leaf) for key, leaf in draw().items()}
    return np.tanh(np.float64(z).reshape(len(z), -1) @ weights["w1"] + weights["b1"]) @ weights["w2"]


def J(z: np.ndarray, y: Any) -> np.ndarray:
    return -(np.float64(y) * scipy.special.log_softmax(z, -1)).sum(-1)


def regulariser(name: str, z: np.ndarray, other: np.ndarray) -> Any:
    """Of logits at adversarial and clean images: the batch mean."""
    if name == "nuat":
        return np.linalg.norm(z - other, "nuc") / len(z)
    return ((scipy.special.softmax(z, -1) - scipy.special.softmax(other, -1)) ** 2).sum(-1).mean()


def run(name: str, **kwargs: Any) -> tuple[Any, Any, np.ndarray]:
    """Loss, parts, and the images that the regulariser is taken at."""
    seen: list[np.ndarray] = []
    x, y = batch()
    given = {"key": KEY, "eps": EPS, "weight": WEIGHT[name]} | kwargs
    loss, parts = getattr(defenses, name)(watching(net(draw()), seen), x, y, **given)
    return loss, parts, seen[-1]


def random_signs() -> np.ndarray:
    return np.asarray(bernoulli_signs(core.per_image_keys("test", KEY, N), jnp.zeros((N, *SHAPE))))


@pytest.fixture(scope="module", params=["gat", "nuat"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def ascent(name):
    """The start by hand, and the slope of the attack's loss there by central differences, with and without each term."""
    x, y = batch()
    start = np.clip(np.float64(x) + EPS / 2 * random_signs(), 0, 1)
    clean = net64(x)

    def slope(function: Callable[[np.ndarray], float]) -> np.ndarray:
        result, step = np.zeros((N, D)), 1e-5
        for i in range(N):
            for pixel in range(D):
                unit = np.zeros((N, D))
                unit[i, pixel] = step
                up, down = (function(net64(start.reshape(N, D) + s * unit)) for s in (1, -1))
                result[i, pixel] = (up - down) / (2 * step)
        return result.reshape(N, *SHAPE)

    terms = slope(lambda z: J(z, y).mean()), slope(lambda z: regulariser(name, z, clean))
    return start, *terms


def test_the_step_climbs_both_terms_from_random_signs(name, ascent):
    start, entropy, distance = ascent
    x = np.float64(batch()[0])
    up = entropy + WEIGHT[name] * distance
    _, _, point = run(name)
    sure = np.abs(up) > 1e-4
    assert sure.mean() > 0.95
    want = np.clip(np.clip(start + EPS * np.sign(up), x - EPS, x + EPS), 0, 1)
    np.testing.assert_allclose(point[sure], want[sure], atol=1e-6)
    for alone in (entropy, distance):
        assert (np.sign(alone) != np.sign(up)).mean() > 0.02, "each term counts"
    shorter = run(name, step_size=0.05)[2]
    want = np.clip(np.clip(start + 0.05 * np.sign(up), x - EPS, x + EPS), 0, 1)
    np.testing.assert_allclose(shorter[sure], want[sure], atol=1e-6)


def test_the_step_in_the_l2_ball_goes_along_the_gradient(name):
    """A long way out of a small ball, so that the end is on it; from no signs at all, where the regulariser has no slope."""
    x, y = batch()
    gradient = np.asarray(jax.grad(lambda z: losses.cross_entropy(net(draw())(z), y).sum())(x))
    along = gradient / np.linalg.norm(gradient.reshape(N, -1), axis=1).reshape(N, 1, 1, 1)
    given = {"norm": "l2", "eps": 0.4, "bounds": None}
    if name == "gat":  # the nuclear norm has no derivative at 0
        point = run(name, signs=0.0, **given)[2]
        np.testing.assert_allclose(point, np.asarray(x) + 0.4 * along, atol=1e-5)
    away = (run(name, weight=0.0, signs=1.0, step_size=1e-3, **given)[2] - np.asarray(x)).reshape(N, -1)
    np.testing.assert_array_equal(np.sign(away), random_signs().reshape(N, -1))
    assert np.abs(np.abs(away) - 0.4 / np.sqrt(D)).max() < 1.1e-3


def test_loss_and_parts(name, ascent):
    """And the step has made the regulariser larger than the signs alone do: an attack that does nothing fails."""
    x, y = batch()
    loss, parts, point = run(name)
    clean, distance = J(net64(x), y).mean(), regulariser(name, net64(point), net64(x))
    np.testing.assert_allclose(parts["clean"], clean, rtol=1e-5)
    np.testing.assert_allclose(parts["distance" if name == "gat" else "nuclear"], distance, rtol=1e-5)
    np.testing.assert_allclose(loss, clean + WEIGHT[name] * distance, rtol=1e-5)
    assert distance > 1.5 * regulariser(name, net64(ascent[0]), net64(x))


def test_weights(name):
    """One that is twice another: GAT's is a mean; NuAT's norm has rows times sqrt(m w / sum w)."""
    (x, y), w = batch(), np.array([2.0, 1, 1, 0, 1, 1, 3, 1])
    loss, parts, point = run(name, weights=w)
    z, other = net64(point), net64(x)
    if name == "gat":
        each = ((scipy.special.softmax(z, -1) - scipy.special.softmax(other, -1)) ** 2).sum(-1)
        want = (w * each).sum() / w.sum()
    else:
        m = w.sum() ** 2 / (w**2).sum()
        want = np.linalg.norm(np.sqrt(m * w / w.sum())[:, None] * (z - other), "nuc") / m
    np.testing.assert_allclose(parts["distance" if name == "gat" else "nuclear"], want, rtol=1e-5)
    np.testing.assert_allclose(loss, (w * J(other, y)).sum() / w.sum() + WEIGHT[name] * want, rtol=1e-5)


def test_signs_are_fair_and_each_images_own():
    keys = core.per_image_keys("test", KEY, 40)
    drawn = bernoulli_signs(keys, jnp.zeros((40, 30)))
    np.testing.assert_array_equal(np.abs(drawn), 1)
    assert 0.45 < (drawn > 0).mean() < 0.55
    np.testing.assert_array_equal(bernoulli_signs(keys[:3], jnp.zeros((3, 30))), drawn[:3])


# --- the nuclear norm


def matrix(kind: str) -> np.ndarray:
    rs = np.random.RandomState(0)
    plain = rs.randn(N, K)
    if kind == "rows add up to 0":  # a singular value of 0, as differences of softmaxes have
        return plain - plain.mean(-1, keepdims=True)
    if kind == "equal singular values":
        return np.linalg.qr(plain)[0]
    if kind == "few rows":
        return plain[:2]
    return plain


@pytest.mark.parametrize("kind", ["distinct", "rows add up to 0", "equal singular values", "few rows"])
def test_nuclear_norm_and_its_gradient(kind):
    """Against NumPy's, and central differences along ways on which the norm has a derivative."""
    with jax.enable_x64(True):
        at = matrix(kind)
        both = jax.value_and_grad(lambda m: nuclear_norm(m).sum())(jnp.asarray(at))
        total, gradient = map(np.asarray, both)
    np.testing.assert_allclose(total, np.linalg.norm(at, "nuc"), rtol=1e-12)
    rs, step = np.random.RandomState(1), 1e-5
    for _ in range(5):
        way = rs.randn(*at.shape)
        if kind == "rows add up to 0":
            way -= way.mean(-1, keepdims=True)
        up, down = (np.linalg.norm(at + s * step * way, "nuc") for s in (1, -1))
        np.testing.assert_allclose((gradient * way).sum(), (up - down) / (2 * step), rtol=1e-6)
    if kind == "rows add up to 0":
        np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-12)  # the subgradient of least length


def test_nuclear_norm_of_zero_has_no_gradient():
    total, gradient = jax.value_and_grad(lambda m: nuclear_norm(m).sum())(jnp.zeros((N, K)))
    assert total == 0
    assert not gradient.any()


def test_nuat_where_a_singular_value_is_always_zero():
    """Logits that add up to 0: neither NaN nor another gradient than central differences show."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        (x, y), weights = batch(dtype=jnp.float64), draw(dtype=jnp.float64)

        @jax.jit
        @jax.value_and_grad
        def loss(w: jax.Array) -> jax.Array:
            def centered(z: jax.Array) -> jax.Array:
                logits = net(weights | {"w2": w})(z)
                return logits - logits.mean(-1, keepdims=True)

            return defenses.nuat(centered, x, y, key=KEY, eps=EPS)[0]

        way, step = np.random.RandomState(0).randn(*weights["w2"].shape), 1e-5
        _, gradient = loss(weights["w2"])
        up, down = (loss(weights["w2"] + s * step * way)[0] for s in (1, -1))
        np.testing.assert_allclose((gradient * way).sum(), (up - down) / (2 * step), rtol=1e-6)


# --- the quadratic upper bound


def by_hand(z: np.ndarray, other: np.ndarray, y: Any) -> np.ndarray:
    slope = scipy.special.softmax(z, -1) - np.float64(y)
    return J(z, y) + ((other - z) * slope).sum(-1) + 0.25 * ((other - z) ** 2).sum(-1)


@pytest.mark.parametrize("attacked", ["pgd", "n_fgsm"])
def test_defenses_with_the_bound(attacked):
    """At the points of training on the cross-entropy, and above it."""
    (x, y), w = batch(), np.array([1.0, 1, 2, 0, 1, 1, 1, 1])
    loss = functools.partial(
        getattr(defenses, attacked), key=KEY, eps=EPS, **({"steps": 2} if attacked == "pgd" else {})
    )
    points: dict[str, list[np.ndarray]] = {"ce": [], "qub": []}
    got = {kind: loss(watching(net(draw()), seen), x, y, training_loss=kind) for kind, seen in points.items()}
    point = points["qub"][-1]
    np.testing.assert_array_equal(point, points["ce"][-1])
    want = by_hand(net64(x), net64(point), y)
    np.testing.assert_allclose(got["qub"][0], want.mean(), rtol=1e-5)
    np.testing.assert_allclose(got["qub"][1]["bound"], want.mean(), rtol=1e-5)
    np.testing.assert_allclose(got["qub"][1]["clean"], J(net64(x), y).mean(), rtol=1e-5)
    assert got["qub"][0] > got["ce"][0] > got["qub"][1]["clean"] + 0.05
    weighed, _ = loss(net(draw()), x, y, training_loss="qub", weights=w)
    np.testing.assert_allclose(weighed, (w * want).sum() / w.sum(), rtol=1e-5)
