"""The parameters of a trained network as a safetensors file, with what else makes it a classifier as metadata."""

import importlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from e2sad_jax import networks
from e2sad_jax.data.prepared import PREFIX
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.errors import ConfigError, WorkdirError, first_line
from e2sad_jax.runs.classifier import Classifier
from e2sad_jax.training import init_state
from e2sad_jax.training.config import Config

FORMAT = 1  # of the metadata, and of the card of an export

# Packages of the extra `export` that a format needs.
NEEDS = {"stablehlo": ("flatbuffers",), "safetensors": ("safetensors",)}


def to_safetensors(classifier: Classifier) -> bytes:
    """The classifier's parameters by name, "params.Conv_0.kernel" say, and as metadata what else `load_safetensors` needs.

    Kernels lie as in Flax: `[kh, kw, C, F]` of convolutions, `[in, out]` of dense layers.

    Raises:
      ConfigError: if safetensors is missing.
    """
    packages("safetensors")
    from safetensors import numpy as safetensors

    return safetensors.save(_flat(classifier.params), {"e2sad_jax": json.dumps(about(classifier))})


def load_safetensors(path: str | os.PathLike[str]) -> Classifier:
    """The classifier whose parameters `to_safetensors` wrote.

    Raises:
      ConfigError: if safetensors is missing.
      WorkdirError: if the file cannot be read, or does not hold the parameters of the network that it names.
    """
    (safetensors,) = packages("safetensors", path)
    path = pathlib.Path(path).expanduser()
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
            like, rest = _described(file.metadata() or {})
            expected = {name: (leaf.shape, "F32") for name, leaf in _flat(like, lambda leaf: leaf).items()}
            for name in sorted({*expected, *found}):
                if found.get(name) != expected.get(name):
                    raise WorkdirError(
                        f"{path}: {name} is {_shown(found, name)}, where the {rest['config'].model} of its metadata has "
                        f"{_shown(expected, name)}; export the run again"
                    )
            arrays = {name: jnp.asarray(file.get_tensor(name)) for name in names}
    except WorkdirError:
        raise
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise WorkdirError(f"{path} is not a file of parameters that `export` wrote: {first_line(error)}") from error
    return Classifier(params=traverse_util.unflatten_dict(arrays, sep="."), **rest)


def packages(name: str, path: str | os.PathLike[str] = "") -> list[Any]:
    """The packages that a format needs.

    Args:
      name: the format.
      path: the file to be read; empty where the format is to be written.

    Raises:
      ConfigError: if one of them is missing.
    """
    try:
        return [importlib.import_module(package) for package in NEEDS[name]]
    except ImportError as error:
        subject, other = (path, "") if path else (f"--format={name}", f", or leave {name} out of --format")
        raise ConfigError(
            f"{subject}: needs {' and '.join(NEEDS[name])}, of which one cannot be imported ({first_line(error)}); "
            f"pip install 'e2sad_jax[export]'{other}"
        ) from error


def about(classifier: Classifier) -> dict[str, Any]:
    """What a trained network is, without the paths of the machine that it was trained on."""
    config = {k: v for k, v in classifier.config.to_json().items() if k not in ("workdir", "data_dir", "init_from")}
    if not config["data"].startswith(PREFIX):
        config["data"] = pathlib.PurePath(config["data"]).name
    found = {"format": FORMAT, "step": classifier.step, "averaged": classifier.averaged}
    return {**found, "config": config, "dataset": dict(classifier.dataset)}


def _described(about: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """From metadata: the shapes of parameters, and all of a classifier but those."""
    if "e2sad_jax" not in about:
        raise ValueError("its metadata does not describe a network")
    values = json.loads(about["e2sad_jax"])
    if values["format"] != FORMAT:
        raise ValueError(f"its metadata has format {values['format']}, this version reads {FORMAT}")
    config, dataset = Config.from_json(values["config"]), values["dataset"]
    shape, classes = tuple(map(int, dataset["image_shape"])), int(dataset["num_classes"])
    if len(shape) != 3 or min(shape) < 1 or classes < 2:
        raise ValueError(f"its metadata has images of shape {shape} and {classes} classes")
    model = networks.create(num_classes=classes, image_shape=shape, **config.network())
    like = jax.eval_shape(lambda: init_state(config, model, shape, config.batch_size)).params
    rest = {"config": config, "dataset": dataset, "step": int(values["step"]), "model": model}
    return like, {**rest, "transform": TRANSFORMS[config.transform], "averaged": bool(values.get("averaged", False))}


def _shown(entries: Mapping[str, tuple[tuple[int, ...], str]], name: str) -> str:
    return f"{entries[name][1]} {list(entries[name][0])}" if name in entries else "absent"


def _flat(params: Any, leaf: Callable[[Any], Any] = np.asarray) -> dict[str, Any]:
    return {name: leaf(value) for name, value in traverse_util.flatten_dict(params, sep=".").items()}
