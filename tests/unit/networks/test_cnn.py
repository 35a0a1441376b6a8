"""The paper's networks: sizes, shapes, precision, gradients, and which images they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import losses, networks
from e2sad_jax.errors import DataError

pytestmark = pytest.mark.usefixtures("all_unoptimized")
MNIST, SVHN = (28, 28, 1), (32, 32, 3)
# Tables 4 and 5: kernels in order.
TABLES = {
    "mnist_cnn": (MNIST, [(5, 5, 1, 32), (5, 5, 32, 64), (7 * 7 * 64, 1024), (1024, 10)], 3_274_634),
    "svhn_cnn": (SVHN, [(5, 5, 3, 32), (5, 5, 32, 64), (3, 3, 64, 128), (5 * 5 * 128, 512), (512, 10)], 1_771_594),
    "digits_cnn": ((8, 8, 1), [(5, 5, 1, 16), (5, 5, 16, 32), (2 * 2 * 32, 256), (256, 10)], 48_842),
}


def shapes(model, image_shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))


def images(n, image_shape, seed=0):
    return jnp.asarray(np.random.RandomState(seed).rand(n, *image_shape), jnp.float32)


@pytest.mark.parametrize("name", TABLES)
def test_layers_and_parameter_count(name):
    image_shape, kernels, count = TABLES[name]
    params = shapes(networks.create(name, 10, image_shape), image_shape)
    assert networks.count_parameters(params) == count
    layers = params["params"]
    order = sorted(layers, key=lambda layer: (layer.startswith("Dense"), layer))
    assert [layers[layer]["kernel"].shape for layer in order] == kernels
    assert [layers[layer]["bias"].shape for layer in order] == [kernel[-1:] for kernel in kernels]
    assert sum(np.prod(kernel) + kernel[-1] for kernel in kernels) == count


def test_every_model_has_a_table():
    assert set(networks.NETWORKS) == {*TABLES, "preact_resnet18", "wide_resnet28_10", "wide_resnet34_10"}, (
        "with their own tests"
    )


@pytest.mark.parametrize(("model", "image_shape", "outputs"), [
    (networks.MnistCNN(), MNIST, [(28, 28, 32), (14, 14, 64), (1024,), (10,)]),
    (networks.SvhnCNN(), SVHN, [(28, 28, 32), (24, 24, 64), (10, 10, 128), (512,), (10,)]),
])  # fmt: skip
def test_output_of_each_layer(model, image_shape, outputs):
    """Padding and pooling of the tables: what each layer returns for one image."""
    params = shapes(model, image_shape)

    def run(params, x):
        return model.apply(params, x, capture_intermediates=True, mutable="intermediates")[1]

    layers = jax.eval_shape(run, params, jnp.zeros((2, *image_shape)))["intermediates"]
    order = sorted((k for k in layers if k != "__call__"), key=lambda layer: (layer.startswith("Dense"), layer))
    assert [layers[layer]["__call__"][0].shape for layer in order] == [(2, *shape) for shape in outputs]


@pytest.mark.parametrize(("name", "total"), [("mnist_cnn", "3,274,634"), ("svhn_cnn", "1,771,594")])
def test_describe_shows_layers_and_total(name, total):
    image_shape, kernels, _ = TABLES[name]
    text = networks.describe(networks.create(name, 10, image_shape), image_shape)
    assert total in text
    for kernel in kernels:
        assert f"[{','.join(str(size) for size in kernel)}]" in text
    for layer in ("Conv_0", "Conv_1", "Dense_0", "Dense_1"):
        assert layer in text


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("precision", networks.PRECISIONS)
@pytest.mark.parametrize("num_classes", [2, 10])
def test_every_model_in_every_precision(name, precision, num_classes):
    """Parameters and logits are float32, whatever the layers compute in."""
    image_shape = TABLES[name][0]
    model = networks.create(name, num_classes, image_shape, precision)
    with jax.numpy_dtype_promotion("standard" if precision == "bf16" else "strict"):
        params = shapes(model, image_shape)
        logits = jax.eval_shape(lambda p, x: networks.logits_fn(model, p)(x), params, jnp.zeros((3, *image_shape)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert logits.shape == (3, num_classes)
    assert logits.dtype == jnp.float32


def test_unknown_names():
    with pytest.raises(KeyError, match="resnet"):
        networks.create("resnet", 10, MNIST)
    with pytest.raises(KeyError, match="float8"):
        networks.create("mnist_cnn", 10, MNIST, "float8")


def test_bfloat16_is_near_float32_and_not_the_same():
    """Losses see float32 logits, within bfloat16's 8 bits of the float32 network's."""
    x = images(4, (8, 8, 1))
    full, narrow = (networks.create("digits_cnn", 10, (8, 8, 1), p) for p in ("float32", "bf16"))
    params = jax.jit(full.init)(jax.random.key(0), x)
    with jax.numpy_dtype_promotion("standard"):
        want, got = jax.jit(full.apply)(params, x), jax.jit(narrow.apply)(params, x)
    assert got.dtype == want.dtype == jnp.float32
    error = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-5 < error < 0.03


@pytest.mark.parametrize(
    ("name", "image_shape", "least"),
    [("mnist_cnn", (3, 28, 1), 4), ("digits_cnn", (28, 2, 1), 4), ("svhn_cnn", (15, 32, 3), 16)],
)
def test_images_too_small_are_refused(name, image_shape, least):
    """Value, bound and remedy in one line."""
    with pytest.raises(DataError) as error:
        networks.create(name, 10, image_shape)
    message = str(error.value)
    for part in (f"{image_shape[0]}x{image_shape[1]}", name, f"{least}x{least}", "--model", *networks.NETWORKS):
        assert part in message


@pytest.mark.parametrize(("name", "image_shape"), [
    ("mnist_cnn", (4, 4, 1)), ("mnist_cnn", (32, 32, 3)), ("mnist_cnn", (7, 9, 2)),
    ("svhn_cnn", (16, 16, 3)), ("svhn_cnn", (28, 28, 1)), ("digits_cnn", (28, 28, 1)),
])  # fmt: skip
def test_other_image_shapes(name, image_shape):
    """Down to the smallest one allowed, a gradient reaches every layer."""
    model = networks.create(name, 3, image_shape)
    x = jnp.zeros((2, *image_shape))
    params = shapes(model, image_shape)
    assert jax.eval_shape(model.apply, params, x).shape == (2, 3)
    assert all(0 not in leaf.shape for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("model", "image_shape"), [
    (networks.MnistCNN(num_classes=3, features=(2, 3), hidden=5), (8, 8, 1)),
    (networks.SvhnCNN(num_classes=3, features=(2, 3, 4), hidden=5), (16, 16, 2)),
])  # fmt: skip
def test_gradient_against_finite_differences(model, image_shape):
    """In float64, along random directions of the weights and of the images."""
    rs = np.random.RandomState(0)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x = jnp.asarray(rs.rand(3, *image_shape))
        y = losses.soft_labels(jnp.arange(3), 3)
        params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rs.randn(*leaf.shape)), shapes(model, image_shape))

        @jax.jit
        def loss(both):
            return losses.cross_entropy(networks.logits_fn(model, both[0])(both[1]), y).sum()

        gradient = jax.jit(jax.grad(loss))((params, x))
        step = 1e-6
        for _ in range(3):
            way = jax.tree.map(lambda leaf: rs.randn(*leaf.shape), (params, x))
            up, down = (loss(jax.tree.map(lambda a, d, s=s: a + s * step * d, (params, x), way)) for s in (1, -1))
            slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, way)))
            np.testing.assert_allclose((up - down) / (2 * step), slope, rtol=1e-5)
            assert abs(slope) > 1e-3


def test_an_image_does_not_see_its_neighbours():
    model = networks.MnistCNN(num_classes=3, features=(2, 3), hidden=5)
    x = images(4, (8, 8, 1))
    f = jax.jit(networks.logits_fn(model, jax.jit(model.init)(jax.random.key(0), x)))
    np.testing.assert_allclose(f(x)[2:3], f(x[2:3]), rtol=1e-5, atol=1e-6)
    assert np.abs(f(x)[0] - f(x)[1]).max() > 1e-3
