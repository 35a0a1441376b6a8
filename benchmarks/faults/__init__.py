"""Faults done to the command line on purpose. `make torture` runs all, `tests/test_faults.py` a few of them."""
