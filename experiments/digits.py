"""Trains e2SAD and a natural model on the embedded digits, attacks both and reports, in minutes on a laptop.

python -m experiments.digits
"""

from e2sad_jax import cli

if __name__ == "__main__":
    cli.train("digits")  # settings: e2sad_jax/runs/recipes.py
