"""Batches that an attack has finished, kept in a folder: an evaluation that was killed goes on from them."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import attacks
from e2sad_jax._io import digest, write_bytes
from e2sad_jax._version import __version__
from e2sad_jax.evaluation.attack import Attack

NAME = "{}.batch"
FORMAT = 2  # of the files
SEAL = hashlib.sha256().digest_size  # bytes in front of a file's content: its digest


class Judged(NamedTuple):
    """A finished batch of B images.

    Attributes:
      inputs: adversarial inputs `[B, ...]`; zeros where they were not kept.
      prediction: int32 `[B]`.
      rejected: bool `[B]`.
      lead: `[B]`, of the label over the best other class, in logits.
    """

    inputs: np.ndarray
    prediction: np.ndarray
    rejected: np.ndarray
    lead: np.ndarray


class Key(NamedTuple):
    """What a batch is the answer to.

    Attributes:
      question: a digest of images, labels, parameters, clean logits, a gradient, and of what else outcomes depend on.
      attack: as it was run.
      seed: of the random numbers.
      rank: of the wrong class that it walks to.
      places: of the images, `[B]`.
    """

    question: str
    attack: Attack
    seed: int
    rank: int
    places: np.ndarray

    @property
    def name(self) -> str:
        """The file's."""
        settings = {**dataclasses.asdict(self.attack), "name": "", "targets": 1}  # of which its program does not depend
        function = attacks.ATTACKS[self.attack.kind].function
        code = getattr(getattr(function, "__code__", None), "co_code", b"")
        words = json.dumps(
            [FORMAT, self.question, settings, self.seed, self.rank],
            sort_keys=True,
            default=lambda number: number.item(),
        )
        return NAME.format(hashlib.sha256(words.encode() + np.int64(self.places).tobytes() + code).hexdigest()[:40])


class Finished:
    """A file for each finished batch, named by what it is the answer to.

    That is the attack with its budget, the seed, the images' places, and a question: a digest of what else outcomes depend on.
    Where one of them differs, nothing is found. A file that cannot be read counts as missing.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        if not os.fspath(folder):
            raise ValueError("resume is empty; it must name a folder")
        self.folder = pathlib.Path(folder).expanduser()
        self._full = False

    def read(self, key: Key, needed: Callable[[Judged], np.ndarray]) -> Judged | None:
        """A batch, if it is there with all that is needed of it.

        Args:
          key: what it is the answer to.
          needed: from the batch to bool `[B]`, whose inputs are needed.
        """
        with contextlib.suppress(OSError):
            content = (self.folder / key.name).read_bytes()
            if hashlib.sha256(content[SEAL:]).digest() != content[:SEAL]:
                return None
            with np.load(io.BytesIO(content[SEAL:]), allow_pickle=False) as kept:
                rows, some, dtype = kept["rows"], kept["inputs"], jnp.dtype(str(kept["dtype"]))
                inputs = np.zeros((len(rows), *some.shape[1:]), dtype)
                inputs[rows] = some.astype(dtype)
                judged = Judged(inputs, kept["prediction"], kept["rejected"], kept["lead"])
            if not (needed(judged) & ~rows).any():
                return judged
        return None

    def write(self, key: Key, judged: Judged, rows: np.ndarray) -> None:
        """Keeps a batch, of its inputs those of `rows`, bool `[B]`. If that fails it says so once: only time is lost."""
        inputs = judged.inputs[rows]
        small = inputs.dtype.itemsize < 4  # which NumPy's files do not know
        stream = io.BytesIO()
        np.savez(
            stream,
            allow_pickle=False,
            inputs=inputs.astype(np.float32) if small else inputs,
            dtype=np.array(inputs.dtype.name),
            rows=rows,
            prediction=judged.prediction,
            rejected=judged.rejected,
            lead=judged.lead,
        )
        content = stream.getvalue()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(self.folder / key.name, hashlib.sha256(content).digest() + content)
        except OSError as error:
            if not self._full:
                self._full = True
                warnings.warn(
                    f"finished batches cannot be kept ({error}); the evaluation goes on without", stacklevel=2
                )

    def __len__(self) -> int:
        """The number of batches, those of other questions among them."""
        return sum(1 for _ in self.folder.glob(NAME.format("*")))

    def clear(self) -> None:
        """Deletes the batches, those of other questions too, and the folder if nothing else is in it."""
        for path in self.folder.glob(NAME.format("*")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def question(arrays: Mapping[str, Any], text: str) -> str:
    """The digest of arrays by name, random keys among them, a text, and the versions of JAX and of this library."""

    def plain(value: Any) -> Any:
        is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(value) if is_key else value

    return digest(
        {name: plain(value) for name, value in arrays.items()},
        f"e2sad_jax {__version__}, jax {jax.__version__}, {text}",
    )
