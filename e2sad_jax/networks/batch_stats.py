"""Batch normalisation under attack: which passes through the network its running averages learn from.

In training every pass is normalised by its own batch's statistics, an attack's as well as the loss's. A pass tells
what it saw by way of the gradient: it takes a *slot* of zeros that changes nothing, and whose gradient is, by a rule
of its own, the statistics. The gradient of the loss in the slots is then their sum over just the passes that the loss
is made of. Attacks are not among them, because no gradient flows through what they return, nor are passes inside a
gradient that a penalty differentiates. No pass is made twice for this.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

Y = TypeVar("Y")
NOTED = "noted"  # the collection of slots
MOMENTUM, EPSILON = 0.9, 1e-5


@jax.custom_vjp
def note(y: Y, slot: Any, value: Any) -> Y:
    """`y`, whose gradient in `slot` is `value`, of the same shapes."""
    return y


note.defvjp(lambda y, slot, value: (y, value), lambda value, g: (g, value, jax.tree.map(jnp.zeros_like, value)))


class BatchNorm(nn.Module):
    """scale (x - mean) / sqrt(var + 1e-5) + bias, over all axes but the last, in float32 at least.

    Mean and (biased) variance are those of the batch in training and the running averages otherwise.

    Attributes:
      dtype: of the result; None for that of `x`.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        shape, axes = x.shape[-1:], tuple(range(x.ndim - 1))
        stats = {
            name: self.variable("batch_stats", name, make, shape).value
            for name, make in (("mean", jnp.zeros), ("var", jnp.ones))
        }
        scale = self.param("scale", nn.initializers.ones_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if train:
            mean = wide.mean(axes, keepdims=True)
            stats = {"mean": mean.reshape(shape), "var": ((wide - mean) ** 2).mean(axes)}

        def along(v: jax.Array) -> jax.Array:
            return v.reshape((1,) * (x.ndim - 1) + shape)

        factor = scale * jax.lax.rsqrt(stats["var"] + EPSILON)
        y = ((wide - along(stats["mean"])) * along(factor) + along(bias)).astype(self.dtype or x.dtype)
        if train and self.has_variable(NOTED, "mean"):
            slot: Any = {name: self.get_variable(NOTED, name) for name in stats}
            y = note(y, slot, stats)
        return y


def parameters(variables: Mapping[str, Any]) -> dict[str, Any]:
    """What of a network's variables the optimiser trains: all but its running averages."""
    return {name: tree for name, tree in variables.items() if name != "batch_stats"}


def slots(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Slots for `training_logits_fn`; none for a network without running averages."""
    if "batch_stats" not in variables:
        return {}
    return {"passes": jnp.zeros(()), "batch_stats": jax.tree.map(jnp.zeros_like, variables["batch_stats"])}


def training_logits_fn(
    model: nn.Module, variables: Mapping[str, Any], slots: Mapping[str, Any]
) -> Callable[[jax.Array], jax.Array]:
    """The function from network inputs to logits in training.

    Args:
      model: the network; `train=True` makes it normalise by the batch.
      variables: its variables, running averages among them.
      slots: what `slots` made; the gradient in them is for `updated`.
    """

    def apply(x: jax.Array) -> jax.Array:
        logits: Any = model.apply({**variables, NOTED: slots["batch_stats"]}, x, train=True)
        return note(logits, slots["passes"], jnp.ones(()))

    return apply


def updated(batch_stats: Any, noted: Mapping[str, Any]) -> Any:
    """The running averages after a step: 0.9 of the old ones, 0.1 of the mean over the loss's passes.

    Args:
      batch_stats: the running averages.
      noted: the gradient of the loss in its slots.
    """
    share = jnp.where(noted["passes"] > 0, (1 - MOMENTUM) / jnp.maximum(noted["passes"], 1), 0)
    kept = jnp.where(noted["passes"] > 0, MOMENTUM, 1)
    return jax.tree.map(lambda old, new: kept * old + share * new, batch_stats, noted["batch_stats"])
