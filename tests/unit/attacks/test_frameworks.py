"""Attacks and defenses inside JAX's own transformations, and with four ways of writing the same network."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from e2sad_jax import attacks, defenses, losses
from e2sad_jax._compile import straight_line
from e2sad_jax.attacks import core
from e2sad_jax.networks import cpu_conv

N, SHAPE, HIDDEN, K = 8, (3, 4, 1), 16, 3
D = int(np.prod(SHAPE))
KEY = jax.random.key(7)
LogitsFn = Callable[[jax.Array], jax.Array]
Weights = dict[str, jax.Array]


def draw(seed: int = 0) -> Weights:
    rs = np.random.RandomState(seed)
    shapes = {"w1": (D, HIDDEN), "b1": (1, HIDDEN), "w2": (HIDDEN, K), "b2": (1, K)}
    return {name: jnp.asarray(0.5 * rs.randn(*shape), jnp.float32) for name, shape in shapes.items()}


def images(*batch: int) -> jax.Array:
    return jnp.asarray(np.random.RandomState(1).rand(*batch, *SHAPE), jnp.float32)


def plain(weights: Weights) -> LogitsFn:
    def logits_fn(z: jax.Array) -> jax.Array:
        flat = z.reshape(z.shape[0], -1)
        return jnp.tanh(flat @ weights["w1"] + weights["b1"]) @ weights["w2"] + weights["b2"]

    return logits_fn


def targets(n: int = N) -> jax.Array:
    return losses.soft_labels(jnp.zeros(n, int), K)


def loss_of(logits_fn: LogitsFn) -> LogitsFn:
    """All images are of class 0, so that any part of a batch has its loss."""
    return lambda z: losses.cross_entropy(logits_fn(z), targets(z.shape[0]))


def second(objective: str) -> Callable[..., jax.Array]:
    return lambda f, key, x, eps=0.1: attacks.second_step(
        f, x, eps=eps, objective=objective, loss_fn=loss_of(f), key=key
    )


def fooled(f: LogitsFn) -> LogitsFn:
    return lambda z: f(z).argmax(-1) != 0


# Every attack as a function of a network, a key and images.
ATTACKS: dict[str, Callable[..., jax.Array]] = {
    "fgsm": lambda f, key, x, eps=0.2: attacks.fgsm(loss_of(f), x, eps=eps),
    "ifgsm": lambda f, key, x, eps=0.2: attacks.ifgsm(loss_of(f), x, eps=eps, steps=3),
    "pgd": lambda f, key, x, eps=0.2: attacks.pgd(key, loss_of(f), x, eps=eps, steps=3),
    "pgd_from_x": lambda f, key, x, eps=0.2: attacks.pgd(key, loss_of(f), x, eps=eps, steps=3, random_start=False),
    "pgd_restarts": lambda f, key, x, eps=0.2: attacks.pgd(
        key, loss_of(f), x, eps=eps, steps=2, step_size=0.03, restarts=2, misclassified_fn=fooled(f)
    ),
    **{f"second_{objective}": second(objective) for objective in attacks.OBJECTIVES},
}
# The sign of rounding noise is as it falls, so Eq. 7 to the letter has no business in a comparison.
COMPARED = [name for name in ATTACKS if name != "second_literal"]


def close(got: jax.Array, want: jax.Array, moved_from: jax.Array | None = None) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    if moved_from is not None:
        assert (np.abs(np.asarray(want) - np.asarray(moved_from)) > 0.01).mean() > 0.5


# --- transformations


quick = pytest.mark.usefixtures("unoptimized")


@pytest.mark.parametrize("name", COMPARED)
def test_jit_equals_eager(name):
    f, x = plain(draw()), images(N)
    close(jax.jit(lambda k, z: ATTACKS[name](f, k, z))(KEY, x), ATTACKS[name](f, KEY, x), x)


@quick
@pytest.mark.parametrize("name", COMPARED)
def test_vmap_equals_a_loop(name):
    """Over batches, keys, weights and budgets at once."""
    x, keys, eps = images(3, N), jax.random.split(KEY, 3), jnp.array([0.1, 0.2, 0.3])
    weights = jax.tree.map(lambda *w: jnp.stack(w), *[draw(seed) for seed in range(3)])
    attack = jax.jit(lambda w, k, z, e: ATTACKS[name](plain(w), k, z, e))
    want = [attack(*jax.tree.map(lambda leaf, i=i: leaf[i], (weights, keys, x, eps))) for i in range(3)]
    close(jax.jit(jax.vmap(attack))(weights, keys, x, eps), jnp.stack(want), x)


@quick
@pytest.mark.parametrize("name", ATTACKS)
def test_no_gradient_flows_through_the_result(name):
    """Neither to the images, nor to the weights, nor to the budget."""

    def total(x: jax.Array, weights: Weights, eps: jax.Array) -> jax.Array:
        return (ATTACKS[name](plain(weights), KEY, x, eps) ** 2).sum()

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(images(N), draw(), jnp.float32(0.1))
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, 0)


@functools.cache
def unsharded(name: str) -> jax.Array:
    f, keys = plain(draw()), jax.random.split(KEY, N)
    return jax.jit(lambda k, z: ATTACKS[name](f, k, z))(keys, images(N))


@quick
@pytest.mark.parametrize("name", [n for n in COMPARED if n not in ("second_noise", "second_random", "pgd_from_x")])
@pytest.mark.parametrize(("how", "loops"), [("shard_map", "cpu"), ("shard_map", "gpu"), ("sharding", "cpu")])
def test_four_devices_equal_one(name, how, loops, monkeypatch):
    """With a key per image; the two objectives with one key for the batch draw alike on every shard."""
    assert len(jax.devices()) >= 4
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    f, x, keys = plain(draw()), images(N), jax.random.split(KEY, N)
    want = unsharded(name)
    monkeypatch.setattr(jax, "default_backend", lambda: loops)

    def attack(k: jax.Array, z: jax.Array) -> jax.Array:
        return ATTACKS[name](f, k, z)

    spec = PartitionSpec("data")
    if how == "shard_map":
        attack = jax.shard_map(attack, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    sharded = NamedSharding(mesh, spec)
    got = jax.jit(attack)(jax.device_put(keys, sharded), jax.device_put(x, sharded))
    assert len(got.sharding.device_set) == 4
    close(got, want, x)


@pytest.mark.parametrize("name", ["second_noise", "second_random"])
def test_one_key_draws_alike_on_one_device_and_four(name):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    f, x = plain(draw()), images(N)
    attack = jax.jit(lambda z: ATTACKS[name](f, KEY, z))
    close(attack(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))), attack(x), x)


@quick
@pytest.mark.parametrize("name", ["ifgsm", "pgd", "pgd_from_x", "pgd_restarts"])
@pytest.mark.parametrize("per_image", [False, True])
def test_compiled_loop_equals_the_unrolled_one(name, per_image):
    """Also differentiated, as a defense does."""
    f, x = plain(draw()), images(N)
    key = jax.random.split(KEY, N) if per_image else KEY

    def run() -> tuple[jax.Array, str]:
        def attack(z: jax.Array) -> jax.Array:  # a new one, so that nothing is found traced
            return ATTACKS[name](f, key, z)

        return jax.jit(attack)(x), str(jax.make_jaxpr(attack)(x))

    with straight_line():
        unrolled, jaxpr = run()
    assert "scan" not in jaxpr
    assert "while" not in jaxpr
    looped, jaxpr = run()
    assert "scan" in jaxpr or "while" in jaxpr
    close(looped, unrolled, x)
    gradient = jax.jit(jax.grad(lambda z: loss_of(f)(ATTACKS[name](f, key, z)).sum() + z.sum()))(x)
    np.testing.assert_array_equal(gradient, 1)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_repeat(platform, monkeypatch):
    """body(times - 1, ... body(0, init)): order and count, on every platform."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for times in (0, 1, 5):
        got = core.repeat(times, lambda i, v: 10 * v + i, jnp.int32(1))
        assert int(got) == int("1" + "".join(str(i) for i in range(times)))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("convolution", ["XLA's", "ours", "none"])
def test_only_xlas_convolutions_on_the_cpu_are_not_put_into_a_loop(convolution, platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    w, settings = jnp.ones((3, 3, 1, 1)), ((1, 1), ((1, 1), (1, 1)), None, None, ("NHWC", "HWIO", "NHWC"))

    @jax.checkpoint  # a program inside the program is looked into too
    def step(z: jax.Array) -> jax.Array:
        match convolution:
            case "XLA's":
                return jax.lax.conv_general_dilated(z, w, *settings)
            case "ours":
                return cpu_conv.conv_general_dilated(z, w, *settings)
        return jnp.tanh(z)

    def both(z: jax.Array) -> jax.Array:
        return core.repeat(3, lambda i, z: step(z), z) + core.each(jnp.arange(3.0), lambda a: step(a * z)).sum(0)

    jaxpr = str(jax.make_jaxpr(both)(jnp.ones((2, 5, 5, 1))))
    loops = 0 if (convolution, platform) == ("XLA's", "cpu") else 2
    assert jaxpr.count("scan[") + jaxpr.count("while[") == loops


# --- frameworks


class Linen(nn.Module):
    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        z = jnp.tanh(nn.Dense(HIDDEN, name="first")(z.reshape(z.shape[0], -1)))
        return nn.Dense(K, name="second")(z)


class Nnx(nnx.Module):
    def __init__(self, weights: Weights) -> None:
        self.first = nnx.Linear(D, HIDDEN, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(HIDDEN, K, rngs=nnx.Rngs(1))
        for layer, w, b in ((self.first, "w1", "b1"), (self.second, "w2", "b2")):
            layer.kernel, layer.bias = nnx.Param(weights[w]), nnx.Param(weights[b][0])

    def __call__(self, z: jax.Array) -> jax.Array:
        return self.second(jnp.tanh(self.first(z.reshape(z.shape[0], -1))))


class Eqx(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, weights: Weights) -> None:
        first, second = eqx.nn.Linear(D, HIDDEN, key=KEY), eqx.nn.Linear(HIDDEN, K, key=KEY)
        where = lambda layer: (layer.weight, layer.bias)  # noqa: E731
        self.first = eqx.tree_at(where, first, (weights["w1"].T, weights["b1"][0]))
        self.second = eqx.tree_at(where, second, (weights["w2"].T, weights["b2"][0]))

    def __call__(self, image: jax.Array) -> jax.Array:
        """One image; Equinox leaves the batch to vmap."""
        return self.second(jnp.tanh(self.first(image.reshape(-1))))


class Framework(NamedTuple):
    """A model, its logits function, its own jit and grad, and how to read its gradient as `Weights`."""

    model: Any
    logits: Callable[[Any], LogitsFn]
    jit: Callable[..., Any]
    grad: Callable[..., Any]
    read: Callable[[Any], Weights]


def same(weights: Weights) -> Weights:
    return weights


def read_linen(tree: Any) -> Weights:
    first, second = tree["params"]["first"], tree["params"]["second"]
    biases = {"b1": first["bias"][None], "b2": second["bias"][None]}
    return {"w1": first["kernel"], "w2": second["kernel"], **biases}


def read_nnx(state: Any) -> Weights:
    first, second = state["first"], state["second"]
    biases = {"b1": first["bias"][...][None], "b2": second["bias"][...][None]}
    return {"w1": first["kernel"][...], "w2": second["kernel"][...], **biases}


def read_eqx(model: Any) -> Weights:
    biases = {"b1": model.first.bias[None], "b2": model.second.bias[None]}
    return {"w1": model.first.weight.T, "w2": model.second.weight.T, **biases}


def framework(name: str) -> Framework:
    w = draw()
    match name:
        case "bare":
            return Framework(w, plain, jax.jit, jax.grad, same)
        case "linen":
            first = {"kernel": w["w1"], "bias": w["b1"][0]}
            tree = {"params": {"first": first, "second": {"kernel": w["w2"], "bias": w["b2"][0]}}}
            return Framework(tree, lambda p: lambda z: Linen().apply(p, z), jax.jit, jax.grad, read_linen)
        case "nnx":
            return Framework(Nnx(w), lambda model: model, nnx.jit, nnx.grad, read_nnx)
        case "equinox":
            return Framework(Eqx(w), jax.vmap, eqx.filter_jit, eqx.filter_grad, read_eqx)
    raise AssertionError(name)


FRAMEWORKS = ["linen", "nnx", "equinox"]


@functools.cache
def attacked(name: str, attack: str) -> jax.Array:
    library = framework(name)
    return library.jit(lambda model, z: ATTACKS[attack](library.logits(model), KEY, z))(library.model, images(N))


@functools.cache
def defended(name: str, objective: str) -> tuple[jax.Array, Weights]:
    """e2SAD's loss by the framework's jit, and its gradient in the parameters by its own grad."""
    library = framework(name)

    def loss(model: Any) -> jax.Array:
        return defenses.e2sad(library.logits(model), images(N), targets(), lam=0.5, objective=objective, key=KEY)[0]

    return library.jit(loss)(library.model), library.read(library.jit(library.grad(loss))(library.model))


@quick
@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("attack", ["fgsm", "ifgsm", "pgd", "pgd_restarts", "second_total", "second_noise"])
def test_attacks_are_equal_in_every_framework(name, attack):
    close(attacked(name, attack), attacked("bare", attack), images(N))


@quick
@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("objective", ["total", "noise"])
def test_e2sad_and_its_gradient_are_equal_in_every_framework(name, objective):
    (value, gradient), (want, want_gradient) = defended(name, objective), defended("bare", objective)
    close(value, want)
    assert gradient.keys() == want_gradient.keys()
    for key, leaf in want_gradient.items():
        assert np.abs(leaf).max() > 1e-3
        close(gradient[key], leaf)
