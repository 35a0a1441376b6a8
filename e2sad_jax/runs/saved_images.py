"""The worst images that an evaluation found, in a file that `--data` reads back bit for bit."""

import pathlib
from typing import NamedTuple

import numpy as np

from e2sad_jax import _io
from e2sad_jax.data.npz import has_member, read_members
from e2sad_jax.errors import ConfigError, DataError, first_line


class Saved(NamedTuple):
    """Inputs of a network, with their labels.

    Attributes:
      inputs: `[N, ...]`, behind the transform.
      labels: `[N]`.
      num_classes: of the model that they were made for.
      transform: name of the transform that they are behind.
    """

    inputs: np.ndarray
    labels: np.ndarray
    num_classes: int
    transform: str


def write(path: pathlib.Path, images: np.ndarray, labels: np.ndarray, num_classes: int, transform: str = "") -> None:
    """Writes images as a file without training images.

    Adversarial images of a network whose transform standardizes each image are none that the transform makes of any pixels.
    So the file holds the network's inputs, and the transform's name.

    Args:
      path: the file.
      images: `[N, H, W, C]`.
      labels: `[N]`.
      num_classes: of the model.
      transform: name of the transform that the images are behind; empty for images in front of it.

    Raises:
      ConfigError: if the file cannot be written.
    """
    arrays = {"x_test": images, "y_test": labels, "num_classes": np.array(num_classes)}
    arrays |= {"transform": np.array(transform)} if transform else {}
    try:
        with _io.atomic_file(path) as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({first_line(error)}); choose another --results") from error


def read(path: pathlib.Path, transform: str) -> Saved | None:
    """Reads what `write` wrote of images behind a transform; None from every other file.

    Args:
      path: the file.
      transform: name of the transform of the model that is to classify them.

    Raises:
      DataError: if the file cannot be read, or its images are behind another transform.
    """
    if not has_member(path, "transform"):
        return None
    members = read_members(path, ("x_test", "y_test"), ("num_classes", "transform"))
    name, count = members["transform"], members.get("num_classes", np.array(0))
    if name.dtype.kind != "U" or name.ndim or str(name) != transform:
        raise DataError(
            f"{path}: its images are behind the transform {str(name)[:40]!r}, those of this model behind {transform!r}; "
            "evaluate the run that they were made for"
        )
    if count.dtype.kind not in "iu" or count.ndim:
        raise DataError(f"{path}: num_classes is {count.dtype} {count.shape}; it must be one integer")
    if members["x_test"].dtype.kind != "f":
        raise DataError(f"{path}: x_test is {members['x_test'].dtype}; inputs behind a transform are floating point")
    return Saved(members["x_test"], members["y_test"], int(count), transform)
