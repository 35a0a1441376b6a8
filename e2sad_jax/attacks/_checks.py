"""Argument checks of attacks and defenses. A traced number has no value yet and passes."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import _arguments
from e2sad_jax._arguments import classes, is_number, is_readable, logits, read
from e2sad_jax.attacks._ball import NORMS, Ball
from e2sad_jax.attacks._numerics import as_float32
from e2sad_jax.attacks._types import Bounds
from e2sad_jax.errors import quoted

__all__ = [
    "Checked",
    "aims",
    "budget",
    "classes",
    "finite_range",
    "fits",
    "image_range",
    "images",
    "is_number",
    "is_readable",
    "logits",
    "nan_without_class",
    "number",
    "read",
    "threat_model",
    "threshold",
]
LARGEST = float(np.finfo(np.float32).max)  # budget: attacks compute in float32
ROUNDING = (
    1e-6  # share of the image range by which images may be beyond it, and one rounding of their dtype: they are clipped
)


class Checked(NamedTuple):
    """What `threat_model` has checked, as attacks compute with it.

    Attributes:
      x: images, an array of JAX.
      eps: budget, a number or an array that broadcasts against `x`.
      step_size: likewise, or None.
      bounds: image range, numbers or arrays that broadcast against `x`, or None.
    """

    x: jax.Array
    eps: Any
    step_size: Any
    bounds: Bounds


def threat_model(
    name: str,
    x: jax.Array,
    *,
    bounds: Bounds,
    eps: object = 0.0,
    norm: str = "linf",
    norms: tuple[str, ...] = NORMS,
    step_size: object | None = None,
    **counts: int,
) -> Checked:
    """Checks what most attacks take, and brings it to the form that they compute with.

    Args:
      name: the attack's name in the messages.
      x: images, floating point, with a leading batch axis, inside `bounds`.
      bounds: image range, the lower below the upper one, each a number or what broadcasts against one image; or None.
      eps: budget, as `budget` takes it.
      norm: of the budget.
      norms: those that there are.
      step_size: above 0 and as `budget` takes it, or None.
      **counts: whole numbers, at least 1 (`steps`, `restarts`, ...).

    Raises:
      TypeError: if the images are not floating point.
      ValueError: if another argument is out of range.
    """
    x = images(name, x)
    if norm not in norms:
        raise ValueError(f"{name}: norm={norm!r}; it must be one of {', '.join(norms)}")
    eps = budget(name, "eps", eps, x, norm=norm)
    for argument, value in counts.items():
        _arguments.count(f"{name}: {argument}", value)
    if step_size is not None:
        step_size = budget(name, "step_size", step_size, x, norm=norm, positive=True)
    return Checked(x, eps, step_size, image_range(name, bounds, x))


def images(name: str, x: jax.Array) -> jax.Array:
    """Refuses images that are not floating point or have no batch axis. NumPy's become what JAX makes of them."""
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name}: images are {x.dtype}; they must be floating point, as the loss sees them (uint8: x / 255)"
        )
    if x.ndim < 1:
        raise ValueError(f"{name}: images need a leading batch axis [N, ...], got a scalar")
    return x


def number(name: str, argument: str, value: object, *, positive: bool = False) -> None:
    """Refuses what is no number, or is negative, not finite or, if `positive`, 0."""
    must = f"it must be a number, finite and {'above' if positive else 'at least'} 0"
    array = isinstance(value, (jax.Array, np.ndarray))
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or (array and _numeric(value))):
        raise ValueError(f"{name}: {argument}={quoted(value)}; {must}")
    if not is_number(value):
        return
    try:
        known = float(read(value) if array else value)  # type: ignore[arg-type]
    except OverflowError:  # a Python integer has no end
        known = float("inf")
    if not 0 <= known <= LARGEST or (positive and known == 0):
        raise ValueError(f"{name}: {argument}={quoted(value) if isinstance(value, int) else value}; {must}")


def budget(name: str, argument: str, value: object, x: jax.Array, *, norm: str = "linf", positive: bool = False) -> Any:
    """Brings a budget or step size to a form that broadcasts against images.

    Args:
      name: the attack's name in the messages.
      argument: the argument's.
      value: one number; `[N]`, one for each image; or what broadcasts against one image `[...]`, a mask. An array with as
        many axes as `x` says it all. `[N]` where the images' last axis is N too could be either and is refused; not in
        the l2 and the l0 ball, which have one radius for an image and take no mask.
      x: images `[N, ...]`.
      norm: "linf", "l2" or "l0".
      positive: whether a number must be above 0. Entries of an array may be 0, where nothing is to move.

    Returns:
      A number as it is; an array in the dtype of the attack's iterates.

    Raises:
      ValueError: if its shape is another, or an entry that can be read is negative or not finite.
    """
    if isinstance(value, (list, tuple)):
        value = np.asarray(value)
    if not isinstance(value, (jax.Array, np.ndarray)) or value.ndim == 0:
        number(name, argument, value, positive=positive)
        return float(value) if isinstance(value, numbers.Real) else _wide(value, x)
    n, image, shape = x.shape[0], x.shape[1:], value.shape
    if not _numeric(value):
        raise ValueError(f"{name}: {argument} is {value.dtype}; it must be of numbers")
    if shape == (n,):
        if norm == "linf" and n > 1 and image[-1:] == (n,):
            raise ValueError(
                f"{name}: {argument} has shape ({n},), and so have the {n} images and their last axis; make it "
                f"{(n, *[1] * len(image))} for one per image, {(1,) * len(image) + (n,)} for one per entry of that axis"
            )
        value = value.reshape(n, *[1] * len(image))
    elif not (fits(shape, image) or (value.ndim == x.ndim and fits(shape, x.shape))):
        raise ValueError(
            f"{name}: {argument} has shape {shape}; it must be a number, have one for each of the {n} images, ({n},), or "
            f"broadcast against one image, {image}"
        )
    if norm != "linf" and any(length > 1 for length in (value.shape[1:] if value.ndim == x.ndim else value.shape)):
        raise ValueError(
            f"{name}: {argument} has shape {shape}; the {norm} ball has one radius for an image: a number, or ({n},)"
        )
    if is_readable(value):
        known = read(value)
        if (wrong := ~((known >= 0) & (known <= LARGEST))).any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            entry = place[: len(shape)] if known.shape == shape else place[:1]
            raise ValueError(
                f"{name}: {argument}[{', '.join(map(str, entry))}]={known[place]}; it must be finite and at least 0"
            )
    return _wide(value, x)


def score(name: str, value: jax.Array) -> jax.Array:
    """The scores of a detector.

    Raises:
      TypeError: if they are no floating point numbers.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name}: score_fn returned {value.dtype}; it must return floating point scores, before they are compared with "
            "the threshold: an attack follows their gradient"
        )
    return value


def threshold(name: str, value: object) -> None:
    """Refuses a detector's threshold that is NaN: no score would be above it, and every image accepted."""
    if is_readable(value) and np.isnan(read(value)).any():  # type: ignore[arg-type]
        raise ValueError(
            f"{name}: threshold={value}; it must be a number, as inference.threshold makes it of clean scores"
        )


def perturbation(name: str, argument: str, value: object, x: jax.Array) -> jax.Array:
    """Refuses perturbations that do not have the images' shape, are not floating point, or, where read, not finite.

    Returns:
      `[N, ...]`, in the dtype of the attack's iterates.
    """
    value = value if isinstance(value, jax.Array) else jnp.asarray(value)
    if value.shape != x.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"{name}: {argument} is {value.dtype} {value.shape}; it must be floating point of the images' shape, {x.shape}"
        )
    value = value.astype(_arguments.wide(x.dtype))
    if is_readable(value) and not np.isfinite(read(value)).all():
        raise ValueError(f"{name}: {argument} has entries that are NaN or infinite; a perturbation must be finite")
    return value


def from_start(name: str, limits: Ball, x: jax.Array, start: jax.Array | None) -> jax.Array:
    """Where an attack begins, float32 or wider: at the images, or at x + `start`, checked and brought into the ball."""
    wide = as_float32(x)
    return wide if start is None else limits.project(wide + perturbation(name, "start", start, x))


def image_range(name: str, bounds: Any, x: jax.Array) -> Bounds:
    """Refuses an image range that is out of order, and images beyond it, where their values can be read.

    Args:
      name: the attack's name in the messages.
      bounds: lowest and highest value, each a number or what broadcasts against one image; or None.
      x: images `[N, ...]`.

    Returns:
      Both, numbers or arrays that broadcast against images; or None.

    Raises:
      ValueError: with the value and its bound.
    """
    if bounds is None:
        return None
    try:
        lower, upper = bounds
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}: bounds={bounds}; it must be two, the lowest and the highest value of an image, or None"
        ) from None
    ends = _end(name, bounds, lower, x), _end(name, bounds, upper, x)
    if not all(map(is_readable, ends)):
        return ends
    known = read(ends[0]), read(ends[1])
    numbers_alone = known[0].ndim == known[1].ndim == 0
    if not (right := np.asarray(known[0] < known[1])).all():  # NaN is not
        shown = f"={bounds}" if numbers_alone else f" are {_entries(~right, *known)}"
        raise ValueError(f"{name}: bounds{shown}; the lower must be below the upper one")
    if x.size and is_readable(x):
        values = read(x)
        largest = np.maximum(abs(known[0]), abs(known[1]))
        slack = np.nan_to_num(ROUNDING * (known[1] - known[0]) + float(jnp.finfo(x.dtype).eps) * largest, posinf=0)
        outside = ~((values >= known[0] - slack) & (values <= known[1] + slack))  # NaN is
        if outside.any():
            found = values[outside].astype(float)
            if numbers_alone:
                where = f"reach from {np.min(values):.4g} to {np.max(values):.4g}, beyond bounds={bounds}"
            else:
                where = f"have {found[0]:.4g} where bounds are {_entries(outside, *known)}"
            remedy = (
                "give the range that they have, or None, or let the model normalise images in [0, 1] itself (evaluation.wrap)"
                if np.isfinite(found).all()
                else "remove NaN and infinity"
            )
            raise ValueError(f"{name}: images {where}; {remedy}")
    return ends


def finite_range(
    name: str, bounds: Any, checked: Bounds, why: str
) -> tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]:
    """Refuses a range that is None or, where it can be read, not finite.

    Args:
      name: the attack's name in the messages.
      bounds: as they were given.
      checked: as `image_range` returns them.
      why: what the attack needs them for.

    Returns:
      `checked`.

    Raises:
      ValueError: with the bounds and the reason.
    """
    if checked is None or any(is_readable(end) and not np.isfinite(read(end)).all() for end in checked):
        raise ValueError(f"{name}: bounds={bounds}; {why}, so it needs the range of valid images, finite")
    return checked


def aims(
    name: str, labels: Any, targets: Any, n: int, num_classes: int, *, predicted: bool = False
) -> tuple[jax.Array | None, jax.Array | None]:
    """Refuses labels and targets `[n]` that are no classes, or are the same where both can be read.

    Args:
      name: the attack's name in the messages.
      labels: classes to leave; None where `predicted` ones take their place.
      targets: classes to reach, or None.
      n: number of images.
      num_classes: of the model.
      predicted: whether labels may be None.
    """
    if not (labels is None and predicted):
        labels = classes(name, "labels", labels, n, num_classes)
    if targets is not None:
        targets = classes(name, "targets", targets, n, num_classes)
    known = labels is not None and targets is not None and is_readable(labels) and is_readable(targets)
    if known and (same := read(targets) == read(labels)).any():
        raise ValueError(f"{name}: targets[{same.argmax()}] is that image's label; it must be another class")
    return labels, targets


def nan_without_class(x: jax.Array, num_classes: int, *classes: jax.Array | None) -> jax.Array:
    """`x` `[N, ...]`, NaN where one of the `classes` `[N]` is none: that of a traced one nobody could refuse."""
    for values in classes:
        if values is not None:
            x = _arguments.nan_without_class(x, values, num_classes)
    return x


def _numeric(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)


def _entries(wrong: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> str:
    """Both ends of the range at the first place that is wrong, and that place in an image."""
    lower, upper, wrong = np.broadcast_arrays(lower, upper, wrong)
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"({lower[place]:g}, {upper[place]:g}), at {list(place[1:])} of an image"


def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether `shape` broadcasts to `target` without making it larger."""
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1], strict=False))


def _wide(value: Any, x: jax.Array) -> jax.Array:
    """In the dtype of the attack's iterates, which a wider one would change, and with as many axes."""
    value = jnp.asarray(value).astype(_arguments.wide(x.dtype))
    return value.reshape(*(1,) * (x.ndim - value.ndim), *value.shape) if value.ndim else value


def _end(name: str, bounds: Any, value: Any, x: jax.Array) -> Any:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    value = value if isinstance(value, (jax.Array, np.ndarray)) else np.asarray(value)
    if not _numeric(value):
        raise ValueError(f"{name}: bounds={bounds}; it must be of numbers, or None")
    if not fits(value.shape, x.shape[1:]):
        raise ValueError(
            f"{name}: bounds have shape {value.shape}; they must be numbers, or broadcast against one image, {x.shape[1:]}"
        )
    return _wide(value, x)
