"""One FGSM step from a start that is known before, and the regulariser that holds the model's answers at both together."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import core
from e2sad_jax.defenses._types import BatchMean, LogitsFn, Parts, is_zero
from e2sad_jax.losses import cross_entropy


class Stepped(NamedTuple):
    """What one step from a start gives.

    Attributes:
      loss: a scalar.
      parts: its terms, before their weights.
      start: where the step began, `[N, ...]`, float32 or wider, in the ball.
      gradient: of each image's share of the mean loss there, `[N, ...]`, float32 or wider; a constant.
    """

    loss: jax.Array
    parts: Parts
    start: jax.Array
    gradient: jax.Array


def step_from(
    name: str,
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    offset: jax.Array,
    limits: core.LinfBall,
    mean: BatchMean,
    *,
    step_size: Any,
    weight: jax.typing.ArrayLike,
) -> Stepped:
    """J(theta, x_adv, y) + weight |z(x_adv) - z(x_0)|^2 / K, with x_adv an FGSM step from x_0 = project(x + offset).

    z are the logits. Both points are constants; the gradient of the regulariser flows through both of its arguments.

    Args:
      name: the defense's name in the messages.
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: clean images `[N, ...]`.
      y: target distributions `[N, K]`.
      offset: what broadcasts against images, float32 or wider.
      limits: the ball.
      mean: over the batch.
      step_size: of the step.
      weight: of the regulariser, at least 0.
    """

    def J(z: jax.Array) -> jax.Array:
        return mean.terms(cross_entropy(logits_fn(z), y))

    def logits(z: jax.Array) -> jax.Array:
        return core.as_float32(core.checks.logits(name, logits_fn(z), len(x)))

    start = jax.lax.stop_gradient(limits.project(core.as_float32(x) + offset))
    x_start = core.project_and_cast(limits, start, x.dtype)
    gradient = jax.lax.stop_gradient(core.finite(core.as_float32(core.as_attack(core.input_gradient)(J, x_start))))
    x_adv = core.project_and_cast(limits, start + step_size * jnp.sign(gradient), x.dtype)
    # The attack has made this forward pass too. XLA finds both, as the images are the same.
    f_start = None if is_zero(weight) else logits(x_start)
    f_adv = logits(x_adv)
    loss = mean(cross_entropy(f_adv, y))
    parts = {"adversarial": loss}
    if f_start is not None:
        away = jnp.where(f_adv == f_start, 0, f_adv - f_start)  # a class masked by -inf is no class
        parts["deviation"] = mean(jnp.square(away).mean(-1))
        loss += weight * parts["deviation"]
    return Stepped(loss, parts, start, gradient)
