"""Convolutions and pooling of the CPU against XLA's own, SciPy's and finite differences; which form is chosen where."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import linen as nn
from jax.test_util import check_grads

from e2sad_jax import networks
from e2sad_jax._compile import straight_line
from e2sad_jax.networks import cnn, cpu_conv
from experiments.step_cost.compiled import collective_bytes
from tests.helpers import mostly_slow

pytestmark = pytest.mark.usefixtures("all_unoptimized")

# batch, height, width, channels, filters, kernel, padding: the paper's layers, narrowed; odd and uneven ones.
SHAPES = {
    "Table 4, first": (5, 28, 28, 1, 8, (5, 5), ((2, 2), (2, 2))),
    "Table 4, second": (6, 14, 14, 8, 12, (5, 5), ((2, 2), (2, 2))),
    "Table 5, first": (4, 32, 32, 3, 8, (5, 5), ((0, 0), (0, 0))),
    "Table 5, third": (19, 12, 12, 9, 16, (3, 3), ((0, 0), (0, 0))),
    "uneven": (7, 9, 13, 6, 5, (3, 4), ((1, 0), (0, 2))),
    "as large as the image": (3, 5, 4, 7, 2, (5, 4), ((0, 0), (0, 0))),
    "padding beyond the kernel": (3, 6, 5, 6, 3, (2, 3), ((3, 1), (0, 4))),
    "one by one": (33, 6, 6, 5, 4, (1, 1), ((0, 0), (0, 0))),
    "one channel": (3, 9, 7, 1, 5, (3, 4), ((1, 0), (0, 2))),
    "one channel, a large kernel": (2, 10, 9, 1, 3, (8, 7), ((0, 1), (2, 0))),
    "one image": (1, 12, 10, 2, 3, (3, 3), ((1, 1), (1, 1))),
    "many images": (cpu_conv.LEAST_TURNS * cpu_conv.TOGETHER, 5, 6, 3, 4, (3, 3), ((1, 1), (1, 0))),
    "many images and a rest": (
        (cpu_conv.LEAST_TURNS + 1) * cpu_conv.TOGETHER + 5,
        4,
        5,
        1,
        3,
        (2, 3),
        ((0, 1), (1, 1)),
    ),
}


def example(name: str, dtype=np.float64):
    n, height, width, channels, filters, kernel, padding = SHAPES[name]
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(n, height, width, channels)), rng.normal(size=(*kernel, channels, filters))
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), padding


def xla(x, w, padding):
    return jax.lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("name", SHAPES)
def test_convolution_and_both_gradients_are_those_of_xla(name):
    with jax.enable_x64(True):
        x, w, padding = example(name)
        shape = jax.eval_shape(lambda x, w: xla(x, w, padding), x, w).shape
        g = jnp.asarray(np.random.default_rng(1).normal(size=shape))

        def all_of(conv):
            y, back = jax.vjp(lambda x, w: conv(x, w, padding=padding), x, w)
            return y, *back(g)

        for ours, theirs in zip(*(jax.jit(all_of, static_argnums=0)(f) for f in (cpu_conv.conv, xla)), strict=True):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["uneven", "one channel", "Table 5, first"])
def test_convolution_is_scipys(name):
    with jax.enable_x64(True):
        x, w, padding = example(name)
        padded = np.pad(x, ((0, 0), *padding, (0, 0)))
        expected = [
            [
                sum(scipy.signal.correlate2d(image[..., c], w[..., c, f], "valid") for c in range(w.shape[2]))
                for f in range(2)
            ]
            for image in padded
        ]
        y = cpu_conv.conv(x, w, padding=padding)
    np.testing.assert_allclose(y[..., :2], np.moveaxis(expected, 1, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", mostly_slow(["uneven", "one channel", "one image", "padding beyond the kernel"], ["uneven"])
)
def test_derivatives_of_every_kind_are_those_of_finite_differences(name):
    """Forward and reverse, and their derivatives again: Hamm's penalty and gradient alignment need them."""
    with jax.enable_x64(True):
        x, w, padding = example(name)
        ours = jax.jit(functools.partial(cpu_conv.conv, padding=padding))
        check_grads(ours, (x, w), order=2, modes=("fwd", "rev"), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Table 4, first", "Table 4, second", "Table 5, first"])
def test_float32_is_as_near_to_the_truth_as_xla_is(name):
    x, w, padding = example(name, np.float32)
    with jax.enable_x64(True):
        x64, w64, _ = example(name)
        x64, w64 = x64.astype(jnp.float32).astype(jnp.float64), w64.astype(jnp.float32).astype(jnp.float64)
        y64, back64 = jax.vjp(lambda x, w: xla(x, w, padding), x64, w64)
        g = np.random.default_rng(1).normal(size=y64.shape).astype(np.float32)
        truth = [np.asarray(a) for a in (y64, *back64(jnp.asarray(g, jnp.float64)))]
    for function, allowed in (
        (functools.partial(cpu_conv.conv, padding=padding), 3e-6),
        (lambda x, w: xla(x, w, padding), 3e-6),
    ):
        y, back = jax.vjp(function, x, w)
        for value, true in zip((y, *back(jnp.asarray(g))), truth, strict=True):
            assert value.dtype == jnp.float32
            assert np.abs(value - true).max() <= allowed * np.abs(true).max()


def test_vmap_over_images_kernels_or_both():
    with jax.enable_x64(True):
        x, w, padding = example("uneven")
        xs, ws = jnp.stack([x, 2 * x, -x]), jnp.stack([w, w + 1, -w])
        both = lambda conv, x, w: jax.value_and_grad(lambda x, w: (conv(x, w) ** 2).sum(), (0, 1))(x, w)  # noqa: E731
        ours = functools.partial(both, functools.partial(cpu_conv.conv, padding=padding))
        theirs = functools.partial(both, lambda x, w: xla(x, w, padding))
        for axes, arguments in (((0, 0), (xs, ws)), ((None, 0), (x, ws)), ((1, None), (jnp.moveaxis(xs, 0, 1), w))):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-10),
                jax.vmap(ours, axes)(*arguments),
                jax.vmap(theirs, axes)(*arguments),
            )


@pytest.mark.parametrize("of_gradient", [False, True])
def test_vmap_over_images_alone_is_more_images(of_gradient):
    """So attacks by the mean of many draws, or on the gradients of all classes, have the fast form too."""
    x, w, padding = example("uneven", np.float32)
    xs = jnp.stack([x, 2 * x])

    def once(x):
        y, back = jax.vjp(lambda x: cpu_conv.conv(x, w, padding=padding), x)
        return back(y)[0] if of_gradient else y

    names = [str(eqn.primitive) for eqn in jax.make_jaxpr(jax.vmap(once))(xs).eqns]
    assert "conv_general_dilated" not in names
    assert ("conv_input_gradient" if of_gradient else "conv") in names
    merged = once(xs.reshape(-1, *x.shape[1:]))
    np.testing.assert_allclose(
        jax.jit(jax.vmap(once))(xs), merged.reshape(2, len(x), *merged.shape[1:]), rtol=1e-5, atol=1e-5
    )


def convolutions(function, *arguments) -> list[str]:
    """The order of the axes in each convolution that JAX hands to XLA."""
    text = jax.jit(function).lower(*arguments).as_text()
    return re.findall(r"dim_numbers = (.*?), window", text)


PLAIN = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"


@pytest.mark.parametrize("name", ["Table 4, first", "Table 4, second", "Table 5, first"])
def test_on_the_cpu_each_gradient_is_one_plain_convolution(name):
    """XLA's CPU backend has fast kernels for those only, and turns others into those outside of loops only."""
    x, w, padding = example(name, np.float32)

    def gradients(x, w):
        y, back = jax.vjp(functools.partial(cpu_conv.conv, padding=padding), x, w)
        return back(y)

    # That of one channel is a sum of products instead.
    assert convolutions(gradients, x, w) == [PLAIN] * (2 if x.shape[3] == 1 else 3)
    assert "reverse = [true" not in jax.jit(gradients).lower(x, w).as_text()
    with straight_line():
        plain = convolutions(lambda x, w: gradients(x, w), x, w)
    assert len(plain) == 3, plain
    assert plain != [PLAIN] * 3, "as JAX has them"
    for platform in ("cuda", "tpu"):
        module = jax.export.export(jax.jit(lambda x, w: gradients(x, w)), platforms=[platform])(x, w).mlir_module()
        assert re.findall(r"dim_numbers = (.*?), window", module) == plain


@pytest.mark.parametrize(("name", "turns"), [("many images", 3), ("many images and a rest", 5), ("one by one", 0)])
def test_on_the_cpu_the_kernel_gradient_of_many_images_is_taken_in_turns(name, turns):
    x, w, padding = example(name, np.float32)
    text = jax.jit(jax.grad(lambda w: (cpu_conv.conv(x, w, padding=padding) ** 2).sum())).lower(w).as_text()
    assert text.count("stablehlo.while") == bool(turns)
    if turns:
        assert f"x{cpu_conv.TOGETHER}xf32>" in text
        assert f"dense<{turns}>" in text
        # One of the sum's beginning, one in the loop, and that of the output, which is products for one channel.
        assert text.count("stablehlo.convolution") == 2 + (w.shape[2] > 1)


def test_for_any_number_of_images_the_kernel_gradient_is_taken_at_once():
    x, w, padding = example("many images", np.float32)
    n = jax.export.symbolic_shape("n")[0]
    gradient = jax.jit(lambda x, w: jax.grad(lambda w: (cpu_conv.conv(x, w, padding=padding) ** 2).sum())(w))
    exported = jax.export.export(gradient, platforms=["cpu"])(jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), w)
    np.testing.assert_allclose(exported.call(x, w), gradient(x, w), rtol=1e-4, atol=1e-3)
    function = jax.jit(lambda x, w: cpu_conv.conv(x, w, padding=padding))
    exported = jax.export.export(function, platforms=["cpu"])(jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), w)
    assert exported.serialize(vjp_order=1), "with its gradients"


def test_float64_may_be_lowered_where_it_is_switched_off():
    with jax.enable_x64(True):
        x, w, padding = example("many images")
        traced = jax.jit(jax.grad(lambda w: (cpu_conv.conv(x, w, padding=padding) ** 2).sum())).trace(w)
    assert "f64" in traced.lower().as_text()


@pytest.mark.parametrize("name", ["Table 4, second", "many images"])
def test_on_several_devices_only_the_kernels_gradient_is_summed(name):
    x, w, padding = example(name, np.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def gradients(x, w):
        y, back = jax.vjp(functools.partial(cpu_conv.conv, padding=padding), x, w)
        return back(y)

    compiled = jax.jit(gradients, in_shardings=(rows, whole), out_shardings=(rows, whole)).lower(x, w).compile()
    assert collective_bytes(compiled) == {"all-reduce": w.nbytes}
    for two, one in zip(compiled(jax.device_put(x, rows), jax.device_put(w, whole)), gradients(x, w), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-3)


def general(x, w, **changes):
    settings = dict(window_strides=(1, 1), padding=((1, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    settings |= changes
    ours = cpu_conv.conv_general_dilated(x, w, **settings)
    strides, padding = settings.pop("window_strides"), settings.pop("padding")
    np.testing.assert_allclose(
        ours, jax.lax.conv_general_dilated(x, w, strides, padding, **settings), rtol=1e-5, atol=1e-5
    )
    return "conv_kernel" in str(
        jax.make_jaxpr(jax.grad(lambda w: cpu_conv.conv_general_dilated(x, w, strides, padding, **settings).sum()))(w)
    )


def test_what_this_module_does_not_cover_goes_to_jax():
    x, w, _ = example("uneven", np.float32)
    assert general(x, w)
    assert general(x, w, padding="SAME")
    assert general(x, w, padding="VALID")
    for changes in (
        {"window_strides": (2, 1)},
        {"lhs_dilation": (2, 1)},
        {"rhs_dilation": (1, 2)},
        {"padding": ((-1, 0), (0, 0))},
    ):
        assert not general(x, w, **changes), changes
    assert not general(x, w[:, :, :2, :3], feature_group_count=3)
    assert not general(x.transpose(0, 3, 1, 2), w, dimension_numbers=("NCHW", "HWIO", "NCHW"))
    assert not general(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    assert not general(x[:, 0], w[0], window_strides=(1,), padding=((1, 1),), dimension_numbers=("NWC", "WIO", "NWC"))


@pytest.mark.parametrize(("x", "w"), [((2, 8, 8, 3), (3, 3, 4, 5)), ((2, 4, 4, 3), (5, 5, 3, 2))])
def test_shapes_that_do_not_fit_are_refused(x, w):
    with pytest.raises(ValueError, match=r"does not fit images of shape"):
        cpu_conv.conv(jnp.zeros(x), jnp.zeros(w), padding=((0, 0), (0, 0)))


def test_inside_shard_map_it_is_jaxs_own_and_right():
    x, w, padding = example("Table 4, second", np.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def gradient(x, w):
        return jax.grad(
            lambda w: (
                cpu_conv.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2
            ).sum()
        )(w)

    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(rows, whole), out_specs=whole))
    np.testing.assert_allclose(sharded(x, w), gradient(x, w), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", ["mnist_cnn", "svhn_cnn"])
def test_a_network_and_its_gradients_are_those_of_plain_layers(name, monkeypatch):
    """The whole of Table 4 and 5: logits, parameter gradients, input gradient, and the gradient of a gradient's norm."""
    shape = (28, 28, 1) if name == "mnist_cnn" else (32, 32, 3)
    x = jax.random.uniform(jax.random.key(1), (3, *shape))

    def quantities():
        model = (
            networks.SvhnCNN(features=(2, 3, 4), hidden=8)
            if name == "svhn_cnn"
            else networks.MnistCNN(features=(2, 4), hidden=8)
        )
        params = jax.jit(model.init)(jax.random.key(0), x)

        def loss(params, x):
            return jax.nn.logsumexp(model.apply(params, x) ** 2, axis=-1).sum()

        def penalty(params):
            return jnp.sqrt((jax.grad(loss, 1)(params, x) ** 2).sum())

        def all_of_them(p, x):
            return model.apply(p, x), jax.grad(loss, (0, 1))(p, x), jax.grad(penalty)(p)

        return jax.jit(all_of_them)(params, x)

    ours = quantities()
    monkeypatch.setattr(cnn, "Conv", nn.Conv)
    monkeypatch.setattr(cpu_conv, "max_pool", lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(quantities()), strict=True):
        assert np.abs(a - b).max() <= 2e-5 * np.abs(b).max()


def test_nothing_changes_where_jit_is_disabled():
    """For whoever debugs a loss of a network, operation by operation."""
    model = networks.create("digits_cnn", 3, (8, 8, 1))
    x = jnp.asarray(np.random.RandomState(0).rand(2, 8, 8, 1), jnp.float32)
    logits_fn = networks.logits_fn(model, model.init(jax.random.key(0), x))

    def slope(z):
        return jax.grad(lambda z: (logits_fn(z) ** 2).sum())(z)

    expected = slope(x)
    with jax.disable_jit():
        np.testing.assert_allclose(slope(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8, 8, 5), (2, 7, 9, 1), (1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pooling_is_flax_own_with_its_gradient(shape, dtype):
    """Half of the values are equal to a neighbour: after a ReLU, or on a flat background, many are."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-2, 3, shape), dtype)
    weights = jnp.asarray(rng.integers(1, 9, (shape[0], shape[1] // 2, shape[2] // 2, shape[3])), dtype)

    def theirs(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    (value, ours), (want, reference) = (
        jax.jit(lambda x, f=f: (f(x), jax.grad(lambda x: (weights * f(x) ** 2).sum())(x)))(x)
        for f in (cpu_conv.max_pool, theirs)
    )
    chex.assert_trees_all_equal(value, want)
    chex.assert_trees_all_equal(ours, reference)
    assert np.abs(np.asarray(ours, np.float32)).sum() > 0


def test_pooling_hands_on_what_is_not_a_number():
    for place in np.ndindex(2, 2):
        x = np.zeros((1, 2, 2, 1), np.float32)
        x[0, *place] = np.nan
        assert np.isnan(cpu_conv.max_pool(jnp.asarray(x))).all()


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 3, 1)])
def test_derivatives_of_pooling_of_every_kind_are_those_of_finite_differences(shape):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape), jnp.float64)
        check_grads(jax.jit(lambda x: cpu_conv.max_pool(x**2) ** 2), (x / x.size,), order=2, modes=("fwd", "rev"))


def test_pooling_under_vmap():
    x = jax.random.normal(jax.random.key(0), (2, 3, 6, 5, 4))
    for axis in (0, 3):
        gradients = jax.jit(jax.vmap(jax.grad(lambda x: (cpu_conv.max_pool(x) ** 2).sum()), axis, axis))(
            jnp.moveaxis(x, 0, axis)
        )
        expected = jax.jit(jax.grad(lambda x: (nn.max_pool(x, (2, 2), strides=(2, 2)) ** 2).sum()))
        for one, gradient in zip(x, jnp.moveaxis(gradients, axis, 0), strict=True):
            np.testing.assert_array_equal(gradient, expected(one))


def test_pooling_inside_shard_map_and_on_a_mesh_with_explicit_axes():
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    kinds = jax.sharding.AxisType
    auto, explicit = (jax.make_mesh((2,), ("data",), axis_types=(kind,)) for kind in (kinds.Auto, kinds.Explicit))
    rows = jax.sharding.PartitionSpec("data")
    gradient = jax.jit(jax.grad(lambda x: (cpu_conv.max_pool(x) ** 2).sum()))
    expected = gradient(x)
    sharded = jax.jit(jax.shard_map(gradient, mesh=auto, in_specs=rows, out_specs=rows))
    np.testing.assert_array_equal(sharded(x), expected)
    np.testing.assert_array_equal(gradient(jax.device_put(x, jax.sharding.NamedSharding(explicit, rows))), expected)


def test_no_gradient_of_pooling_pads_with_gaps():
    """As that of slices does: on the CPU it took a fifth of a training step."""

    def gaps(function) -> int:
        pads = re.findall(r"stablehlo.pad.*interior = \[(.*?)\]", jax.jit(function).lower(x).as_text())
        return sum(set(pad.split(", ")) != {"0"} for pad in pads)

    def slices(x):
        return jnp.maximum(x[:, ::2], x[:, 1::2])

    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    loss = lambda pool: lambda x: (pool(x) ** 2).sum()  # noqa: E731
    penalty = lambda pool: lambda x: (jax.grad(loss(pool))(x) ** 3).sum()  # noqa: E731
    assert gaps(jax.grad(loss(slices))) > 0
    assert gaps(jax.grad(loss(cpu_conv.max_pool))) == gaps(jax.grad(penalty(cpu_conv.max_pool))) == 0
