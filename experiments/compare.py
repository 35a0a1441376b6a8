"""Every defense at the same number of updates: robust accuracy in the worst case against what training cost.

python -m experiments.compare --data=mnist
"""

from e2sad_jax import cli

if __name__ == "__main__":
    cli.request("compare")  # flags: the fields of e2sad_jax.comparison.request.Request
