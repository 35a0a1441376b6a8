"""PGD: projected gradient descent from random points of the ball."""

import jax

from e2sad_jax.attacks import _checks, _loops
from e2sad_jax.attacks._ascent import ascend
from e2sad_jax.attacks._ball import ball
from e2sad_jax.attacks._best import Candidate, score
from e2sad_jax.attacks._numerics import per_image_keys
from e2sad_jax.attacks._types import Bounds, LossFn
from e2sad_jax.attacks._within import as_attack


@as_attack
def pgd(
    key: jax.Array | None,
    loss_fn: LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    steps: int,
    step_size: jax.typing.ArrayLike | None = None,
    restarts: int = 1,
    random_start: bool = True,
    start: jax.Array | None = None,
    misclassified_fn: LossFn | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
) -> jax.Array:
    """Projected gradient descent from random points of the ball; returns the worst of all restarts per image.

    Each restart begins at a uniform point of the ball (cut to `bounds`) and takes `steps` steps, along the gradient's
    signs or, in the l2 ball, along the gradient itself, projected onto the ball around the clean image. Per example the
    worst end point is returned: a misclassified one before any other (a high loss alone does not fool the model), then
    the one of highest loss.

    In bfloat16 and float16 an l2 result is rounded towards the image, so small changes of many pixels shrink.

    With `losses.margin` as its loss this is the l-infinity form of Carlini and Wagner's attack that Madry et al. use:
    `pgd(key, lambda z: losses.margin(logits_fn(z), labels), x, eps=0.3, steps=40)`.

    Args:
      key: one random key, or keys `[N]`, one per image. With keys per image the result of an image does not depend on
        its place in the batch nor on the batch around it. None where nothing is random.
      loss_fn: images `[N, ...]` to per-example losses `[N]`, to be maximised.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: budget in `norm`, at least 0, in the images' own units.
      steps: number of gradient steps, at least 1.
      step_size: above 0; None for 2.5 eps / steps (Madry et al.), which can cross the ball from any start.
      restarts: number of random starts, at least 1.
      random_start: False starts at `x` itself; then more than one restart is refused, they would all be equal.
      start: perturbations `[N, ...]` to start from in place of random ones, in the images' own units: the attack begins at
        x + start, brought into the ball. Likewise with one restart alone.
      misclassified_fn: images `[N, ...]` to bool `[N]`, True where the attack has succeeded; without it restarts are
        compared by loss alone.
      norm: "linf" or "l2", of each image's perturbation.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Adversarial images, same shape and dtype as `x`, within `eps` of it; no gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if a budget is out of range, `norm` is unknown, `key` has neither one key nor N, or `loss_fn` does not
        return per-example losses.

    Reference: Madry et al., 2017, https://arxiv.org/abs/1706.06083
    """
    x, eps, step_size, bounds = _checks.threat_model(
        "pgd", x, eps=eps, norm=norm, bounds=bounds, steps=steps, restarts=restarts, step_size=step_size
    )
    random_start &= start is None
    if restarts > 1 and not random_start:
        where = "from one start" if start is not None else "without random_start"
        raise ValueError(f"pgd: restarts={restarts} {where} would all be equal; use restarts=1")
    if not len(x):  # nothing that a model could be asked
        return x
    if step_size is None:
        step_size = 2.5 * eps / steps
    keys = per_image_keys("pgd", key, x.shape[0]) if random_start else None
    limits = ball(norm, x, eps, bounds)

    def attempt(restart: int | jax.Array) -> jax.Array:
        first = _checks.from_start("pgd", limits, x, start)
        if keys is not None:
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, restart)
            first = limits.project(first + eps * limits.sample(own, first))
        return ascend(loss_fn, first, limits, x.dtype, step_size, steps)

    if restarts == 1:  # nothing to compare: two forward passes saved
        return jax.lax.stop_gradient(attempt(0))

    def scored(restart: int | jax.Array) -> Candidate:
        end = attempt(restart)
        return score(end, loss_fn(end), misclassified_fn)

    worst = _loops.repeat(restarts - 1, lambda i, worst: worst.keep_worst(scored(i + 1)), scored(0))
    return jax.lax.stop_gradient(worst.image)
