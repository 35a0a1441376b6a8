"""The later defenses on linear models, where points and penalties are known."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import defenses, losses
from tests.helpers import mostly_slow
from tests.unit.defenses.toy import EPS, KEY, LogitsFn, N, batch, close, draw, net, registered

# The later defenses as functions of logits_fn, x, y; their arguments may be overridden.
DEFENSES: dict[str, Callable[..., Any]] = {
    "rs_fgsm": registered("rs_fgsm"),
    "n_fgsm": registered("n_fgsm"),
    "free": registered("free"),
    "trades": registered("trades"),
    "grad_align": functools.partial(registered("grad_align"), weight=0.5),
    "gat": registered("gat"),
    "nuat": registered("nuat"),
    "input_gradient": functools.partial(registered("input_gradient"), weight=0.7),
}
NOISY = ["rs_fgsm", "n_fgsm", "trades", "grad_align", "gat", "nuat"]
pytestmark = pytest.mark.usefixtures("unoptimized")


def watching(logits_fn: LogitsFn, seen: list[np.ndarray]) -> LogitsFn:
    """`logits_fn`, and in `seen` the images of each call that is not inside of a gradient, as they are."""

    def watched(z: jax.Array) -> jax.Array:
        if not isinstance(z, jax.core.Tracer):
            seen.append(np.asarray(z.astype(jnp.float32)))
        return logits_fn(z)

    return watched


def trained_on(name: str, logits_fn: LogitsFn, x: jax.Array, y: jax.Array, **kwargs: Any) -> np.ndarray:
    """The images that the loss is taken at, the last ones to go through the network outside of a gradient."""
    seen: list[np.ndarray] = []
    DEFENSES[name](watching(logits_fn, seen), x, y, **kwargs)
    return seen[-1]


# --- linear models: logits w.z and -w.z, so that the gradient's sign is -w's for the first class, w's for the other

W = np.asarray([0.7, -1.1, 0.4, -0.2, 0.9, 1.3, -0.8, -0.6, 0.5, 0.3, -1.2, 0.1], np.float32)


def linear(z: jax.Array) -> jax.Array:
    score = z.reshape(z.shape[0], -1) @ jnp.asarray(W, z.dtype)
    return jnp.stack([score, -score], 1)


def linear_batch(low: float = 0.0, high: float = 1.0, dtype: Any = jnp.float32) -> tuple[Any, Any, np.ndarray]:
    """Images, hard labels, and the sign of each image's input gradient."""
    x = np.random.RandomState(3).uniform(low, high, (N, 3, 4, 1))
    labels = np.arange(N) % 2
    up = np.sign(W).reshape(1, 3, 4, 1) * np.where(labels, 1, -1).reshape(N, 1, 1, 1)
    return jnp.asarray(x, dtype), losses.soft_labels(jnp.asarray(labels), 2, 0), up


def test_rs_fgsm_point_of_a_linear_model():
    """clamp(x + u + 1.25 eps s): at the far edge of the ball wherever u s > -0.25 eps, inside elsewhere."""
    x, y, up = linear_batch(0.3, 0.7)
    moved = (trained_on("rs_fgsm", linear, x, y) - np.asarray(x)) * up
    assert np.abs(moved).max() <= EPS + 1e-6
    edge = moved > EPS - 1e-6
    assert 0.45 < edge.mean() < 0.8, "u s is above -eps / 4 in five of eight cases"
    assert (moved > EPS / 4 - 1e-6).all(), "from -eps a step of 1.25 eps ends at eps / 4"
    assert (moved[~edge] < EPS - 1e-3).any()
    full = (trained_on("rs_fgsm", linear, x, y, step_size=2 * EPS) - np.asarray(x)) * up
    np.testing.assert_allclose(full, EPS, atol=1e-6)


def test_n_fgsm_point_of_a_linear_model():
    """clip(clip(x + u) + eps s), with u of twice eps: not projected, far out of the ball, inside of the range."""
    x, y, up = linear_batch()
    point = trained_on("n_fgsm", linear, x, y)
    assert point.min() >= 0
    assert point.max() <= 1
    far = np.abs(point - np.asarray(x))
    assert EPS * 1.5 < far.max() <= 3 * EPS + 1e-6
    free = (trained_on("n_fgsm", linear, x, y, bounds=None) - np.asarray(x) - EPS * up) / (2 * EPS)  # u
    assert -1 - 1e-5 <= free.min() < -0.8
    assert 0.8 < free.max() <= 1 + 1e-5
    assert abs(free.mean()) < 0.2
    start = np.clip(np.asarray(x) + 2 * EPS * free, 0, 1)
    np.testing.assert_allclose(point, np.clip(start + EPS * up, 0, 1), atol=1e-6)
    plain = trained_on("n_fgsm", linear, x, y, noise=0.0)
    np.testing.assert_allclose(plain, np.clip(np.asarray(x) + EPS * up, 0, 1), atol=1e-6)


def test_free_perturbation_of_a_linear_model_climbs_to_the_edge_and_stays():
    """From -eps it takes two ascents to eps; the gradient is there too where the image was clipped."""
    x, y, up = linear_batch()
    delta = jnp.asarray(-EPS * up, jnp.float32)
    for want in (0.0, EPS, EPS):
        gradient = jax.grad(lambda d: defenses.free(linear, x, y, delta=d, eps=EPS)[0])(delta)
        np.testing.assert_array_equal(np.sign(gradient), up)
        delta = defenses.free_ascent(delta, gradient, eps=EPS)
        np.testing.assert_allclose(delta, want * up, atol=1e-6)
    np.testing.assert_allclose(
        trained_on("free", linear, x, y, delta=delta), np.clip(np.asarray(x) + EPS * up, 0, 1), atol=1e-6
    )
    outside = trained_on("free", linear, x, y, delta=5 * delta, bounds=None) - np.asarray(x)
    np.testing.assert_allclose(outside, EPS * up, atol=1e-6, err_msg="eps may have shrunk since delta was made")


def test_grad_align_of_a_linear_model_is_nothing():
    """One direction for all images, whatever its length; and FGSM's point is the one trained on."""
    x, y, up = linear_batch()
    loss, parts = DEFENSES["grad_align"](linear, x, y)
    np.testing.assert_allclose(parts["misalignment"], 0, atol=1e-6)
    np.testing.assert_allclose(loss, parts["adversarial"], atol=1e-6)
    np.testing.assert_allclose(
        trained_on("grad_align", linear, x, y), np.clip(np.asarray(x) + EPS * up, 0, 1), atol=1e-6
    )


@pytest.mark.parametrize("scale", [1.0, 1e-12])
def test_grad_align_of_a_quadratic_model(scale):
    """The score |z|^2 / 2 has gradient z, so the angle is that between x and its noisy twin; tiny gradients too."""
    x, y, _ = linear_batch(0.2, 0.9)
    seen: list[np.ndarray] = []

    def quadratic(z: jax.Array) -> jax.Array:
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), z)
        score = scale * (z**2).reshape(z.shape[0], -1).sum(-1) / 2
        return jnp.stack([score, -score], 1)

    _, parts = DEFENSES["grad_align"](quadratic, x, y)
    jax.effects_barrier()
    flat = np.asarray(x, np.float64).reshape(N, -1)
    away = [np.abs(v - np.asarray(x)) for v in seen]
    noisy = [
        v.reshape(N, -1) for v, a in zip(seen, away, strict=True) if a.min() > 0 and np.isclose(a, EPS).mean() < 0.1
    ]  # neither the image itself nor FGSM's point
    wanted = [1 - (flat * v).sum(1) / np.linalg.norm(flat, axis=1) / np.linalg.norm(v, axis=1) for v in noisy]
    assert any(abs(w.mean() - float(parts["misalignment"])) < 1e-5 for w in wanted)
    assert parts["misalignment"] > 0.01


def test_input_gradient_penalty_of_a_linear_model():
    """||dJ/dx||^2 = (2 p)^2 |w|^2 with p the wrong class's probability."""
    x, y, _ = linear_batch()
    score = np.asarray(x, np.float64).reshape(N, -1) @ W * np.where(np.arange(N) % 2, -1, 1)
    wrong = 1 / (1 + np.exp(2 * score))
    loss, parts = defenses.input_gradient(linear, x, y, weight=0.3)
    np.testing.assert_allclose(parts["penalty"], (4 * wrong**2 * (W**2).sum()).mean(), rtol=1e-5)
    np.testing.assert_allclose(parts["clean"], -np.log1p(-wrong).mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, parts["clean"] + 0.3 * parts["penalty"], rtol=1e-6)


def test_trades_point_of_a_linear_model_is_a_corner_and_its_loss_the_formula():
    """The divergence grows with |w.(z - x)|, so it ends in one of the two corners; labels are not asked."""
    x, y, _ = linear_batch(0.3, 0.7)
    seen: list[np.ndarray] = []
    loss, parts = DEFENSES["trades"](watching(linear, seen), x, y, steps=5)
    moved = (seen[-1] - np.asarray(x)) * np.sign(W).reshape(1, 3, 4, 1)
    sides = np.sign(moved.reshape(N, -1)[:, :1]).reshape(N, 1, 1, 1)
    np.testing.assert_allclose(moved * sides, EPS, atol=1e-6)
    p, q = (np.exp(2 * np.asarray(z, np.float64).reshape(N, -1) @ W) for z in (x, seen[-1]))
    p, q = p / (1 + p), q / (1 + q)
    divergence = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    np.testing.assert_allclose(parts["divergence"], divergence, rtol=1e-4)
    np.testing.assert_allclose(loss, parts["clean"] + 6 * parts["divergence"], rtol=1e-6)
    other = []
    defenses.trades(watching(linear, other), x, y[::-1], key=KEY, eps=EPS, steps=5)
    np.testing.assert_array_equal(other[-1], seen[-1])


@pytest.mark.parametrize(
    "name", mostly_slow(["rs_fgsm", "free", "trades", "grad_align", "gat", "nuat"], ("free", "gat"))
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_points_are_inside_ball_and_range(name, dtype):
    """After rounding too; and most pixels move."""
    x, y, _ = linear_batch(dtype=dtype)
    with jax.numpy_dtype_promotion("strict" if dtype == jnp.float32 else "standard"):
        point, clean = trained_on(name, linear, x, y), np.asarray(x.astype(jnp.float32))
    assert np.abs(point - clean).max() <= EPS + 1e-6
    assert point.min() >= 0
    assert point.max() <= 1
    assert (point != clean).mean() > 0.8


@pytest.mark.parametrize("name", ["rs_fgsm", "n_fgsm", "free", "trades", "grad_align", "gat", "nuat"])
def test_without_budget_it_is_natural_training(name):
    (x, y), weights = batch(), draw()
    want = defenses.natural(net(weights), x, y)[0]
    np.testing.assert_allclose(DEFENSES[name](net(weights), x, y, eps=0.0)[0], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("trades", {"beta": 0.0}), *[(name, {"weight": 0.0}) for name in ("input_gradient", "grad_align", "gat", "nuat")]],
)
def test_without_its_weight_nothing_is_left_of_the_regulariser(name, weight):
    (x, y), weights = batch(), draw()
    plain = functools.partial(defenses.fgsm, alpha=0, eps=EPS) if name == "grad_align" else defenses.natural
    got, want = (
        jax.grad(lambda w, f=f: f(net(w), x, y)[0])(weights)
        for f in (functools.partial(DEFENSES[name], **weight), plain)
    )
    close(got, want)


@pytest.mark.parametrize("name", mostly_slow(NOISY, ("trades", "gat")))
def test_noise_is_each_images_own_and_repeats_by_key(name):
    (x, y), f = batch(), net(draw())
    loss = float(DEFENSES[name](f, x, y)[0])
    assert loss == float(DEFENSES[name](f, x, y)[0])
    assert loss != float(DEFENSES[name](f, x, y, key=jax.random.key(8))[0])
    if name != "grad_align":  # whose noise is in its regulariser
        given = {"weight": 0.0} if name == "nuat" else {}  # whose step looks at the whole batch
        half = trained_on(name, f, x[: N // 2], y[: N // 2], **given)
        np.testing.assert_allclose(trained_on(name, f, x, y, **given)[: N // 2], half, atol=1e-6)


def test_rs_fgsm_is_one_step_of_pgd():
    (x, y), weights = batch(), draw()
    pgd = functools.partial(defenses.pgd, key=KEY, eps=EPS, steps=1, step_size=1.25 * EPS)
    np.testing.assert_array_equal(DEFENSES["rs_fgsm"](net(weights), x, y)[0], pgd(net(weights), x, y)[0])
