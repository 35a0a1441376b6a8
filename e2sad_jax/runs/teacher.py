"""The teacher of a run that learns from one: its logits of the training images, kept in the run's own folder."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from e2sad_jax import distributed
from e2sad_jax._compile import jit
from e2sad_jax._io import atomic_file
from e2sad_jax.data import Dataset
from e2sad_jax.data.npz import read_members
from e2sad_jax.errors import ConfigError, DataError, WorkdirError
from e2sad_jax.evaluation import in_batches
from e2sad_jax.runs.classifier import load
from e2sad_jax.runs.folder import identity_of, read_config, steps_in
from e2sad_jax.training.config import Config

FILE = "teacher.npz"


def config_of(config: Config, workdir: pathlib.Path) -> Config:
    """The run of the teacher that a run trains first: its own settings, hard labels, in a folder within its own."""
    return config.replace(defense="tempered", soft_label=False, workdir=str(workdir / "teacher"))


def check_teacher(config: Config, dataset: Dataset, workdir: pathlib.Path) -> None:
    """Refuses a teacher that does not fit the run, before anything is trained.

    Args:
      config: the run's settings; nothing is checked where they name no teacher.
      dataset: the run's data.
      workdir: the run's folder. Once it has the teacher's logits, the teacher's own folder may be gone.

    Raises:
      ConfigError: if the teacher is missing, untrained, of other classes, images or temperature.
      WorkdirError: if the run has begun with another teacher.
    """
    flag = f"--teacher={config.settings['teacher']}"
    folder = pathlib.Path(config.settings["teacher"]).expanduser()
    kept = _read(workdir)[1] if (workdir / FILE).exists() else None
    if not config.settings["teacher"] or (kept and not (folder / "config.json").exists()):
        return
    try:
        taught, about = read_config(folder)
    except WorkdirError as error:
        raise ConfigError(f"{flag}: {error}") from error
    if not steps_in(folder):
        raise ConfigError(f"{flag}: holds no checkpoint yet; train it first, by --defense=tempered")
    for what, theirs, ours in (
        ("number of classes", about["num_classes"], dataset.num_classes),
        ("shape of images", list(about["image_shape"]), list(dataset.image_shape)),
        ("temperature", taught.settings.get("temperature"), config.settings["temperature"]),
    ):
        if theirs != ours and theirs is not None:
            raise ConfigError(f"{flag}: its {what} is {theirs}, this run's {ours}; they must be the same")
    if kept and kept != identity_of(folder):
        raise WorkdirError(
            f"{workdir} learns from another teacher than {folder} is now (there {kept}, here {identity_of(folder)}); choose "
            "another --workdir"
        )


def keep_logits(folder: pathlib.Path, train_set: Dataset, workdir: pathlib.Path, batch_size: int) -> None:
    """Writes the logits that a teacher's last checkpoint has of the training images into the folder of its student.

    Raises:
      WorkdirError: if they are not finite, or there is no readable checkpoint.
    """
    teacher = load(folder)
    ask = jit(lambda images: teacher.logits(teacher.transform.apply(images)).astype(jnp.float32))
    x = train_set.x_train
    batches = in_batches(lambda full: ask(x[full]), np.arange(len(x)), min(batch_size, len(x)))
    logits = np.concatenate([np.asarray(some)[: len(places)] for places, some in batches])
    if not np.isfinite(logits).all():
        raise WorkdirError(f"{folder}: its logits of the training images are not finite; choose another --teacher")
    if distributed.is_main():
        with atomic_file(workdir / FILE) as stream:
            np.savez(stream, logits=logits, teacher=np.array(json.dumps(identity_of(folder))))
    distributed.barrier()


def read_logits(workdir: pathlib.Path) -> np.ndarray:
    """The teacher's logits of the training images, `[n, K]`, that a run's folder keeps.

    Raises:
      WorkdirError: if the file is damaged.
    """
    return _read(workdir)[0]


def _read(workdir: pathlib.Path) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        members = read_members(workdir / FILE, ("logits", "teacher"))
        return members["logits"], json.loads(str(members["teacher"]))
    except (DataError, ValueError) as error:
        raise WorkdirError(f"{error}; delete the file to ask the teacher again") from error
