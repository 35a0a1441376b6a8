"""Reference values of the systems that the paper cites, and the two networks that they were computed on.

The images are MNIST's, so the files stay in ../shared.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Shared = Callable[[str], pathlib.Path]  # the fixture `shared`


class Cited(NamedTuple):
    """Images `[32, 28, 28, 1]` in [0, 1], their labels `[32]`, and logits of the networks "cnn" and "linear"."""

    x: jax.Array
    labels: jax.Array
    logits: dict[str, Callable[[jax.Array], jax.Array]]


def values(shared: Shared, name: str) -> dict[str, Any]:
    """The arrays of ../shared/cited/`name`.npz."""
    with np.load(shared(f"cited/{name}.npz")) as file:
        return dict(file)


def networks(shared: Shared) -> Cited:
    """Both networks, in the images' dtype."""
    given = values(shared, "networks")

    def weights(name: str, z: jax.Array) -> jax.Array:
        return jnp.asarray(given[name], z.dtype)

    def layer(z: jax.Array, name: str) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        z = jax.lax.conv_general_dilated(z, weights(f"{name}_kernel", z), (2, 2), "VALID", dimension_numbers=numbers)
        return jax.nn.relu(z + weights(f"{name}_bias", z).reshape(1, 1, 1, -1))

    def dense(z: jax.Array, name: str) -> jax.Array:
        return z.reshape(z.shape[0], -1) @ weights(f"{name}_kernel", z) + weights(f"{name}_bias", z).reshape(1, -1)

    logits = {
        "cnn": lambda z: dense(layer(layer(z, "conv1"), "conv2"), "dense"),
        "linear": lambda z: dense(z, "linear"),
    }
    x = jnp.asarray(given["images_uint8"].astype(np.float32) / 255)
    return Cited(x, jnp.asarray(given["labels"].astype(np.int32)), logits)
