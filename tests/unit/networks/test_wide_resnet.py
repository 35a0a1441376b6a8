"""Wide residual networks: published sizes, layers; both residual networks against PyTorch's layers where it is installed."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import networks
from e2sad_jax.errors import ConfigError, DataError
from e2sad_jax.networks import batch_stats, preact_resnet
from e2sad_jax.training import configure

pytestmark = pytest.mark.usefixtures("all_unoptimized", "standard_promotion")


@pytest.mark.parametrize(("name", "count"), [("wide_resnet28_10", 36_479_194), ("wide_resnet34_10", 46_160_474)])
def test_published_parameter_counts(name, count):
    model = networks.create(name, 10, (32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert networks.count_parameters(variables) == count
    layers = jax.eval_shape(
        lambda v, x: model.apply(v, x, capture_intermediates=True, mutable="intermediates")[1],
        variables,
        jnp.zeros((2, 32, 32, 3)),
    )["intermediates"]
    blocks = (model.depth - 4) // 6
    outputs = [layers[f"PreActBlock_{i}"]["__call__"][0].shape[1:] for i in range(3 * blocks)]
    assert outputs == [(size, size, width) for size, width in ((32, 160), (16, 320), (8, 640)) for _ in range(blocks)]


def test_a_depth_that_no_number_of_blocks_has_is_refused():
    with pytest.raises(ValueError, match=r"WideResNet: depth=30; it must be 6 n \+ 4"):
        networks.WideResNet(depth=30).init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


def test_width_and_statistics_of_the_images_are_the_networks():
    config = configure(model="preact_resnet18", width=2, mean="0.5,0.25,0.1", std="0.2")
    model = networks.create(num_classes=3, image_shape=(8, 8, 3), **config.network())
    plain = networks.create("preact_resnet18", 3, (8, 8, 3), width=2)
    x = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    variables = model.init(jax.random.key(0), x)
    by_hand = (x - jnp.asarray([0.5, 0.25, 0.1]).reshape(1, 1, 1, 3)) / 0.2
    np.testing.assert_allclose(model.apply(variables, x), plain.apply(variables, by_hand), rtol=1e-4, atol=1e-4)
    assert variables["params"]["Conv_0"]["kernel"].shape == (3, 3, 3, 2)
    assert config.digest() != configure(model="preact_resnet18", width=2).digest() != configure().digest()
    cnn = networks.create("digits_cnn", 3, (8, 8, 1), mean=(0.5,), std=(2.0,))
    other = networks.create("digits_cnn", 3, (8, 8, 1))
    weights = cnn.init(jax.random.key(0), x[..., :1])
    np.testing.assert_allclose(
        cnn.apply(weights, x[..., :1]), other.apply(weights, (x[..., :1] - 0.5) / 2), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"std": "0.2,0"}, ConfigError, "--std=0.2,0: must be numbers above 0, separated by commas"),
        ({"mean": "black"}, ConfigError, "--mean=black: must be numbers, separated by commas"),
        ({"mean": "nan"}, ConfigError, "--mean=nan: must be numbers"),
        ({"mean": "0.5,0.5"}, DataError, "--mean=0.5,0.5: 2 numbers for images of 3 channels"),
        ({"width": 8}, ConfigError, "--width=8: --model=svhn_cnn has no width; .* preact_resnet18, wide_resnet28_10"),
    ],
)
def test_what_cannot_be_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        networks.create(num_classes=10, image_shape=(32, 32, 3), **configure(model="svhn_cnn", **settings).network())


if importlib.util.find_spec("torch"):
    import torch
    import torch.nn.functional as F

    def normalised(x, p, train, eps=1e-5):
        scale, bias = p["scale"], p["bias"]
        if train:
            return F.batch_norm(x, torch.zeros_like(scale), torch.ones_like(scale), scale, bias, True, 0.0, eps)
        return F.batch_norm(x, p["mean"], p["var"], scale, bias, False, 0.0, eps)

    def reference(model, p, x, train):
        """The network by PyTorch's functions, as `kuangliu/pytorch-cifar` and TRADES write it."""
        conv = lambda x, layer, stride, pad: F.conv2d(x, layer["kernel"].permute(3, 2, 0, 1), None, stride, pad)  # noqa: E731
        wide = isinstance(model, preact_resnet.WideResNet)
        count, stages = ((model.depth - 4) // 6, 3) if wide else (2, 4)
        x = conv(x, p["Conv_0"], 1, 1)
        for i in range(count * stages):
            block, stride = p[f"PreActBlock_{i}"], 2 if i and i % count == 0 else 1
            y = F.relu(normalised(x, block["BatchNorm_0"], train))
            shortcut = conv(y, block["shortcut"], stride, 0) if "shortcut" in block else x
            y = F.relu(normalised(conv(y, block["Conv_0"], stride, 1), block["BatchNorm_1"], train))
            x = shortcut + conv(y, block["Conv_1"], 1, 1)
        x = F.relu(normalised(x, p["BatchNorm_0"], train)).mean((2, 3))
        return x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]

    def merged(params, stats):
        if not isinstance(params, dict):
            return torch.tensor(np.array(params), requires_grad=True)
        own = {name: merged(value, stats.get(name, {})) for name, value in params.items()}
        averages = {n: torch.tensor(np.array(v)) for n, v in stats.items() if n not in params}
        return {**own, **averages}

    @pytest.mark.parametrize("train", [False, True])
    @pytest.mark.parametrize(
        "model",
        [
            preact_resnet.PreActResNet18(num_classes=4, width=4),
            networks.WideResNet(num_classes=4, depth=10, widen_factor=2),
        ],
        ids=lambda model: type(model).__name__,
    )
    def test_values_and_gradients_are_pytorchs(model, train):
        rng = np.random.default_rng(0)
        x = rng.uniform(size=(4, 12, 12, 3)).astype(np.float32)
        variables = model.init(jax.random.key(0), x)
        stats = variables["batch_stats"]
        if not train:  # in training they are where the moments are taken from: as training begins
            stats = jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.2, 0.8, a.shape), a.dtype), stats)
        variables = {**variables, "batch_stats": stats}
        weights = rng.normal(size=(4, 4)).astype(np.float32)

        def loss(params, x):
            own = {**variables, "params": params}
            slots = batch_stats.slots(own)
            f = batch_stats.training_logits_fn(model, own, slots) if train else lambda x: model.apply(own, x)
            return (f(x) * weights).sum()

        value, (of_params, of_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(variables["params"], x)
        p = merged(jax.device_get(variables["params"]), jax.device_get(stats))
        z = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
        theirs = (reference(model, p, z, train) * torch.tensor(weights)).sum()
        theirs.backward()
        np.testing.assert_allclose(value, theirs.item(), rtol=1e-5, atol=1e-5)
        scale = np.abs(z.grad.numpy()).max()  # of what the small entries are sums of
        np.testing.assert_allclose(of_x, z.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5 * max(1, scale))
        for path, leaf in jax.tree_util.tree_leaves_with_path(of_params):
            other = p
            for key in path:
                other = other[key.key]
            scale = np.abs(other.grad.numpy()).max()
            np.testing.assert_allclose(leaf, other.grad.numpy(), rtol=1e-4, atol=1e-5 * max(1, scale))
