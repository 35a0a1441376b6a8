"""Trains a classifier on SVHN, attacks it and reports: the paper's Section 4.2, with its settings as defaults.

python -m experiments.svhn --defense=e2sad
"""

from e2sad_jax import cli
from e2sad_jax.defenses import DEFENSES

PAPER = {
    "data": "svhn",
    "model": "svhn_cnn",
    "transform": "standardize",
    "epochs": 20.0,
    "alpha": 0.6,
    "lam": 0.3,
    "eps1": 24 / 255,
    "eps2": 8 / 255,
    "attack_steps": 10,
}
# Only e2SAD is trained on soft labels there.
HARD = {defense: {"soft_label": False} for defense in DEFENSES if defense != "e2sad"}

if __name__ == "__main__":
    cli.main("svhn", PAPER, HARD)
