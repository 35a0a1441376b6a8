"""The fewest pixels by the gradient: one after the other, each the best of the linearised network."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax import _arguments, losses
from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._aim import aim
from e2sad_jax.attacks._ball import linf_ball, pixels_of, project_and_cast
from e2sad_jax.attacks._numerics import as_float32, finite, like_sharded, linearise, losses_and_gradient, select
from e2sad_jax.attacks._types import Bounds, LogitsFn


class _State(NamedTuple):
    z: jax.Array  # the point, float32 or wider
    left: jax.Array  # which pixels have not changed, bool [N, P]
    fooled: jax.Array  # bool [N]


def greedy_l0(
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array | None = None,
    *,
    targets: jax.Array | None = None,
    pixels: int = 100,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Greedy l0 attack: changes few pixels, one in a step, until the image is of another class.

    In the linearised network a pixel at x of gradient w = grad (z_k - z_y) raises the lead of class k over the label y by at
    most max((upper - x) w, (lower - x) w), summed over its channels, independent of the other pixels. So the pixels of the
    highest gains are the best ones for k, and the lead that they close tells how many are needed. A step sets the best pixel
    of the class that needs the fewest, to the end of the range that raises its lead, and linearises anew.

    Of a linear model it finds the smallest number of pixels that there is. A step takes the gradients of all K logits, or one
    with `targets`.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, K at least 2.
      x: images `[N, H, W, C]`, floating point, inside `bounds`. A pixel is a place with all of its C channels. Images of
        another number of axes have none: each number is a pixel.
      labels: integer classes to leave, `[N]`; None for the predicted ones. An image of another class stays as it is. Where
        they are traced, one out of range makes its image NaN.
      targets: integer classes to reach, `[N]`, other than `labels`; None for any. An image of its target stays as it is.
      pixels: number of pixels that may change, at least 0.
      bounds: range of valid images, finite; the attack needs one.

    Returns:
      Images, same shape and dtype as `x`; one that was not fooled is that of `x`. No gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point, or `labels` or `targets` are not integers.
      ValueError: if an argument is out of range, a target is the label, `bounds` is None, or the logits are not `[N, K]`.

    >>> import jax.numpy as jnp
    >>> w = jnp.array([[0.0, -5.0], [0.0, 2.0], [0.0, 3.0], [0.0, 1.0]])
    >>> print(greedy_l0(lambda x: x @ w + jnp.array([[2.0, 0.0]]), jnp.full((1, 4), 0.25)))
    [[0.25 0.25 1.   0.25]]

    SparseFool (Modas et al., 2019, https://arxiv.org/abs/1811.02248) goes to the boundary of the linearised network in the
    same order of pixels.
    """
    x, _, _, checked = _checks.threat_model("greedy_l0", x, bounds=bounds)
    _arguments.count("greedy_l0: pixels", pixels, least=0)
    _checks.finite_range("greedy_l0", bounds, checked, "it sets pixels to the ends of the range")
    if not len(x):  # nothing that a model could be asked
        return x
    x = jax.lax.stop_gradient(x)
    n, count, channels = len(x), *pixels_of(x.shape)
    everywhere = linf_ball(x, jnp.inf, checked)
    lower, upper = (jnp.broadcast_to(end, x.shape) for end in everywhere)

    def look(z: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(as_float32(_checks.logits("greedy_l0", logits_fn(z), n)))

    def image(z: jax.Array) -> jax.Array:
        return project_and_cast(everywhere, z, x.dtype)

    def leads(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """By how much each class to reach leads, `[K, N]`, and the gradients of that, `[K, N, ...]`."""
        if goal.targets is not None:
            reach = goal.targets
            lead, w = losses_and_gradient(lambda z: -losses.margin(logits_fn(z), reach), z)
            return as_float32(lead)[None], as_float32(w)[None]
        logits, w = linearise(logits_fn, z, goal.leave)
        own = jax.nn.one_hot(goal.leave, logits.shape[1], dtype=bool)
        lead = logits - jnp.take_along_axis(logits, goal.leave[:, None], 1)
        return jnp.where(own, -jnp.inf, lead).T, w

    def step(_: int | jax.Array, s: _State) -> _State:
        lead, w = leads(image(s.z))
        w = finite(w)
        gains = jnp.maximum((upper - s.z)[None] * w, (lower - s.z)[None] * w)
        gains = gains.reshape(*lead.shape, count, channels).sum(-1)
        gains = jnp.where(s.left[None], gains, 0)
        reach = lead[:, :, None] + jnp.cumsum(-jnp.sort(-gains, axis=2), axis=2)  # with the best 1, 2, ... pixels
        needed = jnp.where(reach[:, :, -1] > 0, (reach <= 0).sum(2), count)
        most = jnp.take_along_axis(reach, jnp.minimum(needed, count - 1)[:, :, None], 2)[:, :, 0]
        k = jnp.where(needed == needed.min(0, keepdims=True), most, -jnp.inf).argmax(0)[None]
        gain = jnp.take_along_axis(gains, k[:, :, None], 0)[0]
        place = gain.argmax(1)
        moves = ~s.fooled & (gain.max(1) > 0)
        chosen = jax.nn.one_hot(place, count, dtype=bool) & moves[:, None]
        w = jnp.take_along_axis(w, k.reshape(1, n, *[1] * (x.ndim - 1)), 0)[0]
        end = jnp.where(w > 0, upper, jnp.where(w < 0, lower, s.z))
        changes = jnp.broadcast_to(chosen[:, :, None], (n, count, channels)).reshape(x.shape)
        z = jnp.where(changes, end, s.z)
        return _State(z, s.left & ~chosen, s.fooled | (moves & goal.reached(look(image(z)))))

    logits = look(x)
    goal = aim("greedy_l0", logits, labels, targets)
    start = _State(as_float32(x), like_sharded(jnp.ones((n, count), bool), x), goal.reached(logits))
    end = _loops.repeat_while(lambda s: ~s.fooled.all(), min(pixels, count), step, start)
    found = select(end.fooled, image(end.z), x)
    return jax.lax.stop_gradient(goal.nan_without_class(found, logits.shape[1]))
