"""Pre-activation residual networks for small images, narrow and wide, as Flax Linen modules."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from e2sad_jax import _arguments
from e2sad_jax.networks import mixed
from e2sad_jax.networks._inputs import standardized
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


def _logits(net: Any, x: jax.Array, train: bool, widths: Sequence[int], blocks: int) -> jax.Array:
    """A convolution, stages of `blocks` blocks of these widths, of which all but the first halve the image, and pooling."""
    kwargs = {"dtype": net.dtype, "precision": net.precision}
    x = Conv(net.width, (3, 3), padding=1, **kwargs)(standardized(x, net.mean, net.std))
    for stage, features in enumerate(widths):
        for block in range(blocks):
            x = PreActBlock(features, 2 if stage and not block else 1, **kwargs)(x, train)
    x = nn.relu(BatchNorm(net.dtype)(x, train)).mean((1, 2))
    x = mixed.Dense(net.num_classes, **kwargs)(x)
    return x.astype(_arguments.wide(x.dtype))


class PreActResNet18(nn.Module):
    """The 18-layer pre-activation residual network for small images such as CIFAR's.

    A 3x3 convolution, four stages of two blocks with 1, 2, 4 and 8 times `width` filters, of which the last three halve
    the image, and global average pooling; 11,172,170 parameters for 3 channels and 10 classes.

    Attributes:
      num_classes: number of classes K.
      width: filters of the first convolution and the first stage.
      dtype: that the layers compute in; None for that of the parameters.
      precision: of float32 products (`jax.lax.Precision`).
      mean: that is taken from each channel of the images first, or one for all; none where it is empty.
      std: by which they are divided then.

    Reference: He et al., 2016, https://arxiv.org/abs/1603.05027
    """

    num_classes: int = 10
    width: int = 64
    dtype: Any = None
    precision: Any = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    min_size = 8  # lowest height and width: 8 -> 4 -> 2 -> 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return _logits(self, x, train, [self.width * 2**stage for stage in range(4)], blocks=2)


class WideResNet(nn.Module):
    """The wide residual network: 16 filters, then three stages of blocks with 16, 32 and 64 times `widen_factor` filters.

    The last two stages halve the image; global average pooling follows. WRN-28-10 has 36,479,194 parameters for 3 channels
    and 10 classes, WRN-34-10 has 46,160,474. There is no dropout, as in robust training.

    Attributes:
      num_classes: number of classes K.
      depth: number of layers, 6 n + 4 for n blocks a stage.
      widen_factor: factor of the stages' widths.
      width: filters of the first convolution, and of a stage before its factor.
      dtype: that the layers compute in; None for that of the parameters.
      precision: of float32 products (`jax.lax.Precision`).
      mean: that is taken from each channel of the images first, or one for all; none where it is empty.
      std: by which they are divided then.

    Raises:
      ValueError: if `depth` is not 6 n + 4.

    Reference: Zagoruyko & Komodakis, 2016, https://arxiv.org/abs/1605.07146
    """

    num_classes: int = 10
    depth: int = 28
    widen_factor: int = 10
    width: int = 16
    dtype: Any = None
    precision: Any = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    min_size = 4  # lowest height and width: 4 -> 2 -> 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        blocks, rest = divmod(self.depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"WideResNet: depth={self.depth}; it must be 6 n + 4 with n at least 1, as 28 and 34 are")
        return _logits(self, x, train, [self.width * self.widen_factor * 2**stage for stage in range(3)], blocks)
