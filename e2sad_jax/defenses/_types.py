"""What every defense shares."""

import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp

LogitsFn = Callable[[jax.Array], jax.Array]  # images [N, ...] -> logits [N, K]
Bounds = tuple[float, float] | None
Parts = dict[str, jax.Array]  # the terms of a loss by name: batch means, before their weights


def check_weight(name: str, argument: str, value: object, upper: float = float("inf")) -> None:
    """Refuses a weight outside [0, upper]; a traced one cannot be looked at and passes."""
    if isinstance(value, numbers.Real) and not 0 <= float(value) <= upper:
        raise ValueError(f"{name}: {argument}={value}; it must lie in [0, {upper}]")


def weighted(
    alpha: jax.typing.ArrayLike, loss_fn: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    """`alpha * loss_fn`, the term as it stands in the training loss, for an attack to differentiate.

    With the same scale in attack and training XLA finds one backward pass where two are written. A weight of exactly 0
    is left out: the attack would find no gradient at all.
    """
    if not isinstance(alpha, numbers.Real):
        alpha = jnp.where(alpha == 0, 1, alpha)  # traced: not to be looked at
    elif alpha == 0:
        return loss_fn
    return lambda z: alpha * loss_fn(z)
