"""One training step as it is timed: compiled, warm, its data on the device; and the rounds in which steps take turns."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from e2sad_jax import distributed, networks, training
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.training.config import Config

IMAGES = 1024  # to take batches from

Timer = Callable[[], float]  # seconds of one step
K = TypeVar("K")


class Data(NamedTuple):
    """A training set of random pixels, on the host.

    Attributes:
      images: uint8 `[n, H, W, C]`.
      labels: int32 `[n]`.
      order: where batches are cut from, int32 `[2n]`: two permutations end to end, as `training.epoch_order`'s.
    """

    images: np.ndarray
    labels: np.ndarray
    order: np.ndarray

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        """The rows of a step's batch, `[batch_size]`: those that `training.make_train_step` takes."""
        offset = step * batch_size % len(self.images)
        return self.order[offset : offset + batch_size]


def data(image_shape: tuple[int, ...], num_classes: int, batch_size: int) -> Data:
    """The same images, labels and order for the same arguments: whoever is compared sees the same batches."""
    rng = np.random.default_rng(0)
    n = max(IMAGES, batch_size)
    order = np.concatenate([rng.permutation(n), rng.permutation(n)]).astype(np.int32)
    return Data(rng.integers(0, 256, (n, *image_shape), np.uint8), rng.integers(0, num_classes, n, np.int32), order)


class Step:
    """A compiled training step with its state and its data on the device.

    Attributes:
      config: the run's settings.
      at_once: steps in a dispatch.
      compiled: the program.
      compile_seconds: what tracing and compiling took, without the persistent cache.
    """

    def __init__(
        self,
        config: Config,
        image_shape: tuple[int, ...],
        num_classes: int,
        *,
        runs: int | None = None,
        steps_per_dispatch: int = 0,
    ):
        """Builds the step; nothing is run.

        Args:
          config: the run's settings.
          image_shape: (H, W, C).
          num_classes: number of classes K.
          runs: how many runs train in the step, as a population; None for one alone.
          steps_per_dispatch: steps that the host starts at once; 0 for what `training.fit` takes here.
        """
        self.config = config
        self.at_once = steps_per_dispatch or training.steps_at_once()
        mesh = distributed.mesh(config.devices, config.batch_size)
        model = networks.create(num_classes=num_classes, image_shape=image_shape, **config.network())
        step: Any = training.make_train_step(
            config,
            model,
            num_classes,
            TRANSFORMS[config.transform],
            population=runs is not None,
            steps=self.at_once,
            mesh=mesh,
        )
        images, labels, order = data(image_shape, num_classes, config.batch_size)
        self._state = training.init_state(config, model, image_shape, len(images))
        extra: list[Any] = []
        if runs is not None:
            order = np.tile(order, (runs, 1))
            self._state, extra = training.stack([self._state] * runs), [{}]
        self._put = functools.partial(distributed.replicate, mesh)
        self._state = training.place(self._put(self._state), mesh, population=runs is not None)
        logits = np.zeros((len(labels), num_classes), np.float32)
        given = (labels, logits) if config.entry.learns else labels
        self._arguments = [*self._put((images, given, order)), *self._put(extra)]
        self._all = self._put([np.int32(self.at_once)]) if self.at_once > 1 else []
        with no_compilation_cache():
            began = time.perf_counter()
            self.compiled = step.lower(self._state, *self._arguments, *self._all).compile()
            self.compile_seconds = time.perf_counter() - began

    def run(self, dispatches: int) -> None:
        """Trains, and waits for the end."""
        for _ in range(dispatches):
            self._state, _ = self.compiled(self._state, *self._arguments, *self._all)
        jax.block_until_ready(self._state)

    def parameters(self) -> Any:
        """The network's variables as they are now, on the host."""
        return jax.device_get(self._state.params)

    def losses(self, steps: int) -> list[float]:
        """Trains for so many steps; the loss of each."""
        losses: list[float] = []
        while len(losses) < steps:
            count = min(self.at_once, steps - len(losses))
            counted = self._put([np.int32(count)]) if self.at_once > 1 else []
            self._state, metrics = self.compiled(self._state, *self._arguments, *counted)
            losses += np.ravel(metrics["loss"])[:count].tolist()
        return losses

    def timer(self, seconds: float) -> Timer:
        """`timer` of this step."""
        return timer(self.run, seconds, self.at_once)


def timer(run: Callable[[int], None], seconds: float, at_once: int = 1) -> Timer:
    """Warms up, and finds how many dispatches a timing takes.

    Args:
      run: does so many dispatches and waits until they are done.
      seconds: a timing is of so many dispatches that it takes at least about this long.
      at_once: steps in a dispatch.

    Returns:
      What times a block of them. Before each block one dispatch is not timed: it brings the caches back, and waits out
      what the step before it left running, threads that spin for work among them.
    """

    def block(dispatches: int) -> float:
        began = time.perf_counter()
        run(dispatches)
        return (time.perf_counter() - began) / (dispatches * at_once)

    run(1)
    dispatches = max(1, math.ceil(seconds / max(block(1) * at_once, 1e-9)))

    def timed() -> float:
        run(1)
        return block(dispatches)

    return timed


def in_turn(
    timers: Mapping[K, Timer],
    rounds: int,
    *,
    progress: Callable[[int, K], None] = lambda i, name: None,
    failed: Callable[[K, Exception], None] | None = None,
) -> Iterator[dict[K, float]]:
    """Times everything once in each round, one after the other, so that what else the machine does touches all alike.

    Args:
      timers: what to time.
      rounds: how often.
      progress: called with the round, from 0, and what is timed next.
      failed: called with a timer's name and exception; that timer is left out from then on. None: the exception passes.

    Yields:
      Each round's seconds.
    """
    left = dict(timers)
    for i in range(rounds):
        seconds = {}
        for name, timed in list(left.items()):
            progress(i, name)
            try:
                seconds[name] = timed()
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                del left[name]
        yield seconds


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Programs are compiled, not taken from a disk."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX asks once per process whether there is one
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
