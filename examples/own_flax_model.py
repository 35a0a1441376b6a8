"""Makes a Flax model of your own robust: the training loop you have, with a defense where the loss was.

python examples/own_flax_model.py
"""

import argparse
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from e2sad_jax import attacks, data, defenses, losses, networks
from e2sad_jax.data import transforms

EPS = 0.2


class Network(nn.Module):
    """Any network from images `[N, H, W, C]` to logits `[N, K]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(32, (5, 5), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def fit(model: nn.Module, x: jax.Array, y: jax.Array, steps: int, *, robust: bool) -> Any:
    """The model's variables after training, with e2SAD at two points of the ball or without any defense."""
    variables, tx = model.init(jax.random.key(0), x[:1]), optax.adam(optax.linear_onecycle_schedule(steps, 5e-3))

    @jax.jit
    def step(variables: Any, opt_state: Any, i: jax.Array) -> tuple[Any, Any]:
        batch_key, key = jax.random.split(jax.random.fold_in(jax.random.key(1), i))
        rows = jax.random.randint(batch_key, (64,), 0, len(x))
        eps = EPS * jnp.minimum(2 * i / steps, 1)  # rises over the first half

        def loss(variables: Any) -> jax.Array:
            logits_fn = networks.logits_fn(model, variables)  # images -> model.apply(variables, images)
            if not robust:
                return losses.cross_entropy(logits_fn(x[rows]), y[rows]).mean()
            points: Any = {"alpha": 0.0, "lam": 1.0, "eps1": eps, "eps2": 2 / 3 * eps}
            points |= {"random_start": True, "ball_second": True}
            return defenses.e2sad(logits_fn, x[rows], y[rows], key=key, **points)[0]

        updates, opt_state = tx.update(jax.grad(loss)(variables), opt_state)
        return optax.apply_updates(variables, updates), opt_state

    opt_state = tx.init(variables)
    for i in range(steps):
        variables, opt_state = step(variables, opt_state, jnp.int32(i))
    return variables


@functools.partial(jax.jit, static_argnames="model")
def accuracies(model: nn.Module, variables: Any, x: jax.Array, y: jax.Array) -> list[jax.Array]:
    """Accuracy on `x`, and on what PGD-40 makes of it."""
    logits_fn = networks.logits_fn(model, variables)

    def loss_fn(z: jax.Array) -> jax.Array:
        return losses.cross_entropy(logits_fn(z), y)

    x_adv = attacks.pgd(jax.random.key(2), loss_fn, x, eps=EPS, steps=40, step_size=0.02)
    return [(logits_fn(z).argmax(-1) == y.argmax(-1)).mean() for z in (x, x_adv)]


def main(steps: int, images: int) -> None:
    """Prints accuracy without an attack and under one, of the model as it was and of the robust one."""
    digits, model = data.sample_tests(data.load("digits"), images), Network()
    x, x_test = (transforms.unit(jnp.asarray(part)) for part in (digits.x_train, digits.x_test))
    labels, labels_test = jnp.asarray(digits.y_train), jnp.asarray(digits.y_test)
    y, y_test = (losses.soft_labels(part, digits.num_classes, delta=0) for part in (labels, labels_test))
    print(f"digits, {len(x_test)} test images, {steps} steps of 64; PGD-40 at {EPS}, steps of 0.02, one random start")
    for name, robust in (("natural", False), ("e2SAD", True)):
        variables = fit(model, x, y, steps, robust=robust)
        clean, attacked = accuracies(model, variables, x_test, y_test)
        print(f"{name:8} clean {clean:.3f}, PGD-40 {attacked:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=355, help="test images to attack")
    main(**vars(parser.parse_args()))
