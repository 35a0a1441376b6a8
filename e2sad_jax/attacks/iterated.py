"""Attacks that take many gradients: IFGSM, its form with momentum, and PGD."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import _ball, _loops
from e2sad_jax.attacks._worst import Worst, judge


def _ascend(
    loss_fn: _ball.LossFn,
    start: jax.Array,
    limits: _ball.LinfBall | _ball.L2Ball,
    dtype: jnp.dtype,
    step_size: jax.typing.ArrayLike,
    steps: int,
    apart: int = 0,
) -> jax.Array:
    """`steps` steps up the loss, each clipped to the ball around the clean image; the first `apart` of them outside a loop."""

    def step(_: int | jax.Array, z: jax.Array) -> jax.Array:
        gradient = _ball.input_gradient(loss_fn, z.astype(dtype))
        return limits.clip(z + step_size * limits.direction(_ball.as_float32(gradient)))

    for i in range(apart):
        start = step(i, start)
    return _ball.cast_inside(_loops.repeat(steps - apart, step, start), dtype, limits)


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
    step_size = _ball.step_size("ifgsm", step_size, eps / steps)
    limits = _ball.box(x, eps, bounds)
    # The first step's gradient is the clean image's, which training takes too: outside a loop XLA finds the two to be one.
    return jax.lax.stop_gradient(_ascend(loss_fn, _ball.as_float32(x), limits, x.dtype, step_size, steps, apart=1))


def mi_fgsm(
    loss_fn: _ball.LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    steps: int = 10,
    step_size: jax.typing.ArrayLike | None = None,
    decay: jax.typing.ArrayLike = 1.0,
    bounds: _ball.Bounds | None = (0.0, 1.0),
) -> jax.Array:
    """Momentum iterative fast gradient sign method.

    g_k = decay g_{k-1} + grad / mean |grad|;  x_k = clamp_{x, eps}(x_{k-1} + a sign(g_k)),  g_0 = 0, x_0 = x

    Made for transfer: images that are made for one network fool another more often than those of `pgd`. The paper
    divides by the sum of |grad|, which gives the same signs.

    Args:
      loss_fn: images `[N, ...]` to per-example losses `[N]`, to be maximised.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: l-infinity budget, at least 0, in the images' own units.
      steps: number of gradient steps, at least 1.
      step_size: a, above 0; None for the paper's eps / steps.
      decay: weight of the gradients before, at least 0; 0 makes it `ifgsm`.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Adversarial images, same shape and dtype as `x`, within `eps` of it; no gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if a budget is out of range or `loss_fn` does not return per-example losses.

    Reference: Dong et al., 2018, https://arxiv.org/abs/1710.06081
    """
    _ball.check_images("mi_fgsm", x)
    _ball.check_number("mi_fgsm", "eps", eps)
    _ball.check_steps("mi_fgsm", "steps", steps)
    _ball.check_number("mi_fgsm", "decay", decay)
    _ball.check_bounds("mi_fgsm", bounds)
    step_size = _ball.step_size("mi_fgsm", step_size, eps / steps)
    limits, start = _ball.box(x, eps, bounds), _ball.as_float32(x)

    def step(_: int | jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z, momentum = state
        gradient = _ball.finite(_ball.as_float32(_ball.input_gradient(loss_fn, z.astype(x.dtype))))
        size = jnp.abs(gradient).mean(tuple(range(1, x.ndim)), keepdims=True)
        momentum = gradient / jnp.where(size > 0, size, 1) + decay * momentum
        return limits.clip(z + step_size * jnp.sign(momentum)), momentum

    end, _ = _loops.repeat(steps, step, (start, jnp.zeros_like(start)))
    return jax.lax.stop_gradient(_ball.cast_inside(end, x.dtype, limits))


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
    norm: str = "linf",
    bounds: _ball.Bounds | None = (0.0, 1.0),
) -> jax.Array:
    """Projected gradient descent with random starts, the worst of several restarts per example.

    Each restart begins at a uniform point of the ball (cut to `bounds`) and takes `steps` steps, along the gradient's
    signs or, in the l2 ball, along the gradient itself, projected onto the ball around the clean image. Per example the
    worst end point is returned: a misclassified one before any other (a high loss alone does not fool the model), then
    the one of highest loss.

    In bfloat16 and float16 an l2 result is rounded towards the image, so small changes of many pixels shrink.

    With `losses.margin` as its loss this is the l-infinity form of Carlini and Wagner's attack that Madry et al. use:
    `pgd(key, lambda z: losses.margin(logits_fn(z), labels), x, eps=0.3, steps=40)`.

    Args:
      key: one random key, or keys `[N]`, one per image. With keys per image the result of an image does not depend on
        its place in the batch nor on the batch around it.
      loss_fn: images `[N, ...]` to per-example losses `[N]`, to be maximised.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: budget in `norm`, at least 0, in the images' own units.
      steps: number of gradient steps, at least 1.
      step_size: above 0; None for 2.5 eps / steps (Madry et al.), which can cross the ball from any start.
      restarts: number of random starts, at least 1.
      random_start: False starts at `x` itself; then more than one restart is refused, they would all be equal.
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
    _ball.check_images("pgd", x)
    _ball.check_number("pgd", "eps", eps)
    _ball.check_steps("pgd", "steps", steps)
    _ball.check_steps("pgd", "restarts", restarts)
    _ball.check_norm("pgd", norm)
    _ball.check_bounds("pgd", bounds)
    if restarts > 1 and not random_start:
        raise ValueError(f"pgd: restarts={restarts} without random_start would all be equal; use restarts=1")
    step_size = _ball.step_size("pgd", step_size, 2.5 * eps / steps)
    keys = _ball.per_image_keys("pgd", key, x.shape[0])
    limits = _ball.ball(norm, x, eps, bounds)

    def attempt(restart: int | jax.Array) -> jax.Array:
        start = _ball.as_float32(x)
        if random_start:
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, restart)
            start = limits.clip(start + eps * limits.noise(own, start))
        return _ascend(loss_fn, start, limits, x.dtype, step_size, steps)

    if restarts == 1:  # nothing to compare: two forward passes saved
        return jax.lax.stop_gradient(attempt(0))

    def judged(restart: int | jax.Array) -> Worst:
        end = attempt(restart)
        return judge(end, loss_fn(end), misclassified_fn)

    worst = _loops.repeat(restarts - 1, lambda i, worst: worst.or_worse(judged(i + 1)), judged(0))
    return jax.lax.stop_gradient(worst.image)
