"""Checkpoints with Orbax, and a trained classifier read back from its workdir."""

import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from e2sad_jax import _io, distributed, networks
from e2sad_jax._compile import jit
from e2sad_jax._io import read_sealed, sealed
from e2sad_jax.data.transforms import TRANSFORMS, Transform
from e2sad_jax.errors import CheckpointError, DamagedError, DataError, WorkdirError, as_device_error, first_line, reason
from e2sad_jax.runs import _stored
from e2sad_jax.runs.folder import read_config, steps_in
from e2sad_jax.training import TrainState, init_state
from e2sad_jax.training.config import Config

STATE = "state_sha256"  # beside a checkpoint's score
PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE)  # errors that say nothing of a file
DELETED = "deleted"  # where Orbax moves what is to go, so that a kill leaves no half of a checkpoint


class Checkpoints:
    """The checkpoints of one workdir: the last one, and the best one by `score`.

    Orbax writes each into a temporary folder and renames it when it is whole, in the background while training goes on.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, read_only: bool = False, last_state: TrainState | None = None
    ):
        """Opens the folder of a run; `read_only` changes nothing there, so that the run may be under way.

        `last_state` is that of the newest checkpoint where it has been read already: the first `restore` gives it away.
        """
        policies = ocp.checkpoint_managers
        self._last_state = last_state
        self._read_only = read_only
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(1), policies.BestN(get_metric_fn=_score, n=1)]
            ),
            best_fn=_score,
            cleanup_tmp_directories=not read_only,  # what a killed process left
            read_only=read_only,
            # What Orbax would set itself, with a warning.
            **({"save_interval_steps": 0, "create": False} if read_only else {"todelete_subdir": DELETED}),
        )
        try:
            _stored.check_folder(self.folder)
        except (OSError, ValueError) as error:
            raise WorkdirError(f"cannot use the checkpoints in {self.folder}: {first_line(error)}") from error
        if not read_only:
            self._forget()
        for step in steps_in(workdir):  # Orbax leaves out one without metrics, and chooses by wrong ones
            _metrics(self.folder / str(step))
            _check_description(self.folder / str(step))
        with self._reading() if read_only else self._writing():
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with contextlib.nullcontext() if self._read_only else self._writing():
                self._manager.close()
        except CheckpointError as failed:
            if error is None:
                raise
            print(f"warning: {failed}", file=sys.stderr, flush=True)  # what ended the run is told by itself
        if not self._read_only:
            self._forget()

    def _forget(self) -> None:
        """Deletes what Orbax has put out of the way, now or before a kill."""
        if distributed.is_main():
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    @property
    def last_step(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint of the highest score, None where there is none."""
        return self._manager.best_step()

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Begins to write a checkpoint; `metrics` must hold `score`. A step that is there already is left alone."""
        if step != self.last_step:
            self._last_state = None
            stored = _storable(state)
            metrics = sealed({**metrics, STATE: _digest(stored)})
            with self._writing():
                self._manager.save(step, args=ocp.args.StandardSave(stored), metrics=metrics)

    def seconds(self, step: int) -> float:
        """Time spent in training up to the checkpoint of `step`."""
        return float(_metrics(self.folder / str(step)).get("seconds", 0.0))

    def score(self, step: int) -> float:
        """What the checkpoint of `step` competes with for the best."""
        return _score(_metrics(self.folder / str(step)))

    def wait(self) -> None:
        """Waits until all checkpoints are on disk."""
        with self._writing():
            self._manager.wait_until_finished()
        self._forget()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with _only_errors():
                yield
        except Exception as error:  # Orbax raises many kinds, those of a run that deletes a checkpoint among them
            raise WorkdirError(f"cannot read the checkpoints in {self.folder}: {first_line(error)}") from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds, those of the thread that writes among them
            raise CheckpointError(
                f"cannot write a checkpoint in {self.folder}: {reason(error)}; what was saved before stays, and the "
                "same command goes on from there"
            ) from error

    def restore(
        self, like: TrainState, step: int | None = None, place: jax.sharding.Sharding | None = None
    ) -> TrainState:
        """The state of `step`, the last one by default.

        Args:
          like: a state of the same configuration, or its shapes (`jax.eval_shape`).
          step: a step that was kept.
          place: where the result lies, whatever it was saved from; None for the default device.

        Raises:
          WorkdirError: if there is no such checkpoint, it fits another network, or (`DamagedError`) cannot be read or
            does not hold what was saved.
        """
        step = self.last_step if step is None else step
        if step is None:
            raise WorkdirError(f"{self.folder} holds no checkpoint yet")
        place = place or jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
        if self._last_state is not None and step == self.last_step:
            state, self._last_state = self._last_state, None  # who gets it may donate it
            return jax.device_put(state, place)
        return self._read(like, step, place)

    def check(self, like: TrainState) -> TrainState | None:
        """Reads all that there are, oldest first; returns the state of the last one.

        Raises:
          DamagedError: as `restore`, of the first one that is damaged.
        """
        state = None
        for step in steps_in(self.folder.parent):
            state = self._read(like, step, jax.sharding.SingleDeviceSharding(jnp.zeros(()).device))
        return state

    def _read(self, like: TrainState, step: int, place: jax.sharding.Sharding) -> TrainState:
        folder = self.folder / str(step)
        stored = jax.eval_shape(_storable, like)
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), stored)
        try:
            _stored.check_step(self.folder / str(step), stored)
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax and TensorStore raise many kinds; all mean that it cannot be used
            named = as_device_error(error, f"reading {folder}", "it is as it was", "--batch_size")
            if named and isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
                raise named from error
            if isinstance(error, OSError) and error.errno in PASSING:
                raise WorkdirError(f"cannot read the checkpoint {folder}: {first_line(error)}") from error
            raise DamagedError(folder, first_line(error)) from error
        if _metrics(folder).get(STATE, digest := _digest(restored)) != digest:  # those of earlier versions have none
            raise DamagedError(folder, "its numbers are not those that were saved")
        return TrainState(**{**restored, "key": jax.random.wrap_key_data(restored["key"])})


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Keeps Orbax from warning that a folder opened for reading is opened for reading."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def set_damaged_aside(workdir: str | os.PathLike[str], like: TrainState) -> TrainState | None:
    """Where the last checkpoint is damaged and an earlier one is whole, puts the last one out of the way, and says so.

    Args:
      workdir: folder of a run that nobody is at work on.
      like: as of `Checkpoints.restore`.

    Returns:
      The state of the last one that is left, None where there is none.

    Raises:
      DamagedError: if one of them is damaged and there is no such way out.
    """
    steps = steps_in(workdir)
    if not steps:
        return None
    try:
        with Checkpoints(workdir, read_only=True) as checkpoints:
            return checkpoints.check(like)
    except DamagedError as error:
        *earlier, last = steps
        if not earlier or error.folder.name != str(last):
            raise
        aside = error.folder.with_name(f"{last}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        error.folder.rename(aside)
        print(
            f"WARNING: the checkpoint of step {last:,} is damaged ({error.why}). It is put aside as {aside}, and training "
            f"goes on from the one of step {earlier[-1]:,}",
            file=sys.stderr,
            flush=True,
        )
    return set_damaged_aside(workdir, like)


def _metrics(folder: pathlib.Path) -> dict[str, Any]:
    """What was noted beside a checkpoint.

    Raises:
      DamagedError: if it is not there any more, or is not what was written.
    """
    try:
        metrics = read_sealed(folder / "metrics" / "metrics")
        _stored.check_metrics(metrics)
        return metrics
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in PASSING:
            raise WorkdirError(f"cannot read the checkpoint {folder}: {first_line(error)}") from error
        raise DamagedError(folder, f"metrics: {first_line(error)}") from error


def _check_description(folder: pathlib.Path) -> None:
    """Reads what Orbax will read as soon as it lists the checkpoints."""
    try:
        if not isinstance(_io.read_json(folder / "_CHECKPOINT_METADATA"), dict):
            raise ValueError("it is no list of names")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise DamagedError(folder, f"_CHECKPOINT_METADATA: {first_line(error)}") from error


def _digest(stored: Mapping[str, Any]) -> str:
    """Of every number in a state, and of its dtype and shape."""
    sha = hashlib.sha256()
    for leaf in jax.device_get(jax.tree.leaves(distributed.local(stored))):
        array = np.ascontiguousarray(leaf)
        sha.update(f"{array.dtype} {np.shape(leaf)}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def _storable(state: TrainState) -> dict[str, Any]:
    """What there is of the state, by name, its random key as plain numbers."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {**{name: part for name, part in parts.items() if part is not None}, "key": jax.random.key_data(state.key)}


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained network as a function from images to probabilities.

    Attributes:
      config: settings of its run.
      dataset: description of the data it was trained on (name, version, sizes).
      step: training steps done.
      model: the Flax module.
      params: its variables.
      transform: from images to the network's input; attacks work behind it, inside `transform.bounds`.
    """

    config: Config
    dataset: Mapping[str, Any]
    step: int
    model: nn.Module
    params: Any
    transform: Transform

    def __post_init__(self) -> None:
        probabilities = jax.jit(lambda p, x: jax.nn.softmax(networks.logits_fn(self.model, p)(self.transform.apply(x))))
        object.__setattr__(self, "_within_a_program", probabilities)
        object.__setattr__(self, "_as_a_program", jit(probabilities))

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits `[N, K]` of network inputs `[N, H, W, C]`, behind the transform: what an attack differentiates."""
        return networks.logits_fn(self.model, self.params)(x)

    def __call__(self, images: Any) -> jax.Array:
        """Class probabilities.

        Args:
          images: `[N, H, W, C]` or, with one channel, `[N, H, W]`; uint8, or floating point in [0, 1].

        Returns:
          `[N, K]`, float32, rows summing to 1.

        Raises:
          DataError: if the shape or dtype is not that of the training images, or a pixel lies outside [0, 1].
        """
        images = jnp.asarray(images)
        height, width, channels = self.dataset["image_shape"]
        if images.ndim == 3 and channels == 1:
            images = images[..., None]
        if images.shape[1:] != (height, width, channels):
            raise DataError(
                f"images have shape {images.shape}; this classifier takes [N, {height}, {width}, {channels}]"
            )
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise DataError(f"images are {images.dtype}; this classifier takes uint8, or floating point in [0, 1]")
        traced = isinstance(images, jax.core.Tracer)
        if images.dtype != jnp.uint8 and images.size and not traced:
            low, high = float(images.min()), float(images.max())
            if not (low >= 0 and high <= 1):  # NaN is neither
                raise DataError(
                    f"images hold pixels from {low:.6g} to {high:.6g}; this classifier takes floating point in [0, 1], or "
                    "uint8 in 0..255"
                )
        probabilities = self._within_a_program if traced else self._as_a_program  # type: ignore[attr-defined]
        return probabilities(self.params, images)  # type: ignore[no-any-return]


def load(workdir: str | os.PathLike[str], which: str = "last") -> Classifier:
    """The classifier that a run left in its workdir.

    Args:
      workdir: folder of the run.
      which: "last" for the newest checkpoint, "best" for the one of the highest robust accuracy in validation.

    Returns:
      A function from images to probabilities, see `Classifier`.

    Raises:
      WorkdirError: if `workdir` holds no run, or no readable checkpoint.
      ValueError: if `which` is neither.
    """
    if which not in ("last", "best"):
        raise ValueError(f"load: which={which!r}; it must be 'last' or 'best'")
    workdir = pathlib.Path(workdir).expanduser()
    config, dataset = read_config(workdir)
    shape = tuple(dataset["image_shape"])
    model = networks.create(config.model, dataset["num_classes"], shape, config.precision)
    if not (workdir / "checkpoints").is_dir():
        raise WorkdirError(f"{workdir} holds no checkpoint yet")
    try:
        like = jax.eval_shape(lambda: init_state(config, model, shape))
    except Exception as error:  # JAX and Flax raise many kinds where a size cannot be
        raise WorkdirError(f"{workdir / 'config.json'} describes no network: {first_line(error)}") from error
    for attempt in range(3):
        steps = steps_in(workdir)
        try:
            with Checkpoints(workdir, read_only=True) as checkpoints:
                state = checkpoints.restore(like, checkpoints.best_step if which == "best" else checkpoints.last_step)
            break
        except WorkdirError:
            time.sleep(0.5 if steps else 0)  # a run under way may be about to replace the checkpoint
            if attempt == 2 or steps == steps_in(workdir):
                raise
    return Classifier(config, dataset, int(state.step), model, state.params, TRANSFORMS[config.transform])
