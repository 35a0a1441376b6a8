"""Attacks: pure functions from a loss and images to adversarial images.

An attack knows no model and no parameters. It takes `loss_fn`, a function from images `[N, ...]` to per-example losses
`[N]`, and so works with any model library, inside `jit`, `vmap`, `grad` and `shard_map`.

`eps`, and `step_size` where there is one, is a number, an array `[N]` with one for each image, or, in the l-infinity norm, a
mask: what broadcasts against one image `[...]`. `bounds`, the range of valid images, is a pair of numbers or of arrays that
broadcast against one image. All may be traced.

* One gradient: `fgsm`, and `second_step` of e2SAD.
* Several gradients: `ifgsm`, `mi_fgsm`, `pgd`, and `apgd`, which adapts its step size. `losses.margin`, `losses.dlr` and
  `losses.targeted_dlr` are losses for them, as is the cross-entropy.
* No gradient: `square`, and `few_pixels`, which changes few pixels.
* Nothing but the classes that the model says: `substitute` trains another one on them, to be attacked in its place.
* The smallest change instead of the highest loss within a budget, from logits and labels: `deepfool`, `carlini_wagner`,
  `lbfgs`, `fab`, `fmn`, `ddn`; the fewest pixels: `greedy_l0`, `jsma`.
* One change for all images: `universal`, `universal_pgd`; `fooling_rate` measures it.
* Against defenses: `bpda` and `eot` for those that round or draw, `evading`, `wrong_and_accepted`, `orthogonal_pgd` and
  `carlini_wagner(constraint_fn=...)` for those that reject.

`ATTACKS` has by name those that a suite can run (`evaluation.Attack`); `register` adds your own. `attacks.core` has the parts
of attacks.
"""

import re

from e2sad_jax.attacks import core
from e2sad_jax.attacks._method import Method
from e2sad_jax.attacks.adaptive import bpda, eot, evading, wrong_and_accepted
from e2sad_jax.attacks.apgd import apgd
from e2sad_jax.attacks.carlini_wagner import carlini_wagner
from e2sad_jax.attacks.ddn import ddn
from e2sad_jax.attacks.deepfool import deepfool
from e2sad_jax.attacks.fab import fab
from e2sad_jax.attacks.few_pixels import few_pixels
from e2sad_jax.attacks.fgsm import fgsm
from e2sad_jax.attacks.fmn import fmn
from e2sad_jax.attacks.greedy_l0 import greedy_l0
from e2sad_jax.attacks.ifgsm import ifgsm
from e2sad_jax.attacks.jsma import jsma
from e2sad_jax.attacks.lbfgs import lbfgs
from e2sad_jax.attacks.mi_fgsm import mi_fgsm
from e2sad_jax.attacks.orthogonal_pgd import orthogonal_pgd
from e2sad_jax.attacks.pgd import pgd
from e2sad_jax.attacks.second_step import OBJECTIVES, second_step
from e2sad_jax.attacks.square import square
from e2sad_jax.attacks.substitute import Substitute, augment, substitute
from e2sad_jax.attacks.universal import fooling_rate, universal, universal_pgd

ATTACKS: dict[str, Method] = {
    "fgsm": Method(fgsm, "gradient", ("linf", "l2")),
    "ifgsm": Method(ifgsm, "gradient"),
    "mi_fgsm": Method(mi_fgsm, "gradient"),
    "pgd": Method(pgd, "gradient", ("linf", "l2")),
    "apgd": Method(apgd, "gradient", ("linf", "l2")),
    "orthogonal_pgd": Method(orthogonal_pgd, "gradient", ("linf", "l2")),
    "square": Method(square, "score-based", ("linf", "l2"), ndim=4),
    "fab": Method(fab, "minimum-norm", ("linf", "l2")),
    "fmn": Method(fmn, "minimum-norm", ("linf", "l2")),
    "ddn": Method(ddn, "minimum-norm", ("l2",)),
    "deepfool": Method(deepfool, "minimum-norm", ("linf", "l2")),
    "carlini_wagner": Method(carlini_wagner, "minimum-norm", ("l2",)),
    "lbfgs": Method(lbfgs, "minimum-norm", ("l2",)),
    "few_pixels": Method(few_pixels, "score-based", ("l0",)),
    "greedy_l0": Method(greedy_l0, "minimum-norm", ("l0",)),
    "jsma": Method(jsma, "minimum-norm", ("l0",)),
}


def register(name: str, method: Method) -> None:
    """Adds your own attack to `ATTACKS`; suites then run it by name.

    Args:
      name: a name that no other attack has.
      method: the attack, and what a suite has to know of it.

    Raises:
      ValueError: if the name is not of lower-case letters, digits and underscores, or is taken; "clean" is, for images
        that are not attacked.
    """
    if not re.fullmatch("[a-z0-9_]+", name):
        raise ValueError(f"attack {name!r} needs a name of lower-case letters, digits and underscores")
    if name == "clean" or name in ATTACKS:
        raise ValueError(f"attack {name!r} exists already; register yours under another name")
    ATTACKS[name] = method


__all__ = [
    "ATTACKS",
    "OBJECTIVES",
    "Method",
    "Substitute",
    "apgd",
    "augment",
    "bpda",
    "carlini_wagner",
    "core",
    "ddn",
    "deepfool",
    "eot",
    "evading",
    "fab",
    "few_pixels",
    "fgsm",
    "fmn",
    "fooling_rate",
    "greedy_l0",
    "ifgsm",
    "jsma",
    "lbfgs",
    "mi_fgsm",
    "orthogonal_pgd",
    "pgd",
    "register",
    "second_step",
    "square",
    "substitute",
    "universal",
    "universal_pgd",
    "wrong_and_accepted",
]
