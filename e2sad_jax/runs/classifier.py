"""A trained classifier read back from the folder of its run."""

from e2sad_jax.runs.checkpoint import Classifier, load

__all__ = ["Classifier", "load"]
