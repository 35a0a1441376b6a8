"""The second step of e2SAD: one step to where the prediction changes most."""

import jax
import jax.numpy as jnp

from e2sad_jax import losses
from e2sad_jax.attacks import _checks
from e2sad_jax.attacks._ball import ball, project_and_cast
from e2sad_jax.attacks._numerics import as_float32, input_gradient, per_image_keys, threefry
from e2sad_jax.attacks._types import Bounds, LogitsFn, LossFn
from e2sad_jax.attacks._within import as_attack

OBJECTIVES = ("total", "noise", "loss", "literal", "random")


@as_attack
def second_step(
    logits_fn: LogitsFn,
    x_adv: jax.Array,
    *,
    eps: jax.typing.ArrayLike,
    objective: str = "total",
    loss_fn: LossFn | None = None,
    key: jax.Array | None = None,
    norm: str = "linf",
    bounds: Bounds = None,
) -> jax.Array:
    """Second adversarial point of e2SAD: one step to where the prediction changes most (Eq. 7).

    x_adv2 = x_adv + eps sign(g)

    In the l2 ball the step is eps g / ||g||_2 with g the image's gradient.

    Eq. 7 asks for g = grad_z CE(f(x_adv), f(z)) at z = x_adv. Taken to the letter, with f(x_adv) held constant, that
    gradient is softmax - softmax = 0: a cross-entropy is minimal in its second argument where both agree. So
    `objective` says what is differentiated instead:

    * `"total"`: CE(f(z), f(z)) through both arguments, the entropy of the prediction (the default);
    * `"noise"`: CE(f(x_adv), f(z)) at a uniform point z of the ball of `eps` around x_adv, as TRADES and VAT leave the same
      minimum;
    * `"loss"`: the training loss `loss_fn` (the red cross of the paper's Figure 2);
    * `"literal"`: Eq. 7 to the letter: the sign of rounding noise, for study;
    * `"random"`: nothing: random signs, the control.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x_adv: the first adversarial images `[N, ...]`, floating point.
      eps: step size eps2 in `norm`, at least 0, in the images' own units; a number, one per image, or a mask
        (`attacks.core.checks.budget`).
      objective: one of the above.
      loss_fn: images to per-example losses `[N]`; needed by `"loss"` alone.
      key: random key; needed by `"noise"` and `"random"`.
      norm: "linf" or "l2", of each image's step.
      bounds: range to clip to. None, the paper's choice: clipped neither to the ball around the clean image nor to the
        image range.

    Returns:
      Images of the same shape and dtype as `x_adv`, within `eps` of it; no gradient flows through them.

    Raises:
      TypeError: if `x_adv` is not floating point.
      ValueError: if `objective` or `norm` is unknown, the argument that it needs is missing, or a budget is out of range.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"second_step: objective={objective!r}; it must be one of {', '.join(OBJECTIVES)}")
    if objective == "loss" and loss_fn is None:
        raise ValueError("second_step: objective='loss' needs loss_fn, images [N, ...] to losses [N]")
    if objective in ("noise", "random") and key is None:
        raise ValueError(f"second_step: objective={objective!r} draws random numbers and needs key")
    x_adv, eps, _, bounds = _checks.threat_model("second_step", x_adv, eps=eps, norm=norm, bounds=bounds)
    if not len(x_adv):  # nothing that a model could be asked
        return x_adv
    limits = ball(norm, x_adv, eps, bounds)
    if key is not None:
        key = threefry("second_step", key)

    def change(z: jax.Array) -> jax.Array:  # CE(const f(x_adv), f(z))
        return losses.dissimilarity(jax.lax.stop_gradient(logits_fn(x_adv)), logits_fn(z))

    def entropy(z: jax.Array) -> jax.Array:  # CE(f(z), f(z))
        logits = logits_fn(z)
        return losses.dissimilarity(logits, logits)

    match objective:
        case "total":
            direction = input_gradient(entropy, x_adv)
        case "noise":
            assert key is not None
            noise = jax.random.uniform(key, x_adv.shape, as_float32(x_adv).dtype, -1, 1)
            if norm == "l2":
                noise = limits.sample(per_image_keys("second_step", key, len(x_adv)), as_float32(x_adv))
            direction = input_gradient(change, (as_float32(x_adv) + eps * noise).astype(x_adv.dtype))
        case "loss":
            assert loss_fn is not None
            direction = input_gradient(loss_fn, x_adv)
        case "literal":
            direction = input_gradient(change, x_adv)
        case "random":
            assert key is not None
            positive = jax.random.bernoulli(key, jnp.float32(0.5), x_adv.shape)  # the same in 64 bits
            direction = jnp.where(positive, 1, -1).astype(x_adv.dtype)
    return project_and_cast(limits, as_float32(x_adv) + eps * limits.steepest(as_float32(direction)), x_adv.dtype)
