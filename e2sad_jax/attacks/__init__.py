"""Attacks: pure functions from a loss and images to adversarial images.

An attack knows no model, no parameters and no labels: it takes `loss_fn`, a function from images `[N, ...]` to
per-example losses `[N]`, and so works with any model library, inside jit, vmap, grad and shard_map.
"""

from e2sad_jax.attacks.iterated import ifgsm, pgd
from e2sad_jax.attacks.one_step import OBJECTIVES, fgsm, second_step

__all__ = ["OBJECTIVES", "fgsm", "ifgsm", "pgd", "second_step"]
