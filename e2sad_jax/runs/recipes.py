"""Settings of the training commands: `experiments.mnist`, say, or `e2sad train mnist`."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training command's settings; flags on the command line have precedence.

    Attributes:
      about: what the command does, in a line.
      settings: those that differ from the defaults of `training.Config` and of the defenses.
      by_defense: those that one defense takes instead, by its name.
      preset: the preset unless one is chosen.
      robust: those that `--preset=robust` and `robust2` have here instead.
      baseline: second defense to train, empty for none.
    """

    about: str
    settings: Mapping[str, Any]
    by_defense: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    preset: str = "robust2"
    robust: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    baseline: str = ""


# By the name of the suite of attacks, too (`evaluation.SUITES`).
RECIPES: Mapping[str, Recipe] = {
    "mnist": Recipe(
        about="MNIST, as in the paper's Section 4.1",
        settings={"data": "mnist", "model": "mnist_cnn"},
        by_defense={"trades": {"attack_steps": 40}},  # its paper's
    ),
    "svhn": Recipe(
        about="SVHN, as in the paper's Section 4.2",
        settings={
            "data": "svhn",
            "model": "svhn_cnn",
            "transform": "standardize",
            "epochs": 20.0,
            "alpha": 0.6,
            "lam": 0.3,
            "eps1": 24 / 255,
            "eps2": 8 / 255,
            "attack_steps": 10,
            "soft_label": False,
        },
        by_defense={"e2sad": {"soft_label": True}},  # e2SAD alone is trained on soft labels there
    ),
    # The recipe of FastAT Benchmark (https://arxiv.org/abs/2604.22853). Of its label smoothing of 0.4 nine tenths fall on
    # the wrong classes.
    "cifar10": Recipe(
        about="CIFAR-10 at 8/255 with PreActResNet-18, as the field trains it",
        settings={
            "data": "cifar10",
            "model": "preact_resnet18",
            "mean": "0.4914,0.4822,0.4465",
            "std": "0.2471,0.2435,0.2616",
            "epochs": 100.0,
            "batch_size": 128,
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "weight_decay": 5e-4,
            "schedule": "onecycle",
            "augment": "crop,flip",
            "delta": 0.36,
            "ema": 0.9995,
            "eps1": 8 / 255,
            "eps2": 8 / 255 / 3,
            "attack_steps": 10,
            "validation_examples": 1000,
        },
        robust={"schedule": "onecycle", "learning_rate": 0.1, "eps_warmup": 0.0, "eps_scale": 1.0},
    ),
    # Not the paper's: a narrow network, and a budget that 8x8 digits enlarged to 28x28 can be defended against in minutes.
    # Training at 0.3 resists the suite's attacks at 0.2 better than training at 0.2 (300 held-out training images, two seeds).
    "digits": Recipe(
        about="e2SAD and a natural model on the embedded digits, in minutes on a laptop",
        settings={
            "data": "digits",
            "model": "digits_cnn",
            "steps": 1000,
            "batch_size": 32,
            "eps1": 0.2,
            "checkpoint_every": 200,
            "log_every": 20,
        },
        robust={"eps_scale": 1.5},
        baseline="natural",
    ),
}
