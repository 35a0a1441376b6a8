"""A model to be evaluated: a function from images to logits, with the images and labels to evaluate it on."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import distributed
from e2sad_jax._compile import jit
from e2sad_jax.errors import DataError, first_line
from e2sad_jax.evaluation.attack import CLEAN, Attack
from e2sad_jax.evaluation.autoattack import AutoResult, run_stages
from e2sad_jax.evaluation.evaluator import Apply, Evaluation, Outcomes, Programs, Progress, in_batches, programs_of


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model and the images that it is evaluated on.

    Attributes:
      name: its name in tables.
      apply: parameters and inputs `[N, ...]` to logits `[N, K]`.
      params: passed on to `apply`.
      images: inputs as `apply` takes them, `[N, ...]`, float32, inside `bounds`.
      labels: `[N]`, integers in `[0, K)`.
      bounds: range of valid inputs.
      batch_size: images at once.
      seed: seed of all random numbers.
      mesh: devices to split batches over, if they divide them; None for one device.
    """

    name: str
    apply: Apply
    params: Any
    images: np.ndarray
    labels: np.ndarray
    bounds: tuple[float, float] = (0.0, 1.0)
    batch_size: int = 250
    seed: int = 0
    mesh: Mesh | None = None
    _programs: Programs | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self._compiled().num_classes(self.params, self.images)

    def evaluate(self, attacks: Sequence[Attack], *, restart: int = 0, progress: Progress | None = None) -> Outcomes:
        """`evaluate` of this model.

        Args:
          attacks: what to run.
          restart: another number draws other random numbers.
          progress: as of `evaluate`.
        """
        return self._evaluation(restart, progress).outcomes(attacks)

    def clean(self) -> np.ndarray:
        """Whether each image is classified correctly, bool `[N]`."""
        return self.right_on(self.images)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The predicted classes of images `[N, ...]`, others or these, int32 `[N]`; -1 where a logit is NaN."""
        return self._evaluation(0, None, images).outcomes([Attack("clean", CLEAN)]).prediction[0]

    def right_on(self, images: np.ndarray) -> np.ndarray:
        """Whether other images `[N, ...]` with the same labels are classified correctly, bool `[N]`."""
        return self.predict(images) == self.labels

    def under(
        self, attack: Attack, restart: int = 0, progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Runs an attack; returns whether each image is still classified correctly, bool `[N]`, and the images.

        Args:
          attack: the attack.
          restart: another number draws other random numbers.
          progress: as of `evaluate`.
        """
        attacked = np.array(self.images)

        def visit(attack: Attack, places: np.ndarray, inputs: np.ndarray, right: np.ndarray) -> None:
            attacked[places] = inputs

        outcomes = self._evaluation(restart, progress).outcomes([attack], visit=visit)
        return outcomes.correct[0], attacked

    def auto(
        self, stages: Sequence[Attack], *, eps: float, norm: str = "linf", progress: Progress | None = None
    ) -> AutoResult:
        """`auto` of this model."""
        return run_stages(self._evaluation(0, progress), stages, eps=eps, norm=norm)

    def per_image(
        self, function: Callable[..., tuple[jax.Array, ...]], *arguments: Any, images: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Computes a function of each image, batch by batch.

        Args:
          function: a function of a module, `(programs, params, images, labels, places, *arguments) -> arrays [N]`;
            `programs.apply` and `programs.bounds` are the model's.
          *arguments: numbers, which are traced.
          images: others than the model's own, of the same labels.

        Returns:
          The arrays, `[N]`.
        """
        programs, images = self._compiled(), self.images if images is None else images
        program = programs.once(function, lambda: jit(functools.partial(function, programs)))
        params = distributed.replicate(self.mesh, self.params)

        def run(full: np.ndarray) -> Any:
            batch = distributed.split_batch(self.mesh, (images[full], self.labels[full], full))
            return program(params, *batch, *arguments)

        parts = [
            [np.asarray(column)[: len(places)] for column in result]
            for places, result in in_batches(run, np.arange(len(images)), min(self.batch_size, len(images)))
        ]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def compiled(self) -> "Model":
        """A copy that compiles each program once and keeps it for several measurements."""
        model = dataclasses.replace(self)
        object.__setattr__(model, "_programs", self._compiled())
        return model

    def _compiled(self) -> Programs:
        return self._programs or programs_of(self.apply, None, self.bounds)

    def _evaluation(self, restart: int, progress: Progress | None, images: Any = None) -> Evaluation:
        seed = zlib.crc32(f"{self.seed} {restart}".encode()) if restart else self.seed
        images = self.images if images is None else images
        return Evaluation(
            self._compiled(), self.params, images, self.labels, self.batch_size, seed, self.mesh, progress
        )


class Classifier(Protocol):
    """What `of_classifier` takes: `e2sad_jax.load` returns it."""

    @property
    def apply(self) -> Apply: ...
    @property
    def params(self) -> Any: ...
    @property
    def transform(self) -> Any: ...
    @property
    def config(self) -> Any: ...


def of_classifier(
    classifier: Classifier,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    name: str = "",
    batch_size: int = 250,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Model:
    """Makes a `Model` of a trained classifier of this library and the images to evaluate it on.

    Args:
      classifier: as `e2sad_jax.load` returns it.
      images: `[N, H, W, C]` as stored, before the classifier's transform.
      labels: `[N]`, integers in `[0, K)`.
      name: its name in tables; empty for that of its defense.
      batch_size: images at once.
      seed: seed of all random numbers.
      mesh: devices to split batches over.
    """
    transform = classifier.transform
    return Model(
        name or classifier.config.defense,
        classifier.apply,
        classifier.params,
        np.asarray(transform.apply(jnp.asarray(images)), np.float32),
        np.asarray(labels),
        transform.bounds,
        batch_size,
        seed,
        mesh,
    )


def of_function(
    logits_fn: Callable[..., jax.Array],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    params: Any = None,
    name: str = "model",
    batch_size: int = 250,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Model:
    """Makes a `Model` of any function that JAX can differentiate and the images to evaluate it on.

    Args:
      logits_fn: images `[N, ...]`, float32 in [0, 1], to logits `[N, K]`; with `params`, of those and images.
      images: `[N, ...]`, uint8, or floating point in [0, 1].
      labels: `[N]`, integers in `[0, K)`.
      params: the model's arrays. Arrays that a function holds itself become a part of each program that is compiled.
      name: its name in tables.
      batch_size: images at once.
      seed: seed of all random numbers.
      mesh: devices to split batches over.

    Raises:
      DataError: if images or labels are not that, or the function does not return logits for them.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    if (
        images.size == 0
        or not np.issubdtype(images.dtype, np.floating)
        or not (np.min(images) >= 0 and np.max(images) <= 1)
    ):
        raise DataError(
            f"{name}: images are {images.dtype} {images.shape}; they must be some, uint8 or floating point in [0, 1]"
        )
    apply: Apply = logits_fn
    if params is None:

        def apply(params: Any, x: jax.Array) -> jax.Array:
            return logits_fn(x)

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
    return Model(name, apply, params, images.astype(np.float32), labels, (0.0, 1.0), batch_size, seed, mesh)
