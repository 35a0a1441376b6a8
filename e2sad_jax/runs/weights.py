"""The weights that a run begins with where `--init_from` names some."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2sad_jax.data.dataset import Dataset
from e2sad_jax.errors import ConfigError
from e2sad_jax.runs.classifier import Classifier, load
from e2sad_jax.runs.parameters import load_safetensors
from e2sad_jax.training.config import Config

SEEN = ("transform", "mean", "std")  # what the network's images depend on


def given_weights(config: Config, model: nn.Module, dataset: Dataset) -> Any:
    """The variables of the run or the safetensors file that `config.init_from` names, on the host.

    Those of a run are of its last checkpoint.

    Raises:
      ConfigError: if they are another network's, or a network's that sees its images otherwise.
      WorkdirError, CheckpointError: if nothing readable is there.
    """
    path = pathlib.Path(config.init_from).expanduser()
    given: Classifier = load(path) if path.is_dir() else load_safetensors(path)
    for name in SEEN:
        there, here = getattr(given.config, name), getattr(config, name)
        if there != here:
            raise ConfigError(
                f"--init_from={config.init_from}: trained with --{name}={there}, not {here}; give the same"
            )
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *dataset.image_shape)))
    wanted, found = (jax.tree.map(lambda leaf: tuple(leaf.shape), tree) for tree in (expected, given.params))
    if wanted != found:
        about = given.dataset
        raise ConfigError(
            f"--init_from={config.init_from}: holds {given.config.model} for images {list(about['image_shape'])} of "
            f"{about['num_classes']} classes, not {config.model} for {list(dataset.image_shape)} of {dataset.num_classes}; "
            "give the same --model, --width and shape of images"
        )
    return jax.device_get(given.params)
