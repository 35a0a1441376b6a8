"""Layers in bfloat16 with float32 kernels, against Flax's layers and float64."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from e2sad_jax.networks import Conv, Dense, mixed

pytestmark = pytest.mark.usefixtures("all_unoptimized")

LAYERS = {
    "Table 4, second": ((5, 14, 14, 3), "Conv", {"features": 4, "kernel_size": (5, 5), "padding": 2}),
    "Table 5, third": ((3, 6, 7, 3), "Conv", {"features": 4, "kernel_size": (3, 3), "padding": "VALID"}),
    "halving": ((4, 8, 8, 3), "Conv", {"features": 4, "kernel_size": (3, 3), "strides": (2, 2), "padding": 1}),
    "halving what is odd": ((4, 9, 6, 3), "Conv", {"features": 4, "kernel_size": (3, 2), "strides": (2, 3)}),
    "shortcut": ((4, 8, 8, 3), "Conv", {"features": 4, "kernel_size": (1, 1), "strides": (2, 2), "padding": 0}),
    "dense": ((6, 20), "Dense", {"features": 5}),
    "dense of many axes": ((2, 3, 20), "Dense", {"features": 5}),
}


def example(name):
    """Layers of ours and of Flax with the same parameters, inputs, and the cotangent of their outputs."""
    shape, kind, settings = LAYERS[name]
    ours, theirs = ({"Conv": Conv, "Dense": Dense}[kind], getattr(nn, kind))
    ours, theirs = (layer(**settings, dtype=jnp.bfloat16) for layer in (ours, theirs))
    x = jax.random.normal(jax.random.key(1), shape).astype(jnp.bfloat16)
    params = theirs.init(jax.random.key(0), x)
    g = jax.random.normal(jax.random.key(2), jax.eval_shape(theirs.apply, params, x).shape).astype(jnp.bfloat16)
    return ours, theirs, params, x, g


def gradients(layer, params, x, g):
    y, back = jax.vjp(layer.apply, params, x)
    return y, *back(g)


@pytest.mark.parametrize("name", LAYERS)
def test_on_the_cpu_values_and_gradients_are_flax_own(name):
    ours, theirs, params, x, g = example(name)
    found = (jax.jit(functools.partial(gradients, layer))(params, x, g) for layer in (ours, theirs))
    for own, other in zip(*map(jax.tree.leaves, found), strict=True):
        assert own.dtype == other.dtype
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("name", LAYERS)
def test_on_accelerators_gradients_of_kernels_are_not_rounded(name):
    _, theirs, params, x, g = example(name)
    kernel = params["params"]["kernel"]
    settings = LAYERS[name][2]
    if "features" in settings and "kernel_size" in settings:
        strides, padding = settings.get("strides", (1, 1)), settings.get("padding", "SAME")
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
        elif isinstance(padding, int):
            padding = ((padding, padding),) * 2
        wide = functools.partial(mixed._wide_conv_kernel, strides=strides, padding=tuple(padding))
    else:
        wide = mixed._wide_dot_kernel
    got = jax.jit(functools.partial(wide, shape=kernel.shape))(x, g)
    rounded = gradients(theirs, params, x, g)[1]["params"]["kernel"]
    with jax.enable_x64(True):
        whole = type(theirs)(**settings, dtype=jnp.float64, param_dtype=jnp.float64)
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        _, truth, _ = gradients(whole, double, jnp.asarray(x, jnp.float64), jnp.asarray(g, jnp.float64))
        truth = np.asarray(truth["params"]["kernel"])
    scale = np.abs(truth).max()
    assert got.dtype == jnp.float32
    assert np.abs(got - truth).max() < 1e-5 * scale
    assert np.abs(rounded - truth).max() > 1e-4 * scale, "what Flax has is rounded to bfloat16"


@pytest.mark.parametrize("name", ["halving what is odd", "dense"])
def test_derivatives_of_every_order_are_near_flax_own(name):
    """Forward, and the gradient of a gradient's norm: input-gradient penalties need it."""
    ours, theirs, params, x, g = example(name)

    def all_of(layer):
        def norm(params):
            return (jax.vjp(functools.partial(layer.apply, params), x)[1](g)[0].astype(jnp.float32) ** 2).sum()

        forward = jax.jvp(layer.apply, (params, x), (params, x))[1]
        return forward, jax.grad(norm)(params)["params"]["kernel"]

    for own, other in zip(*(jax.jit(functools.partial(all_of, layer))() for layer in (ours, theirs)), strict=True):
        own, other = np.asarray(own, np.float32), np.asarray(other, np.float32)
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(own, other, rtol=0, atol=0.01 * np.abs(other).max())


@pytest.mark.parametrize("name", ["halving", "dense"])
def test_many_kernels_at_once_are_one_after_the_other(name):
    ours, _, params, x, g = example(name)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    both = jax.jit(jax.vmap(functools.partial(gradients, ours), (0, None, None)))(several, x, g)
    for i in range(2):
        one = gradients(ours, jax.tree.map(operator.itemgetter(i), several), x, g)
        for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(one), strict=True):
            a, b = np.asarray(a[i], np.float32), np.asarray(b, np.float32)
            np.testing.assert_allclose(a, b, rtol=0, atol=0.01 * np.abs(b).max())


@pytest.mark.parametrize("name", ["halving", "dense"])
@pytest.mark.parametrize(("platform", "wide"), [("tpu", True), ("cpu", False)])
def test_many_gradients_of_kernels_are_not_rounded_either(name, platform, wide):
    ours, _, params, x, g = example(name)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    many = jax.jit(jax.vmap(lambda params: gradients(ours, params, x, g)[1]["params"]["kernel"]))
    text = many.trace(several).lower(lowering_platforms=(platform,)).as_text()
    products = [
        line for line in text.splitlines() if "stablehlo.convolution" in line or "stablehlo.dot_general" in line
    ]
    assert products
    assert wide == any(line.rsplit("->", 1)[1].rstrip().endswith("xf32>") for line in products)


def test_inside_shard_map_it_is_jaxs_own_and_right():
    for name in ("halving", "dense"):
        ours, _, params, x, g = example(name)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows, whole = PartitionSpec("data"), PartitionSpec()

        def kernel(params, x, g, ours=ours):
            return gradients(ours, params, x, g)[1]["params"]["kernel"]

        got = jax.jit(jax.shard_map(kernel, mesh=mesh, in_specs=(whole, rows, rows), out_specs=whole))(params, x, g)
        want = np.asarray(kernel(params, x, g))
        np.testing.assert_allclose(got, want, rtol=0, atol=0.02 * np.abs(want).max())


def test_what_has_one_dtype_is_as_before():
    for kind, shape in ((Conv, (2, 5, 5, 1)), (Dense, (2, 7))):
        settings = {"kernel_size": (3, 3)} if kind is Conv else {}
        x = jnp.ones(shape)
        layer = kind(features=3, **settings)
        program = str(jax.make_jaxpr(layer.apply)(layer.init(jax.random.key(0), x), x))
        assert "mixed" not in program
    x, w = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((3, 4))
    np.testing.assert_array_equal(mixed.dot_general(x, w, (((1,), (1,)), ((), ()))), 4)
