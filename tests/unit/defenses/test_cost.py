"""What a training step costs, by XLA's own count; the other defenses are counted in tests/slow/test_flops.py."""

import jax
import pytest

from e2sad_jax import training

# Defense, settings, bounds in natural steps.
COSTS = [
    pytest.param("fgsm", {}, 1.9, 2.05, marks=pytest.mark.slow),
    ("e2sad", {}, 3.0, 3.4),
    pytest.param("e2sad", training.preset("robust", 0.3), 1.6, 1.75, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def natural():
    return step_flops("natural")


def step_flops(defense, **settings):
    """Of the step that training runs: the Table 4 network at batch 256; compiled, not run."""
    with jax.numpy_dtype_promotion("standard"):  # Optax's own need
        return training.step_flops(training.configure(defense=defense, **settings), (28, 28, 1), 10)


@pytest.mark.parametrize(("defense", "settings", "low", "high"), COSTS)
def test_cost_in_natural_steps(defense, settings, low, high, natural):
    """The attack's backward pass is shared with training's: 2.02 instead of 2.34 for FGSM; and it is there at all."""
    assert low <= step_flops(defense, **settings) / natural <= high
