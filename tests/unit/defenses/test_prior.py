"""ATTA, FGSM-PGI and FGSM-UAP against their equations in float64 by hand, over several calls."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import defenses
from e2sad_jax.defenses import DEFENSES, Defense
from tests.unit.defenses.toy import EPS, KEY, SHAPE, N, batch, close, draw, net

pytestmark = pytest.mark.usefixtures("unoptimized")

DECAY, WEIGHT, STEP = 0.8, 2.0, 0.12  # a decay at which the momentum turns signs, a step that does not cross the ball


class Model:
    """The toy network in float64: logits, and the loss's gradient in the images by the chain rule."""

    def __init__(self, seed: int) -> None:
        self.w = {name: np.asarray(leaf, np.float64) for name, leaf in draw(seed).items()}

    def hidden(self, z: np.ndarray) -> np.ndarray:
        return np.tanh(z.reshape(len(z), -1) @ self.w["w1"] + self.w["b1"])

    def logits(self, z: np.ndarray) -> np.ndarray:
        return self.hidden(z) @ self.w["w2"]

    def losses(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        f = self.logits(z)
        return (y * (np.log(np.exp(f).sum(1, keepdims=True)) - f)).sum(1)

    def gradient(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        p = np.exp(self.logits(z))
        back = (p / p.sum(1, keepdims=True) - y) @ self.w["w2"].T * (1 - self.hidden(z) ** 2)
        return (back @ self.w["w1"].T).reshape(z.shape)


def images() -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.asarray(a, np.float64) for a in batch())


def first_start(seed: int = 3, share: float = 1.5) -> np.ndarray:
    """Partly out of the ball and of the range: an attack brings it back."""
    return np.random.RandomState(seed).uniform(-share * EPS, share * EPS, (N, *SHAPE))


def into(x: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.clip(np.clip(z, x - EPS, x + EPS), 0, 1)


def float32(a: np.ndarray) -> jax.Array:
    return jnp.asarray(a, jnp.float32)


def jitted(name: str, **kwargs: Any) -> Any:
    return jax.jit(lambda weights, **given: getattr(defenses, name)(net(weights), *batch(), **given, **kwargs))


def regularised(model: Model, x: np.ndarray, y: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[float, dict]:
    parts = {
        "adversarial": model.losses(end, y).mean(),
        "deviation": ((model.logits(end) - model.logits(begin)) ** 2).mean(),
    }
    return parts["adversarial"] + WEIGHT * parts["deviation"], parts


def test_pgi_over_three_models():
    """The loss, what is kept, and both going into the next call, where the model is another one."""
    x, y = images()
    start, momentum = first_start(), np.zeros_like(x)
    kept = {"start": float32(start)}
    turned = 0.0
    run = jitted("pgi", eps=EPS, step_size=STEP, weight=WEIGHT, decay=DECAY)
    for seed in range(3):
        model, weights = Model(seed), draw(seed)
        begin = into(x, x + start)
        g = model.gradient(begin, y)
        end = into(x, begin + STEP * np.sign(g))
        momentum = DECAY * momentum + (1 - DECAY) * g / np.abs(g).max((1, 2, 3), keepdims=True)
        start = into(x, begin + STEP * np.sign(momentum)) - x
        want, parts = regularised(model, x, y, begin, end)

        loss, got = run(weights, **kept)
        close(loss, want)
        close(got, {**parts, "delta": start, "momentum": momentum})
        turned = max(turned, (np.sign(g) != np.sign(momentum)).mean())
        kept = {"start": got["delta"], "momentum": got["momentum"]}
        start, momentum = (np.asarray(got[name], np.float64) for name in ("delta", "momentum"))
        assert np.abs(momentum).max() <= 1
    assert turned > 0.05, "the momentum says another thing than the last gradient"
    assert np.abs(end - begin).max() > STEP / 2, "the attack moves"


def test_of_signs_alone_the_momentum_would_be_the_last_gradient():
    """Why the momentum adds up gradients: at the authors' decay no sum of earlier signs outweighs the last one."""
    signs = np.sign(np.random.RandomState(0).randn(200, 50))
    momentum = np.zeros(50)
    for sign in signs:
        momentum = 0.3 * momentum + sign
        np.testing.assert_array_equal(np.sign(momentum), sign)


@pytest.mark.parametrize("steps", [1, 3])
def test_atta_goes_on_where_it_ended(steps):
    x, y = images()
    start = first_start()
    kept, run = float32(start), jitted("atta", eps=EPS, steps=steps, step_size=STEP)
    for seed in range(2):
        model, z = Model(seed), into(x, x + start)
        for _ in range(steps):
            z = into(x, z + STEP * np.sign(model.gradient(z, y)))
        loss, parts = run(draw(seed), start=kept)
        close((loss, parts), (model.losses(z, y).mean(), {"adversarial": model.losses(z, y).mean(), "delta": z - x}))
        kept, start = parts["delta"], z - x


def test_attas_own_step():
    """Eps / 2, and for more steps as Madry et al.'s."""
    (x, y), f = batch(), net(draw())
    start = float32(first_start())
    for steps, size in ((1, EPS / 2), (10, EPS / 4)):
        want = defenses.atta(f, x, y, start=start, eps=EPS, steps=steps, step_size=size)
        close(defenses.atta(f, x, y, start=start, eps=EPS, steps=steps), want)


def test_small_steps_add_up():
    """One step an epoch of a tenth of the budget: on a fixed model the loss climbs to that of ten steps in a row."""
    (x, y), f = batch(), net(draw())
    start, seen, run = jnp.zeros_like(x), [], jitted("atta", eps=EPS, step_size=EPS / 10)
    for _ in range(10):
        loss, parts = run(draw(), start=start)
        start = parts["delta"]
        seen.append(float(loss))
    assert (np.diff(seen) > 0).all()
    want = defenses.atta(f, x, y, start=jnp.zeros_like(x), eps=EPS, steps=10, step_size=EPS / 10)[0]
    np.testing.assert_allclose(seen[-1], want, rtol=1e-5)
    assert seen[-1] > defenses.natural(f, x, y)[0] + 0.1


def test_uap_over_three_models():
    """The perturbation and the momentum of the next step, whose gradient is the attack's and not the loss's."""
    x, y = images()
    u, momentum = np.zeros(SHAPE), np.zeros(SHAPE)
    delta = jnp.zeros((2, *SHAPE))
    run = jitted("uap", eps=EPS, step_size=STEP, weight=WEIGHT)
    both = jax.jit(jax.value_and_grad(lambda d, w: run(w, delta=d), has_aux=True))
    for seed in range(3):
        model = Model(seed)
        begin = into(x, x + u)
        g = model.gradient(begin, y)
        end = into(x, begin + STEP * np.sign(g))
        momentum = DECAY * momentum + g.sum(0) / np.abs(g).sum()
        u = np.clip(u + EPS * np.sign(momentum), -EPS, EPS)
        want = regularised(model, x, y, begin, end)

        got, gradient = both(delta, draw(seed))
        close(got, want)
        close(gradient, np.stack([g.sum(0) / np.abs(g).sum(), np.zeros(SHAPE)]))
        delta = defenses.uap_ascent(delta, gradient, eps=EPS, decay=DECAY)
        close(delta, np.stack([u, momentum]))
    assert np.abs(u).max() == EPS


def test_uap_climbs_for_all_images():
    """On a fixed model the perturbation alone raises the mean loss."""
    (x, y), f = batch(0), net(draw())
    delta = jnp.zeros((2, *SHAPE))
    ascent = jax.jit(jax.grad(lambda d: defenses.uap(f, x, y, delta=d, eps=EPS)[0]))
    for _ in range(5):
        gradient = ascent(delta)
        delta = defenses.uap_ascent(delta, gradient, eps=EPS)
    raised = defenses.natural(f, jnp.clip(x + delta[:1], 0, 1), y)[0]
    assert raised > defenses.natural(f, x, y)[0] + 0.05


# --- of all three


def called(name: str, weights: dict, x: jax.Array, y: jax.Array, start: np.ndarray, **kwargs):
    given = {"delta": float32(jnp.stack([start[0], 0 * start[0]]))} if name == "uap" else {"start": float32(start)}
    given |= {} if name == "atta" else {"weight": WEIGHT}
    return getattr(defenses, name)(net(weights), x, y, **{**given, "eps": EPS, "step_size": STEP, **kwargs})


@pytest.mark.parametrize("name", ["atta", "pgi", "uap"])
def test_another_start_is_another_point(name):
    (x, y), weights = batch(), draw()
    run = jax.jit(lambda start: called(name, weights, x, y, start)[1]["adversarial"])
    losses = [float(run(first_start(seed))) for seed in (3, 4)]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert min(losses) > defenses.natural(net(weights), x, y)[0] + 0.01


@pytest.mark.parametrize("name", ["pgi", "uap"])
def test_the_gradient_flows_through_both_of_the_regularisers_arguments(name):
    """Against differences of the equation at fixed points, in float64."""
    x, y = images()
    start = first_start(share=0.9)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        weights = draw(dtype=jnp.float64)
        gradient = jax.jit(jax.grad(lambda w: called(name, w, jnp.asarray(x), jnp.asarray(y), start)[0]))(weights)
    model = Model(0)
    begin = into(x, x + np.float64(np.float32(start[0] if name == "uap" else start)))
    end = into(x, begin + STEP * np.sign(model.gradient(begin, y)))
    rs = np.random.RandomState(0)
    for _ in range(3):
        way, values = {key: rs.randn(*leaf.shape) for key, leaf in model.w.items()}, []
        for step in (1e-5, -1e-5):
            moved = Model(0)
            moved.w = {key: leaf + step * way[key] for key, leaf in model.w.items()}
            values.append(regularised(moved, x, y, begin, end)[0])
        slope = sum((np.asarray(gradient[key]) * way[key]).sum() for key in way)
        np.testing.assert_allclose((values[0] - values[1]) / 2e-5, slope, rtol=1e-5)


@pytest.mark.parametrize("name", ["pgi", "uap"])
def test_without_its_weight_the_regulariser_is_not_computed(name):
    (x, y), weights = batch(), draw()
    loss, parts = called(name, weights, x, y, first_start())
    plain, rest = called(name, weights, x, y, first_start(), weight=0.0)
    assert "deviation" not in rest
    close(plain, parts["adversarial"])
    assert loss > plain + 1e-3


def test_weights_leave_images_out_of_the_universal_perturbation():
    (x, y), weights, kept = batch(), draw(), 5
    delta = jnp.zeros((2, *SHAPE))
    mask = (jnp.arange(N) < kept).astype(jnp.float32)

    @jax.jit
    def ascent(x, y, weights_of):
        return jax.grad(lambda d: defenses.uap(net(weights), x, y, delta=d, eps=EPS, weights=weights_of)[0])(delta)

    close(ascent(x, y.at[kept:].set(jnp.nan), mask), ascent(x[:kept], y[:kept], jnp.ones(kept)))


def test_what_pgi_keeps_of_an_image_does_not_depend_on_the_rest_of_the_batch():
    (x, y), f, start = batch(), net(draw()), float32(first_start())
    run = jax.jit(functools.partial(defenses.pgi, f, eps=EPS))
    parts, half = (run(x[:n], y[:n], start=start[:n], momentum=start[:n])[1] for n in (N, N // 2))
    for name in ("delta", "momentum"):
        close(parts[name][: N // 2], half[name])


def test_without_a_start_it_is_a_random_one_and_nothing_is_kept():
    (x, y), f = batch(), net(draw())
    want = defenses.rs_fgsm(f, x, y, key=KEY, eps=EPS, step_size=EPS / 2)[0]
    close(defenses.atta(f, x, y, key=KEY, eps=EPS), (want, {"adversarial": want}))
    assert set(defenses.pgi(f, x, y, key=KEY, eps=EPS)[1]) == {"adversarial", "deviation"}


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("pgi", {"momentum": jnp.zeros((N, *SHAPE))}, "pgi: momentum without start"),
        ("pgi", {"start": jnp.zeros((N, 2))}, "pgi: start is float32 .*images' shape"),
        ("pgi", {"start": jnp.zeros((N, *SHAPE)), "momentum": jnp.zeros((2, *SHAPE))}, "pgi: momentum is float32"),
        ("pgi", {"key": KEY, "decay": 1.5}, r"pgi: decay=1.5; it must lie in \[0, 1\]"),
        ("atta", {"start": jnp.zeros((N, 2))}, "start is float32 .*images' shape"),
        ("uap", {"delta": jnp.zeros((N, *SHAPE))}, r"uap: delta has shape \(8, 3, 4, 1\); .*\(2, 3, 4, 1\)"),
    ],
)
def test_refuses(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        getattr(defenses, name)(net(draw()), *batch(), **kwargs)
    with pytest.raises(ValueError, match=r"uap_ascent: decay=2; it must lie in \[0, 1\]"):
        defenses.uap_ascent(jnp.zeros((2, *SHAPE)), jnp.zeros((2, *SHAPE)), eps=EPS, decay=2)


def test_only_a_loss_that_takes_delta_carries_one():
    with pytest.raises(ValueError, match=r"mine: carried=2 is of a loss that takes delta"):
        Defense(lambda f, x, y: 0, "mine", carried=2)
    assert DEFENSES["uap"].carried == 2
