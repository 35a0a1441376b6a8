"""Attacks that look for the smallest change that fools the network: DeepFool, and Carlini and Wagner's."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax import losses
from e2sad_jax.attacks import _ball, _loops

LogitsFn = Callable[[jax.Array], jax.Array]


def deepfool(
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array | None = None,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    norm: str = "l2",
    bounds: _ball.Bounds | None = (0.0, 1.0),
) -> jax.Array:
    """DeepFool: steps to the nearest boundary of the network as it is linear around the image.

    With y the class, w_k = grad z_k - grad z_y and f_k = z_k - z_y at the present point, the boundary nearest to it is
    that of l = argmin_k |f_k| / ||w_k||_q (q = 2, or 1 in the l-infinity norm), and the step to it

        |f_l| / ||w_l||_2^2 w_l,    or    |f_l| / ||w_l||_1 sign(w_l)

    Each image stops by itself as soon as `(1 + overshoot)` times its change is of another class. Its size then says how
    robust the network is there. There is no budget: measure the change, or keep what is within yours.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, K at least 2. Gradients of all K are taken in each step.
      x: images `[N, ...]`, floating point, inside `bounds`.
      labels: integer classes to leave, `[N]`; None for the predicted ones. An image of another class stays as it is.
      steps: number of steps at most, at least 1.
      overshoot: share by which the change reaches beyond the boundary, at least 0.
      norm: "l2" or "linf", in which the change is small.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Images, same shape and dtype as `x`; one that was not fooled within `steps` is where it had got to. No gradient
      flows through them.

    Raises:
      TypeError: if `x` is not floating point or `labels` are not integers.
      ValueError: if an argument is out of range, or the logits are not `[N, K]`.

    Reference: Moosavi-Dezfooli et al., 2016, https://arxiv.org/abs/1511.04599
    """
    _ball.check_images("deepfool", x)
    _ball.check_steps("deepfool", "steps", steps)
    _ball.check_number("deepfool", "overshoot", overshoot)
    _ball.check_norm("deepfool", norm)
    _ball.check_bounds("deepfool", bounds)
    x = jax.lax.stop_gradient(x)
    clean, axes = _ball.as_float32(x), tuple(range(2, x.ndim + 1))
    everywhere = _ball.box(x, jnp.inf, bounds)

    def look(z: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(_ball.as_float32(logits_fn(z)))

    def beyond(z: jax.Array) -> jax.Array:
        """The image that would be returned for `z`."""
        return _ball.project_and_cast(everywhere, clean + (1 + overshoot) * (z - clean), x.dtype)

    def step(_: int | jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z, fooled = state
        logits, w = linearised(logits_fn, z.astype(x.dtype), y)
        size = jnp.abs(w).sum(axes) if norm == "linf" else jnp.sqrt(jnp.square(w).sum(axes))  # [K, N]
        z_own = jnp.take_along_axis(logits, y[:, None], 1)
        # On the boundary itself the step would be zero, and with it the overshoot: one rounding more.
        gap = jnp.abs(logits - z_own) + jnp.finfo(logits.dtype).eps * jnp.maximum(jnp.abs(z_own), 1)
        distance = jnp.where(size > 0, gap.T / jnp.where(size > 0, size, 1), jnp.inf)
        distance = jnp.where(jnp.isfinite(distance), distance, jnp.inf)
        nearest, away = distance.argmin(0), distance.min(0)
        towards = jnp.take_along_axis(w, nearest.reshape(1, -1, *[1] * (x.ndim - 1)), 0)[0]
        towards = _ball.finite(towards)
        towards = jnp.sign(towards) if norm == "linf" else _ball.unit(towards)
        moves = ~fooled & jnp.isfinite(away)
        z = everywhere.clip(z + _ball.broadcast(jnp.where(moves, away, 0), x) * towards)
        return z, fooled | (look(beyond(z)).argmax(-1) != y)

    logits = look(x)
    if logits.ndim != 2 or logits.shape[0] != x.shape[0] or logits.shape[1] < 2:
        raise ValueError(f"deepfool: logits have shape {logits.shape}; it must be ({x.shape[0]}, K), K at least 2")
    y = logits.argmax(-1) if labels is None else labels
    _ball.check_classes("deepfool", "labels", y, logits.shape)
    start = (clean, logits.argmax(-1) != y)
    end, _ = _loops.repeat_while(lambda state: ~state[1].all(), steps, step, start)
    return jax.lax.stop_gradient(beyond(end))


def linearised(logits_fn: LogitsFn, z: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits `[N, K]`, and how each grows beside that of the label: gradients `[K, N, ...]`."""
    logits, backward = jax.vjp(logits_fn, z)
    n, classes = logits.shape
    one_hot = jnp.broadcast_to(jnp.eye(classes, dtype=logits.dtype)[:, None], (classes, n, classes))
    gradients = jax.vmap(lambda cotangent: backward(cotangent)[0])(_ball.like_sharded(one_hot, logits))
    logits, gradients = jax.lax.stop_gradient((_ball.as_float32(logits), _ball.as_float32(gradients)))
    return logits, gradients - jnp.take_along_axis(gradients, labels.reshape(1, -1, *[1] * (z.ndim - 1)), 0)


class _Nearest(NamedTuple):
    """The nearest image so far that fooled the network, and whether one did under the present c."""

    image: jax.Array
    distance: jax.Array
    fooled: jax.Array


class _Adam(NamedTuple):
    w: jax.Array
    mean: jax.Array
    square: jax.Array


class _Search(NamedTuple):
    """The search of c, per image: tried in vain up to `low`, with success from `high`."""

    c: jax.Array
    low: jax.Array
    high: jax.Array


def carlini_wagner(
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array,
    *,
    steps: int = 1000,
    binary_steps: int = 9,
    learning_rate: float = 0.01,
    initial_c: float = 1e-3,
    confidence: float = 0.0,
    bounds: _ball.Bounds = (0.0, 1.0),
) -> jax.Array:
    """Carlini and Wagner's l2 attack: the nearest image of another class, by descent.

    Minimises ||x' - x||_2^2 + c max(-m(x'), -confidence) over w with Adam, where x' is tanh(w) stretched to `bounds` and
    m the `losses.margin`. For each image c is searched: from `initial_c` ten times larger until the image is fooled, then
    by bisection. Of all x' that fool the network the one nearest to x is kept.

    It takes `steps * binary_steps` gradients. The l-infinity attack that goes by the same name is another one:
    `pgd(key, lambda z: losses.margin(logits_fn(z), labels), ...)`.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, K at least 2.
      x: images `[N, ...]`, floating point, inside `bounds`.
      labels: integer classes to leave, `[N]`. An image of another class stays as it is, if by `confidence`.
      steps: Adam steps for each c, at least 1. The authors run up to 10,000.
      binary_steps: number of values of c, at least 1.
      learning_rate: Adam's, above 0. Where its steps are long beside the distance, one that happens to cross the boundary
        ends the search of c too early, and a smaller one finds nearer images.
      initial_c: first c, above 0.
      confidence: margin by which the other class must lead, at least 0; higher ones transfer better.
      bounds: range of valid images; the attack needs one.

    Returns:
      Images, same shape and dtype as `x`, inside `bounds`; an image for which nothing was found is that of `x`. No
      gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point or `labels` are not integers.
      ValueError: if an argument is out of range, `bounds` is None, or the logits are not `[N, K]`.

    Reference: Carlini and Wagner, 2017, https://arxiv.org/abs/1608.04644
    """
    _ball.check_images("carlini_wagner", x)
    _ball.check_steps("carlini_wagner", "steps", steps)
    _ball.check_steps("carlini_wagner", "binary_steps", binary_steps)
    _ball.check_number("carlini_wagner", "learning_rate", learning_rate, positive=True)
    _ball.check_number("carlini_wagner", "initial_c", initial_c, positive=True)
    _ball.check_number("carlini_wagner", "confidence", confidence)
    if bounds is None:
        raise ValueError("carlini_wagner: bounds=None; its change of variables needs the range of valid images")
    _ball.check_bounds("carlini_wagner", bounds)
    x = jax.lax.stop_gradient(x)
    n, clean, everywhere = x.shape[0], _ball.as_float32(x), _ball.box(x, jnp.inf, bounds)
    middle, half = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
    # Just inside, since the ends of the range lie at infinity.
    start = jnp.arctanh(jnp.clip((clean - middle) / half, -1, 1) * 0.999999)

    def lead(z: jax.Array) -> jax.Array:
        return losses.margin(logits_fn(z), labels).astype(clean.dtype)

    def descend(i: int | jax.Array, state: tuple[_Adam, _Nearest, jax.Array]) -> tuple[_Adam, _Nearest, jax.Array]:
        adam, nearest, c = state
        tanh = jnp.tanh(adam.w)
        image = _ball.project_and_cast(everywhere, middle + half * tanh, x.dtype)
        change = _ball.as_float32(image) - clean
        led_by, backward = jax.vjp(lead, image)
        (hinge,) = backward(jnp.where(led_by <= confidence, -c, 0))
        led_by, hinge = jax.lax.stop_gradient((led_by, hinge))
        gradient = (2 * change + _ball.as_float32(hinge)) * half * (1 - jnp.square(tanh))
        mean = 0.9 * adam.mean + 0.1 * gradient
        square = 0.999 * adam.square + 0.001 * jnp.square(gradient)
        t = jnp.asarray(i + 1, clean.dtype)
        step = mean / (1 - 0.9**t) / (jnp.sqrt(square / (1 - 0.999**t)) + 1e-8)
        distance = jnp.square(change).sum(tuple(range(1, x.ndim)))
        fooled = led_by > confidence
        nearer = fooled & (distance < nearest.distance)
        nearest = _Nearest(
            jnp.where(_ball.broadcast(nearer, x), image, nearest.image),
            jnp.where(nearer, distance, nearest.distance),
            nearest.fooled | fooled,
        )
        return _Adam(adam.w - learning_rate * step, mean, square), nearest, c

    def search(_: int | jax.Array, state: tuple[_Search, _Nearest]) -> tuple[_Search, _Nearest]:
        (c, low, high), nearest = state
        adam = _Adam(start, *[_ball.like_sharded(jnp.zeros_like(start), x)] * 2)
        nearest = nearest._replace(fooled=_ball.like_sharded(jnp.zeros(n, bool), x))
        nearest = _loops.repeat_long(steps, descend, (adam, nearest, c))[1]
        low, high = jnp.where(nearest.fooled, low, c), jnp.where(nearest.fooled, c, high)
        return _Search(jnp.where(jnp.isfinite(high), (low + high) / 2, 10 * c), low, high), nearest

    def filled(value: float) -> jax.Array:
        return _ball.like_sharded(jnp.full(n, value, clean.dtype), x)

    already = jax.lax.stop_gradient(lead(x)) > confidence
    nearest = _Nearest(x, jnp.where(already, 0, filled(jnp.inf)), already)
    whole = (_Search(filled(initial_c), filled(0), filled(jnp.inf)), nearest)
    return jax.lax.stop_gradient(_loops.repeat_long(binary_steps, search, whole)[1].image)
