"""The paper's experiments as command lines: `python -m experiments.mnist --help`."""
