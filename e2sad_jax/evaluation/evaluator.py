"""The evaluator: what a function predicts for each image under each attack.

Everything that attacks images in batches goes through here: suites, the worst case (`auto`), transfer, the checks for
gradient masking, the choice of checkpoints, comparisons.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import _arguments, distributed, losses
from e2sad_jax._compile import jit, platform
from e2sad_jax.evaluation import _entrance
from e2sad_jax.evaluation._entrance import Apply, Bounds, Detector, Transform
from e2sad_jax.evaluation.attack import CLEAN, Attack
from e2sad_jax.evaluation.finished import Finished, Judged, Key, question
from e2sad_jax.evaluation.near import Near
from e2sad_jax.evaluation.programs import Programs, in_batches, placed, programs_of

Progress = Callable[[str, int], None]  # what is done, an attack's name first; gradients since the last call
WORTH = 100  # gradients of a whole batch that a program for a smaller one has to save
BEFORE = "finished before"  # instead of the name, for what an earlier call has taken
Visit = Callable[[Attack, np.ndarray, np.ndarray, np.ndarray], None]  # attack, places, inputs, which of them withstood


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one attack did to each image.

    Attributes:
      correct: bool `[N]`, whether the prediction is right. Of a model that rejects images: without attack, whether it is right
        and the image accepted; under attack, whether it is right or the image rejected.
      prediction: int32 `[N]`, the predicted class; -1, which is never right, where a logit is NaN.
      rejected: bool `[N]`, whether the model rejects the image; None for a model that rejects none.
    """

    correct: np.ndarray
    prediction: np.ndarray
    rejected: np.ndarray | None = None

    @property
    def accuracy(self) -> float:
        """The fraction of images that are `correct`."""
        return float(self.correct.mean())

    @property
    def withstood(self) -> np.ndarray:
        """Whether each image is classified correctly or rejected, bool `[N]`."""
        return self.correct if self.rejected is None else self.correct | self.rejected

    @property
    def nan(self) -> int:
        """The number of images whose logits hold NaN; they count as misclassified."""
        return int((self.prediction == -1).sum())


def nan_logits(counts: Mapping[str, int], images: int) -> str:
    """Says how many images have NaN logits, and under what; empty if none has.

    Args:
      counts: by the names of attacks, "clean" among them: the number of images whose logits hold NaN.
      images: the number of images.
    """
    clean, attack = counts.get(CLEAN, 0), max(counts, key=lambda name: counts[name], default=CLEAN)
    found = [f"{clean:,} of {images:,} images have NaN logits"] if clean else []
    if counts.get(attack, 0) > clean:
        found.append(f"{counts[attack]:,} of {images:,} images have NaN logits under {attack}")
    return f"{', '.join(found)}: they count as misclassified" if found else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes(Mapping[str, Outcome]):
    """What each attack of a suite did to each image: a mapping from the attacks' names to `Outcome`s.

    Attributes:
      names: of the A attacks.
      correct: bool `[A, N]`, as of `Outcome`.
      prediction: int32 `[A, N]`, the predicted class; -1, which is never right, where a logit is NaN.
      rejected: bool `[A, N]`, whether the model rejects the image; None for a model that rejects none.
    """

    names: tuple[str, ...]
    correct: np.ndarray
    prediction: np.ndarray
    rejected: np.ndarray | None = None

    def __getitem__(self, name: str) -> Outcome:
        if name not in self.names:
            raise KeyError(name)
        row = self.names.index(name)
        rejected = None if self.rejected is None else self.rejected[row]
        return Outcome(self.correct[row], self.prediction[row], rejected)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def worst_case(self) -> np.ndarray:
        """Whether each image is classified correctly, or rejected, under every attack, bool `[N]`."""
        return np.all([outcome.withstood for outcome in self.values()], axis=0)


def evaluate(
    apply: Apply,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray,
    attacks: Sequence[Attack],
    *,
    transform: Transform | None = None,
    bounds: Bounds = (0.0, 1.0),
    batch_size: int = 250,
    seed: int = 0,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    cascade: bool = False,
    detector: Detector | None = None,
    draws: int = 0,
    resume: str | os.PathLike[str] | None = None,
) -> Outcomes:
    """Runs each attack on every image and returns the predictions.

    Random numbers belong to an image's place in `images`. So the outcome of an image depends neither on `batch_size`, nor
    on the number of devices, the other attacks, or their order.

    An attack is compiled once for all budgets of the call, and on the CPU perhaps again for a small batch. What is compiled
    is kept for later calls only if `apply` and `transform` are this library's own (`networks.apply_fn`, `data.transforms`).
    Of another function nobody knows whether it still computes the same.

    Args:
      apply: parameters and inputs `[N, ...]` to logits `[N, K]`, K at least 2. It needs no hash.
      params: passed on to `apply`: a pytree. Its arrays are traced, other leaves stay as they are.
      images: `[N, ...]`, before `transform`; NumPy's or JAX's, or a list. float64 becomes float32 unless JAX computes in 64
        bits.
      labels: `[N]`, integers of any type in `[0, K)`.
      attacks: what to run, as in `SUITES`.
      transform: from images as stored to what `apply` takes and attacks change. None: uint8 is divided by 255, floating
        point stays as it is.
      bounds: range of valid inputs: two numbers, or arrays that broadcast against one image. All inputs lie inside.
      batch_size: images at once, at least 1. The last batch is filled up, and its padding left out of the result. On the CPU
        a last batch of few images may be filled up to fewer, where that saves more time than another program takes.
      seed: seed of the random numbers.
      mesh: devices to split batches over, if they divide them.
      progress: called with an attack's name and the number of gradients taken since the last call, summed over the images;
        with 0 when an attack begins, and with "finished before" instead of the name for a batch of `resume`. With `cascade`
        the robust accuracy so far follows the name in parentheses. All calls sum to N times `attack.gradients(K)` of all
        attacks: gradients that need not be taken any more count as taken.
      cascade: whether later attacks leave out the images that have fallen. Then `correct` says of each attack whether the
        image withstood it and all before, and `prediction` of an image that has fallen is the wrong one.
      detector: of a model that rejects images. Attacks evade it, and an image falls only if one and the same image is
        misclassified and not rejected.
      draws: for a random model, `apply(params, inputs, key)`: its prediction is the mean of the probabilities of so many
        draws. Attacks average over as many at each step, and the verdict takes others, which no attack has seen. The draws
        for an image depend on `seed` and on the image alone. 0 for any other model.
      resume: folder in which finished batches are kept. A call that was killed goes on from there if it is made again; so
        does one with more attacks, or other budgets. A batch counts again only for the same images, labels, parameters, clean
        logits, gradients of the first batch, seed, attack, and versions of JAX and of this library. A batch takes the space
        of its adversarial inputs, with `cascade` of those that fool the model. Delete the folder when all is done.

    Returns:
      The `Outcomes`, `[A, N]`.

    Raises:
      ValueError: if the arguments do not fit together or an attack is not possible; before anything is attacked.
    """
    bound = _entrance.bind(apply, params)
    limits, random = _entrance.as_bounds(bounds), {"draws": draws, "seed": seed}
    programs = programs_of(bound.apply, transform, limits, params=params, detector=detector, **random)
    finished = None if resume is None else Finished(resume)
    evaluation = Evaluation(programs, bound.arrays, images, labels, batch_size, seed, mesh, progress, finished)
    return evaluation.outcomes(attacks, cascade=cascade)


def predict(
    apply: Apply,
    params: Any,
    images: np.ndarray,
    *,
    transform: Transform | None = None,
    bounds: Bounds | None = None,
    batch_size: int = 250,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Predicts the class of each image, int32 `[N]`, -1 where a logit is NaN.

    Arguments are those of `evaluate`; without `bounds` the images may have any range.
    """
    apply, params = _entrance.bind(apply, params)
    programs = programs_of(apply, transform, None if bounds is None else _entrance.as_bounds(bounds))
    images = _entrance.as_images(images, stored=transform is not None)
    labels = np.zeros(len(images), np.int32)
    return Evaluation(programs, params, images, labels, batch_size, 0, mesh).outcomes([_CLEAN]).prediction[0]


def transfer(
    substitute: tuple[Apply, Any],
    targets: Sequence[tuple[Apply, Any]],
    images: np.ndarray,
    labels: np.ndarray,
    attack: Attack,
    *,
    transform: Transform | None = None,
    bounds: Bounds = (0.0, 1.0),
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
      bounds: range of valid inputs, as of `evaluate`.
      batch_size: images at once.
      seed: seed of the random numbers.
      mesh: as of `evaluate`.
      progress: as of `evaluate`.

    Returns:
      An `Outcome` for each target, `[N]`.

    Raises:
      ValueError: as `evaluate`.
    """
    apply, params = _entrance.bind(*substitute)
    bounds = _entrance.as_bounds(bounds)
    programs = programs_of(apply, transform, bounds)
    evaluation = Evaluation(programs, params, images, labels, batch_size, seed, mesh, progress)
    evaluation.check([attack])
    asked = []
    for target in targets:
        apply, params = _entrance.bind(*target)
        classes = _entrance.classes_of(apply, params, evaluation.inputs)
        _entrance.check_labels(evaluation.labels, classes)
        asked.append((programs_of(apply, None, bounds).attack(_CLEAN), placed(params, mesh)))
    zeros = jax.device_put((np.uint32(0), np.float32(0), np.int32(1)))  # seed, eps and rank: a clean pass reads none

    def show(inputs: jax.Array, batch: Any) -> list[jax.Array]:
        return [ask(variables, inputs, *batch[1:], *zeros)[1] for ask, variables in asked]

    predictions = np.zeros((len(asked), len(evaluation.images)), np.int32)
    for batch in evaluation.run(attack, np.arange(len(evaluation.images)), show):
        for row, shown in zip(predictions, batch.shown, strict=True):
            row[batch.places] = jax.device_get(shown)[: len(batch.places)]
    return [Outcome(row == evaluation.labels, row) for row in predictions]


class Batch(NamedTuple):
    """An attacked batch.

    Attributes:
      places: of its images, `[B]`.
      prediction: int32 `[B]`.
      rejected: bool `[B]`.
      lead: `[B]`, of the label over the best other class, in logits.
      inputs: adversarial inputs `[>= B, ...]`; what is beyond B is padding.
      shown: what `show` made of them.
    """

    places: np.ndarray
    prediction: np.ndarray
    rejected: np.ndarray
    lead: np.ndarray
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
        finished: Finished | None = None,
        first: int = 0,
    ):
        """Checks the arguments, which are those of `evaluate`; `first` is the place of the first image in the data set."""
        self.images = _entrance.as_images(images, stored=programs.own_transform)
        n = len(self.images)
        self.labels = _entrance.as_labels(labels, n)
        self.batch_size = min(_arguments.count("batch_size", batch_size), n)
        self.seed = _arguments.count("seed", seed, least=0, most=2**32 - 1)
        self.inputs, self.num_classes = programs.shapes(params, self.images)
        _entrance.check_labels(self.labels, self.num_classes)
        _entrance.check_bounds_fit(self.inputs.shape[1:], programs.bounds)
        if programs.checked:
            programs.check_inputs(self.images, self.batch_size)
        self.programs, self.params, self.mesh = programs, placed(params, mesh), mesh
        self.progress: Progress = progress or (lambda name, gradients: None)
        self.finished, self.first = finished, first
        self.passes: dict[str, int] = {}  # by attack: how often the model was asked about an image

    def check(self, attacks: Sequence[Attack]) -> None:
        """Raises an error if an attack cannot run, or two have the same name.

        Raises:
          ValueError: if there is one.
        """
        if not attacks:
            raise ValueError("attacks is empty; it must hold at least one evaluation.Attack")
        for attack in attacks:
            attack.check(self.num_classes, self.images.ndim)
        names = [attack.name for attack in attacks]
        if len(set(names)) < len(names):
            raise ValueError(f"attacks are named {', '.join(names)}; each needs a name of its own")

    def outcomes(
        self,
        attacks: Sequence[Attack],
        *,
        cascade: bool = False,
        visit: Visit | None = None,
        near: Near | None = None,
    ) -> Outcomes:
        """`evaluate`.

        Args:
          attacks: what to run.
          cascade: as of `evaluate`.
          visit: called with the adversarial inputs of each batch; None for nothing.
          near: of a cascade that begins with "clean", which images its later attacks leave out; None for those that fell.
        """
        attacks = list(attacks)
        self.check(attacks)
        n = len(self.images)
        correct, prediction = np.zeros((len(attacks), n), bool), np.zeros((len(attacks), n), np.int32)
        rejected = np.zeros((len(attacks), n), bool)

        def standing() -> np.ndarray:
            return (prediction[-1] == self.labels) | rejected[-1]

        def take(row: int, places: np.ndarray, again: bool = False) -> None:
            attack, later = attacks[row], slice(row, None if cascade else row + 1)
            kept = "none" if visit is None else "fallen" if cascade and attack.kind != CLEAN else "all"
            others = int(standing().sum()) - len(places) if cascade and row else None
            for batch in self.run(attack, places, keep=kept, others=others, again=again):
                prediction[later, batch.places], rejected[later, batch.places] = batch.prediction, batch.rejected
                if near is not None:
                    near.look(attack, batch.places, batch.lead)
                if visit is not None:
                    withstood = (batch.prediction == self.labels[batch.places]) | batch.rejected
                    visit(attack, batch.places, jax.device_get(batch.inputs)[: len(batch.places)], withstood)

        for row in range(len(attacks)):
            if not cascade or not row:
                take(row, np.arange(n))
                continue
            chosen = standing()
            if near is not None:
                chosen &= ~near.left_out(row, chosen)
            take(row, np.flatnonzero(chosen))
            if near is not None and near.refuted(row, standing()):
                for earlier in range(2, row + 1):
                    take(earlier, np.flatnonzero(near.missed(earlier) & standing()), again=True)
        for row, attack in enumerate(attacks):
            right = prediction[row] == self.labels
            correct[row] = right & ~rejected[row] if attack.kind == CLEAN else right | rejected[row]
        names = tuple(attack.name for attack in attacks)
        return Outcomes(names, correct, prediction, None if self.programs.detector is None else rejected)

    def run(
        self,
        attack: Attack,
        places: np.ndarray,
        show: Callable[[jax.Array, Any], Any] | None = None,
        *,
        keep: str = "all",
        others: int | None = None,
        again: bool = False,
    ) -> Iterator[Batch]:
        """Attacks the images with the indices `places`, batch by batch.

        A targeted attack goes over them once for each wrong class. An image that fools the model is left out from then on,
        so of each image the last batch that has it counts.

        Args:
          attack: the attack.
          places: of the images, `[B]`.
          show: called with adversarial inputs and their `(images, labels, places)` while they are on the device; what it
            returns, without waiting, is in `Batch.shown`. No batch that was finished before counts then.
          keep: the images whose inputs are needed: "all", "fallen" or "none".
          others: of a cascade, the number of images that stand and are not among `places`: the progress names the share of all
            images that stand. None for no cascade.
          again: whether the progress has counted this attack before.
        """
        ranks = attack.ranks(self.num_classes)
        of_rank = attack.gradients(self.num_classes) // len(ranks)
        n, standing, counted = len(self.images), len(places) + (others or 0), 0 if again else of_rank

        def name() -> str:
            return attack.name if others is None else f"{attack.name} ({standing / n:.3f} robust so far)"

        self.progress(name(), (n - len(places)) * counted * len(ranks))
        program = self.programs.attack(attack)
        wide = np.float64 if self.inputs.dtype == np.float64 else np.float32
        finished = None if show is not None or attack.kind == CLEAN else self.finished
        draws = max(1, self.programs.random[0])
        for rank in ranks:
            size_of = functools.partial(self._size, attack, draws * of_rank * (len(ranks) + 1 - rank))

            def key(some: np.ndarray, rank: int = rank) -> Key:
                return Key(self._question, attack, self.seed, rank, some + self.first)

            def needed(some: np.ndarray, judged: Judged) -> np.ndarray:
                fallen = (judged.prediction != self.labels[some]) & ~judged.rejected
                return fallen if keep == "fallen" else np.full(len(some), keep == "all")

            def dispatch(full: np.ndarray, rank: int = rank) -> Any:
                if finished is not None:
                    some = full[: len(np.unique(full))]  # what is filled up repeats itself
                    before = finished.read(key(some, rank), functools.partial(needed, some))
                    if before is not None:
                        return *before, BEFORE
                batch = distributed.split_batch(
                    self.mesh, (self.images[full], self.labels[full], np.int32(full + self.first))
                )
                numbers = np.uint32(self.seed), np.asarray(attack.eps, wide), np.int32(rank)
                made = program(self.params, *batch, *jax.device_put(numbers))
                return *made, None if show is None else show(made[0], batch)

            left = []
            for some, (inputs, *judged, shown) in in_batches(dispatch, places, self.batch_size, size_of):
                judged = jax.device_get(judged)
                if finished is not None and shown is not BEFORE:
                    nothing = np.broadcast_to(np.zeros((), inputs.dtype), inputs.shape)
                    inputs = nothing if keep == "none" else jax.device_get(inputs)
                    whole = Judged(*(column[: len(some)] for column in (inputs, *judged)))
                    finished.write(key(some), whole, needed(some, whole))
                prediction, rejected, lead = (column[: len(some)] for column in judged)
                withstood = (prediction == self.labels[some]) | rejected
                yield Batch(some, prediction, rejected, lead, inputs, shown)
                left.append(some[withstood])
                self.passes[attack.name] = self.passes.get(attack.name, 0) + len(some) * attack.passes * draws
                standing -= (fallen := int((~withstood).sum()))
                done_with = len(some) + (len(ranks) - rank) * fallen
                self.progress(BEFORE if shown is BEFORE else name(), done_with * counted)
            places = np.concatenate([places[:0], *left])

    def _size(self, attack: Attack, gradients: int, images: int) -> int:
        """What a batch of so few images is filled up to: on the CPU, where padding takes as long as images, not all of a batch.

        Args:
          attack: whose program it is.
          gradients: that the attack is still to take of each image.
          images: in the batch.
        """
        if self.mesh is not None or platform() != "cpu":
            return self.batch_size
        sizes, size = self.programs.sizes(attack), self.batch_size
        least = min((one for one in sizes if images <= one < self.batch_size), default=self.batch_size)
        while images <= size // 2:
            size //= 2
        if gradients * (least - size) < WORTH * self.batch_size:
            return least
        sizes.add(size)
        return size

    @functools.cached_property
    def _question(self) -> str:
        """A digest of what the outcomes depend on beside the attack.

        A function cannot be compared. Its logits of the clean images, its detector's scores and one gradient stand for it.
        """
        programs, n = self.programs, len(self.images)

        def outputs(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
            inputs = programs.transform(images)
            scores = () if programs.detector is None else (programs.detector.score_fn(params, inputs),)
            return programs.verdict(params, inputs), *scores

        program = programs.once("outputs", lambda: jit(outputs))
        run = in_batches(lambda full: program(self.params, self.images[full]), np.arange(n), self.batch_size)
        clean = [np.concatenate(c) for c in zip(*(jax.device_get(made) for _, made in run), strict=True)]
        of_params = {f"parameter {i}": leaf for i, leaf in enumerate(jax.tree.leaves(self.params))}
        low, high = programs.bounds
        arrays = {"images": self.images, "labels": self.labels, "low": low, "high": high, **of_params}
        arrays |= {f"output {i}": column for i, column in enumerate(clean)}
        arrays["gradient"] = self._gradient()
        detector = programs.detector and (programs.detector.threshold, programs.detector.weight)
        return question(arrays, f"{detector}, {programs.random}")

    def _gradient(self) -> np.ndarray:
        """The gradient of the margin at the first batch; empty where the function has none.

        It tells functions apart that have equal logits, as with and without `attacks.bpda` around their rounding.
        """
        programs, full = self.programs, np.resize(np.arange(len(self.images)), self.batch_size)

        def gradient(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
            return jax.grad(lambda x: losses.margin(programs.apply(params, x), labels).sum())(
                programs.transform(images)
            )

        try:
            program = programs.once("gradient", lambda: jit(gradient))
            return np.asarray(program(self.params, self.images[full], self.labels[full]))
        except jax.errors.JaxRuntimeError:  # of the device
            raise
        except Exception:  # whatever a function raises that has no gradient
            return np.zeros(0, np.float32)


_CLEAN = Attack("clean", CLEAN)
