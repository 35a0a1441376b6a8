"""Weights in PyTorch's layout, against PyTorch's definitions of its layers in SciPy, and PyTorch where it is installed."""

import importlib.util

import jax
import numpy as np
import pytest
from scipy.signal import correlate

from e2sad_jax import networks

MNIST = networks.MnistCNN(num_classes=3, features=(2, 4), hidden=16)
SVHN = networks.SvhnCNN(num_classes=3, features=(2, 3, 4), hidden=16)
CASES = {"mnist": (MNIST, (8, 12, 2)), "odd": (MNIST, (7, 10, 1)), "svhn": (SVHN, (20, 16, 3))}


@pytest.fixture(params=CASES)
def case(request):
    model, shape = CASES[request.param]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2,
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, *shape), np.float32)),
    )
    return model, shape, params, rng.normal(size=(3, *shape)).astype(np.float32)


def state(layers):
    return {f"{i}.{part}": v for i, pair in enumerate(layers) for part, v in zip(("weight", "bias"), pair, strict=True)}


def in_numpy(model, layers, x):
    """Conv2d, ReLU, MaxPool2d, Flatten and Linear as PyTorch documents them, on images `[N, C, H, W]`."""
    svhn = isinstance(model, networks.SvhnCNN)
    pooled, padding = ((False, True, True), 0) if svhn else ((True, True), 2)
    for (weight, bias), pool in zip(layers, pooled, strict=False):
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        x = np.stack([[correlate(image, kernel, "valid")[0] for kernel in weight] for image in x])
        x = np.maximum(x + bias[:, None, None], 0)
        if pool:
            n, c, h, w = x.shape
            x = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
    x = x.reshape(len(x), -1)
    for place, (weight, bias) in enumerate(layers[-2:]):
        x = x @ weight.T + bias
        x = np.maximum(x, 0) if place == 0 else x
    return x


def test_the_weights_mean_the_same_in_both_layouts(case):
    model, shape, params, x = case
    layers = networks.to_torch(model, params, shape)
    want = in_numpy(model, layers, np.moveaxis(np.float64(x), -1, 1))
    np.testing.assert_allclose(model.apply(params, x), want, rtol=1e-4, atol=1e-5)
    assert np.ptp(want, axis=0).min() > 1e-3, "the images matter"


def test_there_and_back(case):
    model, shape, params, _ = case
    back = networks.from_torch(model, state(networks.to_torch(model, params, shape)), shape)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_weights_of_another_network_are_refused(case):
    model, shape, params, _ = case
    layers = networks.to_torch(model, params, shape)
    turned = [*layers[:-2], (layers[-2][0][:, 1:], layers[-2][1]), layers[-1]]
    name = f"{len(layers) - 2}.weight"
    with pytest.raises(
        ValueError, match=rf"from_torch: {name} has shape \(16, \d+\); .*CNN for images .* needs \(16, \d+\)"
    ):
        networks.from_torch(model, state(turned), shape)
    with pytest.raises(ValueError, match=rf"holds {2 * len(layers) - 2} arrays; .* needs {2 * len(layers)}"):
        networks.from_torch(model, state(layers[:-1]), shape)
    with pytest.raises(TypeError, match="weights is a str; it must be a state_dict"):
        networks.from_torch(model, "model.pt", shape)
    with pytest.raises(ValueError, match=r"image_shape=\(1, 8, 8\); it must be \(H, W, C\)"):
        networks.from_torch(model, state(layers), (1, 8, 8))
    with pytest.raises(TypeError, match="model is a PreActResNet18; it must be MnistCNN or SvhnCNN"):
        networks.from_torch(networks.create("preact_resnet18", 10, (32, 32, 3)), {}, (32, 32, 3))


def test_pytorch_itself_agrees_where_it_is_installed(case):
    if importlib.util.find_spec("torch") is None:
        return
    import torch
    from torch import nn

    model, shape, params, x = case
    layers = networks.to_torch(model, params, shape)
    padding = 0 if isinstance(model, networks.SvhnCNN) else 2
    net: list[nn.Module] = []
    for place, (weight, _) in enumerate(layers[:-2]):
        net += [nn.Conv2d(*weight.shape[1::-1], weight.shape[2], padding=padding), nn.ReLU()]
        net += [nn.MaxPool2d(2)] if padding or place else []
    net += [nn.Flatten(), nn.Linear(*layers[-2][0].shape[::-1]), nn.ReLU(), nn.Linear(*layers[-1][0].shape[::-1])]
    there = nn.Sequential(*net)
    back = networks.from_torch(model, there.state_dict(), shape)
    with torch.no_grad():
        want = there(torch.tensor(np.moveaxis(x, -1, 1).copy())).numpy()
    np.testing.assert_allclose(model.apply(back, x), want, rtol=1e-4, atol=1e-5)
