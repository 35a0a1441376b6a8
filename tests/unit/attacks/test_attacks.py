"""Attacks: closed forms, budgets, randomness, restarts, JAX transformations, and what is refused."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from e2sad_jax._compile import straight_line

N, SHAPE, K = 8, (3, 4, 1), 3
D = int(np.prod(SHAPE))
KEY = jax.random.key(7)


def weights() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rs = np.random.RandomState(0)
    return rs.randn(D, 16).astype(np.float32), rs.randn(1, 16).astype(np.float32), rs.randn(16, K).astype(np.float32)


W1, B1, W2 = weights()


def logits_fn(z: jax.Array) -> jax.Array:
    """A network of one tanh layer; smooth, so that rounding turns no sign."""
    flat = z.reshape(z.shape[0], -1).astype(jnp.float32)
    return jnp.tanh(0.3 * (flat @ W1 + B1)) @ W2


def loss_fn(z: jax.Array) -> jax.Array:
    """Soft cross-entropy, every image being of class 0."""
    return losses.cross_entropy(logits_fn(z), losses.soft_labels(jnp.zeros(z.shape[0], int), K))


def fooled_fn(z: jax.Array) -> jax.Array:
    return logits_fn(z).argmax(-1) != 0


def numpy_gradient(z: np.ndarray) -> np.ndarray:
    """Gradient of `loss_fn` by hand, in float64."""
    hidden = np.tanh(0.3 * (z.reshape(len(z), -1) @ np.float64(W1) + B1))
    exps = np.exp(hidden @ W2)
    error = exps / exps.sum(-1, keepdims=True) - np.array([0.75, 0.125, 0.125])
    return (((error @ W2.T) * (1 - hidden**2)) @ W1.T * 0.3).reshape(z.shape)


def images(dtype: Any = jnp.float32, seed: int = 1, n: int = N) -> jax.Array:
    """Uniform in [0, 1], the first pixels at the very ends of the range."""
    x = np.random.RandomState(seed).rand(n, *SHAPE)
    x[:, 0, 0], x[:, 0, 1] = 0, 1
    return jnp.asarray(x, dtype)


def coefficients(seed: int = 2) -> np.ndarray:
    rs = np.random.RandomState(seed)
    return (rs.choice([-1, 1], (N, *SHAPE)) * (0.1 + rs.rand(N, *SHAPE))).astype(np.float32)


def linear(z: jax.Array) -> jax.Array:
    return (z.astype(jnp.float32) * coefficients()).sum((1, 2, 3))


def flat(z: jax.Array) -> jax.Array:
    """No gradient at all: an attack stays where it started."""
    return jnp.zeros(z.shape[0])


def second(objective: str) -> Callable[..., jax.Array]:
    def attack(key: jax.Array, x: jax.Array, **kwargs: Any) -> jax.Array:
        return attacks.second_step(logits_fn, x, objective=objective, loss_fn=loss_fn, key=key, **kwargs)

    return attack


# Every attack as a function of a key, images, eps and bounds.
ATTACKS: dict[str, Callable[..., jax.Array]] = {
    "fgsm": lambda key, x, **kw: attacks.fgsm(loss_fn, x, **kw),
    "ifgsm": lambda key, x, **kw: attacks.ifgsm(loss_fn, x, steps=3, **kw),
    "ifgsm_long_steps": lambda key, x, **kw: attacks.ifgsm(loss_fn, x, steps=3, step_size=0.5, **kw),
    "pgd": lambda key, x, **kw: attacks.pgd(key, loss_fn, x, steps=3, **kw),
    "pgd_from_x": lambda key, x, **kw: attacks.pgd(key, loss_fn, x, steps=3, random_start=False, **kw),
    "pgd_restarts": lambda key, x, **kw: attacks.pgd(
        key, loss_fn, x, steps=2, restarts=3, misclassified_fn=fooled_fn, **kw
    ),
    **{f"second_{objective}": second(objective) for objective in attacks.OBJECTIVES},
}
every_attack = pytest.mark.parametrize("name", ATTACKS)


@functools.cache
def jitted(name: str, bounds: Any = (0.0, 1.0)) -> Callable[..., jax.Array]:
    return jax.jit(lambda key, x, eps: ATTACKS[name](key, x, eps=eps, bounds=bounds))


def promotion(dtype: Any) -> AbstractContextManager[None]:
    """Strict, but for bfloat16, where `jnp.promote_types` refuses to be asked."""
    return jax.numpy_dtype_promotion("strict" if dtype == jnp.float32 else "standard")


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Iterator[Any]:
    # Rounding to bfloat16 must survive XLA's optimizations; without them the rest compiles in half the time.
    jax.config.update("jax_disable_most_optimizations", request.param == "float32")
    with promotion(jnp.dtype(request.param)):
        yield jnp.dtype(request.param)
    jax.config.update("jax_disable_most_optimizations", False)


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


# --- the ball and the range


@every_attack
@pytest.mark.parametrize("eps", [0.01, 8 / 255, 0.3, 1.5])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_stays_in_the_ball_and_the_range(name, eps, bounds, dtype):
    """To 1e-6 in either dtype, and yet it moves."""
    for seed in (0, 1):
        x = images(dtype, seed)
        adversarial = jitted(name, bounds)(jax.random.key(seed), x, eps)
        assert adversarial.dtype == dtype
        assert adversarial.shape == x.shape
        change = np.abs(wide(adversarial) - wide(x))
        assert change.max() <= eps + 1e-6
        if bounds is not None:
            assert wide(adversarial).min() >= bounds[0]
            assert wide(adversarial).max() <= bounds[1]
        if name == "second_literal":  # rounding noise may well be zero
            continue
        assert change.max() > (0.6 * eps if bounds != (0.0, 1.0) else 0.5 * min(eps, 1))
        assert (change > 0).mean() > 0.3


@every_attack
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_eps_zero_is_the_identity(name, bounds, dtype):
    x = images(dtype)
    np.testing.assert_array_equal(wide(jitted(name, bounds)(KEY, x, 0.0)), wide(x))


LINEAR = {
    "fgsm": lambda x, **kw: attacks.fgsm(linear, x, **kw),
    "ifgsm": lambda x, **kw: attacks.ifgsm(linear, x, steps=4, **kw),
    "ifgsm_long_steps": lambda x, **kw: attacks.ifgsm(linear, x, steps=5, step_size=0.3, **kw),
    "pgd": lambda x, **kw: attacks.pgd(KEY, linear, x, steps=5, **kw),
    "pgd_restarts": lambda x, **kw: attacks.pgd(KEY, linear, x, steps=2, restarts=2, **kw),
    "second": lambda x, **kw: attacks.second_step(logits_fn, x, objective="loss", loss_fn=linear, **kw),
}


@functools.cache
def linear_jitted(name: str, bounds: Any) -> Callable[..., jax.Array]:
    return jax.jit(lambda x, eps: LINEAR[name](x, eps=eps, bounds=bounds))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("eps", [0.05, 0.3])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), None])
def test_linear_loss_ends_in_the_corner(name, eps, bounds):
    """The maximum over the box; steps beyond eps in all, so a projection around the previous iterate would leave it."""
    x = images()
    corner = wide(x) + eps * np.sign(coefficients())
    got = linear_jitted(name, bounds)(x, eps)
    np.testing.assert_allclose(wide(got), corner if bounds is None else corner.clip(*bounds), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
@pytest.mark.parametrize("step_size", [None, 0.17])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_iterates_by_hand(steps, step_size, bounds):
    """IFGSM, and PGD from the clean image, against numpy in float64."""
    eps, x = 0.2, images()
    for attack, default in (
        (attacks.ifgsm, eps / steps),
        (functools.partial(attacks.pgd, KEY, random_start=False), 2.5 * eps / steps),
    ):
        z = clean = wide(x)
        low, high = (-np.inf, np.inf) if bounds is None else bounds
        for _ in range(steps):
            z = z + (step_size or default) * np.sign(numpy_gradient(z))
            z = z.clip(clean - eps, clean + eps).clip(low, high)
        got = attack(loss_fn, x, eps=eps, steps=steps, step_size=step_size, bounds=bounds)
        np.testing.assert_allclose(wide(got), z, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("step_size", "where"), [(None, 0.5), (0.625 * 0.2, 0.0), (0.2, 0.0)])
def test_ifgsm_default_step_and_a_gradient_that_turns(step_size, where):
    """Towards a peak at 0.55 eps in steps of eps / 4: .25, .5, .75, .5 eps; longer steps jump over it and back."""
    eps, x = 0.2, jnp.full((2, 3), 0.5)
    got = attacks.ifgsm(lambda z: -((z - 0.5 - 0.55 * eps) ** 2).sum(1), x, eps=eps, steps=4, step_size=step_size)
    np.testing.assert_allclose(got, 0.5 + where * eps, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.4, 0.6), (-5.0, 5.0), None])
def test_pgd_finds_a_peak_inside_the_ball(bounds):
    """From any start to within a step of the peak; a peak outside leaves it at the nearest face."""
    x = jnp.full((N, 5), 0.5)
    peak = np.array([[0.41, 0.55, 0.9, -3.0, 0.59]], np.float32)
    got = attacks.pgd(KEY, lambda z: -((z - peak) ** 2).sum(1), x, eps=0.2, steps=60, step_size=0.01, bounds=bounds)
    low, high = (0.3, 0.7) if bounds is None else (max(0.3, bounds[0]), min(0.7, bounds[1]))
    np.testing.assert_allclose(got, np.broadcast_to(peak.clip(low, high), x.shape), rtol=0, atol=0.01 + 1e-6)


def test_zero_gradient_leaves_a_pixel_where_it_is():
    """sign(0) = 0, for every attack that starts at the image."""
    mask = np.arange(D).reshape(1, *SHAPE) % 2

    def blind_logits(z: jax.Array) -> jax.Array:
        return logits_fn(z * mask.astype(np.float32))

    def blind_loss(z: jax.Array) -> jax.Array:
        return loss_fn(z * mask.astype(np.float32))

    x = images()
    for got in (
        attacks.fgsm(blind_loss, x, eps=0.1, bounds=None),
        attacks.ifgsm(blind_loss, x, eps=0.1, steps=2, bounds=None),
        attacks.pgd(KEY, blind_loss, x, eps=0.1, steps=2, random_start=False, bounds=None),
        attacks.second_step(blind_logits, x, eps=0.1),
    ):
        np.testing.assert_array_equal(got[:, mask[0] == 0], x[:, mask[0] == 0])
        assert (got[:, mask[0] == 1] != x[:, mask[0] == 1]).mean() > 0.8
    np.testing.assert_array_equal(attacks.fgsm(flat, x, eps=0.3), x)


@pytest.mark.parametrize("steps", [100, 300])
def test_steps_below_bfloat16_rounding_still_move(steps):
    """0.3 / 300 near 1 is under half a unit in the last place (1/256): each step alone would be rounded away."""
    with promotion(jnp.bfloat16):
        x = jnp.full((2, 3), 0.99609375, jnp.bfloat16)

        def descend(z: jax.Array) -> jax.Array:
            return -z.astype(jnp.float32).sum(1)

        assert (x - jnp.asarray(0.3 / 300, jnp.bfloat16) == x).all()
        for got in (
            attacks.ifgsm(descend, x, eps=0.3, steps=steps),
            attacks.pgd(KEY, descend, x, eps=0.3, steps=steps, step_size=0.3 / steps, random_start=False),
        ):
            np.testing.assert_allclose(wide(got), 0.99609375 - 0.3, rtol=0, atol=2.0**-8)


# --- strength


@pytest.mark.parametrize("name", ["fgsm", "ifgsm", "pgd", "pgd_from_x", "pgd_restarts", "second_loss"])
@pytest.mark.parametrize("eps", [0.05, 0.2])
def test_raises_the_loss_of_every_image(name, eps):
    """Above the clean loss, and above every one of several points of random signs."""
    x = images()
    attacked = loss_fn(jitted(name)(KEY, x, eps))
    assert (attacked > loss_fn(x) + 1e-3).all()
    for seed in range(5):
        signs = np.random.RandomState(seed).choice([-1, 1], x.shape).astype(np.float32)
        assert (attacked > loss_fn(jnp.clip(x + eps * signs, 0, 1))).all()


@pytest.mark.parametrize("name", ["fgsm", "ifgsm", "pgd"])
def test_targeted_by_the_negated_loss(name):
    """The target's probability rises for every image, far above what the untargeted attack leaves it."""
    x, eps = images(), 0.3

    def to_target(z: jax.Array) -> jax.Array:
        return losses.cross_entropy(logits_fn(z), losses.soft_labels(jnp.full(z.shape[0], 2), K, 0))

    def run(objective: Callable[[jax.Array], jax.Array]) -> jax.Array:
        kwargs = {} if name == "fgsm" else {"steps": 5}
        attack = functools.partial(attacks.pgd, KEY) if name == "pgd" else getattr(attacks, name)
        return attack(objective, x, eps=eps, **kwargs)

    reached = to_target(run(lambda z: -to_target(z)))
    assert (reached < to_target(x)).all()
    assert (reached < to_target(run(to_target))).all()
    assert (reached < 0.5 * to_target(x)).mean() > 0.5


# --- randomness and restarts


def starts(key: jax.Array, x: jax.Array, **kwargs: Any) -> np.ndarray:
    return wide(attacks.pgd(key, flat, x, eps=0.3, steps=1, **kwargs))


def test_random_start_is_uniform_in_the_ball():
    x = jnp.full((64, 100), 0.5)
    offset = (starts(KEY, x) - 0.5) / 0.3
    assert np.abs(offset).max() <= 1 + 1e-6
    counts, _ = np.histogram(offset, 10, (-1, 1))
    np.testing.assert_allclose(counts, 640, atol=5 * np.sqrt(640))
    assert (np.abs(offset.mean(1)) < 5 / np.sqrt(300)).all()


def test_random_start_differs_by_key_image_and_pixel():
    x = jnp.full((4, 50), 0.5)
    first, again, other = starts(KEY, x), starts(KEY, x), starts(jax.random.key(8), x)
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.99
    for i in range(4):
        assert len(np.unique(first[i])) == 50
        assert all((first[i] != first[j]).mean() > 0.9 for j in range(i))


def test_random_start_respects_the_range_and_can_be_switched_off():
    x = images()
    assert starts(KEY, x).min() >= 0
    assert starts(KEY, x).max() <= 1
    np.testing.assert_array_equal(starts(KEY, x, random_start=False), x)


def test_keys_per_image_make_results_independent_of_the_batch():
    """Any order, any split."""
    x, keys = images(), jax.random.split(KEY, N)

    @jax.jit
    def attack(keys: jax.Array, x: jax.Array) -> jax.Array:
        return attacks.pgd(keys, loss_fn, x, eps=0.2, steps=2, step_size=0.02, restarts=2, misclassified_fn=fooled_fn)

    whole, order = attack(keys, x), np.random.RandomState(0).permutation(N)
    np.testing.assert_allclose(attack(keys[order], x[order]), whole[order], rtol=0, atol=1e-6)
    np.testing.assert_allclose(attack(keys[3:4], x[3:4]), whole[3:4], rtol=0, atol=1e-6)
    np.testing.assert_allclose(attack(keys[2:7], x[2:7]), whole[2:7], rtol=0, atol=1e-6)
    assert np.abs(attack(jax.random.split(jax.random.key(9), N), x) - whole).max() > 0.05


def test_one_key_gives_an_image_a_start_of_its_own_whatever_follows_it():
    x = images()
    np.testing.assert_array_equal(starts(KEY, x)[:3], starts(KEY, x[:3]))


@pytest.mark.parametrize("per_image", [False, True])
def test_raw_uint32_keys_are_the_same_keys(per_image):
    x = images()
    raw = jax.random.PRNGKey(7)
    new = jax.random.wrap_key_data(raw)
    raw, new = (jax.random.split(raw, N), jax.random.split(new, N)) if per_image else (raw, new)
    assert raw.dtype == jnp.uint32
    np.testing.assert_array_equal(starts(raw, x), starts(new, x))
    assert (starts(raw, x) != wide(x)).mean() > 0.8


def wavy(z: jax.Array) -> jax.Array:
    """Many local maxima of different height."""
    return (jnp.sin(25 * z) + z).sum((1, 2, 3))


def distance(z: jax.Array) -> jax.Array:
    """Grows with the distance from grey; no gradient, so each restart ends where it began."""
    return jax.lax.stop_gradient(jnp.abs(z - 0.5).sum((1, 2, 3)))


def sometimes_nan(z: jax.Array) -> jax.Array:
    return jnp.where(z[:, 0, 0, 0] > 0.5, jnp.nan, distance(z))


@pytest.mark.parametrize("loss", [wavy, distance, sometimes_nan])
@pytest.mark.parametrize("fooled", [None, "low_loss", "all", "none"])
@pytest.mark.parametrize("restarts", [2, 6])
def test_keeps_the_worst_restart(loss, fooled, restarts):
    """Misclassified first, then by loss, a NaN last: against an oracle that sees all end points.

    With "low_loss" the restart of the highest loss is still classified correctly.
    """
    n, ends = 32, []
    x = jnp.full((n, *SHAPE), 0.5)
    middle = {wavy: 10.0, distance: 0.15 * D, sometimes_nan: 0.15 * D}[loss]

    def watched(z: jax.Array) -> jax.Array:
        if not isinstance(z, jax.core.Tracer):
            ends.append(np.asarray(z))
        return loss(z)

    def is_fooled(z: jax.Array) -> jax.Array:
        value = loss(z)
        return {"low_loss": value < middle, "all": value == value, "none": value != value}[fooled]

    def plain(z: jax.Array) -> jax.Array:
        return jnp.zeros(n, bool) if fooled is None or fooled == "none" else is_fooled(z)

    kwargs = {} if fooled is None else {"misclassified_fn": plain}
    budget = dict(eps=0.3, steps=2, step_size=0.01, restarts=restarts)
    with straight_line():  # outside of a compiled loop each restart can be watched
        got = attacks.pgd(KEY, watched, x, **budget, **kwargs)
    assert len(ends) == restarts
    if loss is not wavy:  # which makes much of a rounding
        np.testing.assert_allclose(attacks.pgd(KEY, loss, x, **budget, **kwargs), got, atol=1e-6)
    values = np.nan_to_num(np.stack([np.asarray(loss(jnp.asarray(z))) for z in ends]), nan=-np.inf)
    success = np.stack([np.asarray(plain(jnp.asarray(z))) for z in ends])
    best = np.lexsort((values, success), axis=0)[-1]
    real = np.isfinite(values).any(0)  # all NaN: any of them will do
    assert real.sum() > n / 2
    np.testing.assert_array_equal(got[real], np.stack(ends)[best, np.arange(n)][real])
    assert len(np.unique(best)) == restarts
    if fooled == "low_loss" and restarts == 6:
        assert (best != values.argmax(0)).mean() > 0.3
    assert np.isfinite(got).all()


# --- what is refused

IMAGES = jnp.full((2, 3), 0.5)
RUN: dict[str, Callable[..., jax.Array]] = {
    "fgsm": lambda loss, x, key, **kw: attacks.fgsm(loss, x, **kw),
    "ifgsm": lambda loss, x, key, **kw: attacks.ifgsm(loss, x, **{"steps": 2, **kw}),
    "pgd": lambda loss, x, key, **kw: attacks.pgd(key, loss, x, **{"steps": 2, **kw}),
    "second_step": lambda loss, x, key, **kw: attacks.second_step(
        lambda z: z, x, key=None, **{"objective": "loss", "loss_fn": loss, **kw}
    ),
}
NAN = float("nan")
BY_ALL = [
    *[({"x": jnp.ones((2, 3), t)}, TypeError, rf"images are {t}.*floating point") for t in ("uint8", "int32", "bool")],
    *[({"eps": e}, ValueError, "eps=.*finite and at least 0") for e in (-0.1, -1, NAN, float("inf"), np.float64(-1))],
    *[({"bounds": b}, ValueError, "bounds=.*below") for b in ((1.0, 0.0), (0.5, 0.5), (NAN, 1.0))],
]
BY_ITERATED = [
    *[({"steps": s}, ValueError, rf"steps={s}; .*at least 1") for s in (0, -1, 2.0, None)],
    *[({"step_size": s}, ValueError, rf"step_size={s}; .*above 0") for s in (0, -0.1, NAN)],
]
BY_PGD = [
    ({"restarts": 0}, ValueError, "restarts=0; .*at least 1"),
    ({"restarts": 2, "random_start": False}, ValueError, "restarts=2 without random_start .*restarts=1"),
    ({"key": jax.random.split(KEY, 3)}, ValueError, r"key has shape \(3,\); .*each of the 2 images"),
    ({"key": jax.random.split(KEY, (2, 2))}, ValueError, r"key has shape \(2, 2\)"),
    ({"key": jax.random.split(jax.random.PRNGKey(0), 3)}, ValueError, r"key has shape \(3,\)"),
]
BY_SECOND = [
    ({"objective": "entropy"}, ValueError, "objective='entropy'; .*total, noise, loss, literal, random"),
    ({"objective": "loss", "loss_fn": None}, ValueError, "objective='loss' needs loss_fn"),
    ({"objective": "noise"}, ValueError, "objective='noise' .*needs key"),
    ({"objective": "random"}, ValueError, "objective='random' .*needs key"),
]
REFUSED = [
    *[(name, *case) for name in RUN for case in BY_ALL],
    *[(name, *case) for name in ("ifgsm", "pgd") for case in BY_ITERATED],
    *[("pgd", *case) for case in BY_PGD],
    *[("second_step", *case) for case in BY_SECOND],
]


@pytest.mark.parametrize(("name", "kwargs", "error", "message"), REFUSED)
def test_refuses(name, kwargs, error, message):
    """With the attack's name, the argument, its value and its bound in the message."""
    with pytest.raises(error, match=f"{name}: {message}"):
        RUN[name](**{"loss": lambda z: z.sum(1), "x": IMAGES, "key": KEY, "eps": 0.1, **kwargs})


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("loss", [lambda z: z.sum(), lambda z: z.mean(), lambda z: z, lambda z: z.sum(1)[:1]])
def test_refuses_losses_that_are_not_per_image(name, loss):
    with pytest.raises(ValueError, match=r"loss_fn returned shape .* for 2 images; .*per-example.*\(2,\)"):
        RUN[name](loss, IMAGES, KEY, eps=0.1)
