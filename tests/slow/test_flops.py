"""What a training step of every defense costs, by XLA's own count, beside tests/unit/defenses/test_cost.py."""

import pytest

from e2sad_jax import training
from tests.unit.defenses.test_cost import natural, step_flops  # noqa: F401

ROBUST = training.preset("robust", 0.3)
TWO_STEPS = ROBUST | {"first_point": "step", "first_step_size": 0.15, "adversarial_at": "first"}


@pytest.mark.parametrize(
    ("defense", "settings", "low", "high"),
    [
        ("fgsm", {"alpha": 0.0}, 1.6, 1.75),
        ("e2sad", {"lam": 0.0}, 1.9, 2.05),
        ("e2sad", ROBUST | {"lam": 0.0}, 1.6, 1.75),
        ("e2sad", ROBUST | {"hold_reference": False}, 2.2, 2.45),  # a second backward pass of training
        ("e2sad", ROBUST | {"second_step": "total"}, 1.6, 1.75),
        ("e2sad", ROBUST | {"memory": "none"}, 1.6, 1.75),  # a memory takes no FLOPs
        ("e2sad", TWO_STEPS, 2.6, 2.8),
        ("e2sad", TWO_STEPS | {"hold_reference": False}, 2.9, 3.1),  # its cotangents are no longer the second step's
        ("e2sad", TWO_STEPS | {"second_step": "total"}, 2.9, 3.1),
        ("e2sad", TWO_STEPS | {"adversarial_at": "second"}, 2.2, 2.45),  # one pass for training, as PGD-2
        ("trades", {"attack_steps": 1, "memory": "int8"}, 2.55, 2.75),
        ("hamm", {}, 2.5, 3.1),
        ("ifgsm", {"attack_steps": 1}, 1.9, 2.05),
        ("ifgsm", {"attack_steps": 2}, 2.6, 2.75),  # the first step's gradient is shared, too
        ("ifgsm", {"attack_steps": 5}, 4.5, 4.8),
        # A gradient of the images alone is two thirds of a natural step; GradAlign's is FGSM's too, and taken once.
        ("rs_fgsm", {}, 1.6, 1.75),
        ("n_fgsm", {}, 1.6, 1.75),
        ("pgd", {"attack_steps": 2}, 2.2, 2.4),
        ("free", {}, 1.0, 1.05),
        ("atta", {}, 1.6, 1.75),
        ("atta", {"attack_steps": 2}, 2.2, 2.4),
        # The regulariser's forward pass at the start is the attack's; its backward pass costs two thirds of a step.
        ("pgi", {}, 2.25, 2.4),
        ("pgi", {"prior_weight": 0.0}, 1.6, 1.75),
        ("uap", {}, 2.25, 2.4),
        ("trades", {"attack_steps": 2}, 3.2, 3.45),
        ("gat", {}, 2.6, 2.75),
        ("nuat", {}, 2.6, 2.75),
        ("pgd", {"attack_steps": 2, "training_loss": "qub"}, 3.2, 3.45),
        ("n_fgsm", {"training_loss": "qub"}, 2.6, 2.75),
        ("grad_align", {}, 4.5, 5.5),
        ("tempered", {}, 0.99, 1.01),
        ("distillation", {}, 0.99, 1.01),  # the teacher's logits are known before
        ("strong_adversary", {}, 1.6, 1.75),
        ("strong_adversary", {"adversary": "alpha"}, 4.0, 9.0),
        ("input_gradient", {}, 2.0, 2.75),
    ],
)
def test_cost_in_natural_steps(defense, settings, low, high, natural):  # noqa: F811
    assert low <= step_flops(defense, **settings) / natural <= high
