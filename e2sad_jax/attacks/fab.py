"""FAB: the smallest change that fools the network, found by walking along its boundary."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax import losses
from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._ball import ball, linf_ball, project_and_cast
from e2sad_jax.attacks._numerics import (
    as_float32,
    broadcast,
    finite,
    like_sharded,
    linearise,
    losses_and_gradient,
    norms,
    per_image_keys,
    select,
)
from e2sad_jax.attacks._types import Bounds, LogitsFn

ROUNDS = 50  # of the projection at most; it needs about five
FINAL_STEPS = 3  # along the line from the image to the nearest point found
SHORT = 0.99  # of each of them: on the boundary itself rounding decides
ROUNDING = 1e-5  # share of the largest logit by which another must lead, to do so in another program too
FAR = 1e3  # times the leading logits: so large is that of a class which is masked, and no part of their rounding


class _Found(NamedTuple):
    """The nearest image so far that fools the network, and its distance; without one the clean image, infinity."""

    image: jax.Array
    distance: jax.Array


def fab(
    logits_fn: LogitsFn,
    x: jax.Array,
    labels: jax.Array,
    *,
    targets: jax.Array | None = None,
    any_wrong: bool = False,
    steps: int = 100,
    restarts: int = 1,
    key: jax.Array | None = None,
    eps: jax.typing.ArrayLike | None = None,
    alpha_max: float = 0.1,
    overshoot: float = 1.05,
    beta: float = 0.9,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Fast Adaptive Boundary attack: the nearest image of another class, by projections onto the boundary.

    In each step the network is taken as linear at the present point z. Its boundary towards one class is then a
    hyperplane, onto which z and the image x are projected inside `bounds`, by d and d_x. With a = min(|d| / (|d| + |d_x|),
    `alpha_max`) the next point is, cut to `bounds`,

        (1 - a) (z + overshoot d) + a (x + overshoot d_x)

    and where it fools the network, the one after starts at a share `beta` of the way to it. The nearest point of all that
    fools the network is at last moved towards x as far as three steps of a search on the line between them find.

    The class is the one whose hyperplane is nearest to z, which needs the gradients of all K logits in each step, or with
    `targets` a given one: one gradient, of the target's lead over all others, or over the label with `any_wrong`. Each step
    looks at the next point once more.
    There is no budget: measure the change, or keep what is within yours.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`, K at least 2.
      x: images `[N, ...]`, floating point, inside `bounds`.
      labels: integer classes to leave, `[N]`. An image of another class stays as it is; one that is made leads by 1e-5 of
        its largest logit, beyond what rounding differs by between programs. Where they are traced, one out of range makes
        its image NaN.
      targets: integer classes to reach, `[N]`, other than `labels`; None for any. An image of its target stays as it is.
      any_wrong: whether, walking to `targets`, any wrong class is a success, as for AutoAttack's FAB-T.
      steps: number of steps, at least 1.
      restarts: number of starts, at least 1. The first is at `x`, each other at a random point whose distance from it is
        half that of the nearest found, `eps / 2` at most.
      key: one random key, or keys `[N]`, one per image; needed by more than one start.
      eps: radius that matters to the caller, at least 0; needed by more than one start.
      alpha_max: bias towards the image, in [0, 1].
      overshoot: factor of each projection, at least 1.
      beta: share of the way from the image that is gone again after a success, in (0, 1].
      norm: "linf" or "l2", in which the change is small.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Images, same shape and dtype as `x`, inside `bounds`; an image for which nothing was found is that of `x`. No
      gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point, or `labels` or `targets` are not integers.
      ValueError: if an argument is out of range, a target is the label (where the numbers can be seen: not under `jit`),
        more than one start lacks `key` or `eps`, or the logits are not `[N, K]`.

    Reference: Croce and Hein, 2019, https://arxiv.org/abs/1907.02044
    """
    x, radius_limit, _, bounds = _checks.threat_model(
        "fab", x, eps=0.0 if eps is None else eps, norm=norm, bounds=bounds, steps=steps, restarts=restarts
    )
    if restarts > 1 and (key is None or eps is None):
        raise ValueError(f"fab: restarts={restarts} begin at random points and need key and eps; or use restarts=1")
    if not 0 <= alpha_max <= 1:
        raise ValueError(f"fab: alpha_max={alpha_max}; it must lie in [0, 1], the paper takes 0.1")
    if not overshoot >= 1:
        raise ValueError(f"fab: overshoot={overshoot}; it must be at least 1, the paper takes 1.05")
    if not 0 < beta <= 1:
        raise ValueError(f"fab: beta={beta}; it must lie in (0, 1], the paper takes 0.9")
    if not len(x):  # nothing that a model could be asked
        return x
    x = jax.lax.stop_gradient(x)
    n, clean, everywhere = x.shape[0], as_float32(x), linf_ball(x, jnp.inf, bounds)
    shape = _checks.logits("fab", jax.eval_shape(logits_fn, x), n).shape
    y, wanted = _checks.aims("fab", labels, targets, *shape)
    assert y is not None

    def slack(logits: jax.Array) -> jax.Array:
        """Of every boundary, the hyperplanes too: a walk that ended on the true one would never count as a success."""
        size = jnp.abs(jax.lax.stop_gradient(logits))
        leading = jnp.maximum(jnp.abs(logits.max(1)), pick(size, y))
        return ROUNDING * jnp.where(size <= FAR * leading[:, None], size, 0).max(1)

    def pick(logits: jax.Array, classes: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits, classes[:, None], 1)[:, 0]

    def margin(z: jax.Array) -> jax.Array:
        logits = jax.lax.stop_gradient(as_float32(logits_fn(z)))
        return success(logits).astype(clean.dtype)

    def success(logits: jax.Array) -> jax.Array:
        """Above 0 where the image counts as found, by more than rounding."""
        lead = losses.margin(logits, y) if wanted is None or any_wrong else -losses.margin(logits, wanted)
        return lead - slack(logits)

    def ahead(z: jax.Array) -> jax.Array:
        """By how much the target is above the label, or with success at the target alone above all others."""
        assert wanted is not None
        logits = as_float32(logits_fn(z))
        if not any_wrong:
            return success(logits)
        return pick(logits, wanted) - pick(logits, y) - slack(logits)

    def hyperplane(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The network at z as `value + <normal, . - z>`, above 0 beyond the boundary."""
        if wanted is not None:
            value, normal = losses_and_gradient(ahead, z)
            return value.astype(clean.dtype), as_float32(normal)
        logits, normals = linearise(logits_fn, z, y)
        values = logits - pick(logits, y)[:, None] - slack(logits)[:, None]
        size = norms(normals.reshape(-1, *x.shape[1:]), "l1" if norm == "linf" else norm).reshape(len(normals), n).T
        away = jnp.where(size > 0, jnp.abs(values) / jnp.where(size > 0, size, 1), jnp.inf)
        nearest = jnp.where(jnp.isfinite(away), away, jnp.inf).argmin(1)
        normal = jnp.take_along_axis(normals, nearest.reshape(1, -1, *[1] * (x.ndim - 1)), 0)[0]
        return jnp.take_along_axis(values, nearest[:, None], 1)[:, 0], normal

    def nearer(found: _Found, point: jax.Array) -> tuple[_Found, jax.Array]:
        """`point` instead, where it fools and is nearer; and its margin."""
        image = project_and_cast(everywhere, point, x.dtype)
        now = margin(image)
        distance = norms(as_float32(image) - clean, norm)
        return select((now > 0) & (distance < found.distance), _Found(image, distance), found), now

    def step(_: int | jax.Array, state: tuple[jax.Array, _Found]) -> tuple[jax.Array, _Found]:
        z, found = state
        value, normal = hyperplane(z.astype(x.dtype))
        normal = finite(normal)
        value_clean = value + (normal * (clean - z)).sum(tuple(range(1, x.ndim)))
        both = [jnp.concatenate(pair) for pair in ((z, clean), (normal, normal), (value, value_clean))]
        moves = project(*both, norm=norm, bounds=bounds)
        (d, d_clean), (size, size_clean) = jnp.split(moves, 2), jnp.split(norms(moves, norm), 2)
        total = size + size_clean
        alpha = jnp.minimum(jnp.where(total > 0, size / jnp.where(total > 0, total, 1), 0), alpha_max)
        alpha = broadcast(alpha, x)
        z = everywhere.project((1 - alpha) * (z + overshoot * d) + alpha * (clean + overshoot * d_clean))
        found, now = nearer(found, z)
        return jnp.where(broadcast(now > 0, x), (1 - beta) * clean + beta * z, z), found

    def attempt(restart: int | jax.Array, found: _Found) -> _Found:
        start = clean
        if restarts > 1:
            assert key is not None
            keys = jax.vmap(jax.random.fold_in, (0, None))(per_image_keys("fab", key, n), restart)
            towards = ball(norm, x, radius_limit, bounds).sample(keys, clean)
            towards = towards / broadcast(norms(towards, norm), x)
            radius = jnp.minimum(broadcast(found.distance, x), radius_limit) / 2
            start = everywhere.project(clean + jnp.where(restart == 0, 0, radius) * towards)
        return _loops.repeat_long(steps, step, (start, found))[1]

    def towards_clean(
        _: int | jax.Array, state: tuple[_Found, jax.Array, jax.Array, jax.Array]
    ) -> tuple[_Found, jax.Array, jax.Array, jax.Array]:
        """Just short of where a line through the margins at both ends crosses zero (the paper's Eq. 11)."""
        found, outside, inside, within = state
        end, drop = as_float32(found.image), outside - within
        share = SHORT * jnp.where(drop > 0, outside / jnp.where(drop > 0, drop, 1), 0)
        point = end - broadcast(jnp.where(jnp.isfinite(share), share, 0), x) * (end - inside)
        closer, now = nearer(found, point)
        fools = now > 0
        inside = jnp.where(broadcast(fools, x), inside, point)
        return closer, jnp.where(fools, now, outside), inside, jnp.where(fools, within, now)

    nothing = like_sharded(jnp.full(n, jnp.inf, clean.dtype), x)
    already = jax.lax.stop_gradient(success(as_float32(logits_fn(x)))) > 0
    found = _Found(x, jnp.where(already, 0, nothing))
    found = attempt(0, found) if restarts == 1 else _loops.repeat_long(restarts, attempt, found)
    ends = (found, margin(found.image), clean, margin(x))
    image = _loops.repeat_long(FINAL_STEPS, towards_clean, ends)[0].image
    return jax.lax.stop_gradient(_checks.nan_without_class(image, shape[1], y, wanted))


def project(point: jax.Array, normal: jax.Array, value: jax.Array, *, norm: str, bounds: Bounds) -> jax.Array:
    """The smallest change of `point` to where `value + <normal, change>` is 0, inside `bounds`.

    Every pixel moves the way that closes the gap, by min(t, room) in the l-infinity norm and min(t |w|, room) in l2, w
    being its entry of `normal` and room what `bounds` leave it. What that gains is concave in t, and piecewise linear:
    Newton's method comes to the t that closes the gap from below, in few rounds.

    Args:
      point: `[N, ...]`, float32 or wider, inside `bounds`.
      normal: `[N, ...]`, finite.
      value: `[N]`.
      norm: "linf" or "l2".
      bounds: range of valid images, or None.

    Returns:
      The change, `[N, ...]`. Where no image in `bounds` reaches 0, it goes to the one that comes nearest to it; where
      `normal` is 0 or `value` is not finite, it is 0.
    """
    axes = tuple(range(1, point.ndim))
    largest = jnp.abs(normal).max(axes)
    gap = jnp.abs(value) / jnp.where(largest > 0, largest, 1)
    possible = (largest > 0) & jnp.isfinite(gap)
    gap = jnp.where(possible, gap, 0)
    w = -broadcast(jnp.sign(value), point) * normal / broadcast(jnp.where(largest > 0, largest, 1), point)
    w = jnp.where(broadcast(possible, point), w, 0)
    weight = jnp.abs(w)
    room = jnp.full_like(point, jnp.inf)
    if bounds is not None:
        room = jnp.maximum(jnp.where(w > 0, bounds[1] - point, point - bounds[0]), 0)
    speed = jnp.where(w != 0, 1, 0).astype(w.dtype) if norm == "linf" else weight
    ends = room / jnp.where(speed > 0, speed, 1)  # the t from which on a pixel stays where it is

    def newton(_: int | jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        t, _ = state
        wide = broadcast(t, point)
        gained = (weight * speed * jnp.minimum(wide, ends)).sum(axes)
        rate = jnp.where(wide < ends, weight * speed, 0).sum(axes)
        further = t + jnp.maximum(gap - gained, 0) / jnp.where(rate > 0, rate, 1)
        further = jnp.where((rate > 0) & jnp.isfinite(further), further, t)
        return further, further > t

    zero = like_sharded(jnp.zeros(value.shape, point.dtype), value)
    t, _ = _loops.repeat_while(lambda state: state[1].any(), ROUNDS, newton, (zero, zero == 0))
    return jnp.sign(w) * jnp.minimum(broadcast(t, point) * speed, room)
