"""Networks in Flax Linen: the paper's CNNs, a narrower one for small images, and PreActResNet-18, by name.

>>> import jax
>>> import jax.numpy as jnp
>>> from e2sad_jax import networks
>>> model = networks.create("digits_cnn", num_classes=10, image_shape=(8, 8, 1))
>>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
>>> networks.count_parameters(variables)
48842
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2sad_jax._compile import pure
from e2sad_jax.errors import ConfigError, DataError
from e2sad_jax.networks import batch_stats
from e2sad_jax.networks.cnn import MnistCNN, SvhnCNN
from e2sad_jax.networks.mixed import Conv, Dense
from e2sad_jax.networks.preact_resnet import PreActResNet18, WideResNet
from e2sad_jax.networks.torch_weights import from_torch, to_torch

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mnist_cnn": MnistCNN,  # Table 4
    "svhn_cnn": SvhnCNN,  # Table 5
    "digits_cnn": functools.partial(MnistCNN, features=(16, 32), hidden=256),  # Table 4, narrower
    "preact_resnet18": PreActResNet18,
    "wide_resnet28_10": WideResNet,
    "wide_resnet34_10": functools.partial(WideResNet, depth=34),
}

# What `--precision` means to the layers: JAX rounds float32 products to TF32 or bfloat16 on accelerators by default.
PRECISIONS: Mapping[str, dict[str, Any]] = {
    "float32": {"precision": jax.lax.Precision.HIGHEST},
    "tf32": {"precision": jax.lax.Precision.HIGH},  # "tensorfloat32" in JAX's own words; on TPU three bfloat16 passes
    "bf16": {"dtype": jnp.bfloat16},
}


def has_batch_norm(name: str) -> bool:
    """Whether a network of `NETWORKS` normalises by the batch in training: whether its `__call__` takes `train`."""
    network = NETWORKS[name]
    module: Any = getattr(network, "func", network)
    return "train" in inspect.signature(module.__call__).parameters


def create(
    name: str,
    num_classes: int,
    image_shape: Sequence[int],
    precision: str = "float32",
    *,
    width: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> nn.Module:
    """The named network for images of `image_shape`.

    Args:
      name: a key of `NETWORKS`.
      num_classes: number of classes K, at least 2.
      image_shape: (H, W, C).
      precision: a key of `PRECISIONS`; parameters and losses stay float32.
      width: filters of a residual network's first convolution; 0 for its own number.
      mean: of the channels, or one for all: the network takes it from its images; none where it is empty.
      std: likewise, above 0: by which it divides them then.

    Returns:
      The Flax module; `model.init(key, images)` makes its variables.

    Raises:
      DataError: if the images are too small for the network, or `mean` or `std` is for another number of channels.
      ConfigError: if the network has no `width` of its own.
      KeyError: if `name` or `precision` is unknown.
    """
    about: dict[str, Any] = {"num_classes": num_classes, **PRECISIONS[precision]}
    for flag, values in (("mean", mean), ("std", std)):
        if len(values) not in (0, 1, image_shape[2]):
            raise DataError(
                f"--{flag}={','.join(map(str, values))}: {len(values)} numbers for images of {image_shape[2]} channels; give "
                "one for each, or one for all"
            )
        if values:
            about[flag] = tuple(values)
    if width:
        about["width"] = width
        wide = [n for n, net in NETWORKS.items() if hasattr(getattr(net, "func", net), "width")]
        if name not in wide:
            raise ConfigError(
                f"--width={width}: --model={name} has no width; leave it out, or take one of {', '.join(wide)}"
            )
    model: Any = NETWORKS[name](**about)
    if min(image_shape[:2]) < model.min_size:
        raise DataError(
            f"images of {image_shape[0]}x{image_shape[1]} are too small for {name}, which needs at least "
            f"{model.min_size}x{model.min_size}; choose another --model ({', '.join(NETWORKS)})"
        )
    return model


@functools.lru_cache(maxsize=128)
def apply_fn(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """The function `(params, images [N, H, W, C]) -> logits [N, K]` of a network: the same object for equal modules.

    So what is compiled for one module is found again for an equal one. Batch normalisation uses its running averages, as
    outside of training; `params` are all of the network's variables.
    """

    @pure
    def apply(params: Any, x: jax.Array) -> jax.Array:
        return cast(jax.Array, model.apply(params, x))

    return apply


def logits_fn(model: nn.Module, params: Any) -> Callable[[jax.Array], jax.Array]:
    """The function from images `[N, H, W, C]` to logits `[N, K]` that attacks and defenses take.

    It is `apply_fn(model)` with `params`. In training `batch_stats.training_logits_fn` takes its place for networks with
    batch normalisation.
    """
    return functools.partial(apply_fn(model), params)


def describe(model: nn.Module, image_shape: Sequence[int]) -> str:
    """A table of the network's layers for one image: output shapes and numbers of parameters, without computing any."""
    image = jnp.zeros((1, *image_shape))
    return model.tabulate(jax.random.key(0), image, console_kwargs={"width": 110, "force_terminal": False})


def count_parameters(params: Any) -> int:
    """The number of parameters in a network's variables, running averages left out."""
    trained = batch_stats.parameters(params) if isinstance(params, Mapping) else params
    return sum(leaf.size for leaf in jax.tree.leaves(trained))


__all__ = [
    "NETWORKS",
    "PRECISIONS",
    "Conv",
    "Dense",
    "MnistCNN",
    "PreActResNet18",
    "SvhnCNN",
    "WideResNet",
    "apply_fn",
    "count_parameters",
    "create",
    "describe",
    "from_torch",
    "has_batch_norm",
    "logits_fn",
    "to_torch",
]
