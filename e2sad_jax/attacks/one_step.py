"""Attacks that take one gradient: FGSM, and e2SAD's second step."""

from collections.abc import Callable

import jax

from e2sad_jax import losses
from e2sad_jax.attacks import _ball

OBJECTIVES = ("total", "noise", "loss", "literal", "random")


def fgsm(
    loss_fn: _ball.LossFn,
    x: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    norm: str = "linf",
    bounds: _ball.Bounds | None = (0.0, 1.0),
) -> jax.Array:
    """Fast gradient sign method (Eq. 1; the first step of e2SAD, Eq. 6).

    x_adv = clip(x + eps sign(grad_x loss_fn(x)))

    In the l2 ball the step is eps g / ||g||_2 with g the image's gradient.

    For a targeted attack negate the loss: `fgsm(lambda z: -loss_to_target(z), x, eps=0.3)`.

    Args:
      loss_fn: images `[N, ...]` to per-example losses `[N]`, to be maximised.
      x: images `[N, ...]`, floating point, inside `bounds`.
      eps: budget in `norm`, at least 0, in the images' own units; 0 returns `x`.
      norm: "linf" or "l2", of each image's perturbation.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Adversarial images, same shape and dtype as `x`, within `eps` of it; no gradient flows through them. A pixel whose
      gradient is exactly zero stays as it is.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if `eps` or `bounds` is out of range, `norm` is unknown, or `loss_fn` does not return per-example losses.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.5, 0.9]])
    >>> print(fgsm(lambda z: z[:, 0] - 2 * z[:, 1], x, eps=0.25))
    [[0.75 0.65]]

    Reference: Goodfellow et al., 2015, https://arxiv.org/abs/1412.6572
    """
    _ball.check_images("fgsm", x)
    _ball.check_number("fgsm", "eps", eps)
    _ball.check_norm("fgsm", norm)
    _ball.check_bounds("fgsm", bounds)
    limits = _ball.ball(norm, x, eps, bounds)
    moved = _ball.as_float32(x) + eps * limits.direction(_ball.as_float32(_ball.input_gradient(loss_fn, x)))
    return _ball.project_and_cast(limits, moved, x.dtype)


def second_step(
    logits_fn: Callable[[jax.Array], jax.Array],
    x_adv: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    objective: str = "total",
    loss_fn: _ball.LossFn | None = None,
    key: jax.Array | None = None,
    bounds: _ball.Bounds | None = None,
) -> jax.Array:
    """Second adversarial point of e2SAD: one sign step to where the prediction changes most (Eq. 7).

    x_adv2 = x_adv + eps sign(g)

    Eq. 7 asks for g = grad_z CE(f(x_adv), f(z)) at z = x_adv. Taken to the letter, with f(x_adv) held constant, that
    gradient is softmax - softmax = 0: a cross-entropy is minimal in its second argument where both agree. So
    `objective` says what is differentiated instead:

    * `"total"`: CE(f(z), f(z)) through both arguments, the entropy of the prediction (the default);
    * `"noise"`: CE(f(x_adv), f(z)) at z = x_adv + U(-eps, eps), as TRADES and VAT leave the same minimum;
    * `"loss"`: the training loss `loss_fn` (the red cross of the paper's Figure 2);
    * `"literal"`: Eq. 7 to the letter: the sign of rounding noise, for study;
    * `"random"`: nothing: random signs, the control.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x_adv: the first adversarial images `[N, ...]`, floating point.
      eps: step size eps2, at least 0, in the images' own units.
      objective: one of the above.
      loss_fn: images to per-example losses `[N]`; needed by `"loss"` alone.
      key: random key; needed by `"noise"` and `"random"`.
      bounds: range to clip to. None, the paper's choice: clipped neither to the ball around the clean image nor to the
        image range.

    Returns:
      Images of the same shape and dtype as `x_adv`, within `eps` of it; no gradient flows through them.

    Raises:
      TypeError: if `x_adv` is not floating point.
      ValueError: if `objective` is unknown or lacks the argument it needs, or a budget is out of range.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"second_step: objective={objective!r}; it must be one of {', '.join(OBJECTIVES)}")
    if objective == "loss" and loss_fn is None:
        raise ValueError("second_step: objective='loss' needs loss_fn, images [N, ...] to losses [N]")
    if objective in ("noise", "random") and key is None:
        raise ValueError(f"second_step: objective={objective!r} draws random numbers and needs key")
    _ball.check_images("second_step", x_adv)
    _ball.check_number("second_step", "eps", eps)
    _ball.check_bounds("second_step", bounds)

    def change(z: jax.Array) -> jax.Array:  # CE(const f(x_adv), f(z))
        return losses.dissimilarity(jax.lax.stop_gradient(logits_fn(x_adv)), logits_fn(z))

    def entropy(z: jax.Array) -> jax.Array:  # CE(f(z), f(z))
        logits = logits_fn(z)
        return losses.dissimilarity(logits, logits)

    match objective:
        case "total":
            direction = _ball.input_gradient(entropy, x_adv)
        case "noise":
            assert key is not None
            noise = jax.random.uniform(key, x_adv.shape, _ball.as_float32(x_adv).dtype, -1, 1)
            direction = _ball.input_gradient(change, (_ball.as_float32(x_adv) + eps * noise).astype(x_adv.dtype))
        case "loss":
            assert loss_fn is not None
            direction = _ball.input_gradient(loss_fn, x_adv)
        case "literal":
            direction = _ball.input_gradient(change, x_adv)
        case "random":
            assert key is not None
            direction = jax.random.rademacher(key, x_adv.shape, x_adv.dtype)
    limits = _ball.box(x_adv, eps, bounds)
    return _ball.project_and_cast(
        limits, _ball.as_float32(x_adv) + eps * limits.direction(_ball.as_float32(direction)), x_adv.dtype
    )
