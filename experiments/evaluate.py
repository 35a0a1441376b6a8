"""Measures the robust accuracy of a model: curves, the worst case over strong attacks, checks for gradient masking.

python -m experiments.evaluate --workdir=runs/mnist-e2sad-0123abcd
"""

from e2sad_jax import cli

if __name__ == "__main__":
    cli.request("evaluate")  # flags: the fields of e2sad_jax.runs.evaluate.Request
