"""Orthogonal PGD: an attack on a classifier and a detector whose gradients do not undo each other."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._ball import ball, cast_inside
from e2sad_jax.attacks._best import Candidate
from e2sad_jax.attacks._numerics import (
    as_float32,
    broadcast,
    finite,
    like_sharded,
    losses_and_gradient,
    per_image,
    per_image_keys,
    select,
    unit,
)
from e2sad_jax.attacks._types import Bounds, LossFn


def orthogonal_pgd(
    key: jax.Array | None,
    loss_fn: LossFn,
    score_fn: LossFn,
    x: jax.Array,
    *,
    misclassified_fn: LossFn,
    threshold: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    steps: int,
    step_size: jax.typing.ArrayLike | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Orthogonal projected gradient descent: PGD that fools a classifier and evades a detector.

    Where an image is classified correctly, a step goes up the loss, along its gradient without the component along the
    score's. Where it is misclassified, a step goes down the score, along its gradient without the component along the
    loss's. No weight balances loss and score.

    Args:
      key: one random key, or keys `[N]`, one per image, for a start at a uniform point of the ball. None starts at `x`.
      loss_fn: images `[N, ...]` to per-example losses `[N]`, to be maximised.
      score_fn: images `[N, ...]` to scores `[N]`; an image is rejected if its score is above `threshold`.
      x: images `[N, ...]`, floating point, inside `bounds`.
      misclassified_fn: images `[N, ...]` to bool `[N]`, True where the classifier is wrong, whatever the detector says.
      threshold: the detector's.
      eps: budget in `norm`, at least 0, in the images' own units.
      steps: number of steps, at least 1; each takes both gradients.
      step_size: above 0; None for 2.5 eps / steps.
      norm: "linf" or "l2", of each image's perturbation.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Images, same shape and dtype as `x`, within `eps` of it: of all points on the way that are misclassified and not
      rejected the one of the lowest score; where there is none, of those that are not rejected the one of the highest loss;
      where all are rejected, that of `x`. No gradient flows through them.

    Raises:
      TypeError: if `x` or the scores are not floating point.
      ValueError: if a budget is out of range, `norm` is unknown, `key` has neither one key nor N, `threshold` is NaN, or a
        function does not return one value per image.

    Reference: Bryniarski et al., 2021, https://arxiv.org/abs/2106.15023
    """
    x, eps, step_size, bounds = _checks.threat_model(
        "orthogonal_pgd", x, eps=eps, norm=norm, bounds=bounds, steps=steps, step_size=step_size
    )
    if not len(x):  # nothing that a model could be asked
        return x
    _checks.threshold("orthogonal_pgd", threshold)
    step_size = 2.5 * eps / steps if step_size is None else step_size
    x = jax.lax.stop_gradient(x)
    limits, start = ball(norm, x, eps, bounds), as_float32(x)
    if key is not None:
        start = limits.project(start + eps * limits.sample(per_image_keys("orthogonal_pgd", key, len(x)), start))

    def score_at(image: jax.Array) -> jax.Array:
        return _checks.score("orthogonal_pgd", per_image("score_fn", score_fn, image))

    def wrong_at(image: jax.Array) -> jax.Array:
        return per_image("misclassified_fn", misclassified_fn, image).astype(bool)

    def judged(image: jax.Array, losses: jax.Array, score: jax.Array, wrong: jax.Array) -> Candidate:
        losses, score = as_float32(losses), as_float32(score)
        accepted = ~(score > threshold)
        worth = jnp.where(wrong, -score, losses).astype(start.dtype)
        return Candidate(image, wrong & accepted, jnp.where(accepted & ~jnp.isnan(worth), worth, -jnp.inf))

    def step(_: int | jax.Array, state: tuple[jax.Array, Candidate]) -> tuple[jax.Array, Candidate]:
        point, best = state
        image = cast_inside(point, x.dtype, limits)
        wrong = wrong_at(image)
        losses, rise = losses_and_gradient(loss_fn, image)
        score, away = losses_and_gradient(score_at, image)
        up, down = finite(as_float32(rise)), -finite(as_float32(away))
        direction = select(wrong, _without(down, up), _without(up, down))
        moved = limits.project(point + step_size * limits.steepest(direction))
        return moved, best.keep_worst(judged(image, losses, score, wrong))

    never = like_sharded(jnp.zeros(len(x), bool), x)
    nothing = Candidate(x, never, like_sharded(jnp.full(len(x), -jnp.inf, start.dtype), x))
    end, best = _loops.repeat(steps, step, (start, nothing))
    last = cast_inside(end, x.dtype, limits)
    best = best.keep_worst(judged(last, per_image("loss_fn", loss_fn, last), score_at(last), wrong_at(last)))
    return jax.lax.stop_gradient(best.image)


def _without(direction: jax.Array, other: jax.Array) -> jax.Array:
    """Per image `direction` without its component along `other`; both `[N, ...]`."""
    direction, other = unit(direction), unit(other)  # the square of a saturated network's gradient would be zero
    share = (direction * other).sum(tuple(range(1, direction.ndim)))
    return direction - broadcast(share, direction) * other
