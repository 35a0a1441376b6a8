"""The two small networks and the images of the reference files on attacks and defenses that the paper cites."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Networks(NamedTuple):
    """Networks by name, images in [0, 1] `[32, 28, 28, 1]` that both classify correctly, and their labels."""

    logits: dict[str, Callable[[jax.Array], jax.Array]]
    images: np.ndarray
    labels: np.ndarray


def load(shared: Callable[[str], Any], name: str) -> dict[str, np.ndarray]:
    with np.load(shared(f"cited/{name}.npz")) as file:
        return dict(file)


def networks(shared: Callable[[str], Any]) -> Networks:
    p = load(shared, "networks")

    def conv(x: jax.Array, kernel: np.ndarray) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def cnn(x: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(conv(x, p["conv1_kernel"]) + p["conv1_bias"][None, None, None])
        hidden = jax.nn.relu(conv(hidden, p["conv2_kernel"]) + p["conv2_bias"][None, None, None])
        return hidden.reshape(len(x), -1) @ p["dense_kernel"] + p["dense_bias"][None]

    def linear(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1) @ p["linear_kernel"] + p["linear_bias"][None]

    images = p["images_uint8"].astype(np.float32) / np.float32(255)
    return Networks({"cnn": cnn, "linear": linear}, images, p["labels"].astype(np.int32))
