"""The worst candidate of an attack with several, image by image."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax.attacks._numerics import like_sharded, select
from e2sad_jax.attacks._types import LossFn


class Candidate(NamedTuple):
    """Images that an attack may return, and how bad they are for the model.

    Attributes:
      image: `[N, ...]`.
      fooled: whether the model is wrong there, bool `[N]`.
      loss: `[N]`.
    """

    image: jax.Array
    fooled: jax.Array
    loss: jax.Array

    def keep_worst(self, other: "Candidate") -> "Candidate":
        """Per image the worse of the two: one that fools the model before any other, then the higher loss."""
        worse = (other.fooled & ~self.fooled) | ((other.fooled == self.fooled) & (other.loss > self.loss))
        return select(worse, other, self)


def score(image: jax.Array, loss: jax.Array, misclassified_fn: LossFn | None) -> Candidate:
    """The candidate `image` `[N, ...]` with its losses `[N]`; a NaN loss counts as the lowest.

    Without `misclassified_fn` no candidate counts as fooling the model, and the loss alone decides.
    """
    if misclassified_fn is None:
        fooled = like_sharded(jnp.zeros(loss.shape, bool), loss)
    else:
        fooled = misclassified_fn(image).astype(bool)
    return Candidate(image, fooled, jnp.where(jnp.isnan(loss), -jnp.inf, loss))
