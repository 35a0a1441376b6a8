"""Runs on disk: a folder with settings, checkpoints, metrics and results; training, evaluating and loading it."""
