"""Attacks of training from given perturbations: by hand in float64, chained, brought into the ball, without a gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, defenses
from e2sad_jax.defenses import DEFENSES
from tests.unit.defenses.test_prior import Model, images
from tests.unit.defenses.toy import EPS, EPS2, KEY, SHAPE, K, N, batch, close, draw, net

pytestmark = pytest.mark.usefixtures("unoptimized")

STEP, WEIGHT = 0.12, 2.0
STARTED = [name for name, defense in DEFENSES.items() if defense.takes("start")]
CHAINED = [name for name in STARTED if DEFENSES[name].takes("steps")]
QUICK = [("n_fgsm", "l2")]  # others go there the same way
QUICK += [(name, "linf") for name in STARTED if name not in ("pgd", "rs_fgsm")]
BALLS = [
    pytest.param(name, norm, marks=[] if (name, norm) in QUICK else pytest.mark.slow)
    for name in STARTED
    for norm in ("linf", "l2")
    if norm == "linf" or DEFENSES[name].takes("norm")
]
# The length of the step where no step size can be given, and else.
STEPS = {name: STEP if DEFENSES[name].takes("step_size") else EPS for name in STARTED}
START = np.random.RandomState(3).uniform(-1.5 * EPS, 1.5 * EPS, (N, *SHAPE))  # partly out of ball and range
RADII = {"linf": EPS, "l2": 3 * EPS}


def some(*fast: str) -> Any:
    """Every defense; those that are not named in the slow tests alone."""
    marked = [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in STARTED]
    return pytest.mark.parametrize("name", marked)


def given(name: str, **changes: Any) -> dict[str, Any]:
    """Arguments of a defense, of one step unless said; random numbers only for what is not the attack."""
    offered = {"eps": EPS, "eps1": EPS, "eps2": EPS2, "steps": 1, "step_size": STEP, "weight": WEIGHT, "beta": WEIGHT}
    arguments = {key: value for key, value in offered.items() if DEFENSES[name].takes(key)}
    return arguments | ({"key": KEY} if name == "grad_align" else {}) | changes


def ball_of(name: str, norm: str) -> dict[str, Any]:
    radius = {"eps1" if DEFENSES[name].takes("eps1") else "eps": RADII[norm]}
    return radius | ({"norm": norm} if norm == "l2" else {})


@functools.cache
def program(name: str, dtype: Any = jnp.float32, **changes: Any) -> Any:
    """`(weights, start) -> (loss, parts)` on the batch, compiled once for all tests."""
    x, y = batch(dtype=dtype)
    return jax.jit(lambda w, start: DEFENSES[name].loss(net(w), x, y, **given(name, **changes), start=start))


def float32(a: Any) -> jax.Array:
    return jnp.asarray(a, jnp.float32)


# --- the first step, by hand


def length(a: np.ndarray) -> np.ndarray:
    return np.sqrt((a**2).sum((1, 2, 3), keepdims=True))


def into(x: np.ndarray, z: np.ndarray, norm: str) -> np.ndarray:
    """The point of the ball for `z`: cut to it or, of l2, scaled onto it; then cut to the range."""
    radius = RADII[norm]
    away = np.clip(z - x, -radius, radius) if norm == "linf" else (z - x) * radius / np.maximum(length(z - x), radius)
    return np.clip(x + away, 0, 1)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True)


def climbed(name: str, model: Model, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The gradient in `z` of what the defense's attack climbs: in the logits by hand, then by the chain rule."""
    p, clean = softmax(model.logits(z)), softmax(model.logits(x))
    back = p - y
    if name == "trades":
        back = p - clean
    if name == "gat":
        away = 2 * (p - clean)
        back = back + WEIGHT * p * (away - (p * away).sum(1, keepdims=True))
    if name == "nuat":
        u, _, vt = np.linalg.svd(model.logits(z) - model.logits(x), full_matrices=False)
        back = back + WEIGHT * u @ vt
    hidden = back @ model.w["w2"].T * (1 - model.hidden(z) ** 2)
    return (hidden @ model.w["w1"].T).reshape(z.shape)


def stepped(name: str, norm: str, model: Model, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """One step from `z`, and back into the ball; of N-FGSM into the range alone."""
    g = climbed(name, model, x, y, z)
    end = z + STEPS[name] * (np.sign(g) if norm == "linf" else g / length(g))
    return np.clip(end, 0, 1) if name == "n_fgsm" else into(x, end, norm)


@pytest.mark.parametrize(("name", "norm"), BALLS)
def test_the_first_step_is_that_of_the_equation(name, norm):
    """x_adv = project(x_0 + a sign(grad at x_0)), x_0 = project(x + start): where it ends, and the loss there."""
    (x, y), model = images(), Model(0)
    end = stepped(name, norm, model, x, y, into(x, x + START, norm))
    loss, parts = program(name, **ball_of(name, norm))(draw(), float32(START))
    np.testing.assert_allclose(parts["delta"], end - x, atol=2e-6)
    p, clean = softmax(model.logits(end)), softmax(model.logits(x))
    want = {
        "adversarial": model.losses(end, y).mean(),
        "divergence": (clean * np.log(clean / p)).sum(1).mean(),
        "distance": ((p - clean) ** 2).sum(1).mean(),
        "nuclear": np.linalg.svd(model.logits(end) - model.logits(x))[1].sum() / N,
        "clean": model.losses(x, y).mean(),
    }
    checked = want.keys() & parts.keys()
    close({key: parts[key] for key in checked}, {key: want[key] for key in checked})
    assert checked - {"clean"}
    assert abs(model.losses(end, y).mean() - model.losses(into(x, x + START, norm), y).mean()) > 1e-3, "it moves"
    assert np.isfinite(loss)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "ifgsm" else pytest.mark.slow) for name in CHAINED]
)
def test_two_attacks_of_one_step_are_one_of_two(name):
    """The second from where the first ended; and it ends elsewhere."""
    first = program(name)(draw(), float32(START))[1]["delta"]
    loss, parts = program(name)(draw(), first)
    close((loss, parts), program(name, steps=2)(draw(), float32(START)))
    assert np.abs(parts["delta"] - first).max() > STEP / 2


def test_of_e2sad_with_ball_second_the_second_point_is_kept():
    """By hand, with the loss as what the second step climbs; else the first point, whatever the second is."""
    (x, y), model = images(), Model(0)
    end = stepped("e2sad", "linf", model, x, y, into(x, x + START, "linf"))
    second = into(x, end + EPS2 * np.sign(model.gradient(end, y)), "linf")
    for ball_second, kept in ((True, second), (False, end)):
        run = program("e2sad", second_step="loss", ball_second=ball_second)
        loss, parts = run(draw(), float32(START))
        np.testing.assert_allclose(parts["delta"], kept - x, atol=2e-6)
        assert parts["dissimilarity"] > 1e-3
        assert np.isfinite(loss)
    assert np.abs(second - end).max() > EPS2 / 2


def test_of_e2sad_a_start_that_is_the_first_point_moves_whatever_is_trained():
    """The second point is kept: were it the first, each image would keep its start for ever."""
    alone = {"adversarial_at": "first", "lam": 0.0}
    for own in ({"ball_second": True}, {"ball_second": False}, {"second_step": "total"}, alone):
        run = program("e2sad", **{"second_step": "loss", "first_point": "start", **own})
        parts = run(draw(), float32(START))[1]
        assert np.abs(parts["delta"] - START).max() > EPS2 / 2, own


# --- what comes back


def test_every_defense_with_a_memory_takes_a_start():
    assert [name for name, defense in DEFENSES.items() if "memory" in defense.defaults()] == STARTED
    assert set(STARTED) >= {"fgsm", "ifgsm", "pgd", "hamm", "e2sad", "rs_fgsm", "n_fgsm", "trades", "atta", "pgi"}


@some("e2sad", "pgi")
def test_without_a_start_nothing_comes_back(name):
    (x, y), loss_fn = batch(), DEFENSES[name].loss
    for start in ({}, {"start": None}):
        arguments = given(name) | ({"key": KEY} if DEFENSES[name].takes("key") else {}) | start
        _, parts = jax.eval_shape(lambda w, arguments=arguments: loss_fn(net(w), x, y, **arguments), draw())
        assert parts.keys() & {"adversarial", "divergence", "distance", "nuclear"}
        assert not parts.keys() & {"delta", "momentum"}


@pytest.mark.parametrize(("name", "norm"), BALLS)
def test_a_start_outside_is_brought_into_the_ball(name, norm):
    """Where nothing is to be climbed the attack ends where it begins."""
    x, _ = images()
    flat = {key: jnp.zeros_like(leaf) for key, leaf in draw().items()}
    for scale in (1.0, 100.0):
        delta = program(name, **ball_of(name, norm))(flat, float32(scale * START))[1]["delta"]
        np.testing.assert_allclose(delta, into(x, x + scale * START, norm) - x, atol=2e-6)


@pytest.mark.parametrize(("name", "norm"), BALLS)
def test_what_comes_back_is_in_the_ball_and_in_the_range(name, norm):
    (x, _), radius = batch(), RADII[norm] + (STEPS[name] if name == "n_fgsm" else 0)
    delta = np.asarray(program(name, **ball_of(name, norm))(draw(), float32(START))[1]["delta"])
    size = np.abs(delta).max() if norm == "linf" else length(delta).max()
    assert radius / 2 < size <= radius + 1e-6
    assert (x + delta).min() >= -1e-7
    assert (x + delta).max() <= 1 + 1e-7


@some("hamm", "n_fgsm")
def test_of_bfloat16_images_it_is_float32_and_an_image_of_theirs(name):
    """The step is kept whole, and the ball."""
    x = np.asarray(batch(dtype=jnp.bfloat16)[0], np.float32)
    loss, parts = program(name, dtype=jnp.bfloat16)(draw(dtype=jnp.bfloat16), float32(START))
    delta = np.asarray(parts["delta"])
    assert parts["delta"].dtype == jnp.float32
    assert np.isfinite(loss)
    assert EPS / 2 < np.abs(delta).max() <= EPS + (STEP + 2**-9 if name == "n_fgsm" else 1e-6)
    assert (x + delta).min() >= 0
    assert (x + delta).max() <= 1
    if name != "pgi":  # which keeps no image, but the start of the next
        np.testing.assert_array_equal(np.asarray(jnp.asarray(x + delta, jnp.bfloat16), np.float32), x + delta)


@some("n_fgsm", "pgi")
def test_no_gradient_flows_through_it(name):
    """Neither from the weights nor from the start; nor from the start to the loss."""
    (x, y), weights = batch(), draw()

    def through(w, start):
        def kept(w, start):
            loss, parts = DEFENSES[name].loss(net(w), x, y, **given(name), start=start)
            return (parts["delta"] ** 2).sum(), loss

        _, back = jax.vjp(kept, w, start)
        one = jnp.ones(())
        return back((one, 0 * one)), back((0 * one, one))[1]

    for leaf in jax.tree.leaves(jax.jit(through)(weights, float32(START))):
        assert not np.asarray(leaf).any()


# --- no budget, and what is refused


@some("ifgsm", "hamm")
def test_without_a_budget_it_stays_at_the_image(name):
    (x, y), own = batch(), {"eps1" if DEFENSES[name].takes("eps1") else "eps": 0.0}
    arguments = {key: value for key, value in given(name, **own).items() if key != "step_size"}
    run = jax.jit(lambda w: DEFENSES[name].loss(net(w), x, y, **arguments, start=float32(START))[1]["delta"])
    assert not np.asarray(run(draw())).any()


WRONG = [
    (np.zeros((N, 2), np.float32), r"start is float32 \(8, 2\); it must be floating point of the images' shape"),
    (np.zeros(SHAPE, np.float32), r"start is float32 \(3, 4, 1\); .*\(8, 3, 4, 1\)"),
    (np.zeros((N, *SHAPE), np.int32), "start is int32 .*floating point"),
    (np.full((N, *SHAPE), np.nan, np.float32), "start has entries that are NaN or infinite; .*finite"),
    (np.full((N, *SHAPE), np.inf, np.float32), "start has entries that are NaN or infinite; .*finite"),
]


@pytest.mark.parametrize("name", STARTED)
def test_what_is_no_perturbation_is_refused_in_one_line(name):
    for start, words in WRONG:
        with pytest.raises(ValueError, match=f"^{name}: {words}") as caught:
            DEFENSES[name].loss(net(draw()), *batch(), **given(name), start=start)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_wider_start_does_not_widen_the_attack():
    """Of float64 beside float32 images, and the other way round."""
    with jax.enable_x64(True):
        for x_dtype, dtype in ((jnp.float32, jnp.float64), (jnp.float64, jnp.float32)):
            (x, y), weights = batch(dtype=x_dtype), draw(dtype=x_dtype)
            run = functools.partial(defenses.rs_fgsm, net(weights), x, y, eps=EPS, start=jnp.asarray(START, dtype))
            loss, parts = jax.eval_shape(run)
            assert (loss.dtype, parts["delta"].dtype) == (x_dtype, x_dtype)


# --- the attack itself


def test_pgd_from_a_start_needs_no_key_and_only_one():
    (x, _), f = batch(), net(draw())
    labels = jnp.arange(N) % K

    def loss_fn(z):
        return -f(z)[jnp.arange(N), labels]

    kwargs = {"eps": EPS, "steps": 2, "step_size": STEP}
    got = attacks.pgd(None, loss_fn, x, start=float32(START), **kwargs)
    close(got, attacks.pgd(KEY, loss_fn, x, start=START, random_start=False, **kwargs))
    close(
        attacks.pgd(None, loss_fn, x, start=jnp.zeros_like(x), **kwargs),
        attacks.pgd(None, loss_fn, x, random_start=False, **kwargs),
    )
    with pytest.raises(ValueError, match="pgd: restarts=2 from one start would all be equal; use restarts=1"):
        attacks.pgd(KEY, loss_fn, x, start=float32(START), restarts=2, **kwargs)
    with pytest.raises(ValueError, match="pgd: restarts=2 without random_start would all be equal"):
        attacks.pgd(KEY, loss_fn, x, random_start=False, restarts=2, **kwargs)
    with pytest.raises(ValueError, match="pgd: start is float32"):
        attacks.pgd(None, loss_fn, x, start=np.zeros((N, 1), np.float32), **kwargs)
    with pytest.raises(TypeError, match="pgd: key is NoneType; it must be a random key"):
        attacks.pgd(None, loss_fn, x, **kwargs)
