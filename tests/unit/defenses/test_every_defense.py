"""What every registered defense has to be: differentiable, finite, a pure function, strict about its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import losses
from e2sad_jax.defenses import DEFENSES
from tests.helpers import mostly_slow
from tests.unit.defenses.toy import DELTA, SHAPE, VARIANTS, K, N, batch, close, defended, draw, net

every_variant = pytest.mark.parametrize("name", VARIANTS)
some_in_every_run = pytest.mark.parametrize(
    "name", mostly_slow(VARIANTS, ("e2sad ball", "fgsm", "free", "atta", "trades"))
)
pytestmark = pytest.mark.usefixtures("unoptimized")

NAN = float("nan")
BUDGETS = ("eps", "eps1", "eps2")
TAKING = {
    argument: [name for name, defense in DEFENSES.items() if defense.takes(argument)]
    for argument in (*BUDGETS, "alpha", "lam", "beta", "weight", "noise", "steps", "step_size", "bounds")
}


@some_in_every_run
def test_gradient_against_finite_differences(name):
    """In float64; penalties are second derivatives. No sign turns within so small a step."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        (x, y), weights = batch(dtype=jnp.float64), draw(dtype=jnp.float64)
        both = jax.jit(jax.value_and_grad(lambda w: VARIANTS[name](net(w), x, y)[0]))
        _, gradient = both(weights)
        rs, step = np.random.RandomState(0), 1e-5
        for _ in range(3):
            way = {key: rs.randn(*leaf.shape) for key, leaf in weights.items()}
            up, down = (both({key: leaf + s * step * way[key] for key, leaf in weights.items()})[0] for s in (1, -1))
            slope = sum((gradient[key] * way[key]).sum() for key in weights)
            np.testing.assert_allclose((up - down) / (2 * step), slope, rtol=1e-6, atol=1e-8)
            assert abs(slope) > 1e-4


@some_in_every_run
def test_finite_where_gradients_vanish_and_where_logits_saturate(name):
    """The norm's own derivative at zero is 0 / 0; with nothing to climb the attack stays at the image."""
    for change in (("w1",), ("w2",), ("w1", "b1", "w2"), "saturated"):
        (x, y), weights = batch(0), draw()
        if change == "saturated":
            weights |= {"w2": 1e4 * weights["w2"]}
        else:
            weights |= {key: jnp.zeros_like(weights[key]) for key in change}
        (loss, parts), gradient = defended(name)(weights, x, y)
        for leaf in jax.tree.leaves((loss, parts, gradient)):
            assert np.isfinite(leaf).all()
        if name == "hamm" and change != "saturated":
            assert parts["penalty"] == 0


@some_in_every_run
def test_vmap_over_models_and_a_traced_setting(name):
    """One program for several models, each with another budget or weight; a loss of its own for each."""
    (x, y), models = batch(), [draw(seed) for seed in range(3)]
    defense = DEFENSES[name.split()[0]]
    argument = next((a for a in (*BUDGETS, "weight") if defense.takes(a)), "")
    values = jnp.asarray([0.1, 0.15, 0.2])

    def run(weights, value):
        return VARIANTS[name](net(weights), x, y, **({argument: value} if argument else {}))

    one = jax.jit(run)
    want = [one(weights, value) for weights, value in zip(models, values, strict=True)]
    stacked = jax.jit(jax.vmap(run))(jax.tree.map(lambda *w: jnp.stack(w), *models), values)
    close(stacked, jax.tree.map(lambda *v: jnp.stack(v), *want))
    given = {argument: float(values[1])} if argument else {}
    close(VARIANTS[name](net(models[1]), x, y, **given), want[1])  # neither traced nor compiled
    assert len({float(loss) for loss, _ in want}) == 3


@pytest.mark.parametrize("name", [name for name, defense in DEFENSES.items() if defense.takes("key")])
def test_random_numbers_repeat_by_key(name):
    (x, y), f = batch(), net(draw())
    variant = VARIANTS["e2sad ball" if name == "e2sad" else name]
    loss = float(variant(f, x, y)[0])
    assert loss == float(variant(f, x, y)[0])
    assert loss != float(variant(f, x, y, key=jax.random.key(8))[0])


# --- weights of images


@some_in_every_run
def test_weights_leave_images_out(name):
    """Exactly: the loss, its parts and its gradient are those of the batch without them, whatever stands there."""
    (x, y), weights, kept = batch(), draw(), 5
    given = {"delta": DELTA[:kept]} if name == "free" else {}
    mask = jnp.arange(N) < kept

    @jax.jit
    def run(w, x, y, **kwargs):
        return jax.value_and_grad(lambda w: VARIANTS[name](net(w), x, y, **kwargs), has_aux=True)(w)

    want = run(weights, x[:kept], y[:kept], **given)
    for given_weights in (mask.astype(jnp.float32), 3 * mask.astype(jnp.float32)):
        close(run(weights, x, y.at[kept:].set(jnp.nan), weights=given_weights), want)
    assert abs(defended(name)(weights, x, y)[0][0] - want[0][0]) > 1e-4


@pytest.mark.parametrize("name", ["natural", "fgsm", "e2sad", "free"])
def test_weights_weigh(name):
    """Twice the weight is the image twice."""
    (x, y), weights = batch(), draw()
    twice = [*range(N), 2]
    given = {"delta": DELTA[jnp.array(twice)]} if name == "free" else {}
    want = VARIANTS[name](net(weights), x[jnp.array(twice)], y[jnp.array(twice)], **given)
    close(VARIANTS[name](net(weights), x, y, weights=np.ones(N) + (np.arange(N) == 2)), want)


# --- what a model returns


@pytest.mark.parametrize("name", DEFENSES)
def test_refuses_what_is_no_logits(name):
    """One logit would train on nothing. A tuple, as of a model that also returns its state, has no shape."""
    (x, y), f = batch(), net(draw())
    with pytest.raises(TypeError, match=r"the model returned a tuple; .*lambda x: f\(x\)\[0\]"):
        VARIANTS[name](lambda z: (f(z), None), x, y)
    with pytest.raises(ValueError, match=r"logits have shape \(8, 1\); .*binary_logits"):
        VARIANTS[name](lambda z: f(z)[:, :1], x, y[:, :1])


@pytest.mark.parametrize("name", ["e2sad", "trades", "hamm", "grad_align", "gat", "nuat", "n_fgsm qub"])
def test_a_masked_class_is_no_class(name):
    """A class with a logit of -inf and target 0: neither NaN nor another loss."""
    (x, y), weights = batch(), draw()

    def widened(w):
        return lambda z: jnp.concatenate([net(w)(z), jnp.full((len(z), 1), -jnp.inf)], axis=1)

    more = jnp.pad(y, ((0, 0), (0, 1)))
    got = jax.jit(jax.value_and_grad(lambda w: VARIANTS[name](widened(w), x, more), has_aux=True))(weights)
    close(got, defended(name)(weights, x, y))


@pytest.mark.parametrize("name", ["natural", "fgsm", "e2sad", "trades"])
def test_one_logit_as_two(name):
    """A binary model trains: its loss has a gradient, and its attack raises the loss."""
    (x, _), weights = batch(), draw()
    y = losses.soft_labels(jnp.arange(N) % 2, 2, 0)
    f = lambda w: lambda z: losses.binary_logits(net(w)(z)[:, 0])  # noqa: E731
    (loss, parts), gradient = jax.value_and_grad(lambda w: VARIANTS[name](f(w), x, y), has_aux=True)(weights)
    clean = losses.cross_entropy(f(weights)(x), y).mean()
    assert np.abs(gradient["w1"]).max() > 1e-3
    assert loss > clean - 1e-6
    if "adversarial" in parts and name != "free":
        assert parts["adversarial"] > clean + 0.01


# --- what is refused

WRONG_WEIGHTS = [(np.ones(3), r"\(3,\)"), (np.ones((8, 1)), r"\(8, 1\)"), (["a"] * 8, r"\(8,\)")]
REFUSED = [
    *[(name, {"alpha": a}, rf"alpha={a}; .*\[0, 1\]") for name in TAKING["alpha"] for a in (-0.1, 1.1, NAN)],
    *[
        (name, {argument: -0.1}, rf"^{name}: {argument}=-0.1; .*at least 0")
        for argument in BUDGETS
        for name in TAKING[argument]
    ],
    *[(name, {"steps": 0}, "steps=0; .*at least 1") for name in TAKING["steps"]],
    *[(name, {"step_size": -1.0}, "step_size=-1.0; .*above 0") for name in TAKING["step_size"]],
    *[(name, {"bounds": (1, 0)}, r"bounds=\(1, 0\); ") for name in TAKING["bounds"]],
    *[(n, {a: v}, rf"{a}={v}; .*\[0, inf") for a in ("lam", "beta", "weight") for n in TAKING[a] for v in (-0.1, NAN)],
    *[("fgsm", {"alpha": kind(2)}, "alpha=2.0; ") for kind in (np.float32, np.float64, jnp.float32)],
    ("fgsm", {"eps": np.float32(-0.5)}, "eps=-0.5; "),
    ("n_fgsm", {"noise": -1.0}, "noise=-1.0; .*at least 0"),
    *[(name, {"signs": v}, rf"^{name}: signs={v}; .*\[0, 1\]") for name in ("gat", "nuat") for v in (-0.1, 1.5)],
    *[(name, {"training_loss": "mse"}, f"^{name}: training_loss=.*mse.*one of ce, qub") for name in ("pgd", "n_fgsm")],
    *[(name, {"weights": w}, rf"^{name}: weights are .* {s}; ") for name in DEFENSES for w, s in WRONG_WEIGHTS],
    *[("fgsm", {"weights": np.array(w)}, "weights=.*at least 0") for w in ([-1.0, *[1] * 7], [NAN, *[1] * 7], [0] * 8)],
    *[
        (name, {"x": jnp.zeros((0, *SHAPE)), "y": jnp.zeros((0, K))}, f"^{name}: images have shape .*at least one")
        for name in DEFENSES
        if name != "free"
    ],
    ("strong_adversary", {"adversary": "best"}, "adversary='best'; it must be one of loss, alpha"),
    ("e2sad", {"second_step": "nonsense"}, "objective='nonsense'; .*total"),
    ("e2sad", {"adversarial_at": "third"}, "adversarial_at='third'; it must be one of first, second"),
    ("e2sad", {"second_step": "noise", "key": None}, "objective='noise' .*needs key"),
    ("e2sad", {"random_start": True, "key": None}, "e2sad: random_start draws random numbers and needs key"),
    ("free", {"delta": jnp.zeros((N, 2))}, r"delta has shape \(8, 2\); it must be .*\(8, 3, 4, 1\)"),
]


@pytest.mark.parametrize(("name", "kwargs", "message"), REFUSED)
def test_refuses(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        VARIANTS[name](net(draw()), **{**dict(zip("xy", batch(), strict=True)), **kwargs})


@pytest.mark.parametrize("name", DEFENSES)
def test_refuses_integer_labels(name):
    with pytest.raises(TypeError, match="soft_labels"):
        VARIANTS[name](net(draw()), batch()[0], jnp.arange(N) % K)
