"""Batches that an attack has finished, kept in a folder: an evaluation that was killed goes on from them."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from e2sad_jax._io import digest, write_bytes
from e2sad_jax._version import __version__
from e2sad_jax.evaluation.attack import Attack

NAME = "{}.batch"
SEAL = hashlib.sha256().digest_size  # bytes in front of a file's content: its digest


class Judged(NamedTuple):
    """A finished batch of B images.

    Attributes:
      inputs: adversarial inputs `[B, ...]`; zeros where they were not kept.
      prediction: int32 `[B]`.
      rejected: bool `[B]`.
    """

    inputs: np.ndarray
    prediction: np.ndarray
    rejected: np.ndarray


class Finished:
    """A file for each finished batch, named by what it is the answer to.

    That is the attack with its budget, the seed, the images' places, and the digest of images, labels, parameters and clean
    predictions. Where one of them differs, nothing is found. A file that cannot be read counts as missing.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = pathlib.Path(folder).expanduser()
        self._question = ""

    def ask(self, arrays: Callable[[], dict[str, Any]], text: str) -> None:
        """Says what the batches are about, once.

        Args:
          arrays: called if it was not said before; returns images, labels, clean predictions and what else outcomes depend on.
          text: what else they depend on.
        """
        if not self._question:
            self._question = digest(arrays(), f"e2sad_jax {__version__}, jax {jax.__version__}, {text}")

    def read(
        self, attack: Attack, seed: int, rank: int, places: np.ndarray, needed: Callable[[Judged], np.ndarray]
    ) -> Judged | None:
        """A batch, if it is there with all that is needed of it.

        Args:
          attack: as it was run.
          seed: of the random numbers.
          rank: of the wrong class that it walks to.
          places: of the images, `[B]`.
          needed: from the batch to bool `[B]`, whose inputs are needed.
        """
        with contextlib.suppress(OSError):
            content = self._path(attack, seed, rank, places).read_bytes()
            if hashlib.sha256(content[SEAL:]).digest() != content[:SEAL]:
                return None
            with np.load(io.BytesIO(content[SEAL:]), allow_pickle=False) as kept:
                rows, some = kept["rows"], kept["inputs"]
                inputs = np.zeros((len(rows), *some.shape[1:]), some.dtype)
                inputs[rows] = some
                judged = Judged(inputs, kept["prediction"], kept["rejected"])
            if not (needed(judged) & ~rows).any():
                return judged
        return None

    def write(self, attack: Attack, seed: int, rank: int, places: np.ndarray, judged: Judged, rows: np.ndarray) -> None:
        """Keeps a batch, of its inputs those of `rows`, bool `[B]`; the other arguments are those of `read`.

        Raises:
          OSError: if the folder cannot be written.
        """
        columns = {"prediction": judged.prediction, "rejected": judged.rejected}
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, inputs=judged.inputs[rows], rows=rows, **columns)
        self.folder.mkdir(parents=True, exist_ok=True)
        content = stream.getvalue()
        write_bytes(self._path(attack, seed, rank, places), hashlib.sha256(content).digest() + content)

    def __len__(self) -> int:
        """The number of batches, those of other questions among them."""
        return sum(1 for _ in self.folder.glob(NAME.format("*")))

    def clear(self) -> None:
        """Deletes the batches, those of other questions too, and the folder if nothing else is in it."""
        for path in self.folder.glob(NAME.format("*")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, attack: Attack, seed: int, rank: int, places: np.ndarray) -> pathlib.Path:
        settings = {**dataclasses.asdict(attack), "name": "", "targets": 1}  # of which its program does not depend
        words = json.dumps([self._question, settings, seed, rank], sort_keys=True)
        return self.folder / NAME.format(hashlib.sha256(words.encode() + np.int64(places).tobytes()).hexdigest()[:40])
