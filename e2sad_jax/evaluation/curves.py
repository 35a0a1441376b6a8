"""How far adversarial images are, and the robust accuracy at every budget that follows: one minimum-norm run for all."""

from typing import Any

import numpy as np

from e2sad_jax.attacks._ball import pixels_of
from e2sad_jax.evaluation import _entrance

SLACK = 1e-6  # of images in [0, 1]: the rounding of float32 at the edge of a ball
NORMS = ("linf", "l2", "l0")


def distances(clean: Any, adversarial: Any, fooled: Any, *, norm: str) -> np.ndarray:
    """Measures how far each adversarial image is from its clean one; infinity where it fools nothing.

    After an attack of minimum norm (`attacks.fmn`, `ddn`, `fab`, `carlini_wagner`, `lbfgs`, `deepfool`; `greedy_l0` and `jsma`
    in l0). Of several attacks take `numpy.minimum`.

    Args:
      clean: images `[N, ...]`, uint8, which is divided by 255, or floating point.
      adversarial: images that an attack made of them, same shape. An image that was misclassified before stays as it is: its
        distance is 0.
      fooled: bool `[N]`, whether the model misclassifies them: `predict(apply, params, adversarial) != labels`.
      norm: "linf", "l2" or "l0", the number of pixels.

    Returns:
      float64 `[N]`, in the units of the images.

    Raises:
      ValueError: if the shapes differ, an image is not finite, or `norm` is unknown.
    """
    if norm not in NORMS:
        raise ValueError(f"distances: norm={norm!r}; it must be one of {', '.join(NORMS)}")
    a, b = (_wide(name, images) for name, images in (("clean", clean), ("adversarial", adversarial)))
    if a.shape != b.shape:
        raise ValueError(f"distances: adversarial images have shape {b.shape}; it must be that of clean, {a.shape}")
    n, found = len(a), np.asarray(fooled)
    if found.shape != (n,) or found.dtype != np.bool_:
        raise ValueError(
            f"distances: fooled is {found.dtype} {found.shape}; it must be bool, one for each of {n} images: "
            "evaluation.predict(apply, params, adversarial) != labels"
        )
    change = (b - a).reshape(n, -1)
    if norm == "linf":
        length = np.abs(change).max(1)
    elif norm == "l2":
        length = np.linalg.norm(change, axis=1)
    else:
        length = (change != 0).reshape(n, *pixels_of(a.shape)).any(2).sum(1).astype(np.float64)
    return np.where(found, length, np.inf)


def accuracy_at(distances: Any, budgets: Any) -> np.ndarray:
    """Computes the robust accuracy at each budget: the fraction of images that nothing within it fools.

    It is an upper bound, as any measured robust accuracy. At budget 0 it is the clean accuracy.

    Args:
      distances: `[N]`, as `distances` returns them, the least of all attacks.
      budgets: a number, or an array of any shape, each at least 0.

    Returns:
      float64, of the shape of `budgets`. An image at the budget itself has fallen, and one a millionth beyond, where rounding
      to float32 may put it.

    Raises:
      ValueError: if there are no distances, or one of them or a budget is NaN or below 0.
    """
    far, radius = np.asarray(distances, np.float64), np.asarray(budgets, np.float64)
    if far.ndim != 1 or not len(far):
        raise ValueError(f"accuracy_at: distances have shape {far.shape}; it must be [N], N at least 1")
    for name, values in (("distances", far), ("budgets", radius)):
        if (wrong := ~(values >= 0)).any():
            raise ValueError(f"accuracy_at: {name} contain {values[wrong][0]:g}; each must be at least 0")
    return np.asarray((far > (radius + np.minimum(SLACK, radius))[..., None]).mean(-1))


def optimality(distances: Any, nearest: Any) -> float:
    """Computes how near an attack comes to the nearest adversarial images that are known (AttackBench's local optimality).

    It is the share of the area between the accuracy without attack and the curve of `nearest` that the attack's curve takes
    away, over all budgets up to the farthest image of `nearest`: 1 for an attack that always finds the nearest, 0 for one that
    finds none.

    Args:
      distances: `[N]`, as `distances` returns them: of the attack. It is 0 for an image that is misclassified as it is.
      nearest: `[N]`, the least of all attacks that are compared, this one among them.

    Returns:
      A number in [0, 1]. Where all images of `nearest` that fall do so at one distance, 1 if the attack finds them there.

    Raises:
      ValueError: if the arrays are not `[N]`, a distance is NaN, below 0, or below the nearest, one is above 0 of an image
        that is misclassified as it is, or no attack found anything.

    Reference: Cina et al., 2024, https://arxiv.org/abs/2404.19460
    """
    try:
        own, best = np.asarray(distances, np.float64), np.asarray(nearest, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimality: distances and nearest must be numbers ({error})") from None
    if own.ndim != 1 or own.shape != best.shape or not len(own):
        raise ValueError(
            f"optimality: distances have shape {own.shape} and nearest {best.shape}; both must be [N], N at least 1"
        )
    for name, values in (("distances", own), ("nearest", best)):
        if (wrong := ~(values >= 0)).any():
            raise ValueError(f"optimality: {name} contain {values[wrong][0]:g}; each must be at least 0")
    if (wrong := own < best).any():
        i = int(wrong.argmax())
        raise ValueError(
            f"optimality: image {i} has distance {own[i]:g}, below its nearest {best[i]:g}; nearest is the second argument, "
            "the least of all attacks"
        )
    if (wrong := (best == 0) & (own > 0)).any():
        i = int(wrong.argmax())
        raise ValueError(
            f"optimality: image {i} has distance {own[i]:g} and nearest 0; one that is misclassified as it is must have 0"
        )
    if not (reach := best[np.isfinite(best)].max(initial=0.0)):
        raise ValueError(
            "optimality: no distance of nearest is finite and above 0; there is nothing that an attack has found"
        )
    # The area below an accuracy curve is the mean distance, as far as it counts.
    area, least = (np.minimum(far, reach).mean() for far in (own, best))
    most = reach * (best > 0).mean()
    return float((most - area) / (most - least)) if most > least else float((own == best).mean())


def _wide(name: str, images: Any) -> np.ndarray:
    array = _entrance.as_images(images)
    if array.dtype == np.uint8:
        array = array.astype(np.float32) / 255  # as the model reads it
    wide = array.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"distances: {name} images contain NaN or infinity; remove them")
    return wide
