"""Measures a defense of your own beside others: what a step costs, and what stands the worst of several attacks.

python examples/new_defense.py    # about two minutes of CPU time
python examples/new_defense.py --steps=1000 --images=355 --only="PGD-2" --only="e2SAD, robust" --only="logit pairing"
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from e2sad_jax import attacks, data, defenses, losses, networks, training
from e2sad_jax.data import transforms
from e2sad_jax.evaluation import Attack, auto

EPS = 0.2
Loss = tuple[jax.Array, dict[str, jax.Array]]


def logit_pairing(
    logits_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    y: jax.Array,
    *,
    key: jax.Array,
    eps: jax.typing.ArrayLike,
    weight: float = 0.5,
) -> Loss:
    """PGD-2's loss, and the logits of an image and of its adversarial one kept alike (Kannan et al., 2018)."""
    x_adv = attacks.pgd(key, lambda z: losses.cross_entropy(logits_fn(z), y), x, eps=eps, steps=2)
    f, f_adv = logits_fn(x), logits_fn(x_adv)
    adversarial, pairing = losses.cross_entropy(f_adv, y).mean(), jnp.square(f - f_adv).mean()
    return adversarial + weight * pairing, {"adversarial": adversarial, "pairing": pairing}


def e2sad_robust(logits_fn: Any, x: jax.Array, y: jax.Array, *, key: jax.Array, eps: jax.typing.ArrayLike) -> Loss:
    """e2SAD with the points and weights of `--preset=robust`."""
    points: Any = {"alpha": 0.0, "lam": 1.0, "eps1": eps, "eps2": 2 / 3 * jnp.asarray(eps)}
    return defenses.e2sad(logits_fn, x, y, key=key, random_start=True, ball_second=True, **points)


DEFENSES: dict[str, Callable[..., Loss]] = {
    "natural": lambda f, x, y, key, eps: defenses.natural(f, x, y),
    "PGD-2": functools.partial(defenses.pgd_minmax, steps=2),
    "e2SAD, robust": e2sad_robust,
    "logit pairing": logit_pairing,
}
USUAL = ("natural", "PGD-2", "logit pairing")  # what takes two minutes
ATTACKS = (Attack("APGD-CE", "apgd", steps=20), Attack("Square", "square", steps=100))


def main(steps: int, images: int, only: Sequence[str]) -> None:
    """Trains each defense with the same updates, and prints a line for it."""
    digits = data.load("digits")
    model = networks.MnistCNN(digits.num_classes, features=(8, 16), hidden=64)
    x, y = transforms.unit(jnp.asarray(digits.x_train)), losses.soft_labels(jnp.asarray(digits.y_train), 10, delta=0)
    x_test, y_test = np.asarray(transforms.unit(jnp.asarray(digits.x_test[:images]))), digits.y_test[:images]
    tx = optax.adam(optax.linear_onecycle_schedule(steps, 5e-3))
    variables = model.init(jax.random.key(0), x[:1])
    first = (variables, tx.init(variables), jnp.int32(0))

    apply = networks.apply_fn(model)

    def step(defense: Callable[..., Loss], variables: Any, opt_state: Any, i: jax.Array) -> tuple[Any, Any, jax.Array]:
        batch_key, key = jax.random.split(jax.random.fold_in(jax.random.key(1), i))
        rows = jax.random.randint(batch_key, (64,), 0, len(x))
        eps = EPS * jnp.minimum(2 * i / steps, 1)  # rises over the first half

        def loss(variables: Any) -> jax.Array:
            return defense(functools.partial(apply, variables), x[rows], y[rows], key=key, eps=eps)[0]

        updates, opt_state = tx.update(jax.grad(loss)(variables), opt_state)
        return optax.apply_updates(variables, updates), opt_state, i + 1

    print(f"digits at {EPS}, {steps} steps of 64, one seed, the first {len(x_test)} test images; robust: what stands")
    print("APGD-CE of 20 steps and Square of 100 queries, one restart each; price: FLOPs of a step, natural = 1;")
    print(f"the standard error of an accuracy is up to {0.5 / len(x_test) ** 0.5:.2f}\n")
    print(f"{'':16} clean  robust  price")
    its_step = {name: functools.partial(step, DEFENSES[name]) for name in ("natural", *only)}
    flops = {name: training.function_counts(function, *first)["flops"] for name, function in its_step.items()}
    for name in only:
        price, state, jitted = flops[name] / flops["natural"], first, jax.jit(its_step[name])
        for _ in range(steps):
            state = jitted(*state)
        result = auto(apply, state[0], x_test, y_test, eps=EPS, stages=ATTACKS)
        print(f"{name:16} {result.accuracy['clean']:.3f}   {result.robust.mean():.3f}   {price:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=100, help="test images to attack")
    parser.add_argument("--only", action="append", choices=DEFENSES, help="may be given several times")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.images, arguments.only or USUAL)
