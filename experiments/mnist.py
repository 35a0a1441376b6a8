"""Trains a classifier on MNIST, attacks it and reports: the paper's Section 4.1, with its settings as defaults.

python -m experiments.mnist --defense=e2sad
"""

from e2sad_jax import cli

TRADES = {"attack_steps": 40}  # its paper's

if __name__ == "__main__":
    cli.main("mnist", {"data": "mnist", "model": "mnist_cnn"}, {"trades": TRADES})
