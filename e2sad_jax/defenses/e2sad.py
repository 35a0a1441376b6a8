"""The efficient two-step adversarial defense, e2SAD (Algorithm 1)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from e2sad_jax import attacks
from e2sad_jax.attacks import core
from e2sad_jax.attacks.core import LossFn
from e2sad_jax.defenses._registry import ALPHA, MEMORY, NORM, Defense, Setting, register
from e2sad_jax.defenses._types import (
    Bounds,
    LogitsFn,
    Parts,
    batch_mean,
    check_weight,
    checked_start,
    clean_term,
    ended,
    is_zero,
    weighted,
)
from e2sad_jax.errors import ConfigError
from e2sad_jax.losses import cross_entropy, dissimilarity

POINTS = ("first", "second")
FIRST_POINTS = ("step", "start")


def e2sad(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    alpha: float = 0.6,
    lam: float = 0.1,
    eps1: jax.typing.ArrayLike = 0.3,
    eps2: jax.typing.ArrayLike = 0.1,
    second_step: str = "total",
    clip_second: bool = False,
    random_start: bool = False,
    ball_second: bool = False,
    adversarial_at: str = "first",
    hold_reference: bool = False,
    first_point: str = "step",
    step_size: jax.typing.ArrayLike | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
    key: jax.Array | None = None,
    start: jax.Array | None = None,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """e2SAD: the training loss of Algorithm 1 on two adversarial points per image (Eq. 8).

    alpha J(theta, x, y) + (1 - alpha) J(theta, x_adv, y) + lambda / m sum_i D(f(x_adv_i), f(x_adv2_i))

    Both adversarial points are constants; the gradient of D flows through both of its arguments.

    `random_start`, `ball_second`, `adversarial_at`, `hold_reference`, `first_point` and `start` are not the paper's; see
    docs/e2sad.md.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`; f is its softmax.
      x: clean images `[N, ...]`, inside `bounds`.
      y: target distributions `[N, K]`; the paper trains with soft ones (`losses.soft_labels`).
      alpha: weight of the clean term, in [0, 1]; at 0 with `random_start` or `start` nothing looks at the clean images.
      lam: weight lambda of the dissimilarity, at least 0.
      eps1: budget of the first point in `norm`, at least 0, in the images' own units.
      eps2: budget of the second step around the first point, likewise.
      second_step: what the second step differentiates, one of `attacks.OBJECTIVES` (Eq. 7 itself has a zero gradient).
      clip_second: clip the second point to `bounds` too; the paper does not.
      random_start: take the first step from a random point of the ball unless `start` is given, and stay in the ball, as
        Fast AT does.
      ball_second: bring the second point back into the ball of `eps1` around `x`, and into `bounds`.
      adversarial_at: the point of the adversarial term, "first", x_adv, or "second", x_adv2.
      hold_reference: let the gradient of D flow through f(x_adv2) alone. With `second_step="loss"` and alpha 0 training then
        shares the second step's backward pass, or with `adversarial_at="second"` has but one.
      first_point: "step", one step from the image, or from a random or a given start; or "start", that start itself, in the
        ball: the second point then costs the only gradient step.
      step_size: length of the first step, from the image at most `eps1`; None for `eps1`; not read with `first_point="start"`.
      norm: "linf" or "l2", of each image's perturbation.
      bounds: range of valid images, or None.
      key: random key; needed by `random_start` without `start` and by the objectives "noise" and "random" alone.
      start: perturbations `[N, ...]` that the first step starts from, in the images' own units; `parts` then has `delta`,
        that of the second point with `ball_second` or `first_point="start"`, else that of the first, to be the images' next
        start (docs/defenses.md).
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name, before their weights; without `dissimilarity` where `lam` is 0.

    Raises:
      ValueError: if a weight, a budget, `second_step`, `adversarial_at` or `first_point` is out of range, or `key` or the
        start of `first_point="start"` is missing.
    """
    x = core.checks.images("e2sad", x)
    check_weight("e2sad", "alpha", alpha, 1)
    check_weight("e2sad", "lam", lam)
    if adversarial_at not in POINTS:
        raise ValueError(f"e2sad: adversarial_at={adversarial_at!r}; it must be one of {', '.join(POINTS)}")
    mean, y = batch_mean("e2sad", x, y, weights)
    start = checked_start("e2sad", start, x)

    def J(z: jax.Array) -> jax.Array:  # per example; its sum is the batch mean
        return mean.terms(cross_entropy(logits_fn(z), y))

    # Lines 3 and 4.
    x_adv, x_adv2 = adversarial_points(
        logits_fn,
        J,
        x,
        alpha=alpha,
        eps1=eps1,
        eps2=eps2,
        second_step=second_step,
        clip_second=clip_second,
        random_start=random_start,
        ball_second=ball_second,
        first_point=first_point,
        step_size=step_size,
        norm=norm,
        bounds=bounds,
        key=key,
        start=start,
    )
    f_adv, f_adv2 = logits_fn(x_adv), logits_fn(x_adv2)
    # Line 6.
    adversarial = mean(cross_entropy(f_adv if adversarial_at == "first" else f_adv2, y))
    parts, L_adv = {"adversarial": adversarial}, (1 - alpha) * adversarial
    if not ((random_start or start is not None) and is_zero(alpha)):  # no step has looked at x: a pass for nothing
        parts["clean"] = clean_term(alpha, J, x)
        L_adv += alpha * parts["clean"]
    one_point = is_zero(lam) and adversarial_at == "first"  # nothing is trained on the second
    # The next start. A start that is the first point itself would never move.
    kept = x_adv2 if first_point == "start" or (ball_second and not one_point) else x_adv
    parts = ended(parts, kept, x, start)
    if is_zero(lam):  # so that the compiler drops the second point
        return L_adv, parts
    # Line 7.
    parts["dissimilarity"] = D = mean(dissimilarity(jax.lax.stop_gradient(f_adv) if hold_reference else f_adv, f_adv2))
    L_d = lam * D
    # Line 8.
    return L_adv + L_d, parts


def adversarial_points(
    logits_fn: LogitsFn,
    loss_fn: LossFn,
    x: jax.Array,
    *,
    eps1: jax.typing.ArrayLike,
    eps2: jax.typing.ArrayLike,
    alpha: float = 1.0,
    second_step: str = "total",
    clip_second: bool = False,
    random_start: bool = False,
    ball_second: bool = False,
    first_point: str = "step",
    step_size: jax.typing.ArrayLike | None = None,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
    key: jax.Array | None = None,
    start: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The two points of Algorithm 1, `[N, ...]` each: constants.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      loss_fn: images `[N, ...]` to losses `[N]`.
      x: clean images `[N, ...]`, inside `bounds`.
      eps1: budget of the first point, at least 0.
      eps2: budget of the second step, at least 0.
      alpha: weight of the clean term of the training loss, whose backward pass FGSM shares.
      second_step: what the second step differentiates, one of `attacks.OBJECTIVES`.
      clip_second: clip the second point to `bounds`.
      random_start: take the first step from a random point of the ball.
      ball_second: bring the second point back into the ball of `eps1`.
      first_point: "step" or "start", as of `e2sad`.
      step_size: length of the first step, as of `e2sad`.
      norm: "linf" or "l2".
      bounds: range of valid images, or None.
      key: random key, as of `e2sad`.
      start: perturbations `[N, ...]` that the first step starts from; None: the images, or random ones.

    Raises:
      ValueError: if a budget, `second_step` or `first_point` is out of range, or `key` or the start of
        `first_point="start"` is missing.
    """
    x, _, step_size, bounds = core.checks.threat_model("e2sad", x, norm=norm, bounds=bounds, step_size=step_size)
    eps1, eps2 = (core.checks.budget("e2sad", n, v, x, norm=norm) for n, v in (("eps1", eps1), ("eps2", eps2)))
    if key is not None:
        key = core.threefry("e2sad", key)
    if first_point not in FIRST_POINTS:
        raise ValueError(f"e2sad: first_point={first_point!r}; it must be one of {', '.join(FIRST_POINTS)}")
    if first_point == "start" and not random_start and start is None:
        raise ValueError("e2sad: first_point='start' needs a start; pass one, or random_start=True")
    # Line 3 (Eq. 6): the first point, by FGSM, or the start itself.
    if (random_start or start is not None) and not (core.is_number(eps1) and eps1 == 0):
        if key is None and start is None:
            raise ValueError("e2sad: random_start draws random numbers and needs key")
        own = None if key is None else jax.random.fold_in(key, 1)
        size = eps1 if step_size is None else step_size
        up = loss_fn if first_point == "step" else _flat
        x_adv = attacks.pgd(own, up, x, eps=eps1, steps=1, step_size=size, start=start, norm=norm, bounds=bounds)
    else:
        size = eps1 if step_size is None else jnp.minimum(step_size, eps1)
        x_adv = attacks.fgsm(weighted(alpha, loss_fn), x, eps=size, norm=norm, bounds=bounds)
    # Line 4 (Eq. 7): the second point, where the prediction changes most.
    own_bounds = bounds if clip_second else None
    x_adv2 = attacks.second_step(
        logits_fn,
        x_adv,
        eps=eps2,
        objective=second_step,
        loss_fn=loss_fn,
        key=key,
        norm=norm,
        bounds=own_bounds,
    )
    if ball_second:
        x_adv2 = core.project_and_cast(core.ball(norm, x, eps1, bounds), core.as_float32(x_adv2), x.dtype)
    return x_adv, x_adv2


def _flat(z: jax.Array) -> jax.Array:
    """A loss without a slope, `[N]`: a step up it stays where it is."""
    return jnp.zeros(len(z))


SETTINGS = (
    ALPHA,
    Setting("lam", 0.1, "weight lambda of the dissimilarity", lower=0, varies=True),
    Setting("eps2", 0.1, "budget of the second step", lower=0, budget=True, varies=True),
    Setting("second_step", "total", "what the second step differentiates", choices=attacks.OBJECTIVES),
    Setting("clip_second", False, "clip the second point to the image range"),
    Setting("random_start", False, "the first step starts at a random point of the ball, where none is remembered"),
    Setting("ball_second", False, "keep the second point in the ball of eps1"),
    Setting("adversarial_at", "first", "point of the adversarial term", choices=POINTS),
    Setting(
        "first_point", "step", "first point: a step, or the random or remembered start itself", choices=FIRST_POINTS
    ),
    Setting("hold_reference", False, "the gradient of the dissimilarity flows through the second point alone"),
    Setting(
        "first_step_size",
        0.0,
        "length of the first step, 0: eps1; without effect with --first_point=start",
        lower=0,
        argument="step_size",
        budget=True,
        zero_is_none=True,
    ),
    MEMORY,
    NORM,
)


def _idle(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    if settings["first_point"] == "start":
        if settings["memory"] == "none" and not settings["random_start"]:
            raise ConfigError("--first_point=start: needs a start; give --memory=int8, or --random_start")
        found["first_step_size"] = "--first_point=start takes no first step"
    if settings["memory"] != "none":
        found["random_start"] = f"--memory={settings['memory']} has a start for each image"
    if settings["ball_second"]:
        found["clip_second"] = "--ball_second clips it"
    return found


register("e2sad", Defense(e2sad, "e2SAD", SETTINGS, idle=_idle))
