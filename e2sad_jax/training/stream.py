"""Training images that stay on the host: the batches of the next steps are read while these train."""

import concurrent.futures
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import distributed
from e2sad_jax.data.in_file import Rows, is_in_file
from e2sad_jax.training.config import Config
from e2sad_jax.training.memory import nbytes

SENT = 2**28  # bytes of images that are sent at once, unless a batch has more


def is_resident(config: Config, images: np.ndarray | Rows) -> bool:
    """Whether the training images lie on each device.

    Under `resident="auto"` they do if they and what is remembered of them take at most half of its memory; on the CPU, if they
    do not lie in a file.

    Args:
      config: the run's settings.
      images: training images `[n, H, W, C]`.
    """
    if config.resident != "auto":
        return config.resident == "device"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:  # the CPU, whose memory is the host's
        return not is_in_file(images)
    return images.nbytes + nbytes(config, len(images), images.shape[1:]) <= limit / 2


def most_steps(config: Config, images: np.ndarray | Rows) -> int:
    """The steps whose images are sent at once, at least 1."""
    return max(1, SENT // (config.batch_size * images[:1].nbytes)) * config.steps_per_batch


class Stream:
    """Reads the images of each dispatch of steps, one dispatch ahead, in a thread of its own, and sends them."""

    def __init__(self, config: Config, images: np.ndarray | Rows, at_once: int, mesh: Mesh | None):
        """Reads nothing yet.

        Args:
          config: the run's settings.
          images: training images `[n, H, W, C]`.
          at_once: the most steps of a dispatch.
          mesh: the devices, each of which gets its part of each batch; None for one.
        """
        self._images, self._batch_size, self._replays = images, config.batch_size, config.steps_per_batch
        batches = (at_once + self._replays - 2) // self._replays + 1  # where they begin in the middle of their replays
        self._rows = np.zeros((batches, config.batch_size), np.int32)
        self._shape = (*self._rows.shape, *images.shape[1:])
        self._place = None if mesh is None else distributed.split(mesh, axis=1)
        # The columns of `_rows` that devices of this process take, by the first one.
        self._columns = {0: slice(None)}
        if self._place is not None:
            places = self._place.addressable_devices_indices_map(self._shape).values()
            self._columns = {_first(index): index[1] for index in places}  # type: ignore[index]
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "images")
        self._next: concurrent.futures.Future[tuple[dict[int, np.ndarray], int]] | None = None

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
        parts, first = self._next.result()
        if self._place is None:
            return jax.device_put(parts[0]), np.int32(first)
        with jax.transfer_guard("allow"):
            sent = jax.make_array_from_callback(self._shape, self._place, lambda index: parts[_first(index)])
        return sent, np.int32(first)

    def _read(self, rows: np.ndarray, first: int) -> tuple[dict[int, np.ndarray], int]:
        # Without JAX: the thread has not the caller's default device and types.
        return {at: self._images[rows[:, columns]] for at, columns in self._columns.items()}, first


def _first(index: Any) -> int:
    """The first column of a device's part."""
    return index[1].start or 0
