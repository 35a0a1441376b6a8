"""What a model's robustness is worth: accuracy under attack, the worst case, curves, checks for gradient masking."""

from e2sad_jax.evaluation.auto import AutoResult, auto
from e2sad_jax.evaluation.diagnose import Effort, diagnose
from e2sad_jax.evaluation.evaluator import SUITES, Attack, Outcome, evaluate, perturb, transfer, worst_case
from e2sad_jax.evaluation.masking import Check
from e2sad_jax.evaluation.model import Subject, of_classifier, of_function

__all__ = [
    "SUITES",
    "Attack",
    "AutoResult",
    "Check",
    "Effort",
    "Outcome",
    "Subject",
    "auto",
    "diagnose",
    "evaluate",
    "of_classifier",
    "of_function",
    "perturb",
    "transfer",
    "worst_case",
]
