"""The compiled programs of a model, and how images are put through them in batches."""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import _arguments, _streams, attacks, distributed
from e2sad_jax._compile import is_pure, jit
from e2sad_jax.attacks import core
from e2sad_jax.attacks.adaptive import draw
from e2sad_jax.evaluation import _entrance
from e2sad_jax.evaluation._entrance import Apply, Bounds, Detector, Transform
from e2sad_jax.evaluation.attack import Attack
from e2sad_jax.losses import margin

T = TypeVar("T")


def in_batches(
    run: Callable[[np.ndarray], T],
    places: np.ndarray,
    batch_size: int,
    size_of: Callable[[int], int] | None = None,
) -> Iterator[tuple[np.ndarray, T]]:
    """Runs a program over images in batches, and yields results one batch behind, so that no device waits.

    Args:
      run: places `[batch_size]`, or as many as `size_of` says, to what the program makes of the images there. It must not
        wait for the result.
      places: of the images, `[N]`.
      batch_size: images at once.
      size_of: from the number of images in a batch to the size that it is filled up to; None for `batch_size`.

    Yields:
      The places of a batch and its result. The last batch is filled up with its own images: of a result only as many rows
      count as there are places.
    """
    behind = None
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        result = run(np.resize(some, batch_size if size_of is None else size_of(len(some))))
        if behind is not None:
            yield behind
        behind = some, result
    if behind is not None:
        yield behind


class _Same:
    """A key of a dictionary that equals itself alone; what it holds needs no hash."""

    def __init__(self, held: Any):
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


class Programs:
    """The compiled programs of one function, each compiled when it is first asked for, and once for all budgets.

    Attributes:
      apply: the model as attacks see it, `(params, inputs) -> logits`.
      verdict: as it is judged: a random model by draws that no attack has seen, any other as `apply`.
      detector: of a model that rejects images, or None.
      random: number of draws of a random model and their seed; zeros of any other.
    """

    def __init__(
        self,
        apply: Apply,
        transform: Transform | None,
        bounds: Bounds | None,
        detector: Detector | None = None,
        draws: int = 0,
        seed: int = 0,
    ):
        self.apply = self.verdict = apply
        self.random = draws, seed if draws else 0
        if draws:
            self.apply, self.verdict = (
                functools.partial(_mean_prediction, apply, draws, seed, stream)
                for stream in (_streams.DRAWS, _streams.VERDICT)
            )
        self.detector = detector
        self.own_transform = transform is not None
        self.known_inside = transform is not None and is_pure(transform)  # the library's own keep their range
        self.transform: Transform = transform or _as_inputs
        self.checked = bounds is not None
        self.bounds: Bounds = bounds or (-np.inf, np.inf)
        self._kept: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made at the first call with this key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[no-any-return]

    def rejected(self, params: Any, x: jax.Array) -> jax.Array:
        """Whether the detector rejects each input, bool `[N]`. It does not reject one whose score is NaN."""
        if self.detector is None:
            return jnp.zeros(len(x), bool)
        score = core.per_image("detector", functools.partial(self.detector.score_fn, params), x)
        return core.as_float32(score) > self.detector.threshold  # not rounded to the score's own dtype

    def constraint(self, params: Any) -> core.LossFn | None:
        """A function of inputs that is above 0 where the detector rejects them, in units of a loss."""
        detector = self.detector
        if detector is None:
            return None

        def constraint(x: jax.Array) -> jax.Array:
            score = core.checks.score("detector", detector.score_fn(params, x))
            return detector.weight * (core.as_float32(score) - detector.threshold)

        return constraint

    def attack(self, attack: Attack) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
        """The jitted `(params, images, labels, index, seed, eps, rank) -> (adversarial inputs, classes, rejected, leads)`.

        A lead is that of the label over the best other class, in logits.
        """
        return self.once(_key(attack), lambda: self._attack(_alike(attack)))

    def sizes(self, attack: Attack) -> set[int]:
        """The sizes of small batches that the program of `attack` has been compiled for."""
        return self.once(("sizes", _key(attack)), set[int])

    def _attack(self, attack: Attack) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
        @jit
        def run(
            params: Any,
            images: jax.Array,
            labels: jax.Array,
            index: jax.Array,
            seed: jax.Array,
            eps: jax.Array,
            rank: jax.Array,
        ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            logits_fn = functools.partial(self.apply, params)
            with_budget = attack if attack.norm == "l0" else dataclasses.replace(attack, eps=eps)  # type: ignore[arg-type]
            inputs = with_budget.perturb(
                logits_fn,
                self.transform(images),
                labels,
                bounds=self.bounds,
                index=index,
                seed=seed,
                rank=rank,
                constraint_fn=self.constraint(params),
            )
            logits = self.verdict(params, inputs)
            return inputs, _classes(logits), self.rejected(params, inputs), -margin(logits, labels)

        return run  # type: ignore[no-any-return]

    def shapes(self, params: Any, images: np.ndarray) -> tuple[jax.ShapeDtypeStruct, int]:
        """Shape and dtype of two inputs, and the number of classes K.

        Raises:
          ValueError: if the function does not return logits `[N, K]` of such images.
        """

        def ask() -> tuple[jax.ShapeDtypeStruct, int]:
            inputs = _entrance.shape_of_inputs(self.transform, images)
            return inputs, _entrance.classes_of(self.apply, params, inputs)

        leaves, tree = jax.tree.flatten(params)
        shapes = tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)
        return self.once(("shapes", tree, shapes, images.shape[1:], images.dtype), ask)

    def check_inputs(self, images: np.ndarray, batch_size: int) -> None:
        """Refuses images that are outside of the bounds behind the transform.

        Raises:
          ValueError: if there are some.
        """
        if not self.own_transform:
            _entrance.check_inputs(images, self.bounds)
        elif not self.known_inside:
            shape = _entrance.shape_of_inputs(self.transform, images).shape[1:]
            low, high = (bound if np.ndim(bound) == 0 else np.broadcast_to(bound, shape)[None] for bound in self.bounds)

            @jit
            def outside(images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                inputs = core.as_float32(self.transform(images))
                return _entrance.outside_of(inputs, low, high), inputs.min(), inputs.max()

            batches = in_batches(lambda some: outside(jax.device_put(images[some])), np.arange(len(images)), batch_size)
            parts = [(len(places), jax.device_get(result)) for places, result in batches]
            if count := sum(int(found[:n].sum()) for n, (found, _, _) in parts):
                lowest, highest = min(low for _, (_, low, _) in parts), max(high for _, (_, _, high) in parts)
                _entrance.refuse_outside(count, len(images), float(lowest), float(highest), self.bounds)


def _alike(attack: Attack) -> Attack:
    """Without what its program does not depend on; a number of pixels may be a shape in it."""
    return dataclasses.replace(attack, name="", eps=attack.eps if attack.norm == "l0" else 0.0, targets=1)


def _key(attack: Attack) -> Hashable:
    return _alike(attack), _Same(attacks.ATTACKS.get(attack.kind))


def programs_of(
    apply: Apply,
    transform: Transform | None,
    bounds: Bounds | None,
    *,
    params: Any = None,
    detector: Detector | None = None,
    draws: int = 0,
    seed: int = 0,
) -> Programs:
    """The programs of a function: new ones, or, of functions marked as pure, those of earlier calls.

    Args:
      apply: the function, as `_entrance.bind` returns it.
      transform: from images as stored to inputs, or None.
      bounds: range of valid inputs, as `_entrance.as_bounds` returns it; None for any, for what attacks nothing.
      params: of the model, before `_entrance.bind`; the detector's score is a function of them.
      detector: of a model that rejects images.
      draws: number of draws of a random model; 0 of any other.
      seed: of the draws.

    Raises:
      ValueError: if `draws` is no whole number, at least 0.
    """
    _arguments.count("draws", draws, least=0)
    if detector is not None:
        detector = dataclasses.replace(detector, score_fn=_entrance.bind(detector.score_fn, params).apply)
    if detector is not None or draws:
        return Programs(apply, transform, bounds, detector, draws, seed)
    hashable = bounds is None or all(isinstance(bound, float) for bound in bounds)  # arrays are not
    if hashable and is_pure(apply) and (transform is None or is_pure(transform)):
        return _kept_programs(apply, transform, bounds)
    return Programs(apply, transform, bounds)


_kept_programs = functools.lru_cache(maxsize=16)(Programs)


def _mean_prediction(apply: Apply, draws: int, seed: int, stream: int, params: Any, x: jax.Array) -> jax.Array:
    """Logits `[N, K]` of a random model's mean probabilities; the draws for an image depend on it, seed and stream alone."""

    def of_keys(keys: jax.Array, x: jax.Array) -> jax.Array:
        logits = jax.vmap(lambda key, image: apply(params, image[None], key)[0])(keys, x)
        return jax.nn.log_softmax(core.as_float32(logits))

    return jax.nn.logsumexp(draw(_streams.key(seed, stream), of_keys, x, draws), axis=0) - math.log(draws)


def _classes(logits: jax.Array) -> jax.Array:
    """The predicted classes, int32 `[N]`; -1, which is never right, where a logit is NaN."""
    return jnp.where(jnp.isnan(logits).any(-1), -1, logits.argmax(-1)).astype(jnp.int32)


def _as_inputs(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def placed(params: Any, mesh: Mesh | None) -> Any:
    """Parameters bound to the devices that they lie on, or to all of the mesh: else one program is compiled for either."""
    if mesh is not None:
        return distributed.replicate(mesh, params)
    arrays = jax.device_put(params)
    return jax.tree.map(lambda a: jax.device_put(a, a.sharding), arrays)
