"""Weights of the paper's networks in PyTorch's layout, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax.networks.cnn import MnistCNN, SvhnCNN


def from_torch(model: nn.Module, weights: Mapping[str, Any], image_shape: Sequence[int]) -> Any:
    """The parameters of a network of the paper from the `state_dict` of the same network in PyTorch.

    That is a network with the layers of Table 4 or 5, of any widths: `Conv2d`, then `Flatten` and `Linear`, on images
    `[N, C, H, W]`. Whether ReLU comes before or after pooling makes no difference. Normalise inside the model
    (`evaluation.wrap`).

    Args:
      model: `MnistCNN` or `SvhnCNN`, with the widths of the weights.
      weights: by any names, in the order of the layers: weight `[out, in, ...]` and bias `[out]` of each. Tensors on the CPU
        or NumPy arrays.
      image_shape: (H, W, C).

    Returns:
      Variables of `model`, float32, as `model.init` makes them.

    Raises:
      TypeError: if `model` is another network, or `weights` no mapping.
      ValueError: if `image_shape` is not (H, W, C), or the weights are not those of `model`, with the name of the first that
        is not.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"from_torch: weights is a {type(weights).__name__}; it must be a state_dict, name to array: "
            "torch.load(path, weights_only=True)"
        )
    like, last = _like(model, image_shape)
    expected = [shape for kernel, bias in _shapes(like) for shape in (kernel, bias)]
    found = {name: np.asarray(value, np.float32) for name, value in weights.items()}
    for (name, value), shape in zip(found.items(), expected, strict=False):
        if value.shape != shape:
            raise ValueError(
                f"from_torch: {name} has shape {value.shape}; {_named(model, image_shape)} needs {shape} there"
            )
    if len(found) != len(expected):
        raise ValueError(
            f"from_torch: weights holds {len(found)} arrays; {_named(model, image_shape)} needs {len(expected)}, a weight "
            "and a bias of each layer"
        )
    arrays, params = iter(found.values()), {}
    for name, layer in like.items():
        kernel, bias = next(arrays), next(arrays)
        if kernel.ndim == 4:
            kernel = kernel.transpose(2, 3, 1, 0)  # OIHW -> HWIO
        elif name == "Dense_0":  # nn.Flatten makes [C, H, W] flat, Flax [H, W, C]
            kernel = kernel.reshape(-1, *last).transpose(2, 3, 1, 0).reshape(layer["kernel"].shape)
        else:
            kernel = kernel.T
        params[name] = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    return {"params": params}


def to_torch(model: nn.Module, params: Any, image_shape: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The inverse of `from_torch`: weight `[out, in, ...]` and bias `[out]` of each layer, in their order.

    Args:
      model: `MnistCNN` or `SvhnCNN`. Its `mean` and `std` are no layer: the network in PyTorch has to begin with them.
      params: its variables.
      image_shape: (H, W, C).

    Raises:
      TypeError: if `model` is another network.
    """
    like, (channels, height, width) = _like(model, image_shape)
    layers = []
    for name in like:
        kernel, bias = (np.asarray(params["params"][name][part]) for part in ("kernel", "bias"))
        if kernel.ndim == 4:
            kernel = kernel.transpose(3, 2, 0, 1)
        elif name == "Dense_0":
            kernel = kernel.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(kernel.shape[::-1])
        else:
            kernel = kernel.T
        layers.append((kernel, bias))
    return layers


def _like(model: Any, image_shape: Sequence[int]) -> tuple[Mapping[str, Any], tuple[int, int, int]]:
    """Shapes of the parameters by layer, in the order of the layers; (C, H, W) of what the first dense layer takes."""
    if not isinstance(model, (MnistCNN, SvhnCNN)):
        raise TypeError(f"model is a {type(model).__name__}; it must be MnistCNN or SvhnCNN")
    if len(image_shape) != 3 or min(image_shape[:2]) < model.min_size:
        raise ValueError(
            f"image_shape={tuple(image_shape)}; it must be (H, W, C), H and W at least {model.min_size} for this network"
        )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))["params"]
    names = [f"Conv_{i}" for i in range(len(model.features))] + ["Dense_0", "Dense_1"]
    height, width = (((n - 8) // 2 - 2) // 2 if isinstance(model, SvhnCNN) else n // 2 // 2 for n in image_shape[:2])
    return {name: shapes[name] for name in names}, (model.features[-1], height, width)


def _shapes(like: Mapping[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of weight and bias of each layer in PyTorch."""
    return [
        ((s[3], s[2], s[0], s[1]) if len(s := layer["kernel"].shape) == 4 else s[::-1], layer["bias"].shape)
        for layer in like.values()
    ]


def _named(model: nn.Module, image_shape: Sequence[int]) -> str:
    return f"{type(model).__name__} for images {tuple(image_shape)}"
