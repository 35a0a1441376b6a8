"""Defenses: pure functions from `(logits_fn, x, y)` to a training loss and its parts, one a screen.

`logits_fn` maps images `[N, ...]` to logits `[N, K]` and closes over the parameters, so `jax.grad` over them trains the
model, whatever library it comes from.
"""

from e2sad_jax.defenses.adversarial import fgsm_training, ifgsm_training, pgd_minmax
from e2sad_jax.defenses.e2sad import e2sad
from e2sad_jax.defenses.hamm import hamm
from e2sad_jax.defenses.natural import natural

__all__ = ["e2sad", "fgsm_training", "hamm", "ifgsm_training", "natural", "pgd_minmax"]
