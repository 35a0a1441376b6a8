"""Trains a classifier on MNIST, attacks it and reports, as in the paper's Section 4.1; --preset=paper has its setting.

python -m experiments.mnist --defense=e2sad
"""

from e2sad_jax import cli

if __name__ == "__main__":
    cli.train("mnist")  # settings: e2sad_jax/runs/recipes.py
