"""JSMA: pairs of pixels that raise the target's logit and lower the others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._aim import aim
from e2sad_jax.attacks._ball import linf_ball, project_and_cast
from e2sad_jax.attacks._numerics import as_float32, broadcast, finite, like_sharded, select
from e2sad_jax.attacks._types import Bounds, LogitsFn

ROWS = 16  # of the table of all pairs that are looked at together


class _State(NamedTuple):
    z: jax.Array  # the point, float32 or wider
    reached: jax.Array  # whether its image is of the target's class, bool [N]
    stuck: jax.Array  # whether no pair is left, bool [N]


def jsma(
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array | None = None,
    *,
    targets: jax.Array | None = None,
    theta: float = 1.0,
    gamma: float = 0.145,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """JSMA, the Jacobian-based saliency map attack: changes few pixels, two in a step, until the image is of its target.

    With t the target, a = grad z_t and b = sum_{j != t} grad z_j at the present point, a step changes the pixels p and q of
    the largest

        -(a_p + a_q) (b_p + b_q)    among those with    theta (a_p + a_q) > 0 > theta (b_p + b_q)

    by theta each, clipped to `bounds`. A pixel at the bound that theta leads to is no candidate. An image is done when it is
    of its target, after `gamma D / 2` steps, D being the number of its pixels times channels, or when no pair is left. A step
    takes two gradients, and compares all pairs, D (D - 1) / 2, in memory of order D.

    The paper has the variant that differentiates probabilities too: `jsma(lambda z: jax.nn.softmax(logits_fn(z)), ...)`.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, K at least 2.
      x: images `[N, ...]`, floating point, inside `bounds`.
      labels: integer classes to leave, `[N]`; None for the predicted ones. An image of another class stays as it is. Where
        they are traced, one out of range makes its image NaN.
      targets: integer classes to reach, `[N]`, other than `labels`; None for the likeliest other class of each image, where
        any other class is a success. An image of its target stays as it is.
      theta: change of a pixel in one step, other than 0; below 0 the attack darkens.
      gamma: share of the pixels that may change, in (0, 1].
      bounds: range of valid images, or None for no clipping: then no pixel is ever at a bound.

    Returns:
      Images, same shape and dtype as `x`; one that has not reached its target is that of `x`. No gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point, or `labels` or `targets` are not integers.
      ValueError: if an argument is out of range, a target is the label, or the logits are not `[N, K]`.

    >>> import jax.numpy as jnp
    >>> w = jnp.array([[0.0, 0.0], [-1.0, 3.0], [-1.0, 2.0], [0.0, 1.0]])
    >>> print(jsma(lambda x: x @ w + jnp.array([[2.0, 0.0]]), jnp.full((1, 4), 0.1), gamma=0.5))
    [[0.1 1.  1.  0.1]]

    Reference: Papernot et al., 2016, https://arxiv.org/abs/1511.07528 (Algorithm 3)
    """
    x, _, _, bounds = _checks.threat_model("jsma", x, bounds=bounds)
    if not _checks.is_number(theta) or not 0 < abs(theta) < float("inf"):
        raise ValueError(f"jsma: theta={theta}; it must be a number, finite and other than 0")
    if not 0 < gamma <= 1:
        raise ValueError(f"jsma: gamma={gamma}; it must lie in (0, 1], the share of the pixels that may change")
    if not len(x):  # nothing that a model could be asked
        return x
    x = jax.lax.stop_gradient(x)
    n, d, up = len(x), x[0].size, theta > 0
    everywhere = linf_ball(x, jnp.inf, bounds)
    limit = everywhere.upper if up else everywhere.lower

    def look(z: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(as_float32(_checks.logits("jsma", logits_fn(z), n)))

    def image(z: jax.Array) -> jax.Array:
        return project_and_cast(everywhere, z, x.dtype)

    def step(_: int | jax.Array, s: _State) -> _State:
        logits, backward = jax.vjp(logits_fn, image(s.z))
        own = jax.nn.one_hot(target, logits.shape[1], dtype=logits.dtype)
        both = jax.vmap(lambda c: backward(c)[0])(like_sharded(jnp.stack([own, 1 - own]), logits))
        a, b = finite(as_float32(jax.lax.stop_gradient(both))).reshape(2, n, d) * (1 if up else -1)
        p, q, found = _best_pair(a, b, (s.z < limit if up else s.z > limit).reshape(n, d))
        chosen = jax.nn.one_hot(p, d, dtype=s.z.dtype) + jax.nn.one_hot(q, d, dtype=s.z.dtype)
        moves = found & ~s.reached
        z = everywhere.project(s.z + jnp.where(broadcast(moves, x), theta * chosen.reshape(x.shape), 0))
        return _State(z, s.reached | (moves & goal.reached(look(image(z)))), s.stuck | ~found)

    logits = look(x)
    goal = aim("jsma", logits, labels, targets)
    target = goal.towards(logits)
    start = _State(as_float32(x), goal.reached(logits), like_sharded(jnp.zeros(n, bool), x))
    end = _loops.repeat_while(lambda s: ~(s.reached | s.stuck).all(), int(round(gamma * d / 2, 9)), step, start)
    found = select(end.reached, image(end.z), x)
    return jax.lax.stop_gradient(goal.nan_without_class(found, logits.shape[1]))


def _best_pair(a: jax.Array, b: jax.Array, domain: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pair p < q of the domain with the largest -(a_p + a_q) (b_p + b_q), where the first is above and the second below 0.

    Args:
      a: `[N, D]`.
      b: `[N, D]`.
      domain: pixels that may be taken, bool `[N, D]`.

    Returns:
      p and q, `[N]`, and whether there is such a pair, bool `[N]`.
    """

    def scaled(values: jax.Array) -> jax.Array:
        # Neither do products of large ones overflow nor those of small ones vanish.
        largest = jnp.abs(values).max(1, keepdims=True)
        return values / jnp.where(largest > 0, largest, 1)

    a, b = jnp.where(domain, scaled(a), -2), -scaled(b)  # no sum with -2 is above 0
    everyone = jnp.arange(a.shape[1])

    def scores(p: jax.Array) -> jax.Array:
        """Of the pairs of pixel p, `[N]`, with each pixel, `[N, D]`; 0 for those that are not allowed."""
        p = p[:, None]
        rise = a + jnp.take_along_axis(a, p, 1)
        fall = b + jnp.take_along_axis(b, p, 1)
        return jnp.where(everyone[None] != p, jnp.maximum(rise, 0) * jnp.maximum(fall, 0), 0)

    # The maximum alone, without its place, is several times faster.
    best = jax.lax.map(lambda p: scores(jnp.broadcast_to(p, a.shape[:1])).max(1), everyone, batch_size=ROWS)
    p = best.argmax(0)
    return p, scores(p).argmax(1), best.max(0) > 0
