"""Runs python -m e2sad_jax.data."""

import sys

from e2sad_jax.data import main

if __name__ == "__main__":
    sys.exit(main())
