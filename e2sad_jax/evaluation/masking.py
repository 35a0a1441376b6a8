"""Checks for gradient masking: each compares a measured number with a bound.

Those of outputs are flags of AutoAttack's code (https://github.com/fra31/auto-attack). The others are
from Athalye et al., 2018 (https://arxiv.org/abs/1802.00420), Carlini et al., 2019 (https://arxiv.org/abs/1902.06705), and,
for catastrophic overfitting, Andriushchenko & Flammarion, 2020 (https://arxiv.org/abs/2007.02617).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import _streams
from e2sad_jax.attacks import core
from e2sad_jax.evaluation.model import Model
from e2sad_jax.evaluation.programs import Programs
from e2sad_jax.losses import cross_entropy, margin

MAX_SHARE = 0.02  # of the images: what a few of them may do by chance
MAX_GAP = 0.2  # of FGSM above PGD: honest models of the papers differ by about a tenth
MIN_ALIGNMENT = 0.2  # of gradients at two points of the ball: near zero for a model that overfits to one step


@dataclasses.dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
      name: what is measured.
      value: the number that was measured.
      bound: what it is held to.
      below: whether the value must be at most, rather than at least, `bound`.
      means: what a value beyond the bound says about the model, a clause.
      then: what to do next, a clause.
    """

    name: str
    value: float
    bound: float
    below: bool
    means: str
    then: str

    @property
    def suspicious(self) -> bool:
        """Whether the value is beyond the bound; NaN is."""
        return not (self.value <= self.bound if self.below else self.value >= self.bound)


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Gradients of the cross-entropy with respect to the images.

    Attributes:
      zero: share of images whose gradient is exactly zero, or not finite somewhere.
      alignment: cosine between the gradients at an image and at a random point of its ball, mean over the images.
    """

    zero: float
    alignment: float


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What the model returns.

    Attributes:
      probabilities: share of images whose outputs are at least 0 and sum to 1.
      random: share of images whose outputs differ between two passes.
    """

    probabilities: float
    random: float


def run_checks(
    *,
    clean: np.ndarray,
    fgsm: np.ndarray,
    pgd: np.ndarray,
    white_box: np.ndarray,
    black_box: Mapping[str, np.ndarray],
    whole_range: np.ndarray,
    gradients: Gradients,
    outputs: Outputs,
    loss_decreased: float,
) -> list[Check]:
    """Makes the checks from predictions under attacks and from gradients.

    Args:
      clean: whether each image is right without attack, bool `[N]`; the next five likewise, under attack.
      fgsm: under FGSM.
      pgd: under PGD with the same budget.
      white_box: under every attack that takes gradients.
      black_box: under each attack that takes none of this model's, by name.
      whole_range: under PGD that may turn an image into any other.
      gradients: at the clean images.
      outputs: at the clean images.
      loss_decreased: share of the images that PGD leaves with a lower loss than they had.
    """
    gaps = [
        Check(
            "FGSM above clean",
            float(fgsm.mean() - clean.mean()),
            MAX_SHARE,
            True,
            "images that FGSM made are easier than clean ones (label leaking)",
            "train on FGSM's images with a random start, or on PGD's",
        ),
        Check(
            "FGSM above PGD",
            float(fgsm.mean() - pgd.mean()),
            # An undefended model has aligned gradients, and a wide gap because one step is a weak attack.
            max(MAX_GAP, float(clean.mean() - fgsm.mean())) if gradients.alignment >= MIN_ALIGNMENT else MAX_GAP,
            True,
            "one large step fails where small ones succeed: the loss is bent along the first gradient (catastrophic "
            "overfitting)",
            "report attacks of many steps; train with a rising budget (--eps_warmup) or more attack steps",
        ),
    ]
    without_gradients = [
        Check(
            f"{name} beats gradients",
            float((white_box & clean & ~right).mean()),
            MAX_SHARE,
            True,
            f"{name}, without gradients, fools images that no attack with them does",
            "give what has no gradient one (attacks.bpda), average over what is random (draws=), attack the margin",
        )
        for name, right in black_box.items()
    ]
    kinds = [
        Check(
            "outputs are probabilities",
            outputs.probabilities,
            MAX_SHARE,
            True,
            "the model returns probabilities, on which losses of logits saturate",
            "return logits: leave out the last softmax, or take its logarithm",
        ),
        Check(
            "outputs are random",
            outputs.random,
            MAX_SHARE,
            True,
            "the model answers differently when it is asked again",
            "pass a key to the model and evaluate it with draws=",
        ),
    ]
    return [
        *kinds,
        *gaps,
        *without_gradients,
        Check(
            "zero gradients",
            gradients.zero,
            MAX_SHARE,
            True,
            "some images have no gradient to follow (saturation or rounding)",
            "attack logits divided by a temperature or losses.margin; replace rounding by attacks.bpda",
        ),
        Check(
            "loss lower after the attack",
            loss_decreased,
            MAX_SHARE,
            True,
            "following the gradient does not raise the loss",
            "take smaller steps and more of them; replace what has a wrong gradient by attacks.bpda",
        ),
        Check(
            "correct in the whole range",
            float(whole_range.mean()),
            MAX_SHARE,
            True,
            "images stay correct under an attack that may turn them into anything",
            "the attack fails, not the ball: look for gradients that are zero, wrong or random",
        ),
        Check(
            "gradient alignment",
            gradients.alignment,
            MIN_ALIGNMENT,
            False,
            "the gradient changes its direction within the ball: single-step attacks see another loss than there is",
            "report attacks of many steps with several restarts",
        ),
    ]


def verdict(
    name: str, found: Sequence[Check], images: int, nan: str = "", *, clean: float = 1.0, chance: float = 0.0
) -> str:
    """The conclusion of the checks, in one or two sentences.

    Args:
      name: of the model.
      found: the checks.
      images: the number of images that they were made on.
      nan: what `nan_logits` says of them; then the checks mean nothing.
      clean: accuracy without attack; where it is no better than `chance`, the checks mean nothing either.
      chance: accuracy of a guess.
    """
    if nan:
        advice = (
            "Do not trust any number before it is mended: JAX's setting jax_debug_nans shows where the model makes NaN"
        )
        return f"{name}: {nan}. {advice}."
    if clean <= chance:
        return (
            f"{name}: accuracy without attack is {clean:.3f}, no better than chance ({chance:.3f}). Check the labels, the "
            "order of the classes and the normalisation. The checks mean nothing here."
        )
    breaches = [check for check in found if check.suspicious]
    if not breaches:
        return (
            f"{name}: none of {len(found)} checks on {images:,} images finds a sign of gradient masking. The accuracy "
            "under the strongest attack is still only an upper bound of the robust accuracy."
        )
    why = "; ".join(f"{check.name} {check.value:.3f}, {check.means}" for check in breaches)
    then = "; ".join(dict.fromkeys(check.then for check in breaches))
    return (
        f"{name}: {len(breaches)} of {len(found)} checks on {images:,} images indicate gradient masking ({why}). Do not "
        f"trust accuracies under gradient attacks alone. Next: {then}."
    )


def gradients(model: Model, eps: float, norm: str = "linf") -> Gradients:
    """Measures input gradients at the clean images and at uniform random points of their balls in `norm`."""
    radius = np.asarray(eps, np.float64 if model.images.dtype == np.float64 else np.float32)
    zero, cosine = model.per_image(_GRADIENTS[norm], np.uint32(model.seed), radius)
    return Gradients(float(zero.mean()), float(cosine.mean()))


def alignment(model: Model, eps: float, norm: str = "linf") -> float:
    """The mean cosine of the loss's gradients at an image and at FGSM's point in its ball: near 0 where FGSM's step misleads.

    Fast adversarial training that overfits to its one step loses it (PertAlign, https://openreview.net/forum?id=u1lUbEDQsU).
    Under large budgets it is low for robust models, too. So alone it proves nothing.
    """
    radius = np.asarray(eps, np.float64 if model.images.dtype == np.float64 else np.float32)
    (cosine,) = model.per_image(_ALIGNMENT[norm], radius)
    return float(cosine.mean())


def outputs(model: Model) -> Outputs:
    """Looks at the outputs for the clean images in two passes."""
    (probabilities, *once), (_, *again) = (model.per_image(_outputs) for _ in range(2))
    differ = ~np.all(
        [np.isclose(a, b, rtol=1e-5, atol=0, equal_nan=True) for a, b in zip(once, again, strict=True)], axis=0
    )
    return Outputs(float(probabilities.mean()), float(differ.mean()))


def losses(model: Model, images: np.ndarray) -> np.ndarray:
    """Cross-entropy of each image with its label, `[N]`."""
    return model.per_image(_losses, images=images)[0]


def danger(model: Model, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How bad images are for the model.

    Args:
      model: the model.
      images: `[N, ...]`, with the labels of the model's own.

    Returns:
      Whether each is misclassified and not rejected, bool `[N]`; and the `losses.margin`, `[N]`, the largest number where a
      logit is NaN; of a model that rejects images the lower one of it and what the score has below the threshold.
    """
    wrong, lead = model.per_image(_danger, images=images)
    return wrong, lead


def _loss(programs: Programs, params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    logits = programs.apply(params, x)
    return cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))


def _losses(
    programs: Programs, params: Any, x: jax.Array, labels: jax.Array, places: jax.Array
) -> tuple[jax.Array, ...]:
    return (_loss(programs, params, x, labels),)


def _outputs(
    programs: Programs, params: Any, x: jax.Array, labels: jax.Array, places: jax.Array
) -> tuple[jax.Array, ...]:
    """Whether outputs are probabilities, and two numbers that tell other outputs from them."""
    logits = core.as_float32(programs.apply(params, x))
    are = (logits >= 0).all(1) & (jnp.abs(logits.sum(1) - 1) < 1e-3)
    return are, logits.max(1), logits @ jnp.arange(1, logits.shape[1] + 1, dtype=logits.dtype)


def _danger(
    programs: Programs, params: Any, x: jax.Array, labels: jax.Array, places: jax.Array
) -> tuple[jax.Array, ...]:
    logits = programs.verdict(params, x)
    lead, broken = margin(logits, labels), jnp.isnan(logits).any(-1)
    worst = jnp.finfo(lead.dtype).max
    wrong, lead = (logits.argmax(-1) != labels) | broken, jnp.where(broken, worst, jnp.clip(lead, -worst, worst))
    if (constraint_fn := programs.constraint(params)) is not None:
        wrong, lead = wrong & ~programs.rejected(params, x), jnp.minimum(lead, -constraint_fn(x))
    return wrong, lead


def _gradients(
    norm: str,
    programs: Programs,
    params: Any,
    x: jax.Array,
    labels: jax.Array,
    places: jax.Array,
    seed: jax.Array,
    eps: jax.Array,
) -> tuple[jax.Array, ...]:
    """Whether there is no gradient to follow, and the cosine."""
    key = _streams.key(seed, _streams.MASKING)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
    x = core.as_float32(x)
    limits = core.ball(norm, x, eps, core.checks.image_range("diagnose", programs.bounds, x))
    near = limits.project(x + eps * limits.sample(keys, x))
    here, there = (
        core.input_gradient(lambda z: _loss(programs, params, z, labels), z).reshape(len(x), -1) for z in (x, near)
    )
    broken = ~jnp.isfinite(here).all(1)
    cosine = (core.unit(core.finite(here)) * core.unit(core.finite(there))).sum(1)
    return (core.finite(here) == 0).all(1) | broken, cosine


def _alignment(
    norm: str, programs: Programs, params: Any, x: jax.Array, labels: jax.Array, places: jax.Array, eps: jax.Array
) -> tuple[jax.Array, ...]:
    x = core.as_float32(x)
    limits = core.ball(norm, x, eps, core.checks.image_range("diagnose", programs.bounds, x))
    here = core.finite(core.input_gradient(lambda z: _loss(programs, params, z, labels), x))
    far = limits.project(x + eps * limits.steepest(here))
    there = core.finite(core.input_gradient(lambda z: _loss(programs, params, z, labels), far))
    return ((core.unit(here) * core.unit(there)).reshape(len(x), -1).sum(1),)


_ALIGNMENT = {norm: functools.partial(_alignment, norm) for norm in core.NORMS}
_GRADIENTS = {norm: functools.partial(_gradients, norm) for norm in core.NORMS}
