"""Defenses against their equations written out by hand, the second point of e2SAD, and what a training step costs."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from e2sad_jax import attacks, defenses, losses, training
from e2sad_jax.attacks import core
from e2sad_jax.training.config import Config, preset

N, SHAPE, HIDDEN, K = 8, (3, 4, 1), 16, 3
D = int(np.prod(SHAPE))
KEY = jax.random.key(7)
EPS, EPS2, STEPS = 0.2, 0.1, 3
Weights = dict[str, jax.Array]
LogitsFn = Callable[[jax.Array], jax.Array]


def draw(seed: int = 0, dtype: Any = jnp.float32) -> Weights:
    rs = np.random.RandomState(seed)
    shapes = {"w1": (D, HIDDEN), "b1": (1, HIDDEN), "w2": (HIDDEN, K)}
    return {name: jnp.asarray(0.5 * rs.randn(*shape), dtype) for name, shape in shapes.items()}


def net(weights: Weights) -> LogitsFn:
    return lambda z: jnp.tanh(z.reshape(z.shape[0], -1) @ weights["w1"] + weights["b1"]) @ weights["w2"]


def batch(delta: float = 0.25, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    x = np.random.RandomState(1).rand(N, *SHAPE)
    return jnp.asarray(x, dtype), losses.soft_labels(jnp.arange(N) % K, K, delta).astype(dtype)


# Every defense as a function of logits_fn, x, y; its weights may be overridden.
DEFENSES: dict[str, Callable[..., Any]] = {
    "natural": defenses.natural,
    "fgsm_training": functools.partial(defenses.fgsm_training, eps=EPS),
    "ifgsm_training": functools.partial(defenses.ifgsm_training, eps=EPS, steps=STEPS),
    "pgd_minmax": functools.partial(defenses.pgd_minmax, key=KEY, eps=EPS, steps=STEPS),
    "hamm": functools.partial(defenses.hamm, eps=EPS),
    **{
        f"e2sad_{objective}": functools.partial(
            defenses.e2sad, eps1=EPS, eps2=EPS2, lam=0.7, objective=objective, key=KEY
        )
        for objective in attacks.OBJECTIVES
        if objective != "literal"  # the sign of rounding noise is as it falls
    },
    "e2sad_ball": functools.partial(
        defenses.e2sad, eps1=EPS, eps2=EPS2, lam=0.7, random_start=True, ball_second=True, key=KEY
    ),
}
MIXED = [name for name in DEFENSES if name not in ("natural", "pgd_minmax")]
every_defense = pytest.mark.parametrize("name", DEFENSES)

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
    if name == "pgd_minmax":
        return (attacks.pgd(KEY, loss, x, eps=EPS, steps=STEPS),) * 2
    if name == "e2sad_ball":
        z = attacks.pgd(jax.random.fold_in(KEY, 1), loss, x, eps=EPS, steps=1, step_size=EPS)
        move = direction(lambda v: dissimilarity(weights, v, v), z)
        return z, jnp.clip(jnp.clip(z + EPS2 * move, x - EPS, x + EPS), 0, 1)
    z, steps = x, STEPS if name == "ifgsm_training" else 1
    for _ in range(steps):
        z = jnp.clip(jnp.clip(z + EPS / steps * direction(loss, z), x - EPS, x + EPS), 0, 1)
    match name.removeprefix("e2sad_"):
        case "total":
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
    if name == "pgd_minmax":
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


def gradient_of(function: Callable[[Weights], jax.Array], weights: Weights) -> Weights:
    return jax.jit(jax.grad(function))(weights)


# Each is compiled once for all tests.


@functools.cache
def defended(defense: Callable[..., Any]) -> Callable[..., Any]:
    """A defense's loss with its parts, and its gradient, of weights, images and labels."""
    return jax.jit(jax.value_and_grad(lambda w, x, y: defense(net(w), x, y), has_aux=True))


@functools.cache
def points_by_hand(name: str) -> Callable[..., Any]:
    return jax.jit(functools.partial(points, name))


@functools.cache
def by_hand(name: str) -> Callable[..., Any]:
    """`value` and its gradient, of weights, images, labels, points and alpha."""
    return jax.jit(jax.value_and_grad(functools.partial(value, name), has_aux=True))


def close(got: Any, want: Any, rtol: float = 1e-4) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), got, want)


@every_defense
@pytest.mark.parametrize("delta", [0, 0.25])
def test_loss_parts_and_gradient(name, delta):
    """Parts come unweighted; the gradient is that at precomputed, constant points."""
    (x, y), weights = batch(delta), draw()
    at = points_by_hand(name)(weights, x, y)
    loss, got = defended(DEFENSES[name])(weights, x, y)
    hand, want = by_hand(name)(weights, x, y, at, 0.6)
    close(loss, hand)
    assert min(np.abs(leaf).max() for leaf in want.values()) > 1e-3
    close(got, want)


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("alpha", [0, 0.0, 0.25, 1])
def test_alpha(name, alpha):
    """With alpha = 0 no clean term is left, and yet it attacks; with alpha = 1 nothing of the adversarial loss."""
    (x, y), weights = batch(), draw()
    loss, parts = jax.jit(lambda w: DEFENSES[name](net(w), x, y, alpha=alpha))(weights)
    at = points_by_hand(name)(weights, x, y)
    (want, terms), _ = by_hand(name)(weights, x, y, at, float(alpha))
    clean = terms["clean"]
    if name == "e2sad_ball" and alpha == 0:
        del terms["clean"]  # not looked at
    close((loss, parts), (want, terms))
    assert parts["adversarial"] > clean + 0.05


def test_a_random_start_needs_a_key():
    (x, y), weights = batch(), draw()
    with pytest.raises(ValueError, match="e2sad: random_start draws random numbers and needs key"):
        defenses.e2sad(net(weights), x, y, random_start=True)


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


@pytest.mark.parametrize("name", MIXED)
def test_weights_may_be_traced(name):
    """The weights as arguments of a jitted function, one compilation for all."""
    (x, y), weights = batch(), draw()
    names = ("alpha", "lam") if name.startswith("e2sad") else ("alpha",)
    run = jax.jit(lambda *v: DEFENSES[name](net(weights), x, y, **dict(zip(names, v, strict=True))))
    for numbers in ((0.6, 0.1), (0.25, 2.0), (0.0, 0.5), (1.0, 0.0)):
        given = numbers[: len(names)]
        got, parts = run(*given)
        want, terms = DEFENSES[name](net(weights), x, y, **dict(zip(names, given, strict=True)))
        close((got, {term: parts[term] for term in terms}), (want, terms))


@pytest.mark.parametrize("kind", [np.float32, np.float64, jnp.float32])
def test_weights_may_be_arrays(kind):
    """NumPy's and JAX's scalars mean what Python's mean: alpha = 0 attacks all the same."""
    (x, y), weights = batch(), draw()
    for alpha in (0, 0.25):
        want = DEFENSES["fgsm_training"](net(weights), x, y, alpha=alpha)
        close(DEFENSES["fgsm_training"](net(weights), x, y, alpha=kind(alpha)), want, rtol=1e-6)


def test_e2sad_without_dissimilarity_is_fgsm_training():
    (x, y), weights = batch(), draw()
    want, got = DEFENSES["fgsm_training"], functools.partial(DEFENSES["e2sad_total"], lam=0)
    close(got(net(weights), x, y)[0], want(net(weights), x, y)[0], rtol=1e-6)
    gradients = [gradient_of(lambda w, f=f: f(net(w), x, y)[0], weights) for f in (got, want)]
    close(*gradients)


@pytest.mark.parametrize("stop", [("first",), ("second",), ("first", "second")])
def test_dissimilarity_teaches_through_both_arguments(stop):
    (x, y), weights = batch(), draw()
    at = points("e2sad_total", weights, x, y)
    got = gradient_of(lambda w: DEFENSES["e2sad_total"](net(w), x, y)[0], weights)
    stopped = gradient_of(lambda w: value("e2sad_total", w, x, y, at, stop=stop)[0], weights)
    assert np.abs(got["w2"] - stopped["w2"]).max() > 0.02 * np.abs(got["w2"]).max()


@pytest.mark.parametrize("clip", [False, True])
def test_e2sad_clips_the_second_point_only_when_asked(clip):
    (x, y), weights = batch(), draw()
    first, other = points("e2sad_total", weights, x, y)
    assert (other < 0).any()
    assert (other > 1).any()
    want = value("e2sad_total", weights, x, y, (first, jnp.clip(other, 0, 1) if clip else other))
    close(DEFENSES["e2sad_total"](net(weights), x, y, clip_second=clip), want)


# --- derivatives, transformations, training


@every_defense
def test_gradient_against_finite_differences(name):
    """In float64; Hamm's penalty is a second derivative. No sign turns within so small a step."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        (x, y), weights = batch(dtype=jnp.float64), draw(dtype=jnp.float64)
        both = jax.jit(jax.value_and_grad(lambda w: DEFENSES[name](net(w), x, y)[0]))
        _, gradient = both(weights)
        rs, step = np.random.RandomState(0), 1e-5
        for _ in range(3):
            way = {key: rs.randn(*leaf.shape) for key, leaf in weights.items()}
            up, down = (both({key: leaf + s * step * way[key] for key, leaf in weights.items()})[0] for s in (1, -1))
            slope = sum((gradient[key] * way[key]).sum() for key in weights)
            np.testing.assert_allclose((up - down) / (2 * step), slope, rtol=1e-6, atol=1e-8)
            assert abs(slope) > 1e-4


@every_defense
@pytest.mark.parametrize("zero", [("w1",), ("w2",), ("w1", "b1", "w2")])
def test_finite_where_the_input_gradient_vanishes(name, zero):
    """The norm's own derivative at zero is 0 / 0; with nothing to climb the attack stays at the image."""
    (x, y), weights = batch(), draw()
    weights |= {key: jnp.zeros_like(weights[key]) for key in zero}
    (loss, parts), gradient = defended(DEFENSES[name])(weights, x, y)
    for leaf in jax.tree.leaves((loss, parts, gradient)):
        assert np.isfinite(leaf).all()
    if name == "hamm":
        assert parts["penalty"] == 0


@every_defense
def test_jit_and_vmap_over_models(name):
    (x, y), models_ = batch(), [draw(seed) for seed in range(3)]

    def run(weights: Weights) -> Any:
        return DEFENSES[name](net(weights), x, y)

    want = [defended(DEFENSES[name])(weights, x, y)[0] for weights in models_]
    close(run(models_[0]), want[0])
    stacked = jax.jit(jax.vmap(run))(jax.tree.map(lambda *w: jnp.stack(w), *models_))
    close(stacked, jax.tree.map(lambda *v: jnp.stack(v), *want))


def training_decreases_the_loss(defense: Callable[..., Any]) -> None:
    (x, y), weights = batch(), draw()
    tx = optax.adam(0.02)
    state = tx.init(weights)

    @jax.jit
    def step(weights: Weights, state: Any) -> Any:
        loss, gradient = jax.value_and_grad(lambda w: defense(net(w), x, y)[0])(weights)
        with jax.numpy_dtype_promotion("standard"):  # Optax's own need
            updates, state = tx.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    history = []
    for _ in range(30):
        weights, state, loss = step(weights, state)
        history.append(float(loss))
    assert np.isfinite(history).all()
    assert np.mean(history[-5:]) < 0.9 * history[0]


def refuses_integer_labels(defense: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="soft_labels"):
        defense(net(draw()), batch()[0], jnp.arange(N) % K)


@every_defense
def test_training_decreases_the_loss(name):
    training_decreases_the_loss(DEFENSES[name])


# --- what is refused

NAN = float("nan")
REFUSED = [
    *[(name, {"alpha": a}, rf"alpha={a}; .*\[0, 1\]") for name in MIXED for a in (-0.1, 1.1, NAN)],
    *[("e2sad_total", {"lam": lam}, rf"lam={lam}; .*\[0, ") for lam in (-0.1, NAN)],
    *[("e2sad_total", {eps: -0.1}, "eps=-0.1; .*at least 0") for eps in ("eps1", "eps2")],
    *[(n, {"eps": -0.1}, "eps=-0.1; ") for n in ("fgsm_training", "ifgsm_training", "pgd_minmax", "hamm")],
    *[(name, {"steps": 0}, "steps=0; .*at least 1") for name in ("ifgsm_training", "pgd_minmax")],
    *[(name, {"step_size": -1}, "step_size=-1; .*above 0") for name in ("ifgsm_training", "pgd_minmax")],
    *[(name, {"bounds": (1, 0)}, r"bounds=\(1, 0\); ") for name in DEFENSES if name != "natural"],
    *[("fgsm_training", {"alpha": kind(2)}, "alpha=2.0; ") for kind in (np.float32, np.float64, jnp.float32)],
    ("fgsm_training", {"eps": np.float32(-0.5)}, "eps=-0.5; "),
    ("e2sad_total", {"objective": "nonsense"}, "objective='nonsense'; .*total"),
    ("e2sad_noise", {"key": None}, "objective='noise' .*needs key"),
]


@pytest.mark.parametrize(("name", "kwargs", "message"), REFUSED)
def test_refuses(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        DEFENSES[name](net(draw()), *batch(), **kwargs)


@every_defense
def test_refuses_integer_labels(name):
    refuses_integer_labels(DEFENSES[name])


# --- the cost, by XLA's own count


@functools.cache
def step_flops(defense: str, **settings: Any) -> float:
    """Of the step that training runs: the Table 4 network at batch 256; compiled, not run."""
    with jax.numpy_dtype_promotion("standard"):  # Optax's own need
        return training.step_flops(Config(defense=defense, **settings), (28, 28, 1), 10)


@pytest.mark.parametrize(
    ("defense", "settings", "low", "high"),
    [
        ("fgsm", {}, 1.9, 2.05),
        ("e2sad", {}, 3.0, 3.4),
        ("fgsm", {"alpha": 0.0}, 1.6, 1.75),
        ("e2sad", {"lam": 0.0}, 1.9, 2.05),
        ("e2sad", preset("robust", 0.3), 2.9, 3.1),
        ("e2sad", preset("robust", 0.3) | {"lam": 0.0}, 1.6, 1.75),
        ("e2sad", preset("robust", 0.3) | {"random_start": False}, 2.9, 3.1),
        ("hamm", {}, 2.5, 3.1),
        ("ifgsm", {"attack_steps": 1}, 1.9, 2.05),
        ("ifgsm", {"attack_steps": 2}, 2.6, 2.75),  # the first step's gradient is shared, too
        ("ifgsm", {"attack_steps": 5}, 4.5, 4.8),
    ],
)
def test_cost_in_natural_steps(defense, settings, low, high):
    """The attack's backward pass is shared with training's: 2.02 instead of 2.34 for FGSM; and it is there at all."""
    assert low <= step_flops(defense, **settings) / step_flops("natural") <= high


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
