"""Trains a classifier on MNIST, attacks it and reports: the paper's Section 4.1, with its settings as defaults.

python -m experiments.mnist --defense=e2sad
"""

from experiments import common

TRADES = {"attack_steps": 40, "attack_step_size": 0.01}  # its paper's, for eps 0.3

if __name__ == "__main__":
    common.main("mnist", {"data": "mnist", "model": "mnist_cnn"}, {"trades": TRADES})
