"""Who is judged: a function from images to logits, with images and labels."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import networks
from e2sad_jax.errors import DataError, first_line
from e2sad_jax.evaluation.auto import Apply, attack_fn, predict
from e2sad_jax.evaluation.evaluator import Attack, batches, check_attack

if TYPE_CHECKING:
    from e2sad_jax.runs.classifier import Classifier


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model and the images that it is judged on.

    Attributes:
      name: what it is called in tables.
      apply: parameters and images `[N, ...]` to logits `[N, K]`.
      params: passed on to `apply`.
      x: images as `apply` takes them, `[N, ...]`, float32, inside `bounds`.
      labels: `[N]`, integers in `[0, K)`.
      bounds: range of valid images.
      batch_size: images at once.
      seed: of all random numbers.
    """

    name: str
    apply: Apply
    params: Any
    x: np.ndarray
    labels: np.ndarray
    bounds: tuple[float, float] = (0.0, 1.0)
    batch_size: int = 250
    seed: int = 0

    @property
    def classes(self) -> int:
        """The number of classes K."""
        return int(jax.eval_shape(self.apply, self.params, self.x[:1]).shape[-1])

    def clean(self) -> np.ndarray:
        """Whether each prediction is right, bool `[N]`."""
        return predict(self.apply, self.params, self.x, self.batch_size) == self.labels

    def under(self, attack: Attack, restart: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Whether each prediction is right under an attack, bool `[N]`, and the attacked images `[N, ...]`.

        Args:
          attack: the attack.
          restart: another number draws other random numbers.
        """
        check_attack(attack, self.classes, self.x.ndim)
        seed = np.uint32(zlib.crc32(f"{self.seed} {restart}".encode()) if restart else self.seed)
        run, n = attack_fn(self.apply, attack, self.bounds), len(self.x)
        made, right = [], []
        for index, rows in batches(n, self.batch_size):
            images, prediction = run(
                self.params, self.x[rows], self.labels[rows], index, seed, np.float32(attack.eps), None
            )
            made.append(np.asarray(images))
            right.append(np.asarray(prediction) == self.labels[rows])
        return np.concatenate(right)[:n], np.concatenate(made)[:n]

    def right_on(self, images: np.ndarray) -> np.ndarray:
        """Whether each prediction for other images of the same labels is right, bool `[N]`."""
        return predict(self.apply, self.params, images, self.batch_size) == self.labels


def of_classifier(
    classifier: "Classifier",
    images: np.ndarray,
    labels: np.ndarray,
    *,
    name: str = "",
    batch_size: int = 250,
    seed: int = 0,
) -> Subject:
    """A model of this library, as `e2sad_jax.load` returns it, with test images as stored."""
    return Subject(
        name or classifier.config.defense,
        apply_of(classifier.model),
        classifier.params,
        np.asarray(classifier.transform.apply(jnp.asarray(images)), np.float32),
        np.asarray(labels),
        classifier.transform.bounds,
        batch_size,
        seed,
    )


@functools.lru_cache(maxsize=8)
def apply_of(model: nn.Module) -> Apply:
    """A network as a function of its variables and inputs, the same one for equal networks."""
    return lambda params, x: networks.logits_fn(model, params)(x)


def of_function(
    logits_fn: Callable[..., jax.Array],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    params: Any = None,
    name: str = "model",
    batch_size: int = 250,
    seed: int = 0,
) -> Subject:
    """Anyone's model: a function that JAX can differentiate.

    Args:
      logits_fn: images `[N, ...]`, float32 in [0, 1], to logits `[N, K]`; with `params`, of those and images.
      images: `[N, ...]`, uint8, or floating point in [0, 1].
      labels: `[N]`, integers in `[0, K)`.
      params: the model's arrays. Those that a function holds itself become a part of each program that is compiled.
      name: what it is called in tables.
      batch_size: images at once.
      seed: of all random numbers.

    Raises:
      DataError: if images or labels are not that, or the function does not return logits for them.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    if (
        images.size == 0
        or not np.issubdtype(images.dtype, np.floating)
        or not (images.min() >= 0 and images.max() <= 1)
    ):
        raise DataError(
            f"{name}: images are {images.dtype} {images.shape}; they must be some, uint8 or floating point in [0, 1]"
        )
    apply = _without_params(logits_fn) if params is None else logits_fn
    try:
        shape = jax.eval_shape(apply, params, jax.ShapeDtypeStruct((2, *images.shape[1:]), jnp.float32)).shape
    except Exception as error:  # whatever the function raises
        raise DataError(
            f"{name}: fails on images of shape {(2, *images.shape[1:])}, traced by JAX: {first_line(error)}"
        ) from error
    if len(shape) != 2 or shape[0] != 2:
        raise DataError(f"{name}: returns shape {shape} for 2 images; it must return logits (2, K)")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{name}: labels are {labels.dtype} {labels.shape}; they must be integers ({len(images)},)")
    if labels.min() < 0 or labels.max() >= shape[1]:
        raise DataError(f"{name}: labels reach from {labels.min()} to {labels.max()}; the model has {shape[1]} classes")

    return Subject(name, apply, params, images.astype(np.float32), labels, (0.0, 1.0), batch_size, seed)


@functools.lru_cache(maxsize=4)
def _without_params(logits_fn: Callable[[jax.Array], jax.Array]) -> Apply:
    return lambda params, x: logits_fn(x)
