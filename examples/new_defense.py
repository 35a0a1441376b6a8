"""A defense of your own: registered here, then trained, compared and evaluated by its name.

python examples/new_defense.py    # less than a minute of CPU time

The commands know it once they import this file, from the root of the repository:

E2SAD_JAX_DEFENSES=examples.new_defense python -m experiments.digits --defense=logit_pairing --pairing=1
E2SAD_JAX_DEFENSES=examples.new_defense python -m experiments.compare --data=digits --entry=logit_pairing --entry=PGD-2
"""

import argparse

import jax
import jax.numpy as jnp

from e2sad_jax import attacks, data, defenses, evaluation, losses, networks, training

EPS = 0.1
ATTACKS = (evaluation.Attack("APGD-CE", "apgd", steps=20),)


def logit_pairing(logits_fn, x, y, *, key, eps, bounds, steps=2, pairing=0.5):  # type: ignore[no-untyped-def]
    """PGD's loss, and the logits of an image and of its adversarial one kept alike (Kannan et al., 2018).

    Training passes `eps`, `bounds` and `key` because they are named here; the others are the settings below.
    """
    x_adv = attacks.pgd(key, lambda z: losses.cross_entropy(logits_fn(z), y), x, eps=eps, steps=steps, bounds=bounds)
    f, f_adv = logits_fn(x), logits_fn(x_adv)
    adversarial, apart = losses.cross_entropy(f_adv, y).mean(), jnp.square(f - f_adv).mean()
    return adversarial + pairing * apart, {"adversarial": adversarial, "pairing": apart}


SETTINGS = (
    defenses.Setting("attack_steps", 2, "gradient steps of the training attack", lower=1, argument="steps"),
    defenses.Setting("pairing", 0.5, "weight of the squared difference of the logits", lower=0),
)
defenses.register("logit_pairing", defenses.Defense(logit_pairing, "logit pairing", SETTINGS))


def main(steps: int, images: int, names: list[str]) -> None:
    """Trains each defense with the same updates, attacks its model, and prints a line for it."""
    digits = data.load("digits")
    tests = data.sample_tests(digits, images)
    x, y = tests.x_test, tests.y_test
    print(f"digits at {EPS}, {steps} steps of 32, one seed, {len(x)} test images; robust: under APGD-CE of 20")
    print(f"steps, one restart; the standard error of an accuracy is up to {0.5 / len(x) ** 0.5:.2f}\n")
    print(f"{'':16} clean  robust  GFLOP a step")
    common = {"model": "digits_cnn", "steps": steps, "batch_size": 32, "eps1": EPS, "soft_label": False}
    schedule = {"learning_rate": 5e-3, "schedule": "cyclic", "eps_warmup": 0.5}
    for name in names:
        own = {"attack_steps": 2} if "attack_steps" in defenses.DEFENSES[name].defaults() else {}
        config = training.configure(defense=name, **common, **schedule, **own)
        model = networks.create(config.model, digits.num_classes, digits.image_shape)
        state = training.fit(
            config,
            model,
            digits,
            training.init_state(config, model, digits.image_shape),
            record=lambda step, metrics, count: None,
            checkpoint=lambda step, state: None,
        )
        worst = evaluation.auto(networks.apply_fn(model), state.params, x, y, eps=EPS, stages=ATTACKS)
        gflop = training.step_flops(config, digits.image_shape, digits.num_classes) / 1e9
        label, clean, robust = defenses.DEFENSES[name].label, worst.accuracy["clean"], worst.robust.mean()
        print(f"{label:16} {clean:.3f}   {robust:.3f}   {gflop:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--images", type=int, default=100, help="test images to attack")
    parser.add_argument("--defense", action="append", choices=defenses.DEFENSES, help="may be given several times")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    main(arguments.steps, arguments.images, arguments.defense or ["pgd", "logit_pairing"])
