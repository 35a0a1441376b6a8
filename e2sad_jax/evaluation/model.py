"""A model to be evaluated: a function from images to logits, with the images and labels to evaluate it on."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import _arguments, distributed
from e2sad_jax._compile import jit
from e2sad_jax.errors import DataError
from e2sad_jax.evaluation import _entrance
from e2sad_jax.evaluation._entrance import Apply, Bounds, Detector
from e2sad_jax.evaluation.attack import CLEAN, Attack
from e2sad_jax.evaluation.autoattack import AutoResult, run_stages
from e2sad_jax.evaluation.evaluator import Evaluation, Outcome, Outcomes, Progress
from e2sad_jax.evaluation.exported import stablehlo
from e2sad_jax.evaluation.finished import Finished
from e2sad_jax.evaluation.programs import Programs, in_batches, programs_of


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model and the images that it is evaluated on.

    Attributes:
      name: its name in tables.
      apply: parameters and inputs `[N, ...]` to logits `[N, K]`, K at least 2. It needs no hash.
      params: passed on to `apply`: a pytree. Its arrays are traced, other leaves stay as they are.
      images: inputs as `apply` takes them, `[N, ...]`, inside `bounds`. They become float32, or float64 where JAX computes in
        64 bits; uint8 is divided by 255.
      labels: `[N]`, integers in `[0, K)`; they become int32.
      bounds: range of valid inputs: two numbers, or arrays that broadcast against one image.
      batch_size: images at once.
      seed: seed of all random numbers.
      mesh: devices to split batches over, if they divide them; None for one device.
      detector: of a model that rejects images, as of `evaluate`; None for one that rejects none.
      draws: number of draws of a random model, as of `evaluate`; 0 for any other.
      finished: where finished batches are kept, so that a measurement that was killed goes on; None for nowhere.

    Raises:
      ValueError: if the images, labels or numbers do not fit together; of the function only when it is asked.
    """

    name: str
    apply: Apply
    params: Any
    images: np.ndarray
    labels: np.ndarray
    bounds: Bounds = (0.0, 1.0)
    batch_size: int = 250
    seed: int = 0
    mesh: Mesh | None = None
    detector: Detector | None = None
    draws: int = 0
    finished: Finished | None = None
    _kept: tuple[Programs, Any] | None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        images = _entrance.as_images(self.images)
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        own: dict[str, Any] = {"images": images, "labels": _entrance.as_labels(self.labels, len(images))}
        own["bounds"] = _entrance.as_bounds(self.bounds)
        _entrance.check_inputs(images, own["bounds"])
        own["batch_size"] = _arguments.count("batch_size", self.batch_size)
        own["seed"] = _arguments.count("seed", self.seed, least=0, most=2**32 - 1)
        own["draws"] = _arguments.count("draws", self.draws, least=0)
        for field, value in own.items():
            object.__setattr__(self, field, value)

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        programs, params = self._compiled()
        return programs.shapes(params, self.images)[1]

    def evaluate(self, attacks: Sequence[Attack], *, restart: int = 0, progress: Progress | None = None) -> Outcomes:
        """`evaluate` of this model.

        Args:
          attacks: what to run.
          restart: another number draws other random numbers.
          progress: as of `evaluate`.
        """
        return self._evaluation(restart, progress).outcomes(attacks)

    def clean(self) -> np.ndarray:
        """Whether each image is classified correctly, and not rejected, bool `[N]`."""
        return self.judge(self.images).correct

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The predicted classes of N images inside `bounds`, others or these, int32 `[N]`; -1 where a logit is NaN."""
        return self.judge(images, np.zeros(len(np.asarray(images)), np.int32)).prediction

    def judge(self, images: np.ndarray, labels: np.ndarray | None = None) -> Outcome:
        """What the model makes of other images `[N, ...]` inside `bounds`, of the same labels unless others are given."""
        labels = self.labels if labels is None else labels
        return self._evaluation(0, None, np.asarray(images), labels).outcomes([Attack("clean", CLEAN)])["clean"]

    def right_on(self, images: np.ndarray) -> np.ndarray:
        """Whether other images `[N, ...]` with the same labels are classified correctly, or rejected, bool `[N]`."""
        return self.judge(images).withstood

    def under(
        self, attack: Attack, restart: int = 0, progress: Progress | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Runs an attack; returns whether each image is still classified correctly, bool `[N]`, and the images.

        Args:
          attack: the attack.
          restart: another number draws other random numbers.
          progress: as of `evaluate`.
        """
        outcome, attacked = self.attacked(attack, restart, progress)
        return outcome.correct, attacked

    def attacked(
        self, attack: Attack, restart: int = 0, progress: Progress | None = None
    ) -> tuple[Outcome, np.ndarray]:
        """As `under`, but returns the whole outcome, and the images `[N, ...]`."""
        images = np.array(self.images)

        def visit(attack: Attack, places: np.ndarray, inputs: np.ndarray, right: np.ndarray) -> None:
            images[places] = inputs

        outcomes = self._evaluation(restart, progress).outcomes([attack], visit=visit)
        return outcomes[attack.name], images

    def auto(
        self,
        stages: Sequence[Attack] | None = None,
        *,
        eps: float,
        norm: str = "linf",
        keep: bool = False,
        progress: Progress | None = None,
        near: float | None = None,
    ) -> AutoResult:
        """`auto` of this model, by default with the stages that `auto` has."""
        return run_stages(self._evaluation(0, progress), stages, eps=eps, norm=norm, keep=keep, near=near)

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
        programs, bound = self._compiled()
        images = self.images if images is None else images
        program = programs.once(function, lambda: jit(functools.partial(function, programs)))
        params, numbers = distributed.replicate(self.mesh, bound), jax.device_put(arguments)

        def run(full: np.ndarray) -> Any:
            batch = distributed.split_batch(self.mesh, (images[full], self.labels[full], np.int32(full)))
            return program(params, *batch, *numbers)

        parts = [
            [column[: len(places)] for column in jax.device_get(result)]
            for places, result in in_batches(run, np.arange(len(images)), min(self.batch_size, len(images)))
        ]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def compiled(self) -> "Model":
        """A copy that compiles each program once and keeps it for several measurements."""
        model = dataclasses.replace(self)
        object.__setattr__(model, "_kept", self._compiled())
        return model

    def _compiled(self) -> tuple[Programs, Any]:
        """The model's programs, and the arrays to call them with."""
        if self._kept is not None:
            return self._kept
        bound = _entrance.bind(self.apply, self.params)
        own: dict[str, Any] = {"detector": self.detector, "draws": self.draws, "seed": self.seed}
        return programs_of(bound.apply, None, self.bounds, params=self.params, **own), bound.arrays

    def _evaluation(
        self, restart: int, progress: Progress | None, images: Any = None, labels: Any = None
    ) -> Evaluation:
        seed = zlib.crc32(f"{self.seed} {restart}".encode()) if restart else self.seed
        images, labels = (self.images if images is None else images), (self.labels if labels is None else labels)
        programs, params = self._compiled()
        finished = self.finished if images is self.images and labels is self.labels else None
        return Evaluation(programs, params, images, labels, self.batch_size, seed, self.mesh, progress, finished)


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

    Raises:
      DataError: if images or labels do not fit the classifier.
    """
    transform, name = classifier.transform, name or classifier.config.defense
    with _as_data_errors(name):
        stored = _entrance.as_images(images)
        _entrance.check_inputs(stored, (0.0, 1.0))
        inputs = jax.device_get(transform.apply(jax.device_put(stored)))
        model = Model(
            name, classifier.apply, classifier.params, inputs, labels, transform.bounds, batch_size, seed, mesh
        )
        _entrance.check_labels(model.labels, model.num_classes)
    return model


def of_function(
    logits_fn: Callable[..., jax.Array],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    params: Any = None,
    bounds: Bounds = (0.0, 1.0),
    name: str = "model",
    batch_size: int = 250,
    seed: int = 0,
    mesh: Mesh | None = None,
    detector: Detector | None = None,
    draws: int = 0,
) -> Model:
    """Makes a `Model` of any function that JAX can differentiate and the images to evaluate it on.

    Args:
      logits_fn: images `[N, ...]`, float32 inside `bounds`, to logits `[N, K]`; with `params`, of those and images; with
        `draws`, of a key too, the last argument.
      images: `[N, ...]`, uint8, which is divided by 255, or floating point inside `bounds`.
      labels: `[N]`, integers in `[0, K)`.
      bounds: range of valid images, as of `evaluate`.
      params: the model's parameters. Arrays that a function holds itself become a part of each program that is compiled.
      name: its name in tables.
      batch_size: images at once.
      seed: seed of all random numbers.
      mesh: devices to split batches over.
      detector: of a model that rejects images, as of `evaluate`.
      draws: number of draws of a random model, as of `evaluate`.

    Raises:
      DataError: if images or labels are not that, or the function does not return logits for them.
    """
    with _as_data_errors(name):
        apply: Apply = logits_fn
        if params is None and callable(logits_fn):

            def apply(params: Any, *inputs: jax.Array) -> jax.Array:
                return logits_fn(*inputs)

        model = Model(name, apply, params, images, labels, bounds, batch_size, seed, mesh, detector, draws)
        _entrance.check_labels(model.labels, model.num_classes)
    return model


def of_stablehlo(
    path: str | os.PathLike[str],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    bounds: Bounds = (0.0, 1.0),
    name: str = "",
    batch_size: int = 250,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Model:
    """Makes a `Model` of a function that `jax.export` wrote as StableHLO, and the images to evaluate it on.

    One that was serialized with its gradient (`exported.serialize(vjp_order=1)`, as `experiments.export` does) takes every
    attack. One without its gradient takes Square: `model.auto([evaluation.STAGES[2]], eps=...)`. A function of batches of
    one size is called on as many as there are, the last one filled up.

    Args:
      path: the file, of a function of images `[N, ...]`, float32 inside `bounds`, to logits `[N, K]`.
      images: as of `of_function`.
      labels: as of `of_function`.
      bounds: as of `of_function`.
      name: its name in tables; empty for that of the file.
      batch_size: as of `of_function`.
      seed: as of `of_function`.
      mesh: as of `of_function`.

    Raises:
      DataError: if the file cannot be read, or holds no such function.
    """
    function = stablehlo(path)
    return of_function(
        function,
        images,
        labels,
        bounds=bounds,
        name=name or pathlib.Path(path).name,
        batch_size=batch_size,
        seed=seed,
        mesh=mesh,
    )


@contextlib.contextmanager
def _as_data_errors(name: str) -> Iterator[None]:
    """What is refused inside is refused as a `DataError` that names the model."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
