"""Trains a classifier on CIFAR-10 at 8/255, attacks it and reports, with the settings that the field compares methods in.

python -m experiments.cifar10 --defense=e2sad
"""

from e2sad_jax import cli

if __name__ == "__main__":
    cli.train("cifar10")  # settings: e2sad_jax/runs/recipes.py
