"""Box-constrained L-BFGS: the first attack on neural networks, towards a class nearby."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from e2sad_jax import losses
from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._aim import aim
from e2sad_jax.attacks._ball import LinfBall, linf_ball, project_and_cast
from e2sad_jax.attacks._numerics import as_float32, broadcast, finite, like_sharded, select
from e2sad_jax.attacks._search import Nearest, search_c
from e2sad_jax.attacks._types import Bounds, LogitsFn

HALVINGS = 10  # of a step
DECREASE = 1e-4  # share of the decrease that the slope promises, which a step must have (Armijo)
CURVATURE = 1e-10  # least s y / (|s| |y|) of a pair
TOLERANCE = 1e-6  # of the projected gradient's largest entry, relative to the first gradient's where that is above 1
S = TypeVar("S")


def lbfgs(
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array | None = None,
    *,
    targets: jax.Array | None = None,
    steps: int = 200,
    binary_steps: int = 12,
    initial_c: float = 1e-2,
    history: int = 10,
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Box-constrained L-BFGS attack: the nearest image of the target, by a quasi-Newton method.

    Minimises ||x' - x||_2^2 + c J(x', target) inside `bounds` from x, J being the cross-entropy. For each image c is searched
    as in `carlini_wagner`: from `initial_c` ten times larger until the minimum is of the target, then by bisection to the
    smallest one. Of all x' of the target the one nearest to x is kept.

    A step goes along the L-BFGS direction of the pixels that are free, those that are at no bound against which the gradient
    presses, is clipped to `bounds`, and is halved until the objective decreases enough. Each image has its own history and
    stops by itself.

    The paper writes c on the distance instead, and searches the largest one. `carlini_wagner` finds nearer images: the
    cross-entropy pushes on after the image is of its target.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, K at least 2.
      x: images `[N, ...]`, floating point, inside `bounds`.
      labels: integer classes to leave, `[N]`; None for the predicted ones. An image of another class stays as it is. Where
        they are traced, one out of range makes its image NaN.
      targets: integer classes to reach, `[N]`, other than `labels`; None for the likeliest other class of each image, where
        any other class is a success. An image of its target stays as it is.
      steps: L-BFGS steps for each c, at least 1.
      binary_steps: number of values of c, at least 1.
      initial_c: first c, above 0.
      history: number of pairs of steps and changes of the gradient that are kept, at least 1.
      bounds: range of valid images, or None.

    Returns:
      Images, same shape and dtype as `x`, inside `bounds`; an image for which nothing was found is that of `x`. No
      gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point, or `labels` or `targets` are not integers.
      ValueError: if an argument is out of range, a target is the label, or the logits are not `[N, K]`.

    Reference: Szegedy et al., 2014, https://arxiv.org/abs/1312.6199 (Section 4.1)
    """
    x, _, _, bounds = _checks.threat_model(
        "lbfgs", x, bounds=bounds, steps=steps, binary_steps=binary_steps, history=history
    )
    _checks.number("lbfgs", "initial_c", initial_c, positive=True)
    if not len(x):  # nothing that a model could be asked
        return x
    x = jax.lax.stop_gradient(x)
    clean, everywhere, axes = as_float32(x), linf_ball(x, jnp.inf, bounds), tuple(range(1, x.ndim))

    def look(z: jax.Array) -> jax.Array:
        return as_float32(_checks.logits("lbfgs", logits_fn(z), len(x)))

    def attempt(c: jax.Array, nearest: Nearest) -> Nearest:
        def objective(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = look(z.astype(x.dtype))
            loss = losses.cross_entropy(logits, losses.soft_labels(target, logits.shape[1], 0).astype(logits.dtype))
            return jnp.square(z - clean).sum(axes) + c * loss.astype(clean.dtype), logits

        def visit(nearest: Nearest, z: jax.Array, logits: jax.Array) -> Nearest:
            image = project_and_cast(everywhere, z, x.dtype)
            found = nearest.keep(image, jnp.square(as_float32(image) - clean).sum(axes), goal.reached(logits))
            return found._replace(fooled=goal.reached(logits))  # of the last point alone, the minimum

        return minimise(objective, clean, everywhere, steps=steps, history=history, visit=visit, seen=nearest)[1]

    logits = jax.lax.stop_gradient(look(x))
    goal = aim("lbfgs", logits, labels, targets)
    target = goal.towards(logits)
    already = goal.reached(logits)
    found = search_c(attempt, x, already, initial_c=initial_c, tries=binary_steps, dtype=clean.dtype)
    return jax.lax.stop_gradient(goal.nan_without_class(found, logits.shape[1]))


class _State(NamedTuple):
    z: jax.Array  # [N, ...]
    value: jax.Array  # [N]
    gradient: jax.Array  # [N, ...]
    moves: jax.Array  # the last steps, [history, N, ...], the latest at the end, 0 where there is none
    turns: jax.Array  # the changes of the gradient along them
    done: jax.Array  # bool [N]


def minimise(
    objective: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    start: jax.Array,
    limits: LinfBall,
    *,
    steps: int,
    history: int,
    visit: Callable[[S, jax.Array, jax.Array], S],
    seen: S,
) -> tuple[jax.Array, S]:
    """Minimises `objective` image by image inside `limits`, by projected L-BFGS.

    Args:
      objective: points `[N, ...]` to values `[N]` and logits `[N, K]`.
      start: first point, `[N, ...]`, float32 or wider, in `limits`.
      limits: box.
      steps: number of steps at most.
      history: number of pairs.
      visit: `(seen, point, logits) -> seen`, called with the points of all images whenever one has moved.
      seen: tree of arrays.

    Returns:
      The points, `[N, ...]`, and what `visit` returned last.
    """
    axes = tuple(range(1, start.ndim))

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a * b).sum(axes)

    def look(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def total(z: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            values, logits = objective(z)
            return values.sum(), (values, logits)

        gradient, (values, logits) = jax.grad(total, has_aux=True)(z)
        values, gradient, logits = jax.lax.stop_gradient((values, gradient, logits))
        return values, finite(gradient), logits

    def stationary(z: jax.Array, gradient: jax.Array) -> jax.Array:
        return jnp.abs(limits.project(z - gradient) - z).max(axes) <= least

    def direction(s: _State, gradient: jax.Array, free: jax.Array) -> jax.Array:
        """The two-loop recursion on the free pixels."""
        moves, turns = s.moves * free[None], s.turns * free[None]
        inner = tuple(axis + 1 for axis in axes)
        sy, ss, yy = ((a * b).sum(inner) for a, b in ((moves, turns), (moves, moves), (turns, turns)))
        use = sy > CURVATURE * jnp.sqrt(ss * yy)
        inverse = jnp.where(use, 1 / jnp.where(use, sy, 1), 0)
        scale = jnp.full_like(s.value, 0.5)  # the inverse Hessian of the distance, where there is no pair
        for i in range(history):
            scale = jnp.where(use[i], sy[i] / jnp.where(use[i], yy[i], 1), scale)
        weights, q = [], gradient
        for i in reversed(range(history)):
            weights.append(inverse[i] * dot(moves[i], q))
            q = q - broadcast(weights[-1], q) * turns[i]
        q = broadcast(scale, q) * q
        for i in range(history):
            q = q + broadcast(weights[-1 - i] - inverse[i] * dot(turns[i], q), q) * moves[i]
        descends = dot(q, gradient) > 0
        return -jnp.where(broadcast(descends, q), q * free, gradient)

    def step(_: int | jax.Array, state: tuple[_State, S]) -> tuple[_State, S]:
        s, seen = state
        against = ((s.z <= limits.lower) & (s.gradient > 0)) | ((s.z >= limits.upper) & (s.gradient < 0))
        free = (~against).astype(s.z.dtype)
        towards = direction(s, s.gradient * free, free)

        def halve(
            _: int | jax.Array, trial: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            z, length, accepted = trial
            tried = limits.project(s.z + broadcast(length, z) * towards)
            # The values of two near points differ by their rounding too.
            most = s.value + DECREASE * dot(s.gradient, tried - s.z) + 2 * jnp.finfo(z.dtype).eps * jnp.abs(s.value)
            lower = (objective(tried)[0] <= most) & ~accepted
            return jnp.where(broadcast(lower, z), tried, z), length / 2, accepted | lower

        first = (s.z, jnp.ones_like(s.value), s.done)
        z, _, accepted = _loops.repeat_while(lambda trial: ~trial[2].all(), HALVINGS + 1, halve, first)
        value, gradient, logits = look(z)
        moved = accepted & ~s.done
        empty = ~(s.moves != 0).any((0, *(axis + 1 for axis in axes)))
        forgotten = ~accepted & ~empty  # next along the gradient
        moves, turns = (
            jnp.where(broadcast(forgotten, z)[None], 0, jnp.concatenate([old[1:], new[None]]))
            for old, new in ((s.moves, z - s.z), (s.turns, gradient - s.gradient))
        )
        done = s.done | (~accepted & empty) | stationary(z, gradient) | (moved & (z == s.z).all(axes))
        new = _State(z, value, gradient, moves, turns, done)
        both = ("moves", "turns")  # the others have the images first
        kept = {name: jnp.where(broadcast(s.done, z)[None], getattr(s, name), getattr(new, name)) for name in both}
        rest = {name: select(s.done, getattr(s, name), getattr(new, name)) for name in s._fields if name not in kept}
        return _State(**kept, **rest), visit(seen, z, logits)

    value, gradient, logits = look(start)
    least = TOLERANCE * jnp.maximum(jnp.abs(gradient).max(axes), 1)
    none = like_sharded(jnp.zeros((history, *start.shape), start.dtype), start)
    begin = _State(start, value, gradient, none, none, stationary(start, gradient))
    end, seen = _loops.repeat_while(
        lambda state: ~state[0].done.all(), steps, step, (begin, visit(seen, start, logits))
    )
    return end.z, seen
