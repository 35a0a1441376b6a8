"""Trains e2SAD and a natural model on the embedded digits, attacks both and reports, in minutes on a laptop.

python -m experiments.digits
"""

from experiments import common

LAPTOP = {
    "data": "digits",
    "model": "digits_cnn",
    "steps": 300,
    "batch_size": 128,
    "checkpoint_every": 100,
    "log_every": 10,
}

if __name__ == "__main__":
    common.main("mnist", LAPTOP, baseline="natural")
