"""Universal perturbations: one change for all images."""

from typing import Any

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._ball import Ball, ball, project_and_cast
from e2sad_jax.attacks._numerics import as_float32, input_gradient, per_image, threefry
from e2sad_jax.attacks._types import Bounds, LogitsFn, LossFn
from e2sad_jax.attacks.deepfool import deepfool


def universal(
    key: jax.Array,
    logits_fn: LogitsFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    passes: int = 5,
    fooling: float = 0.8,
    steps: int = 10,
    overshoot: float = 0.02,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Universal perturbation: one change v that fools the network on most images, made of DeepFool's steps.

    In random order, each image that v does not fool yet adds the change that DeepFool makes to x_i + v:

        v = project(v + deepfool(x_i + v) - (x_i + v))

    onto the ball of radius eps, until the share of images of another class than before reaches `fooling`. In the l-infinity
    norm DeepFool's change is not clipped to `bounds`: over black pixels v would otherwise have no negative part. In the l2
    norm it is: no length goes where clipping takes it away. The class of an image is the predicted one; there are no labels.

    v is made to be added to other images too: `jnp.clip(x + v, *bounds)`; `fooling_rate` measures it. Images are taken one
    after the other, so many of them take long. `universal_pgd` takes all at once.

    Args:
      key: one random key, of the order of the images.
      logits_fn: images `[n, ...]` to logits `[n, K]`, of any n; the attack calls it on one image and on all.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: budget in `norm`, at least 0, in the images' own units: a number, or in the l-infinity norm what broadcasts
        against one image.
      passes: number of passes over the images at most, at least 1.
      fooling: share of the images at which it stops, in [0, 1].
      steps: of DeepFool, at least 1.
      overshoot: of DeepFool, at least 0.
      norm: "linf" or "l2".
      bounds: range of valid images, or None for no clipping.

    Returns:
      v, `[1, ...]` of the dtype of `x`, within `eps` of 0. No gradient flows through it.

    Raises:
      TypeError: if `x` is not floating point, or `key` is no random key.
      ValueError: if an argument is out of range, there are no images, or the logits are not `[n, K]`.

    Reference: Moosavi-Dezfooli et al., 2017, https://arxiv.org/abs/1610.08401 (Algorithm 1)
    """
    x, eps, _, checked, limits = _given("universal", x, eps, norm, bounds, passes=passes, steps=steps)
    _checks.number("universal", "overshoot", overshoot)
    if not 0 <= fooling <= 1:
        raise ValueError(f"universal: fooling={fooling}; it must lie in [0, 1], the share of images at which it stops")
    key = threefry("universal", key)
    if key.shape != ():
        raise ValueError(f"universal: key has shape {key.shape}; it must be one key, for the order of the images")
    clean = as_float32(x)
    classes = _classes("universal", logits_fn, x)
    inner = None if norm == "linf" else bounds

    def one(v: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        at = _shifted(clean[i][None], v, checked).astype(x.dtype)
        moved = deepfool(logits_fn, at, classes[i][None], steps=steps, overshoot=overshoot, norm=norm, bounds=inner)
        left = logits_fn(moved).argmax(-1) != classes[i]
        change = jnp.where(left[0], as_float32(moved) - as_float32(at), 0)
        return jnp.where((change != 0).any(), limits.project(v + change), v), None

    def go(i: int | jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        v, _ = state
        order = jax.random.permutation(jax.random.fold_in(key, i), len(x))
        v = jax.lax.scan(one, v, order)[0]
        return v, _rate(logits_fn, x, classes, v, checked)

    start = (jnp.zeros_like(clean[:1]), jnp.zeros((), jnp.float32))
    v, _ = _loops.repeat_while(lambda state: state[1] < fooling, passes, go, start)
    return project_and_cast(limits, v, x.dtype)


def universal_pgd(
    loss_fn: LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    steps: int = 100,
    step_size: jax.typing.ArrayLike | None = None,
    cap: float | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Universal perturbation by gradient steps: one change v that raises the mean loss of all images.

        v = project(v + a d),    d the steepest direction of mean_i min(loss(clip(x_i + v)), cap)

    from v = 0. The cap keeps images that are fooled already from filling the mean.

    Args:
      loss_fn: images `[N, ...]` to losses `[N]`, to be maximised, such as the cross-entropy of the predicted classes.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: budget in `norm`, at least 0, in the images' own units: a number, or in the l-infinity norm what broadcasts
        against one image.
      steps: number of steps, at least 1; each takes the gradients of all images.
      step_size: a, above 0; None for `2.5 * eps / steps`, or `eps / 10` where that is less.
      cap: highest loss of an image that counts, or None.
      norm: "linf" or "l2".
      bounds: range of valid images, or None for no clipping.

    Returns:
      v, `[1, ...]` of the dtype of `x`, within `eps` of 0. No gradient flows through it.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if an argument is out of range, there are no images, or `loss_fn` does not return one value per image.

    Reference: Shafahi et al., 2020, https://arxiv.org/abs/1811.11304 (Algorithm 2)
    """
    x, eps, size, checked, limits = _given("universal_pgd", x, eps, norm, bounds, step_size=step_size, steps=steps)
    clean = as_float32(x)
    if size is None:
        size = jnp.asarray(eps) * min(2.5 / steps, 0.1)

    def capped(z: jax.Array) -> jax.Array:
        losses = per_image("loss_fn", loss_fn, z)
        return losses if cap is None else jnp.minimum(losses, cap)

    def step(_: int | jax.Array, v: jax.Array) -> jax.Array:
        def mean(v: jax.Array) -> jax.Array:
            return as_float32(capped(_shifted(clean, v, checked).astype(x.dtype))).mean()[None]

        return limits.project(v + size * limits.steepest(input_gradient(mean, v)))

    return project_and_cast(limits, _loops.repeat(steps, step, jnp.zeros_like(clean[:1])), x.dtype)


def fooling_rate(logits_fn: LogitsFn, x: jax.Array, change: jax.Array, *, bounds: Bounds = (0.0, 1.0)) -> jax.Array:
    """The share of images whose predicted class changes when `change` is added and the sum clipped to `bounds`.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: images `[N, ...]`, floating point, inside `bounds`.
      change: what broadcasts against them: one perturbation `[1, ...]`, or one for each image.
      bounds: range of valid images, or None for no clipping.

    Returns:
      A scalar in [0, 1], float32.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if `bounds` or the shape of `change` is not right, or the logits are not `[N, K]`.
    """
    x, _, _, checked = _checks.threat_model("fooling_rate", x, bounds=bounds)
    if not _checks.fits(change.shape, x.shape) or change.ndim != x.ndim:
        raise ValueError(
            f"fooling_rate: change has shape {change.shape}; it must be that of one image, {(1, *x.shape[1:])}, or of all"
        )
    return _rate(logits_fn, x, _classes("fooling_rate", logits_fn, x), as_float32(change), checked)


def _given(
    name: str,
    x: jax.Array,
    eps: jax.typing.ArrayLike,
    norm: str,
    bounds: Bounds,
    *,
    step_size: jax.typing.ArrayLike | None = None,
    **counts: Any,
) -> tuple[jax.Array, Any, Any, Bounds, Ball]:
    """What the attacks take, checked, and the ball around no change."""
    x, _, _, checked = _checks.threat_model(name, x, norm=norm, bounds=bounds, **counts)
    if not len(x):
        raise ValueError(f"{name}: images have shape {x.shape}; there must be one at least")
    x = jax.lax.stop_gradient(x)
    none = jnp.zeros_like(x[:1])
    _, eps, step_size, _ = _checks.threat_model(name, none, eps=eps, norm=norm, step_size=step_size, bounds=None)
    return x, eps, step_size, checked, ball(norm, none, eps, None)


def _shifted(clean: jax.Array, v: jax.Array, bounds: Bounds) -> jax.Array:
    return clean + v if bounds is None else jnp.clip(clean + v, *bounds)


def _classes(name: str, logits_fn: LogitsFn, x: jax.Array) -> jax.Array:
    return _checks.logits(name, logits_fn(x), len(x)).argmax(-1)


def _rate(logits_fn: LogitsFn, x: jax.Array, classes: jax.Array, v: jax.Array, bounds: Bounds) -> jax.Array:
    changed = logits_fn(_shifted(as_float32(x), v, bounds).astype(x.dtype)).argmax(-1) != classes
    return changed.astype(jnp.float32).mean()
