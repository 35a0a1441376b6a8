"""What every defense shares."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from e2sad_jax.attacks.core import Bounds, LogitsFn, is_number

__all__ = ["Bounds", "LogitsFn", "Parts", "check_weight", "clean_term", "is_zero", "weighted"]

Parts = dict[str, jax.Array]  # the terms of a loss by name: batch means, before their weights


def check_weight(name: str, argument: str, value: object, upper: float = float("inf")) -> None:
    """Refuses a weight outside [0, upper]; a traced one cannot be looked at and passes."""
    if is_number(value) and not 0 <= float(value) <= upper:  # type: ignore[arg-type]
        raise ValueError(f"{name}: {argument}={value}; it must lie in [0, {upper}]")


def is_zero(weight: object) -> bool:
    """Whether a term of this weight may be left out: one that is traced may be anything."""
    return is_number(weight) and float(weight) == 0  # type: ignore[arg-type]


def clean_term(alpha: jax.typing.ArrayLike, loss_fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """The clean loss; at weight 0 only to be seen, without the pass for a gradient that would be multiplied by 0."""
    clean = loss_fn(x).sum()
    return jax.lax.stop_gradient(clean) if is_zero(alpha) else clean


def weighted(
    alpha: jax.typing.ArrayLike, loss_fn: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    """`alpha * loss_fn`, the term exactly as in the training loss, for an attack to differentiate.

    With the same scale in attack and training XLA finds one backward pass where two are written. A weight of exactly 0
    is left out: the attack would find no gradient at all.
    """
    scale = (alpha if alpha != 0 else 1) if is_number(alpha) else jnp.where(alpha == 0, 1, alpha)
    return lambda z: scale * loss_fn(z)  # type: ignore[return-value]
