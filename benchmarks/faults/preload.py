"""What all commands need, imported once, and made small so that many faults fit: each is forked from a process that has it."""

import functools

import matplotlib.figure  # noqa: F401
import tensorboardX.event_file_writer  # noqa: F401

from benchmarks.faults import phases  # noqa: F401
from e2sad_jax import (  # noqa: F401
    cli,
    data,
    evaluation,
    networks,
)
from e2sad_jax.evaluation import Attack
from e2sad_jax.reporting import plots  # noqa: F401
from e2sad_jax.runs import evaluate as diagnosis
from e2sad_jax.runs import run, trainer  # noqa: F401

networks.NETWORKS["digits_cnn"] = functools.partial(networks.MnistCNN, features=(4, 8), hidden=64)
evaluation.SUITES["digits"] = (
    Attack("clean", "clean"),
    Attack("FGSM 0.2", "fgsm", 0.2, 1),
    Attack("PGD-2", "pgd", 0.2, 2, 0.1),
)
trainer.Attack = lambda name, kind, eps=0.0, steps=0, *rest: Attack(name, kind, eps, min(steps, 2), *rest)
diagnosis.Effort = functools.partial(evaluation.Effort, budgets=(0.5, 1.0), steps=(1, 2), pgd_steps=2, apgd_steps=4)
digits, load = data.load("digits"), data.load
data.load = lambda name, data_dir=None: digits if name == "digits" else load(name, data_dir)
