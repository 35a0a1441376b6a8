"""Exports a trained model for programs without this library: StableHLO, and its parameters as safetensors.

python -m experiments.export --workdir=runs/mnist-e2sad-0123abcd
"""

from e2sad_jax import cli

if __name__ == "__main__":
    cli.request("export")  # flags: the fields of e2sad_jax.export.Request
