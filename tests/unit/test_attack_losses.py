"""Margin and logit ratios: the formulas in NumPy, finite differences, ties and saturation, and what is refused."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import losses

N, K = 40, 6
pytestmark = pytest.mark.usefixtures("all_unoptimized")


def draw(scale: float = 2.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits without ties, true classes, and targets that are others."""
    rs = np.random.RandomState(3)
    labels = rs.randint(0, K, N)
    return (scale * rs.randn(N, K)).astype(np.float32), labels, (labels + rs.randint(1, K, N)) % K


def brute_margin(z: np.ndarray, y: int, t: int) -> float:
    return max(z[k] for k in range(K) if k != y) - z[y]


def brute_dlr(z: np.ndarray, y: int, t: int) -> float:
    pi = sorted(range(K), key=lambda k: -z[k])
    return -(z[y] - max(z[i] for i in range(K) if i != y)) / (z[pi[0]] - z[pi[2]])


def brute_targeted_dlr(z: np.ndarray, y: int, t: int) -> float:
    pi = sorted(range(K), key=lambda k: -z[k])
    return -(z[y] - z[t]) / (z[pi[0]] - (z[pi[2]] + z[pi[3]]) / 2)


Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
LOSSES: dict[str, tuple[Loss, Callable[[np.ndarray, int, int], float]]] = {
    "margin": (lambda z, y, t: losses.margin(z, y), brute_margin),
    "dlr": (lambda z, y, t: losses.dlr(z, y), brute_dlr),
    "targeted_dlr": (losses.targeted_dlr, brute_targeted_dlr),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@every_loss
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_equals_the_formula(name, scale):
    """Every place of the true class among the logits occurs."""
    ours, brute = LOSSES[name]
    logits, labels, targets = draw(scale)
    assert len({int((z > z[y]).sum()) for z, y in zip(logits, labels, strict=True)}) == K
    want = [brute(np.float64(z), y, t) for z, y, t in zip(logits, labels, targets, strict=True)]
    got = jax.jit(ours)(logits, labels, targets)
    assert got.shape == (N,)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6 * scale if name == "margin" else 1e-6)
    if name != "targeted_dlr":
        np.testing.assert_array_equal(got > 0, logits.argmax(1) != labels)


@every_loss
def test_gradient_against_finite_differences(name):
    ours, brute = LOSSES[name]
    logits, labels, targets = draw()
    got = jax.jit(jax.grad(lambda z: ours(z, labels, targets).sum()))(jnp.asarray(logits))
    for row in range(N):
        for k in range(K):
            step = 1e-6 * np.eye(K)[k]
            z, y, t = np.float64(logits[row]), labels[row], targets[row]
            difference = (brute(z + step, y, t) - brute(z - step, y, t)) / 2e-6
            np.testing.assert_allclose(got[row, k], difference, rtol=1e-3, atol=1e-3)


@every_loss
@pytest.mark.parametrize("row", [[0.0] * K, [7.0] * K, [3e4, 3e4, 3e4, 3e4, -3e4, 0], [1e-30] + [0.0] * (K - 1)])
@pytest.mark.parametrize("label", [0, 2, 4])
def test_ties_and_saturation_stay_finite(name, row, label):
    """And there is still a gradient, that pulls the true class down."""
    labels, targets = jnp.array([label]), jnp.array([5])

    def total(z: jax.Array) -> jax.Array:
        return LOSSES[name][0](z, labels, targets).sum()

    value, gradient = jax.value_and_grad(total)(jnp.array([row]))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert gradient[0, label] < 0


@pytest.mark.parametrize("name", ["dlr", "targeted_dlr"])
def test_ratios_do_not_change_with_scale_and_shift(name):
    logits, labels, targets = draw()
    want = LOSSES[name][0](logits, labels, targets)
    np.testing.assert_allclose(LOSSES[name][0](100 * logits + 50, labels, targets), want, rtol=1e-3, atol=1e-4)


@every_loss
def test_bfloat16_logits_are_widened(name):
    logits, labels, targets = draw()
    with jax.numpy_dtype_promotion("standard"):
        half = jnp.asarray(logits, jnp.bfloat16)
        got = LOSSES[name][0](half, labels, targets)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, LOSSES[name][0](half.astype(jnp.float32), labels, targets))


@pytest.mark.parametrize(
    ("name", "least", "remedy"), [("margin", 2, ""), ("dlr", 3, "margin"), ("targeted_dlr", 4, "")]
)
def test_refuses(name, least, remedy):
    loss, zeros = LOSSES[name][0], jnp.zeros(2, int)
    loss(jnp.ones((2, least)), zeros, zeros)
    with pytest.raises(
        ValueError, match=rf"{name}: logits have shape \(2, {least - 1}\); .*at least {least}.*{remedy}"
    ):
        loss(jnp.ones((2, least - 1)), zeros, zeros)
    with pytest.raises(ValueError, match=rf"{name}: logits have shape \({least},\)"):
        loss(jnp.ones(least), zeros, zeros)
    with pytest.raises(TypeError, match=rf"{name}: labels are float32; .*integer"):
        loss(jnp.ones((2, 5)), jnp.zeros(2), zeros)
    with pytest.raises(ValueError, match=rf"{name}: labels have shape \(3,\); .*one class per image"):
        loss(jnp.ones((2, 5)), jnp.zeros(3, int), zeros)
    if name == "targeted_dlr":
        with pytest.raises(TypeError, match="targets are bool"):
            loss(jnp.ones((2, 5)), zeros, jnp.zeros(2, bool))
