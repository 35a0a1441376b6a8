"""What a model's robustness is worth: curves, the strongest attacks, and checks for gradient masking."""

from e2sad_jax.diagnosis.checks import Check
from e2sad_jax.diagnosis.curves import Effort, diagnose
from e2sad_jax.diagnosis.subject import Subject, of_classifier, of_function

__all__ = ["Check", "Effort", "Subject", "diagnose", "of_classifier", "of_function"]
