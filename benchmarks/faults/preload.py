"""What all commands need, imported once, and made small so that many faults fit: each is forked from a process that has it."""

import functools
from typing import Any, cast

import matplotlib.figure  # noqa: F401
import tensorboardX.event_file_writer  # noqa: F401

from benchmarks.faults import phases  # noqa: F401
from e2sad_jax import cli, data, evaluation, networks  # noqa: F401
from e2sad_jax.evaluation import Attack
from e2sad_jax.reporting import plots  # noqa: F401
from e2sad_jax.runs import evaluate, run, validation  # noqa: F401

SMALL = (
    Attack("clean", "clean"),
    Attack("FGSM 0.2", "fgsm", 0.2, 1),
    Attack("PGD-2", "pgd", 0.2, 2, 0.1),
)
digits, load = data.load("digits"), data.load


def short(name: str, kind: str, eps: float = 0.0, steps: int = 0, *rest: Any, **more: Any) -> Attack:
    """An attack of two steps at most."""
    return Attack(name, kind, eps, min(steps, 2), *rest, **more)


def load_once(name: str, data_dir: str | None = None) -> data.Dataset:
    """`data.load`, with the digits read before."""
    return digits if name == "digits" else load(name, data_dir)


effort = functools.partial(evaluation.Effort, budgets=(0.5, 1.0), steps=(1, 2), pgd_steps=2, apgd_steps=4)
networks.NETWORKS["digits_cnn"] = functools.partial(networks.MnistCNN, features=(4, 8), hidden=64)
cast(dict[str, Any], evaluation.SUITES)["digits"] = SMALL
places: tuple[tuple[Any, str, Any], ...] = (
    (validation, "Attack", short),
    (evaluate, "Effort", effort),
    (data, "load", load_once),
)
for owner, name, value in places:
    assert hasattr(owner, name), f"{owner} has no {name}"
    setattr(owner, name, value)
