"""DeepFool, and Carlini and Wagner's attack: exact distances of linear models, other attacks', and what each image keeps."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from e2sad_jax import attacks, losses

N, SHAPE = 6, (3, 4, 1)
D = int(np.prod(SHAPE))
RS = np.random.RandomState(0)
W = RS.randn(D, 5).astype(np.float32)
B = np.array([[1.2, 0.1, 0.0, -0.1, -0.2]], np.float32)  # every image well inside a class
W1, W2 = RS.randn(D, 16).astype(np.float32), RS.randn(16, 4).astype(np.float32)
Attack = Callable[..., jax.Array]


@pytest.fixture(autouse=True)
def quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """XLA compiles in half the time without the optimizations that rounding to bfloat16 must survive."""
    jax.config.update("jax_disable_most_optimizations", "bfloat16" not in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def images(n: int = N, dtype: Any = jnp.float32) -> jax.Array:
    """Away from the ends of the range, which then cuts no small change."""
    return jnp.asarray(0.3 + 0.4 * np.random.RandomState(1).rand(n, *SHAPE), dtype)


def linear(classes: int) -> Callable[[jax.Array], jax.Array]:
    return lambda z: (z.reshape(z.shape[0], -1) - 0.5) @ W[:, :classes] + B[:, :classes]


def network(z: jax.Array, scale: jax.typing.ArrayLike = 1.0) -> jax.Array:
    return jnp.tanh(scale * ((z.astype(jnp.float32).reshape(z.shape[0], -1) - 0.5) @ W1)) @ W2


def size(change: Any, norm: str = "l2") -> np.ndarray:
    flat = np.float64(change).reshape(len(change), -1)
    return np.abs(flat).max(1) if norm == "linf" else np.sqrt((flat**2).sum(1))


def exact(classes: int, norm: str, extra: float = 0) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest boundary of `linear`, where it leads by `extra`, and the point nearest on it, in NumPy."""
    x, nearest, points = np.float64(images()).reshape(N, -1), [], []
    for row in x:
        logits = (row - 0.5) @ W[:, :classes] + B[0, :classes]
        y, best = logits.argmax(), (np.inf, row)
        for k in set(range(classes)) - {y}:
            w, gap = np.float64(W[:, k] - W[:, y]), logits[y] - logits[k] + extra
            dual = np.abs(w).sum() if norm == "linf" else np.sqrt((w**2).sum())
            step = np.sign(w) * gap / dual if norm == "linf" else w * gap / dual**2
            best = min(best, (gap / dual, row + step), key=lambda pair: pair[0])
        nearest.append(best[0])
        points.append(best[1])
    return np.array(nearest), np.array(points).reshape(N, *SHAPE)


def cw(logits_fn: Callable[[jax.Array], jax.Array], x: jax.Array, labels: jax.Array, **kwargs: Any) -> jax.Array:
    """In fewer and longer steps than by default."""
    kwargs = {"steps": 120, "binary_steps": 7, "learning_rate": 0.03, "initial_c": 0.1, **kwargs}
    return attacks.carlini_wagner(logits_fn, x, labels, **kwargs)


BOTH: dict[str, Attack] = {"deepfool": attacks.deepfool, "carlini_wagner": cw}
both = pytest.mark.parametrize("name", BOTH)


@functools.cache
def jitted(name: str) -> Attack:
    return jax.jit(lambda x, labels: BOTH[name](network, x, labels))


# --- distances


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("overshoot", [0.02, 0.5])
def test_deepfool_of_a_linear_model_is_exact(norm, classes, overshoot):
    """|f| / ||w||_q along the dual vector, times 1 + overshoot, to the nearest of all boundaries."""
    x, (distance, point) = images(), exact(classes, norm)
    got = attacks.deepfool(linear(classes), x, norm=norm, overshoot=overshoot)
    want = np.asarray(x) + (1 + overshoot) * (point - np.asarray(x))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
    np.testing.assert_allclose(size(got - x, norm), (1 + overshoot) * distance, rtol=1e-4)
    assert (linear(classes)(got).argmax(1) != linear(classes)(x).argmax(1)).all()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("confidence", [0.0, 0.5])
def test_carlini_wagner_of_a_linear_model_comes_near_the_distance(classes, confidence):
    x, f = images(), linear(classes)
    labels = f(x).argmax(1)
    got = jax.jit(lambda z: cw(f, z, labels, confidence=confidence))(x)
    distance, point = exact(classes, "l2", confidence)
    assert (point > 0).all()
    assert (point < 1).all()
    assert (losses.margin(f(got), labels) > confidence).all()
    assert (size(got - x) > 0.999 * distance).all()
    assert (size(got - x) < 1.02 * distance).all()


def test_both_find_nearer_images_of_a_network_than_single_steps_do():
    """Than the first of many l2 steps of the gradient of the margin, tried to 2 %; CW in the mean than DeepFool."""
    x = images()
    labels = network(x).argmax(1)
    margin = jax.jit(lambda z: losses.margin(network(z), labels))
    fgsm = jax.jit(lambda eps: attacks.fgsm(margin, x, eps=eps, norm="l2"))
    reach = np.full(N, np.inf)
    for eps in 3 * 0.98 ** np.arange(250):
        reach = np.where(margin(fgsm(eps)) > 0, eps, reach)
    assert np.isfinite(reach).all()
    deep, near = jitted("deepfool")(x, labels), jitted("carlini_wagner")(x, labels)
    assert (margin(deep) > 0).all()
    assert (margin(near) > 0).all()
    assert (size(deep - x) < 1.05 * reach).all()
    assert (size(near - x) < 1.03 * size(deep - x)).all()
    assert size(near - x).mean() < 0.995 * size(deep - x).mean()
    assert size(near - x).mean() < 0.98 * reach.mean()


def test_carlini_wagner_is_the_same_search_from_any_first_c():
    """From far too small and far too large ones; in small steps, as one that overshoots would end the search."""
    x, f = images(), linear(3)
    labels, run = f(x).argmax(1), {"steps": 500, "learning_rate": 0.003}
    for first, tried in ((1e-4, 12), (10.0, 16)):
        got = jax.jit(lambda z, c=first, b=tried: cw(f, z, labels, initial_c=c, binary_steps=b, **run))(x)
        np.testing.assert_allclose(size(got - x), exact(3, "l2")[0], rtol=0.03)


def test_the_margin_is_carlini_and_wagners_loss_in_the_box():
    """PGD with the margin as its loss: the corner that a linear margin of two classes is highest in."""
    x, f = images(), linear(2)
    labels = f(x).argmax(1)
    got = attacks.pgd(jax.random.key(0), lambda z: losses.margin(f(z), labels), x, eps=0.1, steps=10)
    side = np.where(np.asarray(labels)[:, None] == 0, 1, -1) * np.sign(W[:, 1] - W[:, 0])
    np.testing.assert_allclose(got, np.asarray(x) + 0.1 * side.reshape(N, *SHAPE), rtol=0, atol=1e-6)


# --- what each image keeps


@both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 3.0), (0.1, 0.7)])
def test_stays_in_the_range_and_fools_in_the_images_own_dtype(name, dtype, bounds):
    with jax.numpy_dtype_promotion("strict" if dtype == "float32" else "standard"):
        scale = bounds[1] - bounds[0]
        x = (bounds[0] + scale * images().at[:, 0, :2].set(0.005).at[:, 0, 2:].set(0.995)).astype(dtype)

        def logits_fn(z: jax.Array) -> jax.Array:
            return network((z.astype(jnp.float32) - bounds[0]) / scale)

        labels = logits_fn(x).argmax(1)
        got = jax.jit(lambda z: BOTH[name](logits_fn, z, labels, bounds=bounds))(x)
        assert got.dtype == dtype
        assert got.shape == x.shape
        assert np.float64(got).min() >= bounds[0]
        assert np.float64(got).max() <= bounds[1]
        assert (logits_fn(got).argmax(1) != labels).all()
        assert (size(got - x) < 0.25 * scale * np.sqrt(D)).all()


@both
def test_an_image_of_another_class_stays_as_it_is(name):
    x = images()
    labels = network(x).argmax(1)
    given = jnp.where(jnp.arange(N) % 2 == 0, labels, (labels + 1) % 4)
    got = jitted(name)(x, given)
    np.testing.assert_array_equal(got[1::2], x[1::2])
    np.testing.assert_allclose(got[::2], jitted(name)(x, labels)[::2], rtol=0, atol=1e-5)
    assert (got[::2] != x[::2]).reshape(N // 2, -1).any(1).all()


@both
def test_no_neighbour_changes_an_image(name):
    """Any order, any part of the batch, half of it on each of two devices, and each image alone under vmap."""
    x, order = images(), np.random.RandomState(0).permutation(N)
    labels = network(x).argmax(1)
    attack = jitted(name)
    whole, close = attack(x, labels), {"rtol": 0, "atol": 2e-4 if name == "carlini_wagner" else 1e-5}
    np.testing.assert_array_equal(whole, attack(x, labels))
    np.testing.assert_allclose(attack(x[order], labels[order]), whole[order], **close)
    np.testing.assert_allclose(attack(x[1:3], labels[1:3]), whole[1:3], **close)
    mesh, axis = Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data")
    split = jax.jit(jax.shard_map(attack, mesh=mesh, in_specs=axis, out_specs=axis))
    np.testing.assert_allclose(split(x, labels), whole, **close)
    alone = jax.vmap(lambda image, label: attack(image[None], label[None])[0])(x, labels)
    np.testing.assert_allclose(alone, whole, **close)


@both
@pytest.mark.parametrize("scale", [0.0, 1e5])
def test_no_gradient_and_saturated_logits_stay_finite(name, scale):
    """Without any gradient nothing is found, and the image stays."""
    x = images()
    labels = network(x, scale).argmax(1)
    got = jax.jit(lambda z: BOTH[name](lambda u: 1e4 * network(u, scale), z, labels, steps=20))(x)
    assert np.isfinite(got).all()
    if scale == 0:
        np.testing.assert_array_equal(got, x)


@both
def test_passes_no_gradient_to_the_network_or_the_images(name):
    x = images(2)
    labels = network(x).argmax(1)

    def objective(scale: jax.Array, z: jax.Array) -> jax.Array:
        return BOTH[name](functools.partial(network, scale=scale), z, labels, steps=5).sum()

    to_scale, to_images = jax.jit(jax.grad(objective, (0, 1)))(jnp.float32(1), x)
    assert to_scale == 0
    np.testing.assert_array_equal(to_images, jnp.zeros_like(x))


def test_deepfool_crosses_a_boundary_that_it_starts_on():
    """Both logits equal: the linear step is zero, and so is what it overshoots by."""
    got = attacks.deepfool(lambda z: jnp.stack([z[:, 0], z[:, 1]], 1), jnp.full((2, 3), 0.5))
    assert (got[:, 1] > got[:, 0]).all()
    np.testing.assert_allclose(got, 0.5, rtol=0, atol=1e-5)


def test_deepfool_stops_by_itself_and_no_later_than_it_is_told():
    """More steps than are needed change nothing; a single one is one step of the linear model."""
    x = images()
    enough, more, one = (
        jax.jit(lambda z, s=steps: attacks.deepfool(network, z, steps=s, overshoot=0.0))(x) for steps in (25, 50, 1)
    )
    np.testing.assert_array_equal(enough, more)
    assert (one != enough).any()
    calls = []

    def counted(z: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(1))
        return linear(3)(z)

    attacks.deepfool(counted, x).block_until_ready()
    jax.effects_barrier()
    assert len(calls) <= 5


# --- what is refused

BY_BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": jnp.ones((2, 3), int)}, TypeError, "{}: images are int32"),
    ({"steps": 0}, ValueError, "{}: steps=0"),
    ({"bounds": (1, 0)}, ValueError, "{}: bounds="),
    ({"labels": jnp.ones(2)}, TypeError, "labels are float32"),
    ({"labels": jnp.ones(3, int)}, ValueError, r"labels have shape \(3,\)"),
    ({"logits_fn": lambda z: z[:, 0]}, ValueError, r"logits have shape \(2,\)"),
    ({"logits_fn": lambda z: z[:, :1]}, ValueError, r"logits have shape \(2, 1\); .*at least 2"),
]
BY_ONE: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("deepfool", {"overshoot": -0.1}, ValueError, "deepfool: overshoot=-0.1"),
    ("deepfool", {"labels": np.array([0, 3])}, ValueError, r"deepfool: labels contain 3; .* in \[0, 3\)"),
    ("deepfool", {"labels": np.array([-1, 0])}, ValueError, r"deepfool: labels contain -1; .* in \[0, 3\)"),
    ("deepfool", {"norm": "l1"}, ValueError, "deepfool: norm='l1'"),
    ("carlini_wagner", {"binary_steps": 0}, ValueError, "carlini_wagner: binary_steps=0"),
    ("carlini_wagner", {"learning_rate": 0}, ValueError, "carlini_wagner: learning_rate=0"),
    ("carlini_wagner", {"initial_c": 0}, ValueError, "carlini_wagner: initial_c=0"),
    ("carlini_wagner", {"confidence": -1}, ValueError, "carlini_wagner: confidence=-1"),
    ("carlini_wagner", {"bounds": None}, ValueError, "carlini_wagner: bounds=None; .*needs the range"),
]


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [*[(n, kwargs, error, m.format(n)) for n in BOTH for kwargs, error, m in BY_BOTH], *BY_ONE],
)
def test_refuses(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        BOTH[name](**{"logits_fn": lambda z: z, "x": jnp.full((2, 3), 0.5), "labels": jnp.zeros(2, int), **kwargs})
