"""Attacks and e2SAD with four ways of writing the same network, and the loops that attacks repeat their steps in."""

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

from e2sad_jax import attacks, defenses, losses
from e2sad_jax.attacks import core
from e2sad_jax.networks import cpu_conv

N, SHAPE, HIDDEN, K = 8, (3, 4, 1), 16, 3
D = int(np.prod(SHAPE))
KEY = jax.random.key(7)
pytestmark = pytest.mark.usefixtures("all_unoptimized")
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


# One attack of each kind of loop and random number, as a function of a network, a key and images.
ATTACKS: dict[str, Callable[..., jax.Array]] = {
    "fgsm": lambda f, key, x, eps=0.2: attacks.fgsm(loss_of(f), x, eps=eps),
    "ifgsm": lambda f, key, x, eps=0.2: attacks.ifgsm(loss_of(f), x, eps=eps, steps=3),
    "pgd_restarts": lambda f, key, x, eps=0.2: attacks.pgd(
        key, loss_of(f), x, eps=eps, steps=2, step_size=0.03, restarts=2, misclassified_fn=fooled(f)
    ),
    "second_total": second("total"),
    "second_noise": second("noise"),
}


def close(got: jax.Array, want: jax.Array, moved_from: jax.Array | None = None) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    if moved_from is not None:
        assert (np.abs(np.asarray(want) - np.asarray(moved_from)) > 0.01).mean() > 0.5


# --- loops


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
        return defenses.e2sad(library.logits(model), images(N), targets(), lam=0.5, second_step=objective, key=KEY)[0]

    return library.jit(loss)(library.model), library.read(library.jit(library.grad(loss))(library.model))


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_equal_in_every_framework(name, attack):
    close(attacked(name, attack), attacked("bare", attack), images(N))


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("objective", ["total", "noise"])
def test_e2sad_and_its_gradient_are_equal_in_every_framework(name, objective):
    (value, gradient), (want, want_gradient) = defended(name, objective), defended("bare", objective)
    close(value, want)
    assert gradient.keys() == want_gradient.keys()
    for key, leaf in want_gradient.items():
        assert np.abs(leaf).max() > 1e-3
        close(gradient[key], leaf)
