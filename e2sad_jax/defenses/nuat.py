"""NuAT: single-step training that keeps the nuclear norm of the whole batch's change of logits small."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import ATTACK_STEP_SIZE, MEMORY, NORM, SIGNS, Defense, Setting, register
from e2sad_jax.defenses._types import (
    Bounds,
    LogitsFn,
    Parts,
    batch_mean,
    check_weight,
    ended,
    signs_or_start,
)
from e2sad_jax.losses import cross_entropy, difference


def nuat(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    key: jax.Array | None = None,
    weight: jax.typing.ArrayLike = 4.5,
    eps: jax.typing.ArrayLike = 0.3,
    signs: jax.typing.ArrayLike = 0.5,
    step_size: jax.typing.ArrayLike | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
    start: jax.Array | None = None,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """Nuclear-norm adversarial training: J(theta, x, y) + lambda / m ||z(x_adv) - z(x)||_*.

    z are the logits, before the softmax, as a matrix `[N, K]` of the batch; the nuclear norm ||.||_* is the sum of its
    singular values, so it looks at all images of the batch together. The images take one step up the same loss with the
    cross-entropy at them, J(theta, u, y) + lambda / m ||z(u) - z(x)||_*, from random signs:

    x_adv = project(x_0 + a sign(grad)),  x_0 = clip(x + k eps r),  each entry of r -1 or 1

    In the l2 ball r is scaled to length 1, and the step is a g / ||g||_2. x_adv is a constant, and in the attack z(x) is; in
    the training loss the gradient flows through both logits. Where the norm has no derivative its subgradient of least
    length is taken. Lambda is constant, and the attack has both terms in each step. The authors' code raises lambda
    linearly from 0, and leaves the attack's second term out in every second step.

    The norm of alike images grows with the root of their number, so lambda / m weighs less in a larger batch. Inside of
    `shard_map` the norm is that of each device's images.

    Args:
      logits_fn: images `[N, ...]` to logits z `[N, K]`.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`, hard or soft; the attack uses them too.
      key: random key of the signs; needed without `start`.
      weight: lambda, at least 0. 4.5 is where the authors' code ends on CIFAR-10 at eps 8/255, in batches of 64.
      eps: budget of the attack in `norm`, at least 0, in the images' own units.
      signs: k, the magnitude of the signs in multiples of eps, in [0, 1]; the authors' code takes 1/2.
      step_size: a, above 0; None for eps.
      norm: "linf" or "l2", of each image's perturbation.
      bounds: range of valid images, or None.
      start: perturbations `[N, ...]` that the attack starts from, in the images' own units; `parts` then has
        `delta`, where it ended, to be the images' next start (docs/defenses.md). None: signs.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike. m is then the effective number of images, (sum w)^2 / sum w^2, and row i of the
        matrix is multiplied by sqrt(m w_i / sum w). With weights of 0 and 1 the norm is that of the images kept.

    Returns:
      The loss, a scalar, and its parts by name, before their weights.

    Raises:
      ValueError: if `weight`, `signs` or a budget is out of range.

    Reference: Sriramanan et al., 2021, "Towards efficient and effective adversarial training"
    """
    x, eps, step_size, bounds = core.checks.threat_model(
        "nuat", x, eps=eps, norm=norm, bounds=bounds, step_size=step_size
    )
    check_weight("nuat", "weight", weight)
    check_weight("nuat", "signs", signs, 1)
    mean, y = batch_mean("nuat", x, y, weights)
    step_size = eps if step_size is None else step_size
    scale = 1 if mean.share is None else jnp.sqrt(mean.size * mean.share)[:, None]

    def logits(u: jax.Array) -> jax.Array:
        return core.as_float32(core.checks.logits("nuat", logits_fn(u), len(x)))

    def norm_by_image(u_logits: jax.Array, z_x: jax.Array) -> jax.Array:
        return nuclear_norm(scale * difference(u_logits, z_x)) / mean.size

    z_x = logits(x)
    constant = jax.lax.stop_gradient(core.as_attack(logits)(x))

    def climbed(u: jax.Array) -> jax.Array:
        u_logits = logits(u)
        return mean.terms(cross_entropy(u_logits, y)) + weight * norm_by_image(u_logits, constant)

    limits = core.ball(norm, x, eps, bounds)
    first = signs_or_start("nuat", limits, x, start, key, signs * eps)
    x_adv = jax.lax.stop_gradient(core.ascend(climbed, first, limits, x.dtype, step_size, 1))

    clean = mean(cross_entropy(z_x, y))
    nuclear = norm_by_image(logits(x_adv), z_x).sum()
    return clean + weight * nuclear, ended({"clean": clean, "nuclear": nuclear}, x_adv, x, start)


def nuclear_norm(matrix: jax.Array) -> jax.Array:
    """What each row adds to the nuclear norm of a matrix, `[N]`; the sum is the norm.

    For M = U S V^T the norm is <U V^T, M>, and U V^T is its gradient; where singular values are 0, their columns left out,
    the subgradient of least length. The derivative of the decomposition itself is NaN where singular values are equal.

    Args:
      matrix: M, `[N, K]`.

    Returns:
      `[N]`.
    """
    u, s, vt = jnp.linalg.svd(jax.lax.stop_gradient(matrix), full_matrices=False)
    rounding = s[0] * max(matrix.shape) * jnp.finfo(s.dtype).eps
    polar = jnp.matmul(jnp.where(s > rounding, u, 0), vt, precision="highest")
    return (polar * matrix).sum(-1)


WEIGHT = Setting("nuat_weight", 4.5, "weight of NuAT's nuclear norm", lower=0, argument="weight")
register("nuat", Defense(nuat, "NuAT", (WEIGHT, SIGNS, ATTACK_STEP_SIZE, MEMORY, NORM)))
