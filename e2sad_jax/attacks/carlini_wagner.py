"""Carlini and Wagner's l2 attack: the smallest change that fools the network, by descent."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax import losses
from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._ball import linf_ball, project_and_cast
from e2sad_jax.attacks._numerics import as_float32, broadcast, finite, like_sharded, per_image
from e2sad_jax.attacks._search import Nearest, search_c
from e2sad_jax.attacks._types import Bounds, LogitsFn, LossFn


class _Adam(NamedTuple):
    w: jax.Array
    mean: jax.Array
    square: jax.Array


def carlini_wagner(
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array,
    *,
    targets: jax.Array | None = None,
    steps: int = 1000,
    binary_steps: int = 9,
    learning_rate: float = 0.01,
    initial_c: float = 1e-3,
    confidence: float = 0.0,
    constraint_fn: LossFn | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Carlini and Wagner's l2 attack: the nearest image of another class, by descent.

    Minimises ||x' - x||_2^2 + c max(-m(x'), -confidence) over w with Adam, where x' is tanh(w) stretched to `bounds` and
    m the `losses.margin`, or with `targets` the lead of the target over all others. For each image c is searched: from
    `initial_c` ten times larger until the image is fooled, then by bisection. Of all x' that fool the network the one
    nearest to x is kept.

    With `constraint_fn` g the objective has c max(0, g(x')) too, and x' counts as fooling only where g(x') is not above 0.

    It takes `steps * binary_steps` gradients. The l-infinity attack that goes by the same name is another one:
    `pgd(key, lambda z: losses.margin(logits_fn(z), labels), ...)`.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, K at least 2.
      x: images `[N, ...]`, floating point, inside `bounds`.
      labels: integer classes to leave, `[N]`. An image of another class stays as it is, if by `confidence`. Where they are
        traced, one out of range makes its image NaN.
      targets: integer classes to reach, `[N]`, other than `labels`; None for any. An image of its target stays as it is, if
        by `confidence`.
      steps: Adam steps for each c, at least 1. The authors run up to 10,000.
      binary_steps: number of values of c, at least 1.
      learning_rate: Adam's, above 0. Where its steps are long relative to the distance, one that happens to cross the boundary
        ends the search of c too early, and a smaller one finds nearer images.
      initial_c: first c, above 0.
      confidence: margin by which the other class must lead, at least 0; higher ones transfer better.
      constraint_fn: images `[N, ...]` to `[N]`, above 0 where an image is not valid, as a detector's score minus its
        threshold, divided by the spread of clean scores. None for no constraint.
      bounds: range of valid images, finite; the attack needs one.

    Returns:
      Images, same shape and dtype as `x`, inside `bounds`; an image for which nothing was found is that of `x`. No
      gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point, or `labels` or `targets` are not integers.
      ValueError: if an argument is out of range, a target is the label, `bounds` is None, or the logits are not `[N, K]`.

    Reference: Carlini and Wagner, 2017, https://arxiv.org/abs/1608.04644
    """
    x, _, _, checked = _checks.threat_model("carlini_wagner", x, bounds=bounds, steps=steps, binary_steps=binary_steps)
    _checks.number("carlini_wagner", "learning_rate", learning_rate, positive=True)
    _checks.number("carlini_wagner", "initial_c", initial_c, positive=True)
    _checks.number("carlini_wagner", "confidence", confidence)
    ends = _checks.finite_range("carlini_wagner", bounds, checked, "it changes variables by tanh")
    lower, upper = (jnp.asarray(end, as_float32(x).dtype) for end in ends)
    if not len(x):  # nothing that a model could be asked
        return x
    logits = _checks.logits("carlini_wagner", jax.eval_shape(logits_fn, x), x.shape[0])
    y, wanted = _checks.aims("carlini_wagner", labels, targets, *logits.shape)
    x = jax.lax.stop_gradient(x)
    clean, everywhere = as_float32(x), linf_ball(x, jnp.inf, checked)
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    # Just inside, since the ends of the range lie at infinity.
    start = jnp.arctanh(jnp.clip((clean - middle) / half, -1, 1) * 0.999999)

    def lead(z: jax.Array) -> jax.Array:
        lead = losses.margin(logits_fn(z), labels) if wanted is None else -losses.margin(logits_fn(z), wanted)
        return lead.astype(clean.dtype)

    def scaled(c: jax.Array, backward: Callable[[jax.Array], tuple[jax.Array]], direction: jax.Array) -> jax.Array:
        """A gradient times c, for which the network's own dtype may be too narrow."""
        return broadcast(c, clean) * finite(as_float32(backward(direction)[0]))

    def constrained(image: jax.Array, hinge: jax.Array, c: jax.Array) -> tuple[jax.Array | bool, jax.Array]:
        """Whether images are valid, and the gradient with the constraint's."""
        if constraint_fn is None:
            return True, hinge
        excess, backward = jax.vjp(lambda z: per_image("constraint_fn", constraint_fn, z), image)
        valid = ~(excess > 0)  # NaN rejects nothing
        return valid, hinge + scaled(c, backward, jnp.where(valid, 0, 1).astype(excess.dtype))

    def descend(i: int | jax.Array, state: tuple[_Adam, Nearest, jax.Array]) -> tuple[_Adam, Nearest, jax.Array]:
        adam, nearest, c = state
        tanh = jnp.tanh(adam.w)
        image = project_and_cast(everywhere, middle + half * tanh, x.dtype)
        change = as_float32(image) - clean
        led_by, backward = jax.vjp(lead, image)
        hinge = scaled(c, backward, jnp.where(led_by <= confidence, -1, 0).astype(led_by.dtype))
        valid, hinge = constrained(image, hinge, c)
        led_by, hinge = jax.lax.stop_gradient((led_by, hinge))
        gradient = (2 * change + hinge) * half * (1 - jnp.square(tanh))
        mean = 0.9 * adam.mean + 0.1 * gradient
        square = 0.999 * adam.square + 0.001 * jnp.square(gradient)
        t = jnp.asarray(i + 1, clean.dtype)
        step = mean / (1 - 0.9**t) / (jnp.sqrt(square / (1 - 0.999**t)) + 1e-8)
        distance = jnp.square(change).sum(tuple(range(1, x.ndim)))
        nearest = nearest.keep(image, distance, valid & (led_by > confidence))
        return _Adam(adam.w - learning_rate * step, mean, square), nearest, c

    def attempt(c: jax.Array, nearest: Nearest) -> Nearest:
        adam = _Adam(start, *[like_sharded(jnp.zeros_like(start), x)] * 2)
        return _loops.repeat_long(steps, descend, (adam, nearest, c))[1]

    already = jax.lax.stop_gradient(lead(x)) > confidence
    if constraint_fn is not None:
        already &= ~(jax.lax.stop_gradient(constraint_fn(x)) > 0)
    found = search_c(attempt, x, already, initial_c=initial_c, tries=binary_steps, dtype=clean.dtype)
    return jax.lax.stop_gradient(_checks.nan_without_class(found, logits.shape[1], y, wanted))
