"""`python -m e2sad_jax`: the commands of the console script `e2sad`, where that is not on the path."""

from e2sad_jax import cli

if __name__ == "__main__":
    cli.console("python -m e2sad_jax")
