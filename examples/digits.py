"""Trains e2SAD on the embedded digits and attacks it, by library calls alone.

python examples/digits.py
"""

import argparse

import jax

from e2sad_jax import data, evaluation, networks, training
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.evaluation import Attack
from e2sad_jax.training import configure, preset

SUITE = (
    Attack("clean", "clean"),
    Attack("FGSM", "fgsm", 0.2, 1),
    Attack("PGD-40", "pgd", 0.2, 40, 0.02),  # of one random start
)


def report(step: int, metrics: dict[str, jax.Array], count: int) -> None:
    """Prints the loss now and then; called after every step."""
    if step % 50 == 0:
        print(f"step {step}: loss {metrics['loss']:.3f}")


def main(steps: int, images: int) -> None:
    """Prints what is left under each attack."""
    config = configure(model="digits_cnn", steps=steps, batch_size=64, eps1=0.2, **preset("robust2", 0.2))
    digits = data.load("digits")
    model = networks.create(config.model, digits.num_classes, digits.image_shape)
    state = training.fit(
        config,
        model,
        digits,
        training.init_state(config, model, digits.image_shape, len(digits.x_train)),
        record=report,
        checkpoint=lambda step, state: None,  # `python -m experiments.digits` keeps them on disk
    )
    transform, tests = TRANSFORMS[config.transform], data.sample_tests(digits, images)
    outcomes = evaluation.evaluate(
        networks.apply_fn(model),
        state.params,
        tests.x_test,
        tests.y_test,
        SUITE,
        transform=transform.apply,
        bounds=transform.bounds,
    )
    print(f"\ndigits, {len(tests.x_test)} test images, {steps} steps of {config.batch_size}; attacks at 0.2")
    for name, outcome in outcomes.items():
        print(f"{name:10} {outcome.accuracy:.3f}")
    print(f"{'all':10} {outcomes.worst_case().mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=355, help="test images to attack")
    main(**vars(parser.parse_args()))
