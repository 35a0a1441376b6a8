"""Defenses: pure functions from `(logits_fn, x, y)` to a training loss and its parts, one a file.

`logits_fn` maps images `[N, ...]` to logits `[N, K]` and closes over the parameters, so `jax.grad` over them trains the
model, whatever library it comes from. Budgets and `bounds` are those of `attacks`; `weights` `[N]` weigh the images, and 0
leaves one out, as in padding. `DEFENSES` holds each by the name that `--defense` takes; `register` adds one.
"""

from e2sad_jax.defenses._registry import DEFENSES, PLUGINS, Defense, Setting, readers, register

# Importing its file registers a defense: this is the order of DEFENSES.
# isort: off
from e2sad_jax.defenses.natural import natural
from e2sad_jax.defenses.fgsm import fgsm
from e2sad_jax.defenses.ifgsm import ifgsm
from e2sad_jax.defenses.pgd import pgd
from e2sad_jax.defenses.hamm import hamm
from e2sad_jax.defenses.e2sad import e2sad
from e2sad_jax.defenses.rs_fgsm import rs_fgsm
from e2sad_jax.defenses.n_fgsm import n_fgsm
from e2sad_jax.defenses.free import free, free_ascent
from e2sad_jax.defenses.trades import trades
from e2sad_jax.defenses.grad_align import grad_align
from e2sad_jax.defenses.input_gradient import input_gradient
from e2sad_jax.defenses.atta import atta
from e2sad_jax.defenses.pgi import pgi
from e2sad_jax.defenses.uap import uap, uap_ascent
from e2sad_jax.defenses.gat import gat
from e2sad_jax.defenses.nuat import nuat
from e2sad_jax.defenses.strong_adversary import strong_adversary
from e2sad_jax.defenses.distillation import distillation, tempered

# isort: on

__all__ = [
    "DEFENSES",
    "PLUGINS",
    "Defense",
    "Setting",
    "atta",
    "distillation",
    "e2sad",
    "fgsm",
    "free",
    "free_ascent",
    "gat",
    "grad_align",
    "hamm",
    "ifgsm",
    "input_gradient",
    "n_fgsm",
    "natural",
    "nuat",
    "pgd",
    "pgi",
    "readers",
    "register",
    "rs_fgsm",
    "strong_adversary",
    "tempered",
    "trades",
    "uap",
    "uap_ascent",
]
