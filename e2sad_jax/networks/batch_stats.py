"""Batch normalisation for adversarial training: the loss's passes update the running averages, the attack's do not.

In training every pass, of the loss or of an attack, is normalised by the statistics of its own batch. A training step
makes several passes inside one gradient, and only those of the loss may update the running averages. The gradient separates
them. Each pass takes a *slot*, zeros that change no value, whose gradient is defined to be the batch's statistics
(`note`). The gradient of the loss in the slots is then the sum of the statistics over the passes that the loss consists
of. Attacks add nothing to it, because no gradient flows through what they return, and neither do passes inside a gradient
that a penalty differentiates. No pass is computed twice.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2sad_jax import _arguments

Y = TypeVar("Y")
NOTED = "noted"  # the collection of slots
MOMENTUM, EPSILON = 0.9, 1e-5


@jax.custom_vjp
def note(y: Y, slot: Any, value: Any) -> Y:
    """Returns `y`, with `value` as its gradient in `slot`; `slot` and `value` have the same shapes."""
    return y


note.defvjp(lambda y, slot, value: (y, value), lambda value, g: (g, value, jax.tree.map(jnp.zeros_like, value)))


@jax.custom_vjp
def _normalized(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The normalised batch, in float32 or wider, its mean and its variance.

    Both moments are of x less `near`, the running average, in one pass and with one sum over the devices. So the digits that
    E[x^2] - E[x]^2 loses where the mean is far from zero are kept once the average has come near. The gradient is written
    out, because JAX's has three sums.
    """
    return _forward(x, scale, bias, near)[0]


def _forward(x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array) -> tuple[Any, Any]:
    axes = tuple(range(x.ndim - 1))
    moved = x.astype(_arguments.wide(x.dtype)) - _along(near, x)
    first, second = moved.mean(axes), (moved**2).mean(axes)
    mean, var = near + first, jnp.maximum(second - first**2, 0)
    rate = jax.lax.rsqrt(var + EPSILON)
    y = (moved - _along(first, x)) * _along(scale * rate, x) + _along(bias, x)
    return (y, mean, var), (x, scale, bias, near, mean, rate)


def _backward(saved: Any, gradients: Any) -> tuple[jax.Array, ...]:
    x, scale, bias, near, mean, rate = saved
    g, g_mean, g_var = gradients
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    unit = (x.astype(g.dtype) - _along(mean, x)) * _along(rate, x)
    g_bias, g_scale = g.sum(axes), (g * unit).sum(axes)
    factor = scale * rate
    constant, slope = (g_mean - factor * g_bias) / count, (2 * g_var / rate - factor * g_scale) / count
    g_x = _along(factor, x) * g + _along(slope, x) * unit + _along(constant, x)
    return g_x.astype(x.dtype), g_scale.astype(scale.dtype), g_bias.astype(bias.dtype), jnp.zeros_like(near)


_normalized.defvjp(_forward, _backward)


def _along(v: jax.Array, x: jax.Array) -> jax.Array:
    """A value for each feature, in the rank of `x`."""
    return v.reshape((1,) * (x.ndim - 1) + v.shape)


class BatchNorm(nn.Module):
    """Normalises over all axes but the last: scale (x - mean) / sqrt(var + 1e-5) + bias, in float32 or wider.

    Mean and (biased) variance are those of the batch in training, and the running averages otherwise.

    Attributes:
      dtype: of the result; None for that of `x`.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        shape = x.shape[-1:]
        stats = {
            name: self.variable("batch_stats", name, make, shape).value
            for name, make in (("mean", jnp.zeros), ("var", jnp.ones))
        }
        scale = self.param("scale", nn.initializers.ones_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        if train:
            wide, mean, var = _normalized(x, scale, bias, stats["mean"])
            stats = {"mean": mean, "var": var}
        else:
            factor = scale * jax.lax.rsqrt(stats["var"] + EPSILON)
            centred = x.astype(_arguments.wide(x.dtype)) - _along(stats["mean"], x)
            wide = centred * _along(factor, x) + _along(bias, x)
        y = wide.astype(self.dtype or x.dtype)
        if train and self.has_variable(NOTED, "mean"):
            slot: Any = {name: self.get_variable(NOTED, name) for name in stats}
            y = note(y, slot, stats)
        return y


def parameters(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that the optimiser trains: all but the running averages."""
    return {name: tree for name, tree in variables.items() if name != "batch_stats"}


def slots(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Slots of zeros for `training_logits_fn`; empty for a network without running averages."""
    if "batch_stats" not in variables:
        return {}
    return {"passes": jnp.zeros(()), "batch_stats": jax.tree.map(jnp.zeros_like, variables["batch_stats"])}


def training_logits_fn(
    model: nn.Module, variables: Mapping[str, Any], slots: Mapping[str, Any]
) -> Callable[[jax.Array], jax.Array]:
    """The function from images `[N, H, W, C]` to logits `[N, K]` in training, normalised by each batch's own statistics.

    Args:
      model: the network; its `__call__` takes `train`.
      variables: its variables, running averages among them.
      slots: what `slots` returns. `updated` takes the loss's gradient in them.
    """

    def apply(x: jax.Array) -> jax.Array:
        logits: Any = model.apply({**variables, NOTED: slots["batch_stats"]}, x, train=True)
        return note(logits, slots["passes"], jnp.ones(()))

    return apply


def updated(batch_stats: Any, noted: Mapping[str, Any]) -> Any:
    """The running averages after a step: 0.9 of the old ones plus 0.1 of the mean over the loss's passes.

    Args:
      batch_stats: the running averages before.
      noted: the gradient of the loss in the slots.

    Returns:
      A tree like `batch_stats`; unchanged if the loss made no pass.
    """
    share = jnp.where(noted["passes"] > 0, (1 - MOMENTUM) / jnp.maximum(noted["passes"], 1), 0)
    kept = jnp.where(noted["passes"] > 0, MOMENTUM, 1)
    return jax.tree.map(lambda old, new: kept * old + share * new, batch_stats, noted["batch_stats"])
