"""Trains a classifier on SVHN, attacks it and reports, as in the paper's Section 4.2; --preset=paper has its setting.

python -m experiments.svhn --defense=e2sad
"""

from e2sad_jax import cli

if __name__ == "__main__":
    cli.train("svhn")  # settings: e2sad_jax/runs/recipes.py
