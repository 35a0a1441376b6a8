"""Attacks: pure functions from a loss and images to adversarial images.

An attack knows no model, no parameters and no labels: it takes `loss_fn`, a function from images `[N, ...]` to
per-example losses `[N]`, and so works with any model library, inside jit, vmap, grad and shard_map.

One step: `fgsm`, `second_step`. Several: `ifgsm`, `mi_fgsm`, `pgd`, and `apgd`, which finds its own step size.
`losses.margin`, `losses.dlr` and `losses.targeted_dlr` are losses for them, beside the cross-entropy.

Without gradients: `square`. The smallest change instead of the worst within a budget, from logits and labels:
`deepfool`, `carlini_wagner`, `fab`.
"""

from e2sad_jax.attacks.apgd import apgd
from e2sad_jax.attacks.fab import fab
from e2sad_jax.attacks.iterated import ifgsm, mi_fgsm, pgd
from e2sad_jax.attacks.minimal import carlini_wagner, deepfool
from e2sad_jax.attacks.one_step import OBJECTIVES, fgsm, second_step
from e2sad_jax.attacks.square import square

__all__ = [
    "OBJECTIVES",
    "apgd",
    "carlini_wagner",
    "deepfool",
    "fab",
    "fgsm",
    "ifgsm",
    "mi_fgsm",
    "pgd",
    "second_step",
    "square",
]
