"""Training images that stay on the host: the batches of the next steps are sent to the devices while these train."""

import concurrent.futures
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import distributed
from e2sad_jax.training.config import Config

SENT = 2**28  # bytes of images that are sent at once, unless a batch has more


def is_resident(config: Config, images: np.ndarray) -> bool:
    """Whether the training images lie on each device: under `resident="auto"` if they take at most half of its memory.

    Args:
      config: the run's settings.
      images: training images `[n, H, W, C]`.
    """
    if config.resident != "auto":
        return config.resident == "device"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")  # the CPU has none
    return limit is None or images.nbytes <= limit / 2


def most_steps(images: np.ndarray, batch_size: int) -> int:
    """The steps whose images are sent at once, at least 1."""
    return max(1, SENT // (batch_size * images[:1].nbytes))


class Stream:
    """Sends the images of each dispatch of steps, one dispatch ahead, by a thread of its own."""

    def __init__(self, config: Config, images: np.ndarray, at_once: int, mesh: Mesh | None):
        """Starts the thread; nothing is read yet.

        Args:
          config: the run's settings.
          images: training images `[n, H, W, C]`.
          at_once: the most steps of a dispatch.
          mesh: the devices, each of which gets its part of each batch; None for one.
        """
        self._images, self._mesh = images, mesh
        self._batch_size, self._replays = config.batch_size, config.steps_per_batch
        batches = at_once if self._replays == 1 else (at_once - 1) // self._replays + 2
        self._rows = np.zeros((batches, config.batch_size), np.int32)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "images")
        self._next: concurrent.futures.Future[tuple[jax.Array, np.int32]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def ask(self, step: int, count: int, order: np.ndarray) -> None:
        """Begins to read the images of `count` steps from `step` on.

        Args:
          step: updates done before.
          count: how many steps, which begin in one epoch.
          order: `epoch_order` of that epoch, on the host.
        """
        first, last = step // self._replays, (step + count - 1) // self._replays
        rows = self._rows.copy()
        for place, batch in enumerate(range(first, last + 1)):
            offset = batch * self._batch_size % len(self._images)
            rows[place] = order[offset : offset + self._batch_size]
        self._next = self._thread.submit(self._read, rows, first)

    def take(self) -> tuple[jax.Array, np.int32]:
        """What was asked for: images `[batches, batch_size, H, W, C]` on the devices, and the number of the first batch."""
        assert self._next is not None
        return self._next.result()

    def _read(self, rows: np.ndarray, first: int) -> tuple[jax.Array, np.int32]:
        if self._mesh is None:
            return jax.device_put(self._images[rows]), np.int32(first)

        def part(index: Any) -> np.ndarray:
            return self._images[rows[index[:2]]]

        shape, place = (*rows.shape, *self._images.shape[1:]), distributed.split(self._mesh, axis=1)
        return jax.make_array_from_callback(shape, place, part), np.int32(first)
