"""Which of several points an attack returns, image by image."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _ball

T = TypeVar("T")


class Worst(NamedTuple):
    """The point to return: one that fools the model before any other, then the one of highest loss."""

    image: jax.Array
    fooled: jax.Array
    loss: jax.Array

    def or_worse(self, other: "Worst") -> "Worst":
        worse = (other.fooled & ~self.fooled) | ((other.fooled == self.fooled) & (other.loss > self.loss))
        return select(worse, other, self)


def judge(image: jax.Array, loss: jax.Array, misclassified_fn: _ball.LossFn | None) -> Worst:
    """`image` as a candidate; without `misclassified_fn` none fools, and a loss that is NaN is below all others."""
    if misclassified_fn is None:
        fooled = _ball.like_sharded(jnp.zeros(loss.shape, bool), loss)
    else:
        fooled = misclassified_fn(image).astype(bool)
    return Worst(image, fooled, jnp.where(jnp.isnan(loss), -jnp.inf, loss))


def select(choose: jax.Array, yes: T, no: T) -> T:
    """Per image `yes` where `choose`, otherwise `no`."""
    return jax.tree.map(lambda a, b: jnp.where(_ball.broadcast(choose, a), a, b), yes, no)
