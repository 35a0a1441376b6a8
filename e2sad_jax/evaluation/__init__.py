"""Evaluation of robustness: accuracy under attack, the worst case, curves, transfer, checks for gradient masking.

It takes functions, of any model library:

>>> import numpy as np
>>> from e2sad_jax import evaluation
>>> apply = lambda params, x: x.reshape(len(x), -1) @ params
>>> w, images = np.eye(16, 4, dtype=np.float32), np.random.default_rng(0).uniform(size=(8, 4, 4, 1)).astype(np.float32)
>>> labels = evaluation.predict(apply, w, images)
>>> suite = [evaluation.Attack("clean", "clean"), evaluation.Attack("PGD-10", "pgd", eps=0.1, steps=10)]
>>> outcomes = evaluation.evaluate(apply, w, images, labels, suite)
>>> outcomes["clean"].accuracy
1.0

* `evaluate` runs a suite of `Attack`s; `SUITES` has those of the training commands.
* `auto` measures the worst case by AutoAttack's protocol.
* `transfer` shows the images made for one model to others.
* `diagnose` measures curves, worst case and transfer of a `Model`, and makes the checks of `masking`.
* `distances` and `accuracy_at` make the accuracy at every budget of one minimum-norm attack; `optimality` compares attacks.
* `wrap` puts normalisation and layout inside a model.
* `quantize` rounds adversarial images to 8-bit grey levels inside the ball.
* `surfaces` computes the loss around images.
"""

from e2sad_jax.evaluation._entrance import Apply, Detector
from e2sad_jax.evaluation.attack import SUITES, Attack
from e2sad_jax.evaluation.autoattack import FAB, ORTHOGONAL, STAGES, AutoResult, auto
from e2sad_jax.evaluation.curves import accuracy_at, distances, optimality
from e2sad_jax.evaluation.diagnosis import Effort, diagnose
from e2sad_jax.evaluation.evaluator import Outcome, Outcomes, evaluate, nan_logits, predict, transfer
from e2sad_jax.evaluation.grey import quantize
from e2sad_jax.evaluation.masking import Check
from e2sad_jax.evaluation.model import Model, of_classifier, of_function, of_stablehlo
from e2sad_jax.evaluation.programs import in_batches
from e2sad_jax.evaluation.verification import Verification, verify
from e2sad_jax.evaluation.wrapping import wrap

__all__ = [
    "FAB",
    "ORTHOGONAL",
    "STAGES",
    "SUITES",
    "Apply",
    "Attack",
    "AutoResult",
    "Check",
    "Detector",
    "Effort",
    "Model",
    "Outcome",
    "Outcomes",
    "Verification",
    "accuracy_at",
    "auto",
    "diagnose",
    "distances",
    "evaluate",
    "in_batches",
    "nan_logits",
    "of_classifier",
    "of_function",
    "of_stablehlo",
    "optimality",
    "predict",
    "quantize",
    "transfer",
    "verify",
    "wrap",
]
