"""Defenses: pure functions from `(logits_fn, x, y)` to a training loss and its parts, one a screen.

`logits_fn` maps images `[N, ...]` to logits `[N, K]` and closes over the parameters, so `jax.grad` over them trains the
model, whatever library it comes from.
"""

from e2sad_jax.defenses.adversarial import fgsm_training, ifgsm_training, pgd_minmax
from e2sad_jax.defenses.e2sad import e2sad
from e2sad_jax.defenses.fast import n_fgsm, rs_fgsm
from e2sad_jax.defenses.free import free, free_ascent
from e2sad_jax.defenses.grad_align import grad_align
from e2sad_jax.defenses.hamm import hamm
from e2sad_jax.defenses.input_gradient import input_gradient
from e2sad_jax.defenses.natural import natural
from e2sad_jax.defenses.trades import trades

__all__ = [
    "e2sad",
    "fgsm_training",
    "free",
    "free_ascent",
    "grad_align",
    "hamm",
    "ifgsm_training",
    "input_gradient",
    "n_fgsm",
    "natural",
    "pgd_minmax",
    "rs_fgsm",
    "trades",
]
