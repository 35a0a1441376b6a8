"""Makes models with batch normalisation and dropout robust, in Flax Linen, Flax NNX and Equinox.

A training step calls the network several times, inside gradients: for the attack and for the loss. All of these passes are
in training mode, with one dropout key a step and so with one mask, and what they change is dropped. One more pass, over the
clean batch, moves the running averages. Attacks on the trained model and its evaluation are in evaluation mode.

python examples/batch_norm.py
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from e2sad_jax import attacks, data, defenses, losses
from e2sad_jax.data import transforms

EPS, HIDDEN = 0.2, 64
TX = optax.adam(3e-3)
LogitsFn = Callable[[jax.Array], jax.Array]


def defense(logits_fn: LogitsFn, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
    """Any loss of `defenses`."""
    return defenses.trades(logits_fn, x, y, key=key, eps=EPS, steps=4)


class Linen:
    """In Linen `mutable` returns the new averages beside the logits."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = nn.Dense(HIDDEN)(x.reshape(len(x), -1))
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(x))

    @staticmethod
    def init(key: jax.Array, x: jax.Array) -> Any:
        variables = Linen.Network().init(key, x)
        return variables["params"], variables["batch_stats"], TX.init(variables["params"])

    @staticmethod
    @jax.jit
    def step(state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        params, averages, opt_state = state
        attack_key, dropout_key = jax.random.split(key)

        def forward(params: Any, z: jax.Array) -> Any:
            variables, rngs = {"params": params, "batch_stats": averages}, {"dropout": dropout_key}
            return Linen.Network().apply(variables, z, train=True, mutable=["batch_stats"], rngs=rngs)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            return defense(lambda z: forward(params, z)[0], x, y, attack_key)

        gradient, _ = jax.grad(objective, has_aux=True)(params)
        averages = forward(params, x)[1]["batch_stats"]
        updates, opt_state = TX.update(gradient, opt_state)
        return optax.apply_updates(params, updates), averages, opt_state

    @staticmethod
    def trained(state: Any) -> tuple[Callable[..., jax.Array], Any]:
        """The network in evaluation mode, as `(variables, images) -> logits`, and its variables."""
        model: Any = Linen.Network()
        return model.apply, {"params": state[0], "batch_stats": state[1]}


class NNX:
    """In NNX a clone takes the changes of a pass; they would be refused inside a gradient."""

    class Network(nnx.Module):
        def __init__(self, features: int, rngs: nnx.Rngs):
            self.first = nnx.Linear(features, HIDDEN, rngs=rngs)
            self.norm = nnx.BatchNorm(HIDDEN, momentum=0.9, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs)
            self.second = nnx.Linear(HIDDEN, 10, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = nnx.relu(self.norm(self.first(x.reshape(len(x), -1))))
            return self.second(self.dropout(x))

    @staticmethod
    def init(key: jax.Array, x: jax.Array) -> Any:
        network = NNX.Network(x[0].size, nnx.Rngs(key))
        return network, nnx.Optimizer(network, TX, wrt=nnx.Param)

    @staticmethod
    @nnx.jit
    def step(state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        network, optimizer = state

        def objective(network: Any) -> tuple[jax.Array, Any]:
            return defense(lambda z: nnx.clone(network)(z), x, y, key)

        gradient, _ = nnx.grad(objective, has_aux=True)(network)
        network(x)  # moves the averages, and dropout's key to that of the next step
        optimizer.update(network, gradient)
        return network, optimizer

    @staticmethod
    def trained(state: Any) -> tuple[Callable[..., jax.Array], Any]:
        network = nnx.clone(state[0])
        network.eval()
        graph, variables = nnx.split(network)
        return lambda variables, x: nnx.merge(graph, variables)(x), variables


class Equinox:
    """In Equinox the model itself returns the new averages beside the logits."""

    class Network(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        dropout: eqx.nn.Dropout
        second: eqx.nn.Linear

        def __init__(self, features: int, key: jax.Array):
            keys = jax.random.split(key)
            self.first = eqx.nn.Linear(features, HIDDEN, key=keys[0])
            self.norm = eqx.nn.BatchNorm(HIDDEN, axis_name="batch", momentum=0.9, mode="batch")
            self.dropout = eqx.nn.Dropout(0.1)
            self.second = eqx.nn.Linear(HIDDEN, 10, key=keys[1])

        def __call__(self, image: jax.Array, averages: Any, key: jax.Array | None) -> Any:
            hidden, averages = self.norm(self.first(image.reshape(-1)), averages)
            return self.second(self.dropout(jax.nn.relu(hidden), key=key)), averages

    @staticmethod
    def forward(network: Any, averages: Any, x: jax.Array, key: jax.Array | None = None) -> Any:
        keys = None if key is None else jax.random.split(key, len(x))
        return jax.vmap(network, (0, None, 0), (0, None), axis_name="batch")(x, averages, keys)

    @staticmethod
    def init(key: jax.Array, x: jax.Array) -> Any:
        network, averages = eqx.nn.make_with_state(Equinox.Network)(x[0].size, key)
        return network, averages, TX.init(eqx.filter(network, eqx.is_inexact_array))

    @staticmethod
    @eqx.filter_jit
    def step(state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        network, averages, opt_state = state
        attack_key, dropout_key = jax.random.split(key)

        def objective(network: Any) -> tuple[jax.Array, Any]:
            return defense(lambda z: Equinox.forward(network, averages, z, dropout_key)[0], x, y, attack_key)

        gradient, _ = eqx.filter_grad(objective, has_aux=True)(network)
        _, moved = Equinox.forward(network, averages, x, dropout_key)
        updates, opt_state = TX.update(gradient, opt_state)
        return eqx.apply_updates(network, updates), moved, opt_state

    @staticmethod
    def trained(state: Any) -> tuple[Callable[..., jax.Array], Any]:
        arrays, rest = eqx.partition((eqx.nn.inference_mode(state[0]), state[1]), eqx.is_array)

        def apply(arrays: Any, x: jax.Array) -> jax.Array:
            network, averages = eqx.combine(arrays, rest)
            return Equinox.forward(network, averages, x)[0]

        return apply, arrays


LIBRARIES: dict[str, Any] = {"Linen": Linen, "NNX": NNX, "Equinox": Equinox}


def fit(library: Any, x: jax.Array, y: jax.Array, steps: int) -> Any:
    """The state of a model of `library` after training on batches of 64."""
    state = library.init(jax.random.key(0), x[:2])
    for i in range(steps):
        rows_key, key = jax.random.split(jax.random.fold_in(jax.random.key(1), i))
        rows = jax.random.randint(rows_key, (64,), 0, len(x))
        state = library.step(state, x[rows], y[rows], key)
    return state


@functools.partial(jax.jit, static_argnums=0)
def accuracies(apply: Callable[..., jax.Array], params: Any, x: jax.Array, y: jax.Array) -> list[jax.Array]:
    """Accuracy on `x`, and on what PGD-40 makes of it."""

    def loss_fn(z: jax.Array) -> jax.Array:
        return losses.cross_entropy(apply(params, z), y)

    x_adv = attacks.pgd(jax.random.key(2), loss_fn, x, eps=EPS, steps=40, step_size=0.02)
    return [(apply(params, z).argmax(-1) == y.argmax(-1)).mean() for z in (x, x_adv)]


def main(steps: int, images: int) -> None:
    """Prints accuracy without an attack and under one, of one model of each library."""
    digits = data.sample_tests(data.load("digits"), images)
    x, x_test = (transforms.unit(jnp.asarray(part)) for part in (digits.x_train, digits.x_test))
    labels, labels_test = jnp.asarray(digits.y_train), jnp.asarray(digits.y_test)
    y, y_test = (losses.soft_labels(part, digits.num_classes, delta=0) for part in (labels, labels_test))
    print(f"digits, {len(x_test)} test images, {steps} steps of 64; PGD-40 at {EPS}, steps of 0.02, one random start")
    for name, library in LIBRARIES.items():
        clean, attacked = accuracies(*library.trained(fit(library, x, y, steps)), x_test, y_test)
        print(f"{name:8} clean {clean:.3f}, PGD-40 {attacked:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=355, help="test images to attack")
    main(**vars(parser.parse_args()))
