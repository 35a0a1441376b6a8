"""Learning with a strong adversary on linear models, where the worst point is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import defenses, losses
from tests import cited
from tests.unit.defenses.test_points import W, linear, linear_batch, watching
from tests.unit.defenses.toy import EPS, N, batch, close, draw, net

FLAT = W.reshape(1, 3, 4, 1)
pytestmark = pytest.mark.usefixtures("all_unoptimized")


def trained_at(logits_fn, x, y, **kwargs):
    """The images that the loss is taken at, and the loss."""
    seen = []
    loss, parts = defenses.strong_adversary(watching(logits_fn, seen), x, y, **kwargs)
    assert loss == parts["adversarial"]
    return seen[-1], loss


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_directions_on_the_linear_network_of_the_reference_values(norm, shared):
    """Unclipped, by the paper's length of 1.5, as the paper trains."""
    net, want = cited.networks(shared), cited.values(shared, "closed_forms")
    y = losses.soft_labels(net.labels, 10, 0)
    eps = 1.5 if norm == "l2" else 0.25
    point, _ = trained_at(net.logits["linear"], net.x, y, eps=eps, norm=norm)
    moved = (np.float64(point) - np.float64(net.x)).reshape(32, -1)
    if norm == "l2":
        np.testing.assert_allclose(moved, 1.5 * want["lwa_l2"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1.5, rtol=1e-5)
    else:
        size = np.abs(want["lwa_gradient"])
        sure = size > 1e-4 * size.max(1, keepdims=True)
        assert sure.mean() > 0.5
        np.testing.assert_allclose(moved[sure], 0.25 * want["lwa_linf"][sure], atol=1e-6)


@pytest.mark.parametrize(("norm", "dual"), [("linf", np.abs(W).sum()), ("l2", np.linalg.norm(W))])
def test_the_inner_maximum_of_a_linear_model_is_exact(norm, dual):
    """log(1 + exp(-s + 2 eps ||w||)) with s the margin: the step is the worst point of all, and no clean loss is added."""
    x, y, _ = linear_batch()
    score = np.float64(x).reshape(N, -1) @ W * np.where(np.arange(N) % 2, -1, 1)
    want = np.logaddexp(0, -2 * score + 2 * 0.2 * dual).mean()
    loss, _ = defenses.strong_adversary(linear, x, y, eps=0.2, norm=norm)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert abs(want - np.logaddexp(0, -2 * score).mean()) > 0.1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_of_two_classes_both_adversaries_are_one(norm):
    """The other class's probability is all that the label's lacks. The l2 step has the given length."""
    x, y, up = linear_batch()
    points = [trained_at(linear, x, y, eps=0.2, norm=norm, adversary=a)[0] for a in ("loss", "alpha")]
    np.testing.assert_allclose(*points, atol=1e-6)
    way = up if norm == "linf" else up * np.abs(FLAT) / np.linalg.norm(W)
    np.testing.assert_allclose(points[1] - np.asarray(x), 0.2 * way, atol=1e-6)


@pytest.mark.slow
def test_the_alpha_adversary_goes_to_the_nearest_class_of_the_softmax():
    """By hand, in float64: the least |g_y - g_j| / ||H_j - H_y|| over the other classes j, away from y even beyond."""
    (x, y), weights = batch(0), draw()
    w = {name: np.float64(leaf) for name, leaf in weights.items()}
    hidden = np.tanh(np.float64(x).reshape(N, -1) @ w["w1"] + w["b1"])
    g = np.exp(hidden @ w["w2"])
    g /= g.sum(1, keepdims=True)
    logits = np.einsum("nh,hk,dh->nkd", 1 - hidden**2, w["w2"], w["w1"])
    H = g[:, :, None] * (logits - np.einsum("nk,nkd->nd", g, logits)[:, None])
    want, seconds = [], 0
    for i, label in enumerate(np.asarray(y).argmax(1)):
        others = [j for j in range(3) if j != label]
        away = [H[i, j] - H[i, label] for j in others]
        far = [abs(g[i, label] - g[i, j]) / np.linalg.norm(d) for j, d in zip(others, away, strict=True)]
        seconds += int(g[i].argsort()[-2] != others[int(np.argmin(far))])
        nearest = away[int(np.argmin(far))]
        want.append(0.5 * nearest / np.linalg.norm(nearest))
    point, _ = trained_at(net(weights), x, y, eps=0.5, adversary="alpha")
    np.testing.assert_allclose((point - np.asarray(x)).reshape(N, -1), want, rtol=1e-3, atol=1e-6)
    other, _ = trained_at(net(weights), x, y, eps=0.5)
    assert np.abs(other - point).max() > 0.01
    assert seconds > 0


@pytest.mark.parametrize("adversary", ["loss", "alpha"])
def test_without_budget_it_is_natural_training(adversary):
    (x, y), weights = batch(), draw()
    got, want = (
        jax.grad(lambda w, f=f: f(net(w), x, y)[0])(weights)
        for f in (
            lambda f, x, y: defenses.strong_adversary(f, x, y, eps=0.0, adversary=adversary),
            defenses.natural,
        )
    )
    close(got, want)


@pytest.mark.parametrize("adversary", ["loss", "alpha"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_clipped_only_where_bounds_are_given(adversary, norm):
    x, y, _ = linear_batch()
    free, _ = trained_at(linear, x, y, eps=2 * EPS, norm=norm, adversary=adversary)
    kept, _ = trained_at(linear, x, y, eps=2 * EPS, norm=norm, adversary=adversary, bounds=(0.0, 1.0))
    assert free.min() < 0 < 1 < free.max()
    np.testing.assert_allclose(kept, np.clip(free, 0, 1), atol=1e-6)


def test_an_image_with_a_saturated_softmax_stays():
    """Its probabilities have no gradient; neither NaN nor a step."""
    x, y, _ = linear_batch()
    point, loss = trained_at(lambda z: 1e4 * linear(z), x, y, adversary="alpha")
    np.testing.assert_array_equal(point, x)
    assert np.isfinite(loss)


def test_on_a_layer_instead_of_the_pixels():
    """The upper part of the network alone, and what the lower one gives."""
    (x, y), weights = batch(), draw()
    hidden = jnp.tanh(x.reshape(N, -1) @ weights["w1"] + weights["b1"])
    point, _ = trained_at(lambda h: h @ weights["w2"], hidden, y, eps=0.3)
    np.testing.assert_allclose(np.linalg.norm(point - np.asarray(hidden), axis=1), 0.3, rtol=1e-4)
