"""Arrays that stay in their file: of data sets that need not fit the host's memory."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

LARGE = 2**31  # bytes from which on the array of a file is not read but mapped


class Rows:
    """Rows of an array in a file, read when they are asked for; what takes part of an array takes part of these.

    Attributes:
      shape: `(n, ...)` of the rows.
      dtype: of the array.
    """

    def __init__(self, array: np.ndarray, places: np.ndarray):
        """Reads nothing.

        Args:
          array: `[N, ...]`, in a file.
          places: int64 `[n]`, which of its rows.
        """
        self._array, self._places = array, places
        self.shape, self.dtype = (len(places), *array.shape[1:]), array.dtype

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads the rows of a slice, of indices or of a mask, with the shape that numpy would give them."""
        rows: np.ndarray = self._array[self._places[index]]
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("rows of a file cannot be an array without a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy elsewhere has no file
        return np.array, (self[:],)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def rows(self, index: slice | np.ndarray) -> Rows:
        """Returns some of the rows, still unread."""
        return Rows(self._array, self._places[index])


def is_in_file(array: Any) -> bool:
    """Whether an array, or what it is a view of, is the mapping of a file."""
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    return isinstance(array, np.memmap | Rows)


def rows(array: np.ndarray | Rows, index: slice | np.ndarray) -> np.ndarray | Rows:
    """Returns `array[index]`; what lies in a file is not read."""
    if isinstance(array, Rows):
        return array.rows(index)
    if is_in_file(array) and not isinstance(index, slice):
        return Rows(array, np.arange(len(array))[index])
    return array[index]


def empty(shape: tuple[int, ...], dtype: Any, folder: pathlib.Path) -> np.ndarray:
    """Returns an array to be filled; one of `LARGE` bytes in a file without a name, if the folder has space for it.

    Args:
      shape: of the array.
      dtype: of the array.
      folder: for the file, whose space is free again when the array is not used any more; made when missing.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size >= LARGE:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):  # a disk that is full later would end the process
                    os.posix_fallocate(file.fileno(), 0, size)
                return np.memmap(file, dtype, "w+", shape=shape)
    return np.empty(shape, dtype)
