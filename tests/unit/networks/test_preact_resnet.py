"""PreActResNet-18: its layers, its blocks by their formula, and its dtypes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import networks
from e2sad_jax.networks import batch_stats, preact_resnet

pytestmark = pytest.mark.usefixtures("all_unoptimized", "standard_promotion")


def draw(model: nn.Module, shape: tuple[int, ...] = (8, 8, 1)) -> Any:
    """Variables with running averages that are not those of the start."""
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))
    rs = np.random.RandomState(0)
    stats = jax.tree.map(lambda a: jnp.asarray(rs.uniform(0.2, 0.8, a.shape), a.dtype), variables["batch_stats"])
    return {**variables, "batch_stats": stats}


def images(n: int, shape: tuple[int, ...] = (8, 8, 1)) -> jax.Array:
    return jnp.asarray(np.random.RandomState(1).rand(n, *shape), jnp.float32)


def test_layers_and_parameter_count():
    """Table 1 of the residual networks for CIFAR: kernels by stage, strides at the stages' starts, a shortcut there."""
    model = networks.create("preact_resnet18", 10, (32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    kernels = [leaf.shape for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 4]
    want = [(3, 3, 3, 64)]
    for before, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        want += [(3, 3, before, width), *[(3, 3, width, width)] * 3, *([(1, 1, before, width)] if width > 64 else [])]
    assert sorted(kernels) == sorted(want)
    norms = 2 * (64 * 4 + 64 + 128 * 3 + 128 + 256 * 3 + 256 + 512 * 3 + 512)
    assert networks.count_parameters(variables) == sum(map(np.prod, want)) + norms + 512 * 10 + 10 == 11_172_170

    def run(variables, x):
        return model.apply(variables, x, capture_intermediates=True, mutable="intermediates")[1]

    layers = jax.eval_shape(run, variables, jnp.zeros((2, 32, 32, 3)))["intermediates"]
    outputs = [layers[f"PreActBlock_{i}"]["__call__"][0].shape[1:] for i in range(8)]
    assert outputs == [(size, size, width) for size, width in ((32, 64), (16, 128), (8, 256), (4, 512)) for _ in "12"]


def test_a_block_is_its_formula():
    """Shortcut + conv(relu(bn(conv(relu(bn(x)))))), the shortcut a 1x1 convolution where the shape changes."""
    x = images(2, (6, 6, 3)) - 0.5

    def norm(v: Any, p: Any, s: Any) -> np.ndarray:
        return np.maximum((v - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"], 0)

    def conv(v: np.ndarray, kernel: Any, stride: int) -> np.ndarray:
        kernel = np.asarray(kernel, np.float64)
        k, size = kernel.shape[0], v.shape[1] // stride
        v = np.pad(v, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
        out = np.zeros((len(v), size, size, kernel.shape[3]))
        for i in range(k):
            for j in range(k):
                out += v[:, i : i + size * stride : stride, j : j + size * stride : stride] @ kernel[i, j]
        return out

    for features, stride in ((3, 1), (4, 2)):
        block = preact_resnet.PreActBlock(features, stride)
        variables = jax.device_get(draw(block, (6, 6, 3)))
        p, s = variables["params"], variables["batch_stats"]
        y = norm(np.asarray(x, np.float64), p["BatchNorm_0"], s["BatchNorm_0"])
        shortcut = conv(y, p["shortcut"]["kernel"], stride) if stride == 2 else np.asarray(x)
        y = norm(conv(y, p["Conv_0"]["kernel"], stride), p["BatchNorm_1"], s["BatchNorm_1"])
        want = shortcut + conv(y, p["Conv_1"]["kernel"], 1)
        np.testing.assert_allclose(jax.jit(block.apply)(variables, x), want, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_parameters_averages_and_logits_are_float32(precision):
    model = preact_resnet.PreActResNet18(num_classes=5, width=2, **networks.PRECISIONS[precision])
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    slots = batch_stats.slots(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), variables))
    logits = jax.eval_shape(lambda v, x: batch_stats.training_logits_fn(model, v, slots)(x), variables, images(3))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert (logits.shape, logits.dtype) == ((3, 5), jnp.float32)
