"""Named checks for gradient masking, each a number beside a bound.

From Athalye et al., 2018 (https://arxiv.org/abs/1802.00420), Carlini et al., 2019 (https://arxiv.org/abs/1902.06705), and,
for catastrophic overfitting, Andriushchenko & Flammarion, 2020 (https://arxiv.org/abs/2007.02617).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import _streams
from e2sad_jax._compile import jit
from e2sad_jax.attacks.core import finite, input_gradient, linf_ball, unit
from e2sad_jax.evaluation.auto import Apply
from e2sad_jax.evaluation.evaluator import batches
from e2sad_jax.evaluation.model import Subject
from e2sad_jax.losses import cross_entropy

SMALL = 0.02  # of accuracies: what a few images may do by chance
FAR = 0.2  # FGSM above PGD: honest models of the papers differ by about a tenth
ALIGNED = 0.2  # of gradients at two points of the ball: a model that overfits to one step has it near zero


@dataclasses.dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
      name: what it is called.
      value: the number that was found.
      bound: what it is held to.
      below: whether it must be at most, rather than at least, `bound`.
      means: what a breach says, a clause in plain words.
    """

    name: str
    value: float
    bound: float
    below: bool
    means: str

    @property
    def suspicious(self) -> bool:
        """Whether the number is beyond the bound; NaN is."""
        return not (self.value <= self.bound if self.below else self.value >= self.bound)


def checks(
    *,
    clean: np.ndarray,
    fgsm: np.ndarray,
    pgd: np.ndarray,
    white_box: np.ndarray,
    black_box: dict[str, np.ndarray],
    whole_range: np.ndarray,
    gradients: "Gradients",
    loss_fell: float,
) -> list[Check]:
    """The checks, from what was measured.

    Args:
      clean: right without attack, bool `[N]`; so all of the following under theirs.
      fgsm: FGSM.
      pgd: PGD, at the same budget.
      white_box: every attack that takes gradients.
      black_box: those that take none of this model's, by name.
      whole_range: PGD whose ball is all images.
      gradients: of the clean images.
      loss_fell: share of the images that PGD leaves with a lower loss than they had.
    """
    found = [
        Check(
            "FGSM above clean",
            float(fgsm.mean() - clean.mean()),
            SMALL,
            True,
            "images that FGSM made are easier than clean ones (label leaking)",
        ),
        Check(
            "FGSM above PGD",
            float(fgsm.mean() - pgd.mean()),
            FAR,
            True,
            "one large step fails where small ones succeed: the loss is bent along the first gradient (catastrophic "
            "overfitting)",
        ),
    ]
    for name, right in black_box.items():
        found.append(
            Check(
                f"{name} beats gradients",
                float((white_box & clean & ~right).mean()),
                SMALL,
                True,
                f"{name}, without gradients, fools images that no attack with them does",
            )
        )
    found += [
        Check(
            "zero gradients",
            gradients.zero,
            SMALL,
            True,
            "some images have no gradient to follow (saturation or rounding)",
        ),
        Check(
            "loss lower after the attack",
            loss_fell,
            SMALL,
            True,
            "following the gradient does not raise the loss",
        ),
        Check(
            "right in the whole range",
            float(whole_range.mean()),
            SMALL,
            True,
            "images stand an attack that may turn them into anything",
        ),
        Check(
            "gradient alignment",
            gradients.alignment,
            ALIGNED,
            False,
            "the gradient points elsewhere a little way off: single-step attacks see another loss than there is",
        ),
    ]
    return found


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Of the cross-entropy in the images.

    Attributes:
      zero: share of images whose gradient is exactly zero, or NaN somewhere.
      alignment: cosine between the gradients at an image and at a random point of its ball, mean over the images.
    """

    zero: float
    alignment: float


def gradients(subject: Subject, eps: float) -> Gradients:
    """Gradients at clean images and at uniform random points of their l-infinity balls."""
    of_batch, n = _gradients(subject.apply, subject.bounds), len(subject.x)
    parts: list[Sequence[np.ndarray]] = []
    for index, rows in batches(n, subject.batch_size):
        seed, budget = np.uint32(subject.seed), np.float32(eps)
        parts.append(
            jax.device_get(of_batch(subject.params, subject.x[rows], subject.labels[rows], index, seed, budget))
        )
    zero, cosine = (np.concatenate(column)[:n] for column in zip(*parts, strict=True))
    return Gradients(float(zero.mean()), float(cosine.mean()))


@functools.lru_cache(maxsize=16)
def _gradients(apply: Apply, bounds: tuple[float, float]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    @jit
    def of_batch(
        params: Any, x: jax.Array, labels: jax.Array, index: jax.Array, seed: jax.Array, eps: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def loss_fn(z: jax.Array) -> jax.Array:
            logits = apply(params, z)
            return cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))

        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.fold_in(jax.random.key(seed), _streams.MASKING), index
        )
        limits = linf_ball(x, eps, bounds)
        near = limits.project(x + eps * limits.sample(keys, x))
        both = [input_gradient(loss_fn, z).reshape(len(x), -1) for z in (x, near)]
        broken = ~jnp.isfinite(both[0]).all(1)  # nothing to follow either
        here, there = map(finite, both)
        cosine = (unit(here) * unit(there)).sum(1)
        return (here == 0).all(1) | broken, cosine

    return of_batch  # type: ignore[no-any-return]


def losses(subject: Subject, images: np.ndarray) -> np.ndarray:
    """Cross-entropy of each image with its label, `[N]`."""
    of_batch, n = _losses(subject.apply), len(images)
    parts = [
        np.asarray(of_batch(subject.params, images[rows], subject.labels[rows]))
        for _, rows in batches(n, subject.batch_size)
    ]
    return np.concatenate(parts)[:n]


@functools.lru_cache(maxsize=16)
def _losses(apply: Apply) -> Callable[..., jax.Array]:
    def of_batch(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        logits = apply(params, x)
        return cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))

    return jit(of_batch)  # type: ignore[no-any-return]


def verdict(name: str, found: Sequence[Check], images: int) -> str:
    """A sentence in plain words."""
    breaches = [check for check in found if check.suspicious]
    if not breaches:
        return (
            f"{name}: none of {len(found)} checks on {images:,} images finds a sign of gradient masking; the strongest attack "
            "above is an upper bound of the robust accuracy all the same."
        )
    why = "; ".join(f"{check.name} {check.value:.3f}, {check.means}" for check in breaches)
    return (
        f"{name}: {len(breaches)} of {len(found)} checks on {images:,} images speak of gradient masking ({why}). Trust no "
        "accuracy under attacks with gradients alone."
    )
