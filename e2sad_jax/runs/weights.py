"""The weights that a run begins with where `--init_from` names some."""

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from e2sad_jax._io import read_json, write_json
from e2sad_jax.data.dataset import Dataset
from e2sad_jax.errors import ConfigError, WorkdirError, first_line
from e2sad_jax.runs.classifier import Classifier, load
from e2sad_jax.runs.folder import describe_dataset, identity_of, read_config
from e2sad_jax.runs.parameters import load_safetensors
from e2sad_jax.training.config import Config

FILE = "init_from.json"  # which weights a run began with
SEEN = ("transform", "mean", "std")  # what the network's images depend on


def given_weights(config: Config, model: nn.Module, dataset: Dataset) -> Any:
    """The variables of the run or the safetensors file that `config.init_from` names, on the host.

    Those of a run are the raw ones of its last checkpoint; an export has those that it was asked for.

    Raises:
      ConfigError: if they are another network's, or a network's that sees its images otherwise.
      WorkdirError, CheckpointError: if nothing readable is there.
    """
    path, flag = _path(config.init_from), f"--init_from={config.init_from}"
    if not path.exists():
        raise ConfigError(
            f"{flag}: there is no such file or folder; name a run's folder, or a safetensors file of an export"
        )
    given: Classifier = load(path) if path.is_dir() else load_safetensors(path)
    there, here = given.config.in_effect(), config.in_effect()
    for name in SEEN:
        if there[name] != here[name]:
            values = (f"--{name}={values[name]}" if values[name] else f"no --{name}" for values in (there, here))
            raise ConfigError(f"{flag}: trained with {' and not '.join(values)}; give the same")
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *dataset.image_shape)))
    found, wanted = (
        {name: list(leaf.shape) for name, leaf in traverse_util.flatten_dict(tree, sep=".").items()}
        for tree in (given.params, expected)
    )
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{flag}: {name} is {found.get(name, 'absent')} in {_network(given.config, given.dataset)}, but "
                f"{wanted.get(name, 'absent')} in this run's {_network(config, describe_dataset(dataset))}; network, "
                "--width, images and number of classes must be the same"
            )
    return jax.device_get(given.params)


def check_source(config: Config, workdir: pathlib.Path) -> None:
    """Refuses to go on with a run that began with other weights than `config.init_from` holds now.

    Once the run has begun, its source may be gone.

    Raises:
      WorkdirError: naming both.
    """
    there, here = begun_with(workdir), source_of(config.init_from)
    if there is not None and here is not None and there != here:
        raise WorkdirError(
            f"{workdir} began with other weights than {config.init_from} holds now (there {there}, here {here}); choose "
            "another --workdir"
        )


def begun_with(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Which weights a run began with, as `source_of` has them; None if its folder does not say.

    Raises:
      WorkdirError: if that file cannot be read.
    """
    try:
        return read_json(workdir / FILE)  # type: ignore[no-any-return]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WorkdirError(f"cannot read {workdir / FILE}: {first_line(error)}; delete that file to go on") from error


def source_of(init_from: str) -> dict[str, Any] | None:
    """Which weights a run's folder or a safetensors file holds now; None if it is empty, or nothing is there."""
    path = _path(init_from)
    if not init_from or not path.exists():
        return None
    if path.is_dir():
        return identity_of(path)
    with path.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def check_unseen(init_from: str, data: str, validation_examples: int) -> None:
    """Refuses initial weights that were trained on images which are held out now.

    Args:
      init_from: run or safetensors file of the weights; nothing is checked if it names none, or nothing is there.
      data: the data set.
      validation_examples: the number of its training images that are held out.

    Raises:
      ConfigError: if the weights are of the same data set with another number held out.
      WorkdirError: if nothing readable is there.
    """
    path = _path(init_from)
    if not init_from or not path.exists():
        return
    there = read_config(path)[0] if path.is_dir() else load_safetensors(path).config
    if there.data == data and there.validation_examples != validation_examples:
        raise ConfigError(
            f"--init_from={init_from}: trained with --validation_examples={there.validation_examples}, so it has seen images "
            f"that --judge=held_out attacks; give --validation_examples={there.validation_examples}, or --judge=test"
        )


def note_source(config: Config, workdir: pathlib.Path) -> None:
    """Keeps in a run's folder which weights it begins with."""
    write_json(workdir / FILE, source_of(config.init_from))


def _path(init_from: str) -> pathlib.Path:
    return pathlib.Path(init_from).expanduser()


def _network(config: Config, dataset: Mapping[str, Any]) -> str:
    width = f" of --width={config.width}" if config.width else ""
    return f"{config.model}{width} for images {list(dataset['image_shape'])} of {dataset['num_classes']} classes"
