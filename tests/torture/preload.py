"""What all commands need, imported once, and made small so that many faults fit: each is forked from a process that has it."""

import functools

import matplotlib.figure  # noqa: F401
import tensorboardX.event_file_writer  # noqa: F401

from e2sad_jax import comparison, data, evaluate, models, plots, run  # noqa: F401
from e2sad_jax.diagnosis import run as diagnosis  # noqa: F401
from e2sad_jax.evaluate import Attack
from experiments import common  # noqa: F401

models.MODELS["digits_cnn"] = functools.partial(models.MnistCNN, features=(4, 8), hidden=64)
evaluate.SUITES["digits"] = (
    Attack("clean", "clean"),
    Attack("FGSM 0.2", "fgsm", 0.2, 1),
    Attack("PGD-4", "pgd", 0.2, 4, 0.1),
)
digits, load = data.load("digits"), data.load
data.load = lambda name, data_dir=None: digits if name == "digits" else load(name, data_dir)
