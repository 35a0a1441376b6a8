"""Whether adversarial images are what they are reported as: near enough, in the range, and misclassified."""

import dataclasses
from typing import Any

import numpy as np

from e2sad_jax.evaluation.curves import SLACK, distances
from e2sad_jax.evaluation.model import Model


@dataclasses.dataclass(frozen=True, eq=False)
class Verification:
    """What a second look at adversarial images found.

    Attributes:
      fooled: bool `[N]`, which images the model misclassifies (and accepts, where it rejects some), in its batch size and in
        another one.
      differ: number of images whose predicted class depends on the batch size.
      largest: length of the largest change among `fooled`; 0 if there is none.
      outside: number of images among `fooled` beyond the budget or the range.
      batch_sizes: in which the images were classified.
    """

    fooled: np.ndarray
    differ: int
    largest: float
    outside: int
    batch_sizes: tuple[int, int]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `fooled` as a number."""
        return {**dataclasses.asdict(self), "fooled": int(self.fooled.sum()), "batch_sizes": list(self.batch_sizes)}


def verify(model: Model, images: np.ndarray, *, eps: float, norm: str = "linf") -> Verification:
    """Classifies adversarial images again, in batches of two sizes, and measures how far they are from the model's images.

    Args:
      model: the model and its clean images.
      images: inputs that fool it, of the same labels; an image that no attack has changed may be among them, `[N, ...]`.
      eps: budget that they were made with.
      norm: "linf" or "l2".
    """
    n = len(model.images)
    own = min(model.batch_size, n)
    other = dataclasses.replace(model, batch_size=own // 2 + 1 if own > 2 else 3 - own)
    seen, again = model.judge(images), other.judge(images)
    fooled = ~seen.withstood & ~again.withstood
    lengths = distances(model.images, images, np.ones(n, bool), norm=norm)
    low, high = (np.asarray(bound, np.float64) for bound in model.bounds)
    slack = SLACK * float(np.max(high - low))
    beyond = ((images < low - slack) | (images > high + slack)).reshape(n, -1).any(1)
    outside = fooled & ((lengths > eps + slack) | beyond)
    return Verification(
        fooled=fooled,
        differ=int((seen.prediction != again.prediction).sum()),
        largest=float(lengths[fooled].max(initial=0)),
        outside=int(outside.sum()),
        batch_sizes=(own, other.batch_size),
    )
