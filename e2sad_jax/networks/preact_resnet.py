"""Pre-activation residual networks for small images, as Flax Linen modules."""

import functools
from typing import Any

import flax.linen as nn
import jax

from e2sad_jax import _arguments
from e2sad_jax.networks import mixed
from e2sad_jax.networks.batch_stats import BatchNorm

Conv = functools.partial(mixed.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())


class PreActBlock(nn.Module):
    """A residual block: batch normalisation, ReLU and a 3x3 convolution, twice, plus a shortcut.

    The shortcut is the identity, or a 1x1 convolution after the first ReLU where the shape changes.

    Attributes:
      features: filters.
      stride: of the first convolution.
      dtype: that the layers compute in; None for that of the parameters.
      precision: of float32 products (`jax.lax.Precision`).
    """

    features: int
    stride: int = 1
    dtype: Any = None
    precision: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        kwargs = {"dtype": self.dtype, "precision": self.precision}
        strides = (self.stride, self.stride)
        y = nn.relu(BatchNorm(self.dtype)(x, train))
        if self.stride != 1 or x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1), strides=strides, padding=0, name="shortcut", **kwargs)(y)
        y = Conv(self.features, (3, 3), strides=strides, padding=1, **kwargs)(y)
        y = nn.relu(BatchNorm(self.dtype)(y, train))
        return x + Conv(self.features, (3, 3), padding=1, **kwargs)(y)


class PreActResNet18(nn.Module):
    """The 18-layer pre-activation residual network for small images such as CIFAR's.

    A 3x3 convolution, four stages of two blocks with 1, 2, 4 and 8 times `width` filters, of which the last three halve
    the image, and global average pooling; 11,172,170 parameters for 3 channels and 10 classes.

    Attributes:
      num_classes: number of classes K.
      width: filters of the first convolution and the first stage.
      dtype: that the layers compute in; None for that of the parameters.
      precision: of float32 products (`jax.lax.Precision`).

    Reference: He et al., 2016, https://arxiv.org/abs/1603.05027
    """

    num_classes: int = 10
    width: int = 64
    dtype: Any = None
    precision: Any = None

    min_size = 8  # lowest height and width: 8 -> 4 -> 2 -> 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        kwargs = {"dtype": self.dtype, "precision": self.precision}
        x = Conv(self.width, (3, 3), padding=1, **kwargs)(x)
        for stage in range(4):
            for block in range(2):
                stride = 2 if stage and not block else 1
                x = PreActBlock(self.width * 2**stage, stride, **kwargs)(x, train)
        x = nn.relu(BatchNorm(self.dtype)(x, train)).mean((1, 2))
        x = mixed.Dense(self.num_classes, **kwargs)(x)
        return x.astype(_arguments.wide(x.dtype))
