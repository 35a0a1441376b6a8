"""Losses: closed forms, other libraries' values, finite differences, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from e2sad_jax import losses

N, K = 5, 7
pytestmark = pytest.mark.usefixtures("all_unoptimized")


def draw(seed: int, scale: float = 2.0) -> np.ndarray:
    return (scale * np.random.RandomState(seed).randn(N, K)).astype(np.float32)


def numpy_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -(np.float64(targets) * scipy.special.log_softmax(np.float64(logits), axis=-1)).sum(-1)


@pytest.fixture
def logits() -> jax.Array:
    return jnp.asarray(draw(0))


@pytest.fixture
def other() -> jax.Array:
    return jnp.asarray(draw(1))


# --- soft labels


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.25, 0.9])
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_soft_labels_closed_form(num_classes, delta):
    """1 - delta for the true class, delta / (K - 1) for each other."""
    labels = np.arange(num_classes)[::-1].copy()
    got = losses.soft_labels(jnp.asarray(labels), num_classes, delta)
    want = np.full((num_classes, num_classes), delta / (num_classes - 1))
    want[np.arange(num_classes), labels] = 1 - delta
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)


def test_soft_labels_default_is_the_papers():
    got = losses.soft_labels(jnp.array([3]), 10)
    np.testing.assert_allclose(got[0, 3], 0.75, rtol=1e-6)
    np.testing.assert_allclose(np.delete(np.asarray(got[0]), 3), 0.25 / 9, rtol=1e-6)


def test_delta_zero_is_one_hot():
    labels = jnp.array([0, 4, 2])
    np.testing.assert_array_equal(losses.soft_labels(labels, 5, 0), np.eye(5)[np.asarray(labels)])


def test_soft_labels_are_not_optax_smoothing():
    """Optax gives the true class its share of what is taken away; with delta scaled for that both agree."""
    labels = jnp.array([0, 3, 6])
    one_hot = losses.soft_labels(labels, K, 0)
    np.testing.assert_allclose(
        losses.soft_labels(labels, K, 0.25), optax.smooth_labels(one_hot, 0.25 * K / (K - 1)), rtol=1e-6
    )
    assert not np.allclose(losses.soft_labels(labels, K, 0.25), optax.smooth_labels(one_hot, 0.25), atol=1e-2)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "uint32"])
def test_soft_labels_take_any_integers(dtype):
    got = losses.soft_labels(jnp.array([1, 2], dtype), 3)
    np.testing.assert_allclose(got, [[0.125, 0.75, 0.125], [0.125, 0.125, 0.75]], rtol=1e-6)


@pytest.mark.parametrize("labels", [jnp.array([1.0, 2.0]), jnp.eye(3), jnp.array([True, False])])
def test_soft_labels_refuse_what_is_not_integer(labels):
    with pytest.raises(TypeError, match=rf"labels are {labels.dtype}.*integer"):
        losses.soft_labels(labels, 3)


@pytest.mark.parametrize("num_classes", [1, 0, -2])
def test_soft_labels_refuse_too_few_classes(num_classes):
    with pytest.raises(ValueError, match=rf"num_classes={num_classes}.*at least 2"):
        losses.soft_labels(jnp.array([0]), num_classes)


@pytest.mark.parametrize("delta", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_soft_labels_refuse_delta(delta):
    with pytest.raises(ValueError, match=rf"delta={delta}.*\[0, 1\)"):
        losses.soft_labels(jnp.array([0]), 3, delta)


@pytest.mark.parametrize("wrong", [-1, 4, 99])
def test_soft_labels_of_what_is_no_class(wrong):
    """Refused; NaN where the labels are traced: neither a row of zeros nor the last class."""
    with pytest.raises(ValueError, match=rf"soft_labels: labels contain {wrong}; each must be a class in \[0, 4\)"):
        losses.soft_labels([0, wrong], 4)
    got = jax.jit(lambda y: losses.soft_labels(y, 4))(jnp.array([0, wrong]))
    np.testing.assert_array_equal(np.isnan(got), [[False] * 4, [True] * 4])


@pytest.mark.parametrize(("dtype", "classes"), [("uint8", 256), ("uint8", 300), ("int8", 200), ("uint32", 5)])
def test_narrow_labels_do_not_wrap(dtype, classes):
    """`10 < 256` is False in uint8, and class 266 is 10."""
    y, z = np.array([3, 4], dtype), np.zeros((2, classes), np.float32)
    z[:, -1], z[:, 3] = 5, 3
    for f in (lambda f: f, jax.jit):
        np.testing.assert_array_equal(f(lambda y: losses.soft_labels(y, classes, 0))(y), np.eye(classes)[np.int64(y)])
        np.testing.assert_allclose(f(losses.margin)(jnp.asarray(z), y), [2, 5] if classes > 5 else [2, -2])


def test_soft_labels_refuse_other_shapes():
    for shape, labels in (((3, 1), jnp.zeros((3, 1), int)), ((), 3)):
        with pytest.raises(ValueError, match=rf"labels have shape {re.escape(str(shape))}; .*one class per image"):
            losses.soft_labels(labels, 4)


# --- cross-entropy


def test_cross_entropy_by_hand():
    """Two classes at odds 3 : 1."""
    logits = jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0]]))
    targets = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    want = [np.log(4 / 3), np.log(4), 0.5 * np.log(4 / 3) + 0.5 * np.log(4)]
    np.testing.assert_allclose(losses.cross_entropy(logits, targets), want, rtol=1e-6)


@pytest.mark.parametrize("delta", [0, 0.25])
@pytest.mark.parametrize("scale", [0.1, 2, 30])
def test_cross_entropy_against_scipy(scale, delta):
    logits = draw(2, scale)
    targets = losses.soft_labels(jnp.arange(N), K, delta)
    got = losses.cross_entropy(jnp.asarray(logits), targets)
    assert got.shape == (N,)
    np.testing.assert_allclose(got, numpy_cross_entropy(logits, np.asarray(targets)), rtol=1e-5, atol=1e-6)


def test_hard_cross_entropy_against_optax(logits):
    labels = jnp.arange(N) % K
    want = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(losses.cross_entropy(logits, losses.soft_labels(labels, K, 0)), want, rtol=1e-5)


def test_cross_entropy_of_uniform_logits_is_log_k():
    got = losses.cross_entropy(jnp.full((N, K), 3.0), losses.soft_labels(jnp.arange(N), K))
    np.testing.assert_allclose(got, np.log(K), rtol=1e-6)


def test_cross_entropy_ignores_a_shift_of_the_logits(logits):
    targets = losses.soft_labels(jnp.arange(N), K)
    np.testing.assert_allclose(
        losses.cross_entropy(logits + 50, targets), losses.cross_entropy(logits, targets), rtol=1e-4
    )


def test_cross_entropy_gradient_is_softmax_minus_target(logits):
    targets = losses.soft_labels(jnp.arange(N), K)
    gradient = jax.grad(lambda z: losses.cross_entropy(z, targets).sum())(logits)
    np.testing.assert_allclose(gradient, scipy.special.softmax(draw(0), -1) - np.asarray(targets), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("function", [losses.cross_entropy, losses.dissimilarity])
@pytest.mark.parametrize("argument", [0, 1])
def test_gradients_against_finite_differences(function, argument):
    """In float64, in both arguments."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        first = jnp.asarray(np.float64(draw(3)))
        second = jnp.asarray(scipy.special.softmax(np.float64(draw(4)), -1))
        arguments = [first, second]

        def total(z: jax.Array) -> jax.Array:
            given = list(arguments)
            given[argument] = z
            return function(*given).sum()

        x = arguments[argument]
        gradient = np.asarray(jax.grad(total)(x))
        step = 1e-6
        for i, j in [(0, 0), (1, 3), (4, 6)]:
            unit = jnp.zeros_like(x).at[i, j].set(step)
            difference = (total(x + unit) - total(x - unit)) / (2 * step)
            np.testing.assert_allclose(gradient[i, j], difference, rtol=1e-6, atol=1e-9)
        assert np.abs(gradient).max() > 1e-2


@pytest.mark.parametrize("top", [50.0, 1e4, 1e30])
def test_saturated_logits_stay_finite(top):
    """A certain wrong prediction costs its margin; no infinity and no NaN, in the gradient either."""
    logits = jnp.array([[top, 0.0, -top]])
    for delta in (0, 0.25):
        for label in range(3):
            y = losses.soft_labels(jnp.array([label]), 3, delta)
            value, gradient = jax.value_and_grad(lambda z, y=y: losses.cross_entropy(z, y).sum())(logits)
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()
    wrong = losses.cross_entropy(logits, losses.soft_labels(jnp.array([1]), 3, 0))
    np.testing.assert_allclose(wrong, [top], rtol=1e-6)
    for argument in (0, 1):
        value, gradient = jax.value_and_grad(lambda *a: losses.dissimilarity(*a).sum(), argument)(logits, -logits)
        np.testing.assert_allclose(value, 2 * top, rtol=1e-6)
        assert np.isfinite(gradient).all()
    entropy, gradient = jax.value_and_grad(lambda z: losses.dissimilarity(z, z).sum())(logits)
    assert abs(entropy) < 1e-6
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_integer_targets_are_not_read_as_one_hot(logits, dtype):
    """Neither labels [N] nor, the silent case, an integer matrix of the logits' own shape."""
    for targets in (jnp.zeros(N, dtype), jnp.ones((N, K), dtype)):
        with pytest.raises(TypeError, match=rf"targets are {dtype}.*soft_labels"):
            losses.cross_entropy(logits, targets)


def test_integer_labels_of_a_square_batch_are_refused():
    """N = K would broadcast labels [N] against logits [N, K]."""
    with pytest.raises(TypeError, match="soft_labels"):
        losses.cross_entropy(jnp.zeros((4, 4)), jnp.arange(4))


@pytest.mark.parametrize("shape", [(K,), (1, K), (N, 1), (N, K + 1), (N, K, 1), ()])
def test_other_shapes_are_refused(logits, shape):
    with pytest.raises(ValueError, match=r"must have one shape \[N, K\]"):
        losses.cross_entropy(logits, jnp.zeros(shape))
    with pytest.raises(ValueError, match=r"must have one shape \[N, K\]|logits have shape"):
        losses.dissimilarity(logits, jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(N, 1), (N,), (N, 1, K), (N, 1, 1)])
def test_a_model_without_two_logits_is_refused(shape):
    """The cross-entropy of one logit is 0, of `[N]` one softmax over the batch: a defense would train on nothing."""
    for loss in (losses.cross_entropy, losses.dissimilarity):
        with pytest.raises(ValueError, match=rf"{loss.__name__}: logits have shape .*at least 2 \(.*binary_logits"):
            loss(jnp.ones(shape), jnp.ones(shape))


@pytest.mark.parametrize("output", [(np.ones((N, K)), None), {"logits": np.ones((N, K))}, None])
def test_outputs_that_are_no_logits_are_refused(output, logits):
    y = jnp.arange(N)
    for call in (
        lambda: losses.cross_entropy(output, jax.nn.one_hot(y, K)),
        lambda: losses.dissimilarity(logits, output),
        lambda: losses.dissimilarity(output, logits),
        lambda: losses.margin(output, y),
    ):
        with pytest.raises(TypeError, match=r"the model returned a (tuple|dict|NoneType); .*lambda x: f\(x\)\[0\]"):
            call()


@pytest.mark.parametrize("masked", [-np.inf, -1e9])
def test_a_masked_class_is_no_class(masked, logits, other):
    """A logit of -inf and probability 0: values and gradients are those of the other classes."""
    targets = losses.soft_labels(jnp.arange(N) % K, K)

    def widened(z: jax.Array) -> jax.Array:
        return jnp.concatenate([z, jnp.full((N, 1), masked)], axis=1)

    more = jnp.pad(targets, ((0, 0), (0, 1)))
    for plain, wide in (
        (lambda z: losses.cross_entropy(z, targets), lambda z: losses.cross_entropy(widened(z), more)),
        (lambda z: losses.dissimilarity(z, other), lambda z: losses.dissimilarity(widened(z), widened(other))),
        (lambda z: losses.dissimilarity(z, z), lambda z: losses.dissimilarity(widened(z), widened(z))),
    ):
        want, got = (jax.value_and_grad(lambda z, f=f: f(z).sum())(logits) for f in (plain, wide))
        np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-7)
    assert np.isposinf(losses.cross_entropy(widened(logits), losses.soft_labels(jnp.arange(N) % K, K + 1))).all() == (
        masked == -np.inf
    )


# --- one logit


def test_binary_logits_are_the_binary_cross_entropy():
    z, y = jnp.asarray(draw(8)[:, 0]), jnp.arange(N) % 2
    want = optax.sigmoid_binary_cross_entropy(z, y.astype(jnp.float32))
    for one in (z, z[:, None]):
        got = losses.cross_entropy(losses.binary_logits(one), losses.soft_labels(y, 2, 0))
        np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(losses.margin(losses.binary_logits(z), y), np.where(y == 1, -z, z))
    for wrong in (jnp.ones((N, 2)), jnp.ones(()), jnp.ones((N, 1, 1))):
        with pytest.raises(ValueError, match=r"binary_logits: logits have shape .*\[N\] or \[N, 1\]"):
            losses.binary_logits(wrong)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_computed_in_float32(dtype):
    with jax.numpy_dtype_promotion("standard"):
        logits, other = jnp.asarray(draw(5), dtype), jnp.asarray(draw(6), dtype)
        targets = losses.soft_labels(jnp.arange(N), K)
        for got, first, second in (
            (losses.cross_entropy(logits, targets), logits, targets),
            (losses.dissimilarity(other, logits), logits, jax.nn.softmax(other.astype(jnp.float32))),
        ):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, numpy_cross_entropy(np.asarray(first), np.asarray(second)), rtol=1e-5)
        gradient = jax.grad(lambda z: losses.cross_entropy(z, targets).sum())(logits)
        assert gradient.dtype == dtype


def test_float64_stays():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        logits = np.float64(draw(7))
        targets = losses.soft_labels(jnp.arange(N), K)
        got = losses.cross_entropy(jnp.asarray(logits), targets)
        assert targets.dtype == got.dtype == jnp.float64
        np.testing.assert_allclose(got, numpy_cross_entropy(logits, np.asarray(targets)), rtol=1e-12)


# --- dissimilarity


def test_dissimilarity_by_hand():
    """f(x) = (3/4, 1/4), f(x') = (1/2, 1/2): log 2; and the other way round."""
    p, q = jnp.log(jnp.array([[3.0, 1.0]])), jnp.zeros((1, 2))
    np.testing.assert_allclose(losses.dissimilarity(p, q), [np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(losses.dissimilarity(q, p), [-0.5 * np.log(3 / 16)], rtol=1e-6)


def test_dissimilarity_is_entropy_plus_divergence(logits, other):
    """CE(p, q) = H(p) + KL(p || q), by scipy."""
    p, q = (scipy.special.softmax(np.float64(z), -1) for z in (logits, other))
    want = scipy.special.entr(p).sum(-1) + scipy.special.rel_entr(p, q).sum(-1)
    np.testing.assert_allclose(losses.dissimilarity(logits, other), want, rtol=1e-5)
    assert not np.allclose(losses.dissimilarity(other, logits), want, rtol=1e-2)


def test_dissimilarity_of_equal_predictions_is_their_entropy(logits):
    want = scipy.special.entr(scipy.special.softmax(np.float64(logits), -1)).sum(-1)
    np.testing.assert_allclose(losses.dissimilarity(logits, logits), want, rtol=1e-5)


def test_dissimilarity_has_its_minimum_at_equal_predictions(logits, other):
    """Eq. 7's trap: the gradient in the second argument vanishes there, the one in the first does not."""

    def total(p: jax.Array, q: jax.Array) -> jax.Array:
        return losses.dissimilarity(p, q).sum()

    first, second = jax.grad(total, (0, 1))(logits, logits)
    assert np.abs(second).max() < 3e-7
    assert np.abs(first).max() > 0.1
    assert (losses.dissimilarity(logits, other) > losses.dissimilarity(logits, logits)).all()


def test_gradient_flows_through_both_arguments(logits, other):
    """d/dq = q - p; d/dp = p (c - p.c) with c = -log q: neither is stopped."""
    p, q = (scipy.special.softmax(np.float64(z), -1) for z in (logits, other))
    first, second = jax.grad(lambda *z: losses.dissimilarity(*z).sum(), (0, 1))(logits, other)
    cost = -np.log(q)
    np.testing.assert_allclose(second, q - p, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(first, p * (cost - (p * cost).sum(-1, keepdims=True)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("function", [losses.cross_entropy, losses.dissimilarity])
def test_jit_and_vmap(function, logits, other):
    second = jax.nn.softmax(other)
    want = function(logits, second)
    np.testing.assert_allclose(jax.jit(function)(logits, second), want, rtol=1e-6)
    batched = jax.vmap(function)(jnp.stack([logits, second]), jnp.stack([second, second]))
    np.testing.assert_allclose(batched, jnp.stack([want, function(second, second)]), rtol=1e-6)


# --- the quadratic upper bound


def drawn_bound(scale: float, n: int = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, others at many distances, and soft targets."""
    rs = np.random.RandomState(0)
    z = scale * rs.randn(n, K)
    return z, z + rs.randn(n, K) * 10 ** rs.uniform(-3, 1, (n, 1)), rs.dirichlet(np.full(K, 0.3), n)


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_quadratic_upper_bound_is_one(scale):
    """Never below the cross-entropy, equal at the clean logits, and the equation."""
    with jax.enable_x64(True):
        z, other, y = drawn_bound(scale)
        bound = np.asarray(losses.quadratic_upper_bound(*map(jnp.asarray, (z, other, y))))
        assert (bound >= np.asarray(losses.cross_entropy(jnp.asarray(other), y)) - 1e-12).all()
        np.testing.assert_allclose(
            losses.quadratic_upper_bound(z, z, y), losses.cross_entropy(jnp.asarray(z), y), rtol=1e-12
        )
    slope = ((other - z) * (scipy.special.softmax(z, -1) - y)).sum(-1)
    want = -(y * scipy.special.log_softmax(z, -1)).sum(-1) + slope + ((other - z) ** 2).sum(-1) / 4
    np.testing.assert_allclose(bound, want, rtol=1e-10)


def test_quadratic_upper_bound_has_the_least_constant():
    """Between two classes alike the cross-entropy curves by 1/2: the bound touches it to third order."""
    with jax.enable_x64(True):
        y, step = jnp.array([[1.0, 0.0]]), 1e-2
        other = jnp.array([[step, -step]])
        gap = np.asarray(losses.quadratic_upper_bound(0 * other, other, y) - losses.cross_entropy(other, y))
    assert 0 <= gap[0] < step**3


def test_quadratic_upper_bound_teaches_through_both_logits():
    """In closed form: with d = z' - z and H the cross-entropy's Hessian, H d - d / 2 and softmax(z) - y + d / 2."""
    with jax.enable_x64(True):
        z, other, y = drawn_bound(2.0, 5)
        both = jax.grad(lambda *a: losses.quadratic_upper_bound(*a, jnp.asarray(y)).sum(), argnums=(0, 1))(z, other)
        clean, adversarial = map(np.asarray, both)
    p, d = scipy.special.softmax(z, -1), other - z
    np.testing.assert_allclose(clean, p * d - p * (p * d).sum(-1, keepdims=True) - d / 2, atol=1e-10)
    np.testing.assert_allclose(adversarial, p - y + d / 2, atol=1e-10)


def test_quadratic_upper_bound_refuses_and_masks(logits, other):
    y = losses.soft_labels(jnp.arange(N), K)
    with pytest.raises(ValueError, match=r"adversarial_logits \(4, 7\) and targets \(5, 7\)"):
        losses.quadratic_upper_bound(logits, other[:4], y)
    with pytest.raises(TypeError, match="soft_labels"):
        losses.quadratic_upper_bound(logits, other, jnp.arange(N))
    wider = [jnp.pad(values, ((0, 0), (0, 1)), constant_values=-jnp.inf) for values in (logits, other)]
    more = jnp.pad(y, ((0, 0), (0, 1)))
    got = jax.value_and_grad(lambda *a: losses.quadratic_upper_bound(*a, more).sum(), argnums=(0, 1))(*wider)
    want = jax.value_and_grad(lambda *a: losses.quadratic_upper_bound(*a, y).sum(), argnums=(0, 1))(logits, other)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for gradient, plain in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(gradient[:, :-1], plain, rtol=1e-5, atol=1e-6)
        assert not gradient[:, -1].any()
    assert losses.quadratic_upper_bound(logits.astype(jnp.bfloat16), other.astype(jnp.bfloat16), y).dtype == jnp.float32
