"""What every entrance of `evaluation` does with its arguments: one form for all, one line where that cannot be."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax.attacks import core
from e2sad_jax.errors import first_line, quoted

Apply = Callable[..., jax.Array]  # (params, inputs [N, ...]) -> logits [N, K]; of a random model (params, inputs, key)
Transform = Callable[[jax.Array], jax.Array]  # images as stored [N, ...] -> inputs [N, ...]
Bounds = tuple[Any, Any]  # lowest and highest valid input: numbers, or arrays that broadcast against one image

_ROUNDING = 1e-6  # of the range: what float32 may lie outside


@dataclasses.dataclass(frozen=True)
class Detector:
    """A detector of a model that rejects images.

    Attributes:
      score_fn: the model's parameters and inputs `[N, ...]` to scores `[N]`. Attacks differentiate it: take `attacks.bpda` of
        what has no gradient.
      threshold: an image is rejected if its score is above it. Fix it on held-out training images (`inference.threshold`).
      weight: of the score in units of an attack's loss, above 0: attacks lower `weight * max(0, score - threshold)`. A multiple
        of 1 / (standard deviation of clean scores) is of the loss's order. With a low one attacks are rejected, and the
        accuracy looks too high: report the worst case over several.

    Raises:
      ValueError: if `score_fn` is no function, `threshold` no finite number, or `weight` not above 0.
    """

    score_fn: Callable[[Any, jax.Array], jax.Array]
    threshold: float
    weight: float

    def __post_init__(self) -> None:
        if not callable(self.score_fn):
            raise ValueError(
                f"detector: score_fn is a {type(self.score_fn).__name__}; it must be a function of params and inputs"
            )
        if not core.is_number(self.threshold) or not math.isfinite(self.threshold):
            raise ValueError(f"detector: threshold={quoted(self.threshold)}; it must be a finite number")
        core.checks.number("detector", "weight", self.weight, positive=True)


def as_budget(name: str, eps: Any, *, argument: str = "eps", positive: bool = False) -> float:
    """A budget as a Python number.

    Args:
      name: what the message names.
      eps: the budget.
      argument: its name.
      positive: whether 0 is refused too.

    Raises:
      ValueError: if it is not one number, finite in float32, and at least (or above) 0.
    """
    if np.ndim(eps):
        least = "above" if positive else "at least"
        raise ValueError(
            f"{name}: {argument} has shape {np.shape(eps)}; it must be one number, {least} 0: scale the inputs inside the "
            "model so that one serves them all"
        )
    core.checks.number(name, argument, eps, positive=positive)
    return float(jax.device_get(eps))


def as_images(images: Any, *, stored: bool = False) -> np.ndarray:
    """Images on the host, at least one: float64 becomes float32 unless JAX computes in 64 bits.

    Args:
      images: `[N, ...]`, anything that NumPy makes an array of.
      stored: whether a transform reads them, so that every dtype is allowed.

    Raises:
      ValueError: if they are no such array.
    """
    array = _as_array("images", images)
    if array.ndim < 2 or len(array) == 0 or array.size == 0:
        raise ValueError(f"images have shape {array.shape}; it must be [N, ...], N at least 1: there must be some")
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    if array.dtype.kind in "OSU" or not (stored or floating or array.dtype == np.uint8):
        raise ValueError(f"images are {array.dtype}; they must be uint8 or floating point, or need a transform")
    if floating and array.dtype.itemsize > 4:
        array = array.astype(jax.dtypes.canonicalize_dtype(np.float64))
    return array


def as_labels(labels: Any, n: int) -> np.ndarray:
    """Labels of n images on the host, int32 `[N]`.

    Raises:
      ValueError: if they are not one integer for each image.
    """
    array = _as_array("labels", labels)
    if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
        one_hot = "; of one-hot labels take labels.argmax(1)" if array.ndim == 2 and array.shape[1] > 1 else ""
        raise ValueError(f"labels {array.shape} {array.dtype} must be one integer for each of {n} images{one_hot}")
    inside = np.clip(array, -1, 2**31 - 1)  # what int32 does not hold is no class either
    return inside.astype(np.int32)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Refuses labels outside of [0, K).

    Raises:
      ValueError: if there is one.
    """
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels reach from {labels.min()} to {labels.max()}; the model has {num_classes} classes: labels count from 0"
        )


def as_bounds(bounds: Any) -> Bounds:
    """The range of valid inputs: two Python numbers, or arrays where it differs from one part of an image to another.

    Raises:
      ValueError: if it is no pair of numbers, or the lower is not below the upper one.
    """
    try:
        low, high = bounds
        lower, upper = (np.asarray(_on_host(value), np.float64) for value in (low, high))
        right = bool(np.all(lower < upper))  # NaN is below nothing
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(
            f"bounds={quoted(bounds)}; it must be (lower, upper), two numbers or arrays that broadcast against one image, "
            "the lower below the upper one"
        )
    wide = jax.dtypes.canonicalize_dtype(np.float64)
    return (
        float(lower) if lower.ndim == 0 else lower.astype(wide),
        float(upper) if upper.ndim == 0 else upper.astype(wide),
    )


def check_inputs(inputs: np.ndarray, bounds: Bounds) -> None:
    """Refuses inputs that `bounds` do not fit, or that lie outside of them.

    Args:
      inputs: `[N, ...]`, as `apply` takes them; uint8 counts from 0 to 1.
      bounds: as `as_bounds` returns them.

    Raises:
      ValueError: if there are some.
    """
    check_bounds_fit(inputs.shape[1:], bounds)
    low, high = (bound if np.ndim(bound) == 0 else bound[None] for bound in bounds)
    if inputs.dtype == np.uint8:
        if np.all(low <= 0) and np.all(high >= 1):
            return
        inputs = inputs.astype(np.float32) / 255
    with np.errstate(over="ignore", invalid="ignore"):
        outside = outside_of(inputs, low, high)
    if outside.any():
        refuse_outside(int(outside.sum()), len(inputs), float(np.min(inputs)), float(np.max(inputs)), bounds)


def outside_of(inputs: Any, low: Any, high: Any) -> Any:
    """Whether a value of each input lies outside of [low, high], bool `[N]`; NaN does. Of NumPy's arrays or JAX's."""
    width = high - low
    allowance: Any = _ROUNDING * np.where(np.isfinite(width), width, 0)
    if np.ndim(allowance) == 0:
        allowance = float(allowance)
    inside = (inputs >= low - allowance) & (inputs <= high + allowance)
    return ~inside.reshape(len(inputs), -1).all(1)


def check_bounds_fit(shape: tuple[int, ...], bounds: Bounds) -> None:
    """Refuses bounds that do not broadcast against one image of that shape."""
    for bound in bounds:
        if not core.checks.fits(np.shape(bound), shape):
            raise ValueError(
                f"bounds have shape {np.shape(bound)}; it must be a number, or broadcast against one image {shape}"
            )


def refuse_outside(outside: int, n: int, low: float, high: float, bounds: Bounds) -> None:
    """Raises the error of inputs outside of their range.

    Args:
      outside: how many of them.
      n: of how many.
      low: the lowest value.
      high: the highest value.
      bounds: the range.

    Raises:
      ValueError: always.
    """
    scalar = all(np.ndim(bound) == 0 for bound in bounds)
    within = f"bounds=({bounds[0]:g}, {bounds[1]:g})" if scalar else "bounds"
    if not (math.isfinite(low) and math.isfinite(high)):
        remedy = "remove NaN and infinity"
    elif scalar and tuple(bounds) == (0.0, 1.0) and low >= 0 and high <= 255:
        remedy = "divide pixels of 0..255 by 255"
    else:
        remedy = (
            "normalisation belongs inside the model: give images in [0, 1] and evaluation.wrap(apply, mean=..., std=...); or "
            "give their range as bounds"
        )
    raise ValueError(f"{outside} of {n} images reach outside {within}, from {low:.4g} to {high:.4g}; {remedy}")


class Bound(NamedTuple):
    """A function with the arrays that it is called with.

    Attributes:
      apply: `(arrays, inputs) -> logits`.
      arrays: a pytree of arrays.
    """

    apply: Apply
    arrays: Any


def bind(apply: Apply, params: Any) -> Bound:
    """Takes what is no array out of the parameters, as an Equinox module's activation function, so that `jit` takes the rest.

    Raises:
      ValueError: if `apply` is no function.
    """
    if not callable(apply):
        kind = type(apply).__name__
        raise ValueError(f"apply is a {kind}; it must be a function: the order is apply, params, images, labels")
    leaves, tree = jax.tree.flatten(params)
    places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    if len(places) == len(leaves):
        return Bound(apply, params)
    rest = [None if _is_array(leaf) else leaf for leaf in leaves]

    def of_arrays(arrays: Sequence[Any], x: jax.Array, *key: jax.Array) -> jax.Array:
        filled = list(rest)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        return apply(jax.tree.unflatten(tree, filled), x, *key)

    return Bound(of_arrays, [leaves[place] for place in places])


def shape_of_inputs(transform: Transform, images: np.ndarray) -> jax.ShapeDtypeStruct:
    """Shape and dtype of two images behind the transform, without computing anything.

    Raises:
      ValueError: if the transform fails, or does not return one floating input for each.
    """
    found = _traced("transform", transform, images)
    if not _is_shaped(found) or found.ndim < 2 or found.shape[0] != 2 or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(
            f"transform returns {_in_words(found)}; it must return an input [N, ...], floating point, for each"
        )
    return found  # type: ignore[no-any-return]


def classes_of(apply: Apply, params: Any, inputs: Any) -> int:
    """The number of classes K of a model, without computing anything.

    Args:
      apply: the model.
      params: its parameters.
      inputs: `[N, ...]`, with shape and dtype.

    Raises:
      ValueError: if the function fails on such inputs, or does not return logits.
    """
    return classes_in(_traced("the model", lambda x: apply(params, x), inputs), 2)


def classes_in(logits: Any, n: int) -> int:
    """The number of classes of what a model returns for n images.

    Args:
      logits: with shape and dtype.
      n: number of images.

    Raises:
      ValueError: if it is none of logits `[n, K]`, K at least 2.
    """
    count = f"{n} image{'s' if n > 1 else ''}"
    must = f"it must return logits ({n}, K), K at least 2"
    one = "losses.binary_logits makes two logits of one"
    if not _is_shaped(logits):
        key = next(iter(logits), "") if isinstance(logits, dict) else 0
        how = f": take them out of it, as lambda x: f(x)[{key!r}]" if isinstance(logits, (tuple, list, dict)) else ""
        raise ValueError(f"the model returns {_in_words(logits)} for {count}; {must}{how}")
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[0] != n or shape[1] < 2:
        how = ""
        if shape in ((n,), (n, 1)):
            how = f"; {one}"
        elif len(shape) > 2 and shape[0] == n and math.prod(shape) == n * max(shape[1:]):
            how = "; reshape them: logits.reshape(len(x), -1)"
        raise ValueError(f"the model returns shape {shape} for {count}; {must}{how}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"the model returns {logits.dtype} for {count}; {must}, floating point, not classes")
    return shape[1]


def _traced(name: str, function: Callable[[Any], Any], images: Any) -> Any:
    """What a function of images returns for two of them, as shapes.

    Raises:
      ValueError: of one line, if the function raises whatever it may.
    """
    two = jax.ShapeDtypeStruct((2, *images.shape[1:]), images.dtype)
    try:
        return jax.eval_shape(lambda x: function(x), two)  # a lambda, for JAX asks a function for its hash
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{name} fails on images of shape {two.shape} {two.dtype}, traced by JAX: {what}") from error


def _as_array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(_on_host(values))
    except Exception as error:  # whatever another library's arrays raise
        raise ValueError(f"{name} are a {type(values).__name__}, no array: {first_line(error)}") from error


def _on_host(values: Any) -> Any:
    return jax.device_get(values) if isinstance(values, jax.Array) else values


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) or (isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind not in "OSU")


def _is_shaped(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _in_words(value: Any) -> str:
    if _is_shaped(value):
        return f"shape {tuple(value.shape)} {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"
