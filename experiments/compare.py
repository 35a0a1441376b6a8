"""Trains every defense for the same number of updates and compares robust accuracy with training cost.

python -m experiments.compare --data=mnist
"""

from e2sad_jax import cli

if __name__ == "__main__":
    cli.request("compare")  # flags: the fields of e2sad_jax.comparison.request.Request
