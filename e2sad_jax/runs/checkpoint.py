"""Checkpoints of a run, written by Orbax: the last one and the best one."""

import contextlib
import dataclasses
import errno
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging

from e2sad_jax import _io, _streams, distributed
from e2sad_jax._io import read_sealed, sealed
from e2sad_jax.errors import CheckpointError, DamagedError, WorkdirError, as_device_error, first_line, reason
from e2sad_jax.runs.folder import steps_in
from e2sad_jax.training import TrainState

UNJUDGED = -1.0  # score of a checkpoint that was not validated, because the run was stopped: below all others
STATE = "state_sha256"  # in the same file as a checkpoint's score
PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE)  # errors that say nothing of a file
DELETED = "deleted"  # where Orbax moves what is to be deleted, so that a kill leaves no half of a checkpoint


class Checkpoints:
    """The checkpoints of one workdir: the last one, and the best one by `score`.

    Orbax writes each into a temporary folder, in the background during training, and renames it when it is complete.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, read_only: bool = False):
        """Opens the folder of a run; `read_only` changes nothing there, so that the run may be under way."""
        policies = ocp.checkpoint_managers
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
        if not read_only:
            self._delete_discarded()
        for step in steps_in(workdir):
            self._metrics(step)  # Orbax leaves out one without metrics, and chooses by wrong ones
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
            print(f"warning: {failed}", file=sys.stderr, flush=True)  # the error that ended the run has its own message
        if not self._read_only:
            self._delete_discarded()

    @property
    def last_step(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint of the highest score, None where there is none."""
        return self._manager.best_step()

    def seconds(self, step: int) -> float:
        """Seconds of training up to the checkpoint of `step`."""
        return float(self._metrics(step)["seconds"])

    def averaged(self, step: int) -> bool:
        """Whether the averaged weights of the checkpoint of `step` were better in validation than the raw ones."""
        return bool(self._metrics(step).get("averaged", 0))

    def score(self, step: int) -> float:
        """The score of the checkpoint of `step`; the best checkpoint has the highest."""
        return _score(self._metrics(step))

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Begins to write a checkpoint; a step that is there already is left alone.

        Args:
          step: its number.
          state: what to write; its buffers may be donated as soon as this returns.
          metrics: `score`, which orders checkpoints, `seconds` of training so far, and any others.

        Raises:
          CheckpointError: if this one or the one before cannot be written.
        """
        if step != self.last_step:
            stored = _storable(state)
            metrics = sealed({**metrics, STATE: digest(stored)})
            with self._writing():
                self._manager.save(step, args=ocp.args.StandardSave(stored), metrics=metrics)

    def wait(self) -> None:
        """Waits until all checkpoints are on disk.

        Raises:
          CheckpointError: if one of them cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()
        self._delete_discarded()

    def restore(
        self, like: TrainState, step: int | None = None, place: jax.sharding.Sharding | None = None
    ) -> TrainState:
        """Restores the state of `step`, by default the last one.

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
        folder = self.folder / str(step)
        place = place or jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), jax.eval_shape(_storable, like)
        )
        try:
            written = {**abstract, **_shaped(folder, abstract)}
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(written))
        except Exception as error:  # Orbax and TensorStore raise many kinds; all mean that it cannot be used
            named = as_device_error(error, f"reading {folder}", "it is as it was", "--batch_size")
            if named and isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
                raise named from error
            if isinstance(error, OSError) and error.errno in PASSING:
                raise WorkdirError(f"cannot read the checkpoint {folder}: {first_line(error)}") from error
            raise DamagedError(folder, first_line(error)) from error
        if digest(restored) != self._metrics(step)[STATE]:
            raise DamagedError(folder, "its numbers are not those that were saved")
        if "memory" in restored:
            wanted = abstract["memory"]
            restored["memory"] = {n: kept.reshape(wanted[n].shape) for n, kept in restored["memory"].items()}
        return TrainState(**{**restored, "key": jax.random.wrap_key_data(restored["key"], impl=_streams.GENERATOR)})

    def _metrics(self, step: int) -> dict[str, Any]:
        return read_metrics(self.folder / str(step))

    def _delete_discarded(self) -> None:
        """Deletes what Orbax has moved out of the way, now or before a kill."""
        if distributed.is_main():
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # Orbax warns that a folder opened for reading is opened for reading
        try:
            yield
        except Exception as error:  # Orbax raises many kinds, those of a run that deletes a checkpoint among them
            raise WorkdirError(f"cannot read the checkpoints in {self.folder}: {first_line(error)}") from error
        finally:
            logging.set_verbosity(verbosity)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds, those of the thread that writes among them
            raise CheckpointError(
                f"cannot write a checkpoint in {self.folder}: {reason(error)}; earlier checkpoints stay, and the same "
                "command resumes from the last one"
            ) from error


def quarantine_damaged(workdir: str | os.PathLike[str], like: TrainState) -> None:
    """Renames the last checkpoint if it is damaged and an earlier one is intact, so that training resumes from the latter.

    Args:
      workdir: folder of a run, locked.
      like: as of `Checkpoints.restore`.

    Raises:
      DamagedError: if there is no earlier one, or an earlier one is damaged: without the best the results would be others.
    """
    steps = steps_in(workdir)
    try:
        if steps:
            with Checkpoints(workdir, read_only=True) as checkpoints:
                for step in steps:
                    checkpoints.restore(like, step)
    except DamagedError as error:
        *earlier, last = steps
        if not earlier or error.folder.name != str(last):
            raise
        aside = error.folder.with_name(f"{last}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        error.folder.rename(aside)
        print(
            f"warning: the checkpoint of step {last:,} is damaged ({error.why}). It is moved to {aside}, and training resumes "
            f"from the one of step {earlier[-1]:,}",
            file=sys.stderr,
            flush=True,
        )


def read_metrics(folder: pathlib.Path) -> dict[str, Any]:
    """Reads what a checkpoint holds in addition to the state: score, seconds, digest.

    Raises:
      DamagedError: if it is not there any more, or is not what was written.
    """
    try:
        metrics = read_sealed(folder / "metrics" / "metrics")
        if missing := {"score", "seconds", STATE} - set(metrics):
            raise ValueError(f"without {', '.join(sorted(missing))}")
        return metrics
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in PASSING:
            raise WorkdirError(f"cannot read the checkpoint {folder}: {first_line(error)}") from error
        raise DamagedError(folder, f"metrics: {first_line(error)}") from error


def state_digest(workdir: pathlib.Path, step: int) -> str | None:
    """Digest of a run's state at a step, as its checkpoint has it; None if there is no such checkpoint."""
    folder = workdir / "checkpoints" / str(step)
    return str(read_metrics(folder)[STATE])[:16] if folder.is_dir() else None


def digest(tree: Any) -> str:
    """SHA-256 of every number in a tree of JAX arrays, and of its name, dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(distributed.local(tree))
    return _io.digest({jax.tree_util.keystr(path): jax.device_get(leaf) for path, leaf in leaves})


def _shaped(folder: pathlib.Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """The memory in a state's shapes as a checkpoint has it: it was `[rows, H, W, C]` before it was `[rows, H W C]`."""
    if "memory" not in abstract:
        return {}
    there = ocp.StandardCheckpointHandler().metadata(folder / ocp.checkpoint_manager.DEFAULT_ITEM_NAME).tree["memory"]

    def shaped(wanted: jax.ShapeDtypeStruct, found: Any) -> jax.ShapeDtypeStruct:
        same = math.prod(found.shape) == math.prod(wanted.shape)
        return jax.ShapeDtypeStruct(found.shape if same else wanted.shape, wanted.dtype, sharding=wanted.sharding)

    return {"memory": {name: shaped(wanted, there[name]) for name, wanted in abstract["memory"].items()}}


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def _storable(state: TrainState) -> dict[str, Any]:
    """The parts of a state by name, its random key as plain numbers."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {**{name: part for name, part in parts.items() if part is not None}, "key": jax.random.key_data(state.key)}
