"""Makes a trained Flax model of your own robust: its weights are fine-tuned with e2SAD, each image's attack remembered.

python examples/fine_tune.py
"""

import argparse
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from e2sad_jax import data, defenses, evaluation, losses, networks
from e2sad_jax.data import transforms

EPS, BATCH = 0.2, 32
ROBUST: Any = {  # docs/e2sad.md: one gradient step, from the image's last perturbation
    "alpha": 0.0,
    "lam": 0.3,
    "first_point": "start",
    "adversarial_at": "second",
    "second_step": "loss",
    "hold_reference": True,
    "ball_second": True,
}


class Network(nn.Module):
    """Any network from images `[N, H, W, C]` to logits `[N, K]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (5, 5), strides=2)(x))
        x = nn.relu(nn.Conv(32, (5, 5), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def trained(model: nn.Module, x: jax.Array, y: jax.Array, steps: int, variables: Any, *, robust: bool) -> Any:
    """The variables after more steps, on the images alone or with e2SAD."""
    tx = optax.adam(optax.linear_onecycle_schedule(steps, 5e-3))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(variables: Any, opt_state: Any, memory: jax.Array, rows: jax.Array, eps: jax.Array) -> Any:
        def loss(variables: Any) -> tuple[jax.Array, jax.Array]:
            logits_fn = networks.logits_fn(model, variables)  # images -> model.apply(variables, images)
            if not robust:
                return losses.cross_entropy(logits_fn(x[rows]), y[rows]).mean(), memory
            start = eps * memory[rows]  # kept in units of the budget, which rises
            value, parts = defenses.e2sad(
                logits_fn, x[rows], y[rows], **ROBUST, eps1=1.5 * eps, eps2=0.75 * eps, start=start
            )
            return value, memory.at[rows].set(parts["delta"] / eps)

        gradient, memory = jax.grad(loss, has_aux=True)(variables)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(variables, updates), opt_state, memory

    opt_state, rng = tx.init(variables), np.random.default_rng(0)
    memory = jax.random.uniform(jax.random.key(1), x.shape, minval=-1)
    for i in range(steps):
        rows, eps = rng.permutation(len(x))[:BATCH], EPS * min(2 * (i + 1) / steps, 1)  # rises over the first half
        variables, opt_state, memory = step(variables, opt_state, memory, rows, jnp.float32(eps))
    return variables


def main(steps: int, images: int) -> None:
    """Prints clean and robust accuracy of the natural model, and of what it has become."""
    digits, model = data.sample_tests(data.load("digits"), images), Network()
    x, x_test = (transforms.unit(jnp.asarray(part)) for part in (digits.x_train, digits.x_test))
    y = losses.soft_labels(jnp.asarray(digits.y_train), digits.num_classes, delta=0)
    print(f"digits, {len(x_test)} test images, {steps} steps of {BATCH} each; robust: under APGD-CE at {EPS}")
    variables = model.init(jax.random.key(0), x[:1])
    for name, robust in (("natural", False), ("fine-tuned", True)):
        variables = trained(model, x, y, steps, variables, robust=robust)
        attacked = networks.apply_fn(model), variables, np.asarray(x_test), digits.y_test
        result = evaluation.auto(*attacked, stages=evaluation.STAGES[:1], eps=EPS)
        clean, *_, robust_accuracy = result.accuracy.values()
        print(f"{name:10} clean {clean:.3f}, robust {robust_accuracy:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--images", type=int, default=355, help="test images to attack")
    main(**vars(parser.parse_args()))
