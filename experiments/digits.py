"""Trains e2SAD and a natural model on the embedded digits, attacks both and reports, in minutes on a laptop.

python -m experiments.digits
"""

from e2sad_jax import cli

# Not the paper's: a narrow network, and budgets that 8x8 digits blown up to 28x28 can be defended against in minutes.
LAPTOP = {
    "data": "digits",
    "model": "digits_cnn",
    "steps": 200,
    "batch_size": 128,
    "learning_rate": 3e-3,
    "lam": 0.3,
    "eps1": 0.2,
    "eps2": 0.07,
    "checkpoint_every": 100,
    "log_every": 10,
}

if __name__ == "__main__":
    cli.main("digits", LAPTOP, baseline="natural")
