"""The paper's networks (Tables 4 and 5), a narrow one for small images, and all by name, as Flax Linen modules.

They take images `[N, H, W, C]` and return logits `[N, num_classes]`, float32 at least; the softmax of the paper's
tables is left to the losses. Pooling comes before ReLU: the same numbers and gradients, with a quarter of the ReLUs.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2sad_jax.errors import DataError
from e2sad_jax.networks import batch_stats, cpu_conv
from e2sad_jax.networks.preact_resnet import PreActResNet18

Conv = functools.partial(nn.Conv, conv_general_dilated=cpu_conv.conv_general_dilated)


class MnistCNN(nn.Module):
    """Table 4: two 5x5 convolutions (padding 2), each with ReLU and 2x2 max pooling, then 1,024 units; 3,274,634 parameters
    for 28x28x1 images and 10 classes.

    Attributes:
      num_classes: number of classes K.
      features: filters of the two convolutions.
      hidden: units of the fully connected layer.
      dtype: what the layers compute in; None for the parameters' own.
      precision: of products in float32 (`jax.lax.Precision`).
    """

    num_classes: int = 10
    features: Sequence[int] = (32, 64)
    hidden: int = 1024
    dtype: Any = None
    precision: Any = None

    min_size = 4  # two poolings

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kwargs = {"dtype": self.dtype, "precision": self.precision}
        for features in self.features:
            x = nn.relu(cpu_conv.max_pool(Conv(features, (5, 5), padding=2, **kwargs)(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, **kwargs)(x))
        return _logits(nn.Dense(self.num_classes, **kwargs)(x))


class SvhnCNN(nn.Module):
    """Table 5: 5x5x32 and 5x5x64 convolutions, pooling, 3x3x128, pooling, then 512 units, no padding; 1,771,594 parameters
    for 32x32x3 images and 10 classes.

    Attributes: as of `MnistCNN`.
    """

    num_classes: int = 10
    features: Sequence[int] = (32, 64, 128)
    hidden: int = 512
    dtype: Any = None
    precision: Any = None

    min_size = 16  # 16 -> 12 -> 8 -> 4 -> 2 -> 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kwargs = {"padding": "VALID", "dtype": self.dtype, "precision": self.precision}
        first, second, third = self.features
        x = nn.relu(Conv(first, (5, 5), **kwargs)(x))
        x = nn.relu(cpu_conv.max_pool(Conv(second, (5, 5), **kwargs)(x)))
        x = nn.relu(cpu_conv.max_pool(Conv(third, (3, 3), **kwargs)(x)))
        x = x.reshape(x.shape[0], -1)
        del kwargs["padding"]
        x = nn.relu(nn.Dense(self.hidden, **kwargs)(x))
        return _logits(nn.Dense(self.num_classes, **kwargs)(x))


def _logits(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "mnist_cnn": MnistCNN,  # Table 4
    "svhn_cnn": SvhnCNN,  # Table 5
    "digits_cnn": lambda **kwargs: MnistCNN(features=(16, 32), hidden=256, **kwargs),  # Table 4 narrowed, for a laptop
    "preact_resnet18": PreActResNet18,
}

# How `--precision` maps to layers: JAX rounds float32 products to TF32 or bfloat16 on accelerators unless told not to.
PRECISIONS: Mapping[str, dict[str, Any]] = {
    "float32": {"precision": jax.lax.Precision.HIGHEST},
    "tf32": {"precision": jax.lax.Precision.HIGH},  # "tensorfloat32" by JAX's own name; on TPU three bfloat16 passes
    "bf16": {"dtype": jnp.bfloat16},
}


def create(name: str, num_classes: int, image_shape: Sequence[int], precision: str = "float32") -> nn.Module:
    """The named network for images of `image_shape`.

    Args:
      name: a key of `MODELS`.
      num_classes: number of classes K, at least 2.
      image_shape: (H, W, C).
      precision: a key of `PRECISIONS`; parameters and losses stay float32.

    Raises:
      DataError: if the images are too small for the network.
      KeyError: if `name` or `precision` is unknown.
    """
    model: Any = MODELS[name](num_classes=num_classes, **PRECISIONS[precision])
    if min(image_shape[:2]) < model.min_size:
        raise DataError(
            f"images of {image_shape[0]}x{image_shape[1]} are too small for {name}, which needs at least "
            f"{model.min_size}x{model.min_size}; choose another --model ({', '.join(MODELS)})"
        )
    return model


def logits_fn(model: nn.Module, params: Any) -> Callable[[jax.Array], jax.Array]:
    """The function from network inputs `[N, H, W, C]` to logits `[N, K]` that attacks and defenses take.

    With running averages where the network has batch normalisation; in training `batch_stats.training_logits_fn`.
    """

    def apply(x: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply(params, x))

    return apply


def describe(model: nn.Module, image_shape: Sequence[int]) -> str:
    """The layer table of `model` for one image, with output shapes and parameter counts; nothing is computed."""
    image = jnp.zeros((1, *image_shape))
    return model.tabulate(jax.random.key(0), image, console_kwargs={"width": 110, "force_terminal": False})


def count_parameters(params: Any) -> int:
    """Number of scalars in a tree of parameters, running averages left out."""
    trained = batch_stats.parameters(params) if isinstance(params, Mapping) else params
    return sum(leaf.size for leaf in jax.tree.leaves(trained))
