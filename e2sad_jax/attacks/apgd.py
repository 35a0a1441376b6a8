"""Auto-PGD: projected gradient descent that finds its own step size."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._ball import ball, cast_inside
from e2sad_jax.attacks._best import Candidate, score
from e2sad_jax.attacks._numerics import (
    as_float32,
    broadcast,
    like_sharded,
    losses_and_gradient,
    per_image_keys,
    select,
)
from e2sad_jax.attacks._types import Bounds, LossFn

MOMENTUM = 0.75  # alpha of Algorithm 1


class _Seen(NamedTuple):
    """A point and what the model made of it; all that follows is per image."""

    point: jax.Array
    loss: jax.Array
    direction: jax.Array


class _State(NamedTuple):
    now: _Seen
    before: jax.Array  # x^(k-1)
    best: _Seen  # x_max, f_max
    worst: Candidate
    scale: jax.Array  # eta in units of its first value
    rises: jax.Array  # steps since the last checkpoint that raised the loss
    halved: jax.Array  # whether the last checkpoint halved the step size
    best_at_checkpoint: jax.Array  # f_max there


def checkpoints(steps: int) -> list[int]:
    """The steps at which the step size may be halved: ceil(p_j steps), p from 0, .22 in gaps that shrink to .06."""
    percent = [0, 22]
    while percent[-1] <= 100:
        percent.append(percent[-1] + max(percent[-1] - percent[-2] - 3, 6))
    return sorted({-(-p * steps // 100) for p in percent[:-1]})


def apgd(
    key: jax.Array,
    loss_fn: LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    steps: int = 100,
    restarts: int = 1,
    rho: float = 0.75,
    misclassified_fn: LossFn | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Auto-PGD (Algorithm 1 of the paper): PGD with momentum that adapts its own step size.

    z = P(x_k + eta s(grad));  x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))

    s is the sign, or in the l2 ball the gradient at length 1. The step size eta starts at 2 eps. At each checkpoint it
    is halved, for each image by itself, and the image goes back to its best point, (1) if fewer than a share `rho` of
    the steps since the last checkpoint raised the loss, or (2) if that one did not halve and the best loss has not
    risen since. Each restart begins at a uniform point of the ball, cut to `bounds`.

    With `losses.dlr` as `loss_fn`, or `losses.targeted_dlr` for a target, it is the attack of AutoAttack.

    Args:
      key: one random key, or keys `[N]`, one per image. With keys per image the result of an image does not depend on
        its place in the batch nor on the batch around it.
      loss_fn: images `[N, ...]` to per-example losses `[N]`, to be maximised.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: budget in `norm`, at least 0, in the images' own units.
      steps: number of gradient steps, at least 1.
      restarts: number of random starts, at least 1.
      rho: share of rising steps below which the step size is halved, in [0, 1].
      misclassified_fn: images `[N, ...]` to bool `[N]`, True where the attack has succeeded; without it points are
        compared by loss alone.
      norm: "linf" or "l2", of each image's perturbation.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Adversarial images, same shape and dtype as `x`, within `eps` of it: of all points on the way, over all restarts,
      one that fools the model if there was one, then the one of highest loss. No gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if a budget is out of range, `norm` is unknown, `key` has neither one key nor N, or `loss_fn` does not
        return per-example losses.

    Reference: Croce and Hein, 2020, https://arxiv.org/abs/2003.01690
    """
    x, eps, _, bounds = _checks.threat_model(
        "apgd", x, eps=eps, norm=norm, bounds=bounds, steps=steps, restarts=restarts
    )
    if not 0 <= rho <= 1:
        raise ValueError(f"apgd: rho={rho}; it must lie in [0, 1], the paper takes 0.75")
    if not len(x):  # nothing that a model could be asked
        return x
    x, n = jax.lax.stop_gradient(x), x.shape[0]
    keys = per_image_keys("apgd", key, n)
    limits = ball(norm, x, eps, bounds)
    clean, eta = as_float32(x), 2 * eps
    marks = checkpoints(steps)
    due, enough = np.zeros(steps, bool), np.zeros(steps, np.int32)
    for before, mark in itertools.pairwise(mark for mark in marks if mark < steps):
        due[mark], enough[mark] = True, math.ceil(round(rho * (mark - before), 9))
    is_due, enough_rises = jnp.asarray(due), jnp.asarray(enough)

    def look(point: jax.Array) -> tuple[_Seen, Candidate]:
        image = cast_inside(point, x.dtype, limits)  # what is scored is what may be returned
        loss, gradient = losses_and_gradient(loss_fn, image)
        scored = score(image, loss.astype(clean.dtype), misclassified_fn)
        return _Seen(point, scored.loss, limits.steepest(as_float32(gradient))), scored

    def step(k: int | jax.Array, s: _State) -> _State:
        point = s.now.point
        target = limits.project(point + eta * broadcast(s.scale, x) * s.now.direction)
        alpha = jnp.where(k == 0, 1.0, MOMENTUM).astype(point.dtype)
        moved = limits.project(point + alpha * (target - point) + (1 - alpha) * (point - s.before))
        seen, candidate = look(moved)
        best = select(seen.loss > s.best.loss, seen, s.best)
        # As in the paper, a checkpoint at step k judges the points up to x_k; x_{k+1} is only then at hand.
        stuck = ~s.halved & (s.best_at_checkpoint == s.best.loss)
        halve = is_due[k] & ((s.rises < enough_rises[k]) | stuck)
        now = select(halve, best, seen)
        return _State(
            now=now,
            before=point,
            best=best,
            worst=s.worst.keep_worst(candidate),
            scale=jnp.where(halve, s.scale / 2, s.scale),
            rises=jnp.where(is_due[k], 0, s.rises) + (now.loss > s.now.loss).astype(jnp.int32),
            halved=jnp.where(is_due[k], halve, s.halved),
            best_at_checkpoint=jnp.where(is_due[k], s.best.loss, s.best_at_checkpoint),
        )

    def attempt(restart: int | jax.Array, worst: Candidate) -> Candidate:
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, restart)
        start, candidate = look(limits.project(clean + eps * limits.sample(own, clean)))
        state = _State(
            now=start,
            before=start.point,
            best=start,
            worst=worst.keep_worst(candidate),
            scale=like_sharded(jnp.ones(n, clean.dtype), x),
            rises=like_sharded(jnp.zeros(n, jnp.int32), x),
            halved=never,
            best_at_checkpoint=start.loss,
        )
        return _loops.repeat_long(steps, step, state).worst

    never = like_sharded(jnp.zeros(n, bool), x)
    nothing = Candidate(x, never, like_sharded(jnp.full(n, -jnp.inf, clean.dtype), x))
    worst = attempt(0, nothing) if restarts == 1 else _loops.repeat_long(restarts, attempt, nothing)
    return jax.lax.stop_gradient(worst.image)
