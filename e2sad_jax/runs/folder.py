"""A run's folder: `config.json` with its settings, `training.json` with its history, and the lock."""

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from e2sad_jax._io import LOCK, locked, read_json, read_sealed, sealed, unsealed, write_json
from e2sad_jax.data import Dataset
from e2sad_jax.errors import ConfigError, GoneError, WorkdirError, first_line, printable
from e2sad_jax.training.config import Config

FORMAT = 1  # of config.json and of the checkpoints in its folder
TRAINING = "training.json"
CONFIG_BYTES = 2**20


def workdir_of(config: Config) -> pathlib.Path:
    """The folder of a run: its `workdir`, or the default one of its settings."""
    return pathlib.Path(config.workdir or config.default_workdir()).expanduser()


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """Identity and sizes of a data set, for config.json and results.json."""
    return {
        "name": dataset.name,
        "version": dataset.version,
        "sha256": dataset.sha256,
        "source_sha256": dict(dataset.source_sha256),
        "train_examples": len(dataset.x_train),
        "test_examples": len(dataset.x_test),
        "image_shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
    }


@contextlib.contextmanager
def open_workdir(workdir: pathlib.Path, config: Config, dataset: Dataset) -> Iterator[None]:
    """Creates or checks the workdir of a run and locks it against other processes.

    Raises:
      WorkdirError: if it belongs to a run of other settings or data (naming what differs), if another process is at
        work in it, or if it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if not (workdir / "config.json").exists() and any(map(_foreign, workdir.iterdir())):
                raise WorkdirError(
                    f"{workdir} is not empty and holds no config.json: not a workdir; choose another --workdir"
                )
            stack.enter_context(locked(workdir))
        except OSError as error:
            raise _unusable(workdir, error) from error
        check_workdir(workdir, config, dataset)
        yield


def ensure_exists(workdir: pathlib.Path) -> None:
    """Refuses to write into a workdir that was deleted or moved during its run; writing would create it again.

    Raises:
      GoneError: if it is gone.
    """
    if not (workdir / "config.json").exists():  # a folder of the same name may have been made since
        raise GoneError(
            f"{workdir}/config.json is gone: the workdir was deleted or moved while the run was at work in it, so nothing more "
            "can be saved there; put it back to resume from its last checkpoint, or start the run again"
        )


def steps_in(workdir: str | os.PathLike[str]) -> list[int]:
    """The steps of the complete checkpoints in a workdir, by their names, in order."""
    names = [path.name for path in (pathlib.Path(workdir) / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def identity_of(workdir: pathlib.Path) -> dict[str, Any]:
    """Which model a run's last checkpoint is: equal runs are bit for bit the same.

    Raises:
      WorkdirError: as `read_config`, or if there is no checkpoint.
    """
    config, dataset = read_config(workdir)
    if not (steps := steps_in(workdir)):
        raise WorkdirError(f"{workdir} holds no checkpoint yet")
    return {"run": config.digest(), "data": dataset["sha256"][:8], "step": steps[-1]}


def _foreign(path: pathlib.Path) -> bool:
    """Whether a file shows that a folder without config.json is not one that a start of ours left unfinished."""
    if path.name == "checkpoints":
        return not path.is_dir() or any(path.iterdir())
    return path.name not in (LOCK, "config.json") and not path.name.startswith(".config.json.")


def _unusable(workdir: pathlib.Path, error: OSError) -> WorkdirError:
    return WorkdirError(f"cannot use {workdir} as workdir: {error.strerror}; choose another --workdir")


def check_workdir(workdir: pathlib.Path, config: Config, dataset: Dataset) -> None:
    """Raises an error if the workdir belongs to another run.

    Raises:
      WorkdirError: if it belongs to a run of other settings, data, or of another version; naming what differs.
    """
    if not (workdir / "config.json").exists():
        return
    there, dataset_there = read_config(workdir)
    ours, theirs = config.identity(), there.identity()
    differences = []
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):  # what has no effect in one of them has its value all the same
            of, here = (one.to_json().get(name, "not read") for one in (there, config))
            if of != here:
                differences.append(f"--{name}: {of} there, {here} here")
    if dataset_there["sha256"] != dataset.sha256:
        differences.append(f"data: {dataset_there['name']} there, {dataset.name} here, with other content")
    if differences or ours != theirs:
        raise WorkdirError(f"{workdir} holds another run ({'; '.join(differences)}); choose another --workdir")


def write_config(workdir: pathlib.Path, config: Config, dataset: Dataset) -> None:
    """Writes config.json: what `read_config` reads.

    Raises:
      WorkdirError: if it cannot be written.
    """
    here = {"format": FORMAT, "config": config.to_json(), "dataset": describe_dataset(dataset)}
    try:
        write_json(workdir / "config.json", sealed(here))
    except OSError as error:
        raise _unusable(workdir, error) from error


def note_training(workdir: pathlib.Path, segment: Mapping[str, Any]) -> None:
    """Adds a segment of training to training.json: what one process did, from `from_step` to `to_step`, on what and when.

    The steps of earlier processes after `from_step` were lost with them and are left out.
    """
    begun = segment["from_step"]
    known = read_training(workdir)
    if not known and begun and (workdir / TRAINING).exists():
        print(f"warning: {workdir / TRAINING} is damaged; its entries on earlier steps are lost", file=sys.stderr)
    earlier = [{**s, "to_step": min(s["to_step"], begun)} for s in known if s["from_step"] < begun]
    write_json(workdir / TRAINING, [sealed(s) for s in (*earlier, segment)])


def read_training(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the segments of training from training.json, oldest first; empty if it cannot be read.

    Each has `from_step`, `to_step`, `seconds`, `runs_together`, `command`, and what `provenance.environment` says.
    """
    try:
        return [unsealed(segment) for segment in read_json(workdir / TRAINING)]
    except (OSError, ValueError, TypeError):
        return []


def read_config(workdir: pathlib.Path) -> tuple[Config, dict[str, Any]]:
    """Reads configuration and data set description from a workdir's config.json.

    Raises:
      WorkdirError: if it is missing, damaged, or of another format or version.
    """
    path = workdir / "config.json"
    try:
        values = read_sealed(path, CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        exported = workdir if workdir.suffix == ".safetensors" else workdir / "model.safetensors"
        hint = f"; export.load_safetensors({str(exported)!r}) reads an export" if exported.is_file() else ""
        raise WorkdirError(
            f"{path} does not exist: {workdir} is not the workdir of a run; name one that has config.json{hint}"
        ) from error
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"cannot read {path}: {first_line(error)}; restore it from a copy, or choose another --workdir to train again"
        ) from error
    if values.get("format") != FORMAT:
        found = first_line(ValueError(values.get("format")))
        raise WorkdirError(f"{path} has format {found}, this version reads {FORMAT}; choose another --workdir")
    try:
        dataset = values["dataset"]
        if missing := {"name", "sha256", "image_shape", "num_classes"} - set(dataset):
            raise KeyError(f"dataset without {', '.join(sorted(missing))}")
        config = Config.from_json(values["config"])
        return config, dataset
    except (KeyError, TypeError, ConfigError) as error:
        raise WorkdirError(f"{path} is not a configuration of this version: {printable(str(error))}") from error
