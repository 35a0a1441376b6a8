"""The paper's defenses against their equations written out by hand, and the second point of e2SAD."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, defenses, losses
from e2sad_jax.attacks import core
from tests.helpers import mostly_slow
from tests.unit.defenses.toy import (
    EPS,
    EPS2,
    KEY,
    STEPS,
    VARIANTS,
    D,
    LogitsFn,
    N,
    Weights,
    batch,
    close,
    defended,
    draw,
    net,
)

PAPERS = ["natural", "fgsm", "ifgsm", "pgd", "hamm", *(name for name in VARIANTS if name.startswith("e2sad"))]
MIXED = ["fgsm", "ifgsm", "hamm", "e2sad", "e2sad ball"]

pytestmark = pytest.mark.usefixtures("unoptimized")


# --- the equations by hand


def J(weights: Weights, z: jax.Array, y: jax.Array) -> jax.Array:
    return -(y * jax.nn.log_softmax(net(weights)(z))).sum(-1)


def dissimilarity(weights: Weights, z: jax.Array, other: jax.Array, stop: tuple[str, ...] = ()) -> jax.Array:
    first = jax.nn.softmax(net(weights)(z))
    second = jax.nn.log_softmax(net(weights)(other))
    first = jax.lax.stop_gradient(first) if "first" in stop else first
    second = jax.lax.stop_gradient(second) if "second" in stop else second
    return -(first * second).sum(-1)


def direction(function: LogitsFn, z: jax.Array) -> jax.Array:
    return jnp.sign(jax.grad(lambda v: function(v).sum())(z))


def points(name: str, weights: Weights, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The adversarial points (Eq. 1, 2, 6 and 7); PGD's random ones by the library, tested elsewhere."""

    def loss(z: jax.Array) -> jax.Array:
        return J(weights, z, y)

    if name == "natural":
        return x, x
    if name == "pgd":
        return (attacks.pgd(KEY, loss, x, eps=EPS, steps=STEPS),) * 2
    if name == "e2sad ball":
        z = attacks.pgd(jax.random.fold_in(KEY, 1), loss, x, eps=EPS, steps=1, step_size=EPS)
        move = direction(lambda v: dissimilarity(weights, v, v), z)
        return z, jnp.clip(jnp.clip(z + EPS2 * move, x - EPS, x + EPS), 0, 1)
    z, steps = x, STEPS if name == "ifgsm" else 1
    for _ in range(steps):
        z = jnp.clip(jnp.clip(z + EPS / steps * direction(loss, z), x - EPS, x + EPS), 0, 1)
    match name.removeprefix("e2sad").strip():
        case "" if name == "e2sad":
            move = direction(lambda v: dissimilarity(weights, v, v), z)
        case "noise":
            noisy = z + EPS2 * jax.random.uniform(KEY, z.shape, minval=-1, maxval=1)
            move = direction(lambda v: dissimilarity(weights, z, v), noisy)
        case "loss":
            move = direction(loss, z)
        case "random":
            move = attacks.second_step(net(weights), z, eps=1.0, objective="random", key=KEY) - z
        case _:
            return z, z
    return z, z + EPS2 * move


def value(
    name: str,
    weights: Weights,
    x: jax.Array,
    y: jax.Array,
    at: Any,
    alpha: float = 0.6,
    lam: float = 0.7,
    stop: Any = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Eq. 3, 4, 5 and 8 at given points."""
    clean, adversarial = J(weights, x, y).mean(), J(weights, at[0], y).mean()
    mixed = alpha * clean + (1 - alpha) * adversarial
    if name == "natural":
        return clean, {"clean": clean}
    if name == "pgd":
        return adversarial, {"adversarial": adversarial}
    parts = {"clean": clean, "adversarial": adversarial}
    if name == "hamm":
        gradient = jax.grad(lambda z: J(weights, z, y).mean())(at[0])
        parts["penalty"] = EPS * N / 2 * jnp.sqrt((gradient**2).sum())
        mixed += (1 - alpha) * parts["penalty"]
    if name.startswith("e2sad"):
        parts["dissimilarity"] = dissimilarity(weights, *at, stop).mean()
        mixed += lam * parts["dissimilarity"]
    return mixed, parts


@functools.cache
def points_by_hand(name: str) -> Callable[..., Any]:
    return jax.jit(functools.partial(points, name))


@functools.cache
def by_hand(name: str) -> Callable[..., Any]:
    """`value` and its gradient, of weights, images, labels, points, alpha and lambda: compiled once for all tests."""
    return jax.jit(jax.value_and_grad(functools.partial(value, name), has_aux=True))


@pytest.mark.parametrize("name", PAPERS)
def test_loss_parts_and_gradient(name):
    """On hard and soft labels. Parts come unweighted; the gradient is that at precomputed, constant points."""
    for delta in (0, 0.25):
        (x, y), weights = batch(delta), draw()
        at = points_by_hand(name)(weights, x, y)
        loss, got = defended(name)(weights, x, y)
        hand, want = by_hand(name)(weights, x, y, at, 0.6, 0.7)
        close(loss, hand)
        assert min(np.abs(leaf).max() for leaf in want.values()) > 1e-3
        close(got, want)


@pytest.mark.parametrize(("where", "hold"), [("second", True), ("first", True), ("second", False)])
def test_the_adversarial_term_at_the_second_point_and_a_reference_that_is_held(where, hold):
    """Of J at either point; a held reference gives the dissimilarity's value, and no gradient through the first point."""
    (x, y), weights = batch(), draw()
    x1, x2 = points_by_hand("e2sad loss")(weights, x, y)

    def ours(w):
        return VARIANTS["e2sad loss"](net(w), x, y, alpha=0.0, adversarial_at=where, hold_reference=hold)

    def by_hand(w):
        adversarial = J(w, x2 if where == "second" else x1, y).mean()
        different = dissimilarity(w, x1, x2, ("first",) if hold else ()).mean()
        return adversarial + 0.7 * different, (adversarial, different)

    (got, parts), gradient = jax.value_and_grad(ours, has_aux=True)(weights)
    (want, terms), slope = jax.value_and_grad(by_hand, has_aux=True)(weights)
    close((got, parts["adversarial"], parts["dissimilarity"]), (want, *terms))
    close(gradient, slope)
    plain = jax.grad(lambda w: VARIANTS["e2sad loss"](net(w), x, y, alpha=0.0)[0])(weights)
    assert np.abs(gradient["w1"] - plain["w1"]).max() > 1e-3


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("alpha", [0, 1.0])
def test_alpha(name, alpha):
    """With alpha = 0 no clean term is left, and yet it attacks; with alpha = 1 nothing of the adversarial loss."""
    (x, y), weights = batch(), draw()
    loss, parts = jax.jit(lambda w: VARIANTS[name](net(w), x, y, alpha=alpha))(weights)
    at = points_by_hand(name)(weights, x, y)
    (want, terms), _ = by_hand(name)(weights, x, y, at, float(alpha), 0.7)
    clean = terms["clean"]
    if name == "e2sad ball" and alpha == 0:
        del terms["clean"]  # not looked at
    close((loss, parts), (want, terms))
    assert parts["adversarial"] > clean + 0.05


@pytest.mark.parametrize("name", MIXED)
def test_weights_may_be_traced(name):
    """The weights as arguments of a jitted function, one compilation for all."""
    (x, y), weights = batch(), draw()
    names = ("alpha", "lam") if name.startswith("e2sad") else ("alpha",)
    run = jax.jit(lambda *v: VARIANTS[name](net(weights), x, y, **dict(zip(names, v, strict=True))))
    at = points_by_hand(name)(weights, x, y)
    for numbers in ((0.6, 0.1), (0.25, 2.0), (0.0, 0.5), (1.0, 0.0)):
        close(run(*numbers[: len(names)]), by_hand(name)(weights, x, y, at, *numbers)[0])


@pytest.mark.parametrize("kind", [np.float32, np.float64, jnp.float32])
def test_weights_may_be_arrays(kind):
    """NumPy's and JAX's scalars mean what Python's mean: alpha = 0 attacks all the same."""
    (x, y), weights = batch(), draw()
    for alpha in (0, 0.25):
        want = VARIANTS["fgsm"](net(weights), x, y, alpha=alpha)
        close(VARIANTS["fgsm"](net(weights), x, y, alpha=kind(alpha)), want, rtol=1e-6)


def test_both_points_of_the_ball_stay_there_and_are_drawn_anew():
    (x, y), weights = batch(), draw()
    seen: list[jax.Array] = []

    def watched(z: jax.Array) -> jax.Array:
        jax.debug.callback(lambda v: seen.append(v), z, ordered=True)
        return net(weights)(z)

    for key in (KEY, jax.random.key(8)):
        defenses.e2sad(watched, x, y, alpha=0, eps1=EPS, eps2=EPS, random_start=True, ball_second=True, key=key)
        jax.effects_barrier()
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == 4  # the two gradients and the two points: none of the clean images
    for z in seen:
        assert np.abs(z - x).max() <= EPS + 3e-8
        assert z.min() >= 0
        assert z.max() <= 1
    assert all((a != b).mean() > 0.5 for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[2], first[3])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_first_point_may_be_the_start_itself(norm):
    """Then the second one is that of a step of PGD from there, and the loss that of the two."""
    (x, y), weights = batch(), draw()
    f = net(weights)
    start = jax.random.uniform(KEY, x.shape, x.dtype, -2 * EPS, 2 * EPS)
    given = {"alpha": 0.0, "eps1": EPS, "eps2": EPS / 2, "second_step": "loss", "ball_second": True, "norm": norm}
    got, parts = defenses.e2sad(f, x, y, **given, first_point="start", adversarial_at="second", lam=0.7, start=start)
    first = within(x, x + start, EPS) if norm == "l2" else jnp.clip(x + start.clip(-EPS, EPS), 0, 1)
    second = x + defenses.pgd(f, x, y, start=start, eps=EPS, steps=1, step_size=EPS / 2, norm=norm)[1]["delta"]
    close(parts["delta"], second - x)
    mean = losses.cross_entropy(f(second), y).mean()
    close(parts["adversarial"], mean)
    close(got, mean + 0.7 * losses.dissimilarity(f(first), f(second)).mean())
    with pytest.raises(ValueError, match="first_point='start' needs a start; pass one, or random_start=True"):
        defenses.e2sad(f, x, y, **given, first_point="start")
    with pytest.raises(ValueError, match="first_point='x'; it must be one of step, start"):
        defenses.e2sad(f, x, y, **given, first_point="x")


def test_e2sad_takes_a_first_step_of_any_length_inside_the_ball():
    (x, y), weights = batch(), draw()
    f = net(weights)
    for size, eps in ((EPS / 2, EPS / 2), (2 * EPS, EPS), (np.full(len(x), EPS / 2), np.full(len(x), EPS / 2))):
        got, want = (
            defenses.e2sad(f, x, y, alpha=0.5, lam=0, eps1=e, step_size=s)[0] for e, s in ((EPS, size), (eps, None))
        )
        close(got, want)


def test_e2sad_without_dissimilarity_is_fgsm_training():
    (x, y), weights = batch(), draw()
    got = jax.jit(jax.value_and_grad(lambda w: VARIANTS["e2sad"](net(w), x, y, lam=0), has_aux=True))(weights)
    close(got, defended("fgsm")(weights, x, y), rtol=1e-5)


@pytest.mark.parametrize("stop", [("first",), ("second",), ("first", "second")])
def test_dissimilarity_teaches_through_both_arguments(stop):
    (x, y), weights = batch(), draw()
    at = points_by_hand("e2sad")(weights, x, y)
    _, got = defended("e2sad")(weights, x, y)
    stopped = jax.jit(jax.grad(lambda w: value("e2sad", w, x, y, at, stop=stop)[0]))(weights)
    assert np.abs(got["w2"] - stopped["w2"]).max() > 0.02 * np.abs(got["w2"]).max()


@pytest.mark.parametrize("clip", [False, True])
def test_e2sad_clips_the_second_point_only_when_asked(clip):
    (x, y), weights = batch(), draw()
    first, other = points_by_hand("e2sad")(weights, x, y)
    assert (other < 0).any()
    assert (other > 1).any()
    want, _ = by_hand("e2sad")(weights, x, y, (first, jnp.clip(other, 0, 1) if clip else other), 0.6, 0.7)
    close(VARIANTS["e2sad"](net(weights), x, y, clip_second=clip), want)


# --- the l2 ball


def within(x: jax.Array, z: jax.Array, eps: float) -> jax.Array:
    """The point of the l2 ball that an attack goes to from z, inside the range."""
    away = jnp.sqrt(((z - x) ** 2).sum((1, 2, 3), keepdims=True))
    return jnp.clip(x + (z - x) * jnp.minimum(1, eps / jnp.maximum(away, 1e-12)), 0, 1)


def slope(function: LogitsFn, z: jax.Array) -> jax.Array:
    g = jax.grad(lambda v: function(v).sum())(z)
    return g / jnp.sqrt((g**2).sum((1, 2, 3), keepdims=True))


@pytest.mark.parametrize(
    "name", mostly_slow(["pgd", "trades", "rs_fgsm", "n_fgsm", "e2sad", "e2sad ball"], ["e2sad", "rs_fgsm"])
)
def test_l2(name):
    """Steps along the gradient at length 1, in the l2 ball; the random points by the library, tested elsewhere."""
    (x, y), weights, eps = batch(), draw(), 0.8
    f, keys = net(weights), core.per_image_keys("l2", KEY, N)

    def loss(z: jax.Array) -> jax.Array:
        return J(weights, z, y)

    def changed(z: jax.Array) -> jax.Array:
        return dissimilarity(weights, z, z)

    attack = functools.partial(attacks.pgd, norm="l2", eps=eps, steps=1)
    match name:
        case "pgd":
            want = loss(attacks.pgd(KEY, loss, x, norm="l2", eps=eps, steps=STEPS))
        case "rs_fgsm":
            want = loss(attack(KEY, loss, x, step_size=1.25 * eps))
        case "n_fgsm":
            start = jnp.clip(x + 2 * eps * core.ball("l2", x, eps, None).sample(keys, x), 0, 1)
            want = loss(jnp.clip(start + eps * slope(loss, start), 0, 1))
        case "trades":
            p = jax.nn.softmax(f(x))

            def divergence(z: jax.Array) -> jax.Array:
                return (p * (jnp.log(p) - jax.nn.log_softmax(f(z)))).sum(-1)

            z = within(x, x + 1e-3 * jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys), eps)
            for _ in range(STEPS):
                z = within(x, z + 2.5 * eps / STEPS * slope(divergence, z), eps)
            want = loss(x) + 6 * divergence(z)
        case "e2sad":
            z = within(x, x + eps * slope(loss, x), eps)
            want = 0.6 * loss(x) + 0.4 * loss(z) + 0.7 * dissimilarity(weights, z, z + EPS2 * slope(changed, z))
        case "e2sad ball":
            z = attack(jax.random.fold_in(KEY, 1), loss, x, step_size=eps)
            other = within(x, z + EPS2 * slope(changed, z), eps)
            want = 0.6 * loss(x) + 0.4 * loss(z) + 0.7 * dissimilarity(weights, z, other)
    budget = {"eps1": eps} if name.startswith("e2sad") else {"eps": eps}
    got, _ = VARIANTS[name](f, x, y, norm="l2", **budget)
    close(got, want.mean())
    assert abs(got - VARIANTS[name](f, x, y, **budget)[0]) > 1e-3  # another ball


# --- the second point


def test_total_climbs_the_entropy():
    """Its sign against central differences of the entropy in float64, pixel by pixel."""
    (x, _), weights = batch(), {key: np.float64(leaf) for key, leaf in draw().items()}

    def entropy(z: np.ndarray) -> np.ndarray:
        exps = np.exp(np.tanh(z @ weights["w1"] + weights["b1"]) @ weights["w2"])
        p = exps / exps.sum(-1, keepdims=True)
        return -(p * np.log(p)).sum(-1)

    got = np.sign(np.asarray(attacks.second_step(net(draw()), x, eps=0.1)) - np.asarray(x)).reshape(N, D)
    flat_x, step = np.float64(x).reshape(N, D), 1e-5
    for pixel in range(D):
        unit = step * np.eye(D)[pixel]
        difference = entropy(flat_x + unit) - entropy(flat_x - unit)
        np.testing.assert_array_equal(got[:, pixel], np.sign(difference))


def test_literal_has_only_rounding_noise_to_follow(monkeypatch):
    """Eq. 7 as it stands, seen where the attack takes its gradient: below 1e-6 of the total one."""
    seen = {}
    original = core.input_gradient

    def watched(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        seen[objective] = original(function, x)
        return seen[objective]

    monkeypatch.setattr(sys.modules["e2sad_jax.attacks.second_step"], "input_gradient", watched)
    for objective in ("total", "literal"):
        attacks.second_step(net(draw()), batch()[0], eps=0.1, objective=objective)
    assert np.abs(seen["total"]).max() > 1e-2
    assert np.abs(seen["literal"]).max() < 1e-6 * np.abs(seen["total"]).max()


def test_random_draws_both_signs():
    x = jnp.full((50, 20), 0.5)
    run = functools.partial(attacks.second_step, lambda z: z, x, eps=0.1, objective="random")
    move = np.asarray(run(key=KEY)) - 0.5
    np.testing.assert_allclose(np.abs(move), 0.1, rtol=0, atol=1e-6)
    assert 0.4 < (move > 0).mean() < 0.6
    np.testing.assert_array_equal(run(key=KEY), run(key=KEY))
    assert 0.4 < (run(key=KEY) != run(key=jax.random.key(8))).mean() < 0.6


@pytest.mark.parametrize("objective", attacks.OBJECTIVES)
def test_second_point_stays_around_the_first_and_is_clipped_only_when_asked(objective):
    """A step of eps around the first point: not around the clean image, nor in its range; noise repeats by key."""
    (x, y), f = batch(), net(draw())

    def run(key: jax.Array = KEY, **kwargs: Any) -> np.ndarray:
        def loss(z: jax.Array) -> jax.Array:
            return losses.cross_entropy(f(z), y)

        return np.asarray(attacks.second_step(f, x, eps=0.3, objective=objective, loss_fn=loss, key=key, **kwargs))

    assert (np.abs(run() - x)[run() != x] > 0.3 - 1e-6).all()
    if objective != "literal":  # rounding noise may well be zero
        assert run().min() < -0.1
        assert run().max() > 1.1
    np.testing.assert_allclose(run(bounds=(0.0, 1.0)), run().clip(0, 1), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(run(), run())
    assert (run() != run(jax.random.key(8))).any() == (objective in ("noise", "random"))
