"""The paper's convolutional networks (Tables 4 and 5), as Flax Linen modules.

They map images `[N, H, W, C]` to logits `[N, num_classes]`, float32 or wider; the softmax of the paper's tables is part of
the losses. Pooling comes before ReLU: the same values and gradients with a quarter of the ReLUs.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from e2sad_jax import _arguments
from e2sad_jax.networks import cpu_conv
from e2sad_jax.networks._inputs import standardized
from e2sad_jax.networks.mixed import Conv, Dense


class MnistCNN(nn.Module):
    """The paper's MNIST network (Table 4): two 5x5 convolutions (padding 2), each with 2x2 max pooling and ReLU, then a layer
    of 1,024 units; 3,274,634 parameters for 28x28x1 images and 10 classes.

    Attributes:
      num_classes: number of classes K.
      features: filters of the two convolutions.
      hidden: units of the fully connected layer.
      dtype: that the layers compute in; None for that of the parameters.
      precision: of float32 products (`jax.lax.Precision`).
      mean: that is taken from each channel of the images first, or one for all; none where it is empty.
      std: by which they are divided then.
    """

    num_classes: int = 10
    features: Sequence[int] = (32, 64)
    hidden: int = 1024
    dtype: Any = None
    precision: Any = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    min_size = 4  # lowest height and width: two poolings

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kwargs = {"dtype": self.dtype, "precision": self.precision}
        x = standardized(x, self.mean, self.std)
        for features in self.features:
            x = nn.relu(cpu_conv.max_pool(Conv(features, (5, 5), padding=2, **kwargs)(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(Dense(self.hidden, **kwargs)(x))
        return _logits(Dense(self.num_classes, **kwargs)(x))


class SvhnCNN(nn.Module):
    """The paper's SVHN network (Table 5): convolutions 5x5x32, 5x5x64 and 3x3x128 without padding, max pooling after the
    second and third, then a layer of 512 units; 1,771,594 parameters for 32x32x3 images and 10 classes.

    Attributes: as of `MnistCNN`.
    """

    num_classes: int = 10
    features: Sequence[int] = (32, 64, 128)
    hidden: int = 512
    dtype: Any = None
    precision: Any = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    min_size = 16  # lowest height and width: 16 -> 12 -> 8 -> 4 -> 2 -> 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kwargs = {"padding": "VALID", "dtype": self.dtype, "precision": self.precision}
        first, second, third = self.features
        x = standardized(x, self.mean, self.std)
        x = nn.relu(Conv(first, (5, 5), **kwargs)(x))
        x = nn.relu(cpu_conv.max_pool(Conv(second, (5, 5), **kwargs)(x)))
        x = nn.relu(cpu_conv.max_pool(Conv(third, (3, 3), **kwargs)(x)))
        x = x.reshape(x.shape[0], -1)
        del kwargs["padding"]
        x = nn.relu(Dense(self.hidden, **kwargs)(x))
        return _logits(Dense(self.num_classes, **kwargs)(x))


def _logits(x: jax.Array) -> jax.Array:
    return x.astype(_arguments.wide(x.dtype))
