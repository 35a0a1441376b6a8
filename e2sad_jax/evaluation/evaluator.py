"""The evaluator: what a function predicts for each image under each attack.

Everything that attacks images in batches goes through here: suites, the worst case (`auto`), transfer, the checks for
gradient masking, the choice of checkpoints, comparisons.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import attacks, distributed
from e2sad_jax._compile import is_pure, jit
from e2sad_jax.evaluation.attack import CLEAN, Attack

Apply = Callable[[Any, jax.Array], jax.Array]  # (params, inputs [N, ...]) -> logits [N, K]
Transform = Callable[[jax.Array], jax.Array]  # images as stored [N, ...] -> inputs [N, ...]
Progress = Callable[[str, int], None]  # name of an attack, gradients since the last call
Visit = Callable[[Attack, np.ndarray, np.ndarray, np.ndarray], None]  # attack, places, inputs, whether they are right
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one attack did to each image.

    Attributes:
      correct: bool `[N]`, whether the prediction is right.
      prediction: int32 `[N]`, the predicted class; -1, which is never right, where a logit is NaN.
    """

    correct: np.ndarray
    prediction: np.ndarray

    @property
    def accuracy(self) -> float:
        """The fraction of images that are classified correctly."""
        return float(self.correct.mean())


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes(Mapping[str, Outcome]):
    """What each attack of a suite did to each image: a mapping from the attacks' names to `Outcome`s.

    Attributes:
      names: of the A attacks.
      correct: bool `[A, N]`, whether the prediction is right.
      prediction: int32 `[A, N]`, the predicted class; -1, which is never right, where a logit is NaN.
    """

    names: tuple[str, ...]
    correct: np.ndarray
    prediction: np.ndarray

    def __getitem__(self, name: str) -> Outcome:
        if name not in self.names:
            raise KeyError(name)
        row = self.names.index(name)
        return Outcome(self.correct[row], self.prediction[row])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def worst_case(self) -> np.ndarray:
        """Whether each image is classified correctly under every attack, bool `[N]`."""
        return np.all(self.correct, axis=0)


def evaluate(
    apply: Apply,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray,
    attacks: Sequence[Attack],
    *,
    transform: Transform | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 250,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    cascade: bool = False,
) -> Outcomes:
    """Runs each attack on every image and returns the predictions.

    Random numbers belong to an image's place in `images`. So the outcome of an image depends neither on `batch_size`, nor
    on the number of devices, the other attacks, or their order.

    An attack is compiled once for all budgets of the call. What is compiled is kept for later calls only if `apply` and
    `transform` are this library's own (`networks.apply_fn`, `data.transforms`). Of another function nobody knows whether
    it still computes the same.

    Args:
      apply: parameters and inputs `[N, ...]` to logits `[N, K]`.
      params: passed on to `apply`, a pytree of arrays.
      images: `[N, ...]`, before `transform`.
      labels: `[N]`, integers in `[0, K)`.
      attacks: what to run, as in `SUITES`.
      transform: from images as stored to what `apply` takes and attacks change. None: uint8 is divided by 255, floating
        point stays as it is.
      bounds: range of valid inputs.
      batch_size: images at once, at least 1. The last batch is filled up, and its padding left out of the result.
      seed: seed of the random numbers.
      mesh: devices to split batches over, if they divide them.
      progress: called with an attack's name and the number of gradients taken since the last call, summed over the images;
        with 0 when an attack begins. All calls sum to N times `attack.gradients(K)` of all attacks: gradients that need
        not be taken any more count as taken.
      cascade: whether later attacks leave out the images that have fallen. Then `correct` says of each attack whether the
        image withstood it and all before, and `prediction` of an image that has fallen is the wrong one.

    Returns:
      The `Outcomes`, `[A, N]`.

    Raises:
      ValueError: if the arguments do not fit together or an attack is not possible; before anything is attacked.
    """
    evaluation = Evaluation(
        programs_of(apply, transform, bounds), params, images, labels, batch_size, seed, mesh, progress
    )
    return evaluation.outcomes(attacks, cascade=cascade)


def predict(
    apply: Apply,
    params: Any,
    images: np.ndarray,
    *,
    transform: Transform | None = None,
    batch_size: int = 250,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Predicts the class of each image, int32 `[N]`, -1 where a logit is NaN; arguments as of `evaluate`."""
    labels = np.zeros(len(images), np.int32)
    return evaluate(
        apply, params, images, labels, [_CLEAN], transform=transform, batch_size=batch_size, mesh=mesh
    ).prediction[0]


def transfer(
    substitute: tuple[Apply, Any],
    targets: Sequence[tuple[Apply, Any]],
    images: np.ndarray,
    labels: np.ndarray,
    attack: Attack,
    *,
    transform: Transform | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 250,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Transfer attack: attacks a substitute and evaluates the targets on its images (Section 4.1.2, Table 2).

    Args:
      substitute: the function that the attack sees, `(apply, params)`.
      targets: the functions that are asked, `(apply, params)` each. The substitute may be among them: that is a white box.
      images: `[N, ...]`, before `transform`.
      labels: `[N]`, integers in `[0, K)`.
      attack: how the images are made.
      transform: as of `evaluate`, the same for all.
      bounds: range of valid inputs.
      batch_size: images at once.
      seed: seed of the random numbers.
      mesh: as of `evaluate`.
      progress: as of `evaluate`.

    Returns:
      An `Outcome` for each target, `[N]`.

    Raises:
      ValueError: as `evaluate`.
    """
    apply, params = substitute
    evaluation = Evaluation(
        programs_of(apply, transform, bounds), params, images, labels, batch_size, seed, mesh, progress
    )
    asked = [(programs_of(apply, None, bounds).attack(_CLEAN), _placed(params, mesh)) for apply, params in targets]

    def show(inputs: jax.Array, batch: Any) -> list[jax.Array]:
        return [ask(variables, inputs, *batch[1:], np.uint32(0), np.float32(0), 1)[1] for ask, variables in asked]

    predictions = np.zeros((len(asked), len(evaluation.images)), np.int32)
    evaluation.check([attack])
    for batch in evaluation.run(attack, np.arange(len(evaluation.images)), show):
        for row, shown in zip(predictions, batch.shown, strict=True):
            row[batch.places] = np.asarray(shown)[: len(batch.places)]
    return [Outcome(row == evaluation.labels, row) for row in predictions]


def in_batches(run: Callable[[np.ndarray], T], places: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, T]]:
    """Runs a program over images in batches of one size, and yields results one batch behind, so that no device waits.

    Args:
      run: places `[batch_size]` to what the program makes of the images there. It must not wait for the result.
      places: of the images, `[N]`.
      batch_size: images at once.

    Yields:
      The places of a batch and its result. The last batch is filled up with its own images: of a result only as many rows
      count as there are places.
    """
    behind = None
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        result = run(np.resize(some, batch_size))
        if behind is not None:
            yield behind
        behind = some, result
    if behind is not None:
        yield behind


class Programs:
    """The compiled programs of one function, each compiled when it is first asked for, and once for all budgets."""

    def __init__(self, apply: Apply, transform: Transform | None, bounds: tuple[float, float]):
        self.apply = apply
        self.transform = transform or _as_inputs
        self.bounds = bounds
        self._kept: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made at the first call with this key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[no-any-return]

    def attack(self, attack: Attack) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """The jitted `(params, images, labels, index, seed, eps, rank) -> (adversarial inputs, predicted classes)`."""
        alike = dataclasses.replace(attack, name="", eps=0.0, targets=1)  # what the program does not depend on
        return self.once((alike, attacks.ATTACKS.get(attack.kind)), lambda: self._attack(alike))

    def _attack(self, attack: Attack) -> Callable[..., tuple[jax.Array, jax.Array]]:
        @jit
        def run(
            params: Any,
            images: jax.Array,
            labels: jax.Array,
            index: jax.Array,
            seed: jax.Array,
            eps: jax.Array,
            rank: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            logits_fn = functools.partial(self.apply, params)
            with_budget: Attack = dataclasses.replace(attack, eps=eps)  # type: ignore[arg-type]  # traced
            inputs = with_budget.perturb(
                logits_fn, self.transform(images), labels, bounds=self.bounds, index=index, seed=seed, rank=rank
            )
            return inputs, _classes(logits_fn(inputs))

        return run  # type: ignore[no-any-return]

    def num_classes(self, params: Any, images: np.ndarray) -> int:
        """The number of classes K.

        Raises:
          ValueError: if the function does not return logits `[N, K]`.
        """

        def ask() -> int:
            shape = jax.eval_shape(lambda p, x: self.apply(p, self.transform(x)), params, images[:1]).shape
            if len(shape) != 2 or shape[0] != 1:
                raise ValueError(f"the model returns shape {shape} for 1 image; it must return logits (1, K)")
            return int(shape[1])

        shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(params))
        return self.once((shapes, images.shape[1:], images.dtype), ask)


def programs_of(apply: Apply, transform: Transform | None, bounds: tuple[float, float]) -> Programs:
    """The programs of a function: new ones, or, of functions marked as pure, those of earlier calls."""
    bounds = (float(bounds[0]), float(bounds[1]))
    if is_pure(apply) and (transform is None or is_pure(transform)):
        return _kept_programs(apply, transform, bounds)
    return Programs(apply, transform, bounds)


_kept_programs = functools.lru_cache(maxsize=16)(Programs)


class Batch(NamedTuple):
    """An attacked batch.

    Attributes:
      places: of its images, `[B]`.
      prediction: int32 `[B]`.
      inputs: adversarial inputs `[>= B, ...]`; what is beyond B is padding.
      shown: what `show` made of them.
    """

    places: np.ndarray
    prediction: np.ndarray
    inputs: jax.Array
    shown: Any


class Evaluation:
    """One function, images with their labels, and how they are cut into batches: `evaluate`, step by step."""

    def __init__(
        self,
        programs: Programs,
        params: Any,
        images: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        mesh: Mesh | None = None,
        progress: Progress | None = None,
    ):
        self.images, self.labels = np.asarray(images), np.asarray(labels)
        n = len(self.images)
        if n == 0 or self.labels.shape != (n,) or not np.issubdtype(self.labels.dtype, np.integer):
            raise ValueError(
                f"labels {self.labels.shape} {self.labels.dtype} must be one integer for each of {n} images, of which "
                "there must be some"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it must be at least 1")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed}; it must be in [0, {2**32 - 1}]")
        self.num_classes = programs.num_classes(params, self.images)
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise ValueError(
                f"labels reach from {self.labels.min()} to {self.labels.max()}; the model has {self.num_classes} classes"
            )
        self.programs, self.params = programs, _placed(params, mesh)
        self.batch_size, self.seed, self.mesh = min(batch_size, n), seed, mesh
        self.progress: Progress = progress or (lambda name, gradients: None)

    def check(self, attacks: Sequence[Attack]) -> None:
        """Raises an error if an attack cannot run, or two have the same name.

        Raises:
          ValueError: if there is one.
        """
        for attack in attacks:
            attack.check(self.num_classes, self.images.ndim)
        names = [attack.name for attack in attacks]
        if len(set(names)) < len(names):
            raise ValueError(f"attacks are named {', '.join(names)}; each needs a name of its own")

    def outcomes(self, attacks: Sequence[Attack], *, cascade: bool = False, visit: Visit | None = None) -> Outcomes:
        """`evaluate`; `visit`, if given, is called with the adversarial inputs of each batch."""
        self.check(attacks)
        n = len(self.images)
        correct, prediction = np.zeros((len(attacks), n), bool), np.zeros((len(attacks), n), np.int32)
        places = np.arange(n)
        for row, attack in enumerate(attacks):
            if cascade and row:
                places, prediction[row] = np.flatnonzero(correct[row - 1]), prediction[row - 1]
            for batch in self.run(attack, places):
                prediction[row, batch.places] = batch.prediction
                if visit is not None:
                    right = batch.prediction == self.labels[batch.places]
                    visit(attack, batch.places, np.asarray(batch.inputs)[: len(batch.places)], right)
            correct[row] = prediction[row] == self.labels
        return Outcomes(tuple(attack.name for attack in attacks), correct, prediction)

    def run(
        self, attack: Attack, places: np.ndarray, show: Callable[[jax.Array, Any], Any] | None = None
    ) -> Iterator[Batch]:
        """Attacks the images with the indices `places`, batch by batch.

        A targeted attack goes over them once for each wrong class. An image that fools the model is left out from then on,
        so of each image the last batch that has it counts.

        Args:
          attack: the attack.
          places: of the images, `[B]`.
          show: called with adversarial inputs and their `(images, labels, places)` while they are on the device; what it
            returns, without waiting, is in `Batch.shown`.
        """
        ranks = attack.ranks(self.num_classes)
        of_rank = attack.gradients(self.num_classes) // len(ranks)
        fallen_before = len(self.images) - len(places)
        self.progress(attack.name, fallen_before * of_rank * len(ranks))
        program = self.programs.attack(attack)
        for rank in ranks:

            def dispatch(full: np.ndarray, rank: int = rank) -> tuple[jax.Array, jax.Array, Any]:
                batch = distributed.split_batch(self.mesh, (self.images[full], self.labels[full], full))
                seed, eps = np.uint32(self.seed), np.float32(attack.eps)
                inputs, prediction = program(self.params, *batch, seed, eps, np.int32(rank))
                return inputs, prediction, None if show is None else show(inputs, batch)

            left = []
            for some, (inputs, predicted, shown) in in_batches(dispatch, places, self.batch_size):
                prediction = np.asarray(predicted)[: len(some)]
                right = prediction == self.labels[some]
                yield Batch(some, prediction, inputs, shown)
                left.append(some[right])
                done_with = len(some) + (len(ranks) - rank) * int((~right).sum())
                self.progress(attack.name, done_with * of_rank)
            places = np.concatenate([places[:0], *left])


_CLEAN = Attack("clean", CLEAN)


def _classes(logits: jax.Array) -> jax.Array:
    """The predicted classes, int32 `[N]`; -1, which is never right, where a logit is NaN."""
    return jnp.where(jnp.isnan(logits).any(-1), -1, logits.argmax(-1)).astype(jnp.int32)


def _as_inputs(images: jax.Array) -> jax.Array:
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; they must be uint8 or floating point, or need a transform")
    return images


def _placed(params: Any, mesh: Mesh | None) -> Any:
    """Parameters bound to the devices that they lie on, or to all of the mesh: else one program is compiled for either."""
    if mesh is not None:
        return distributed.replicate(mesh, params)
    arrays = jax.device_put(params)
    return jax.tree.map(lambda a: jax.device_put(a, a.sharding), arrays)
