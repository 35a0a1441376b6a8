"""Attacks that take many gradients: IFGSM and PGD."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _ball, _loops


def _ascend(
    loss_fn: _ball.LossFn,
    start: jax.Array,
    limits: _ball.Box,
    dtype: jnp.dtype,
    step_size: jax.typing.ArrayLike,
    steps: int,
) -> jax.Array:
    """`steps` sign steps up the loss, each clipped to the box around the clean image."""

    def step(_: int | jax.Array, z: jax.Array) -> jax.Array:
        gradient = _ball.input_gradient(loss_fn, z.astype(dtype))
        return limits.clip(z + step_size * jnp.sign(_ball.widen(gradient)))

    return _ball.narrow(_loops.repeat(steps, step, start), dtype, limits)


def ifgsm(
    loss_fn: _ball.LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    steps: int,
    step_size: jax.typing.ArrayLike | None = None,
    bounds: _ball.Bounds | None = (0.0, 1.0),
) -> jax.Array:
    """Iterative fast gradient sign method (Eq. 2).

    x_0 = x;  x_k = clamp_{x, eps}(x_{k-1} + a sign(grad loss_fn(x_{k-1}))),  k = 1 .. steps

    With the paper's a = eps / steps it only just reaches the edge of the ball and never turns back: weak. To judge a
    model use `pgd`, which overshoots.

    Args:
      loss_fn: images `[N, ...]` to per-example losses `[N]`, to be maximised.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: l-infinity budget, at least 0, in the images' own units.
      steps: number of gradient steps N, at least 1.
      step_size: a, above 0; None for the paper's eps / steps.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Adversarial images, same shape and dtype as `x`, within `eps` of it; no gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if a budget is out of range or `loss_fn` does not return per-example losses.

    Reference: Kurakin et al., 2016, https://arxiv.org/abs/1611.01236
    """
    _ball.check_images("ifgsm", x)
    _ball.check_number("ifgsm", "eps", eps)
    _ball.check_steps("ifgsm", "steps", steps)
    _ball.check_bounds("ifgsm", bounds)
    if step_size is None:
        step_size = eps / steps
    else:
        _ball.check_number("ifgsm", "step_size", step_size, positive=True)
    limits = _ball.box(x, eps, bounds)
    return jax.lax.stop_gradient(_ascend(loss_fn, _ball.widen(x), limits, x.dtype, step_size, steps))


def pgd(
    key: jax.Array,
    loss_fn: _ball.LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    steps: int,
    step_size: jax.typing.ArrayLike | None = None,
    restarts: int = 1,
    random_start: bool = True,
    misclassified_fn: _ball.LossFn | None = None,
    bounds: _ball.Bounds | None = (0.0, 1.0),
) -> jax.Array:
    """Projected gradient descent with random starts, the worst of several restarts per example.

    Each restart begins at a uniform point of the ball (cut to `bounds`) and takes `steps` sign steps, projected onto
    the ball around the clean image. Per example the worst end point is returned: a misclassified one before any other
    (a high loss alone does not fool the model), then the one of highest loss.

    Args:
      key: one random key, or keys `[N]`, one per image. With keys per image the result of an image does not depend on
        its place in the batch nor on the batch around it.
      loss_fn: images `[N, ...]` to per-example losses `[N]`, to be maximised.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: l-infinity budget, at least 0, in the images' own units.
      steps: number of gradient steps, at least 1.
      step_size: above 0; None for 2.5 eps / steps (Madry et al.), which can cross the ball from any start.
      restarts: number of random starts, at least 1.
      random_start: False starts at `x` itself; then more than one restart is refused, they would all be equal.
      misclassified_fn: images `[N, ...]` to bool `[N]`, True where the attack has succeeded; without it restarts are
        compared by loss alone.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Adversarial images, same shape and dtype as `x`, within `eps` of it; no gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if a budget is out of range, `key` has neither one key nor N, or `loss_fn` does not return per-example
        losses.

    Reference: Madry et al., 2017, https://arxiv.org/abs/1706.06083
    """
    _ball.check_images("pgd", x)
    _ball.check_number("pgd", "eps", eps)
    _ball.check_steps("pgd", "steps", steps)
    _ball.check_steps("pgd", "restarts", restarts)
    _ball.check_bounds("pgd", bounds)
    if restarts > 1 and not random_start:
        raise ValueError(f"pgd: restarts={restarts} without random_start would all be equal; use restarts=1")
    if step_size is None:
        step_size = 2.5 * eps / steps
    else:
        _ball.check_number("pgd", "step_size", step_size, positive=True)
    keys = _ball.per_image_keys("pgd", key, x.shape[0])
    limits = _ball.box(x, eps, bounds)

    def attempt(restart: int | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        start = _ball.widen(x)
        if random_start:
            start = limits.clip(start + eps * _uniform(jax.vmap(jax.random.fold_in, (0, None))(keys, restart), start))
        end = _ascend(loss_fn, start, limits, x.dtype, step_size, steps)
        if restarts == 1:  # nothing to compare: two forward passes saved
            return end, jnp.zeros(x.shape[0], bool), jnp.zeros(x.shape[0])
        loss = loss_fn(end)
        fooled = jnp.zeros(loss.shape, bool) if misclassified_fn is None else misclassified_fn(end).astype(bool)
        return end, fooled, jnp.where(jnp.isnan(loss), -jnp.inf, loss)

    def keep_worse(
        restart: int | jax.Array, best: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        (x_best, fooled_best, loss_best), (x_new, fooled, loss) = best, attempt(restart + 1)
        worse = (fooled & ~fooled_best) | ((fooled == fooled_best) & (loss > loss_best))
        return (
            jnp.where(worse.reshape(-1, *[1] * (x.ndim - 1)), x_new, x_best),
            fooled | fooled_best,
            jnp.where(worse, loss, loss_best),
        )

    return jax.lax.stop_gradient(_loops.repeat(restarts - 1, keep_worse, attempt(0))[0])


def _uniform(keys: jax.Array, like: jax.Array) -> jax.Array:
    """U(-1, 1) of shape `[N, ...]`, image i drawn from `keys[i]`."""
    return jax.vmap(lambda k: jax.random.uniform(k, like.shape[1:], like.dtype, -1, 1))(keys)
