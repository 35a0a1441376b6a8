"""Which class an attack from logits leaves, and which it reaches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax import losses
from e2sad_jax.attacks import _checks


class Aim(NamedTuple):
    """The class that each image is to leave, and the one that it is to reach.

    Attributes:
      leave: classes, `[N]`.
      targets: classes, `[N]`, or None for any other than `leave`.
    """

    leave: jax.Array
    targets: jax.Array | None

    def reached(self, logits: jax.Array) -> jax.Array:
        """Whether the class of `logits` `[N, K]` is the target, or without targets another one; bool `[N]`."""
        found = logits.argmax(-1)
        return jnp.not_equal(found, self.leave) if self.targets is None else jnp.equal(found, self.targets)

    def lead(self, logits: jax.Array) -> jax.Array:
        """By how much the target leads in `logits` `[N, K]`, or without targets the best class other than `leave`; `[N]`."""
        return losses.margin(logits, self.leave) if self.targets is None else -losses.margin(logits, self.targets)

    def towards(self, logits: jax.Array) -> jax.Array:
        """The targets, or without targets the likeliest class by `logits` `[N, K]` other than `leave`; `[N]`."""
        if self.targets is not None:
            return self.targets
        own = jax.nn.one_hot(self.leave, logits.shape[-1], dtype=bool)
        return jnp.where(own, -jnp.inf, jnp.maximum(logits, jnp.finfo(logits.dtype).min)).argmax(-1)

    def nan_without_class(self, x: jax.Array, num_classes: int) -> jax.Array:
        """`x` `[N, ...]`, NaN where the class to leave or the target is none."""
        return _checks.nan_without_class(x, num_classes, self.leave, self.targets)


def aim(name: str, logits: jax.Array, labels: jax.Array | None, targets: jax.Array | None) -> Aim:
    """Checks `labels` and `targets` `[N]`; without labels the class to leave is that of `logits` `[N, K]`."""
    labels, targets = _checks.aims(name, labels, targets, *logits.shape, predicted=True)
    return Aim(logits.argmax(-1) if labels is None else labels, targets)
