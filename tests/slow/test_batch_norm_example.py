"""Models with batch normalisation and dropout of your own, as `examples/batch_norm.py` trains them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx

from e2sad_jax import attacks, defenses, evaluation, losses
from examples import batch_norm

every_library = pytest.mark.parametrize("name", batch_norm.LIBRARIES)
KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def promotion_of_users():
    """Optax and Equinox promote types and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def batch() -> tuple[jax.Array, jax.Array]:
    """Two classes apart by their mean, of images that are neither centred nor of unit variance."""
    rs = np.random.RandomState(0)
    labels = np.arange(32) % 2
    x = np.clip(0.15 + 0.6 * labels[:, None, None, None] + 0.1 * rs.randn(32, 8, 8, 1), 0, 1)
    return jnp.asarray(x, jnp.float32), losses.soft_labels(jnp.asarray(labels), 10, delta=0)


def averages(name, state):
    """The running averages as a user reads them, [mean, variance]."""
    if name == "Linen":
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state[1])]
    if name == "NNX":
        return [np.asarray(state[0].norm.mean[...]), np.asarray(state[0].norm.var[...])]
    network, stored = state[:2]
    return [np.asarray(leaf) for leaf in stored.get(network.norm.batch_state_index)]


def first_layer(name, state, x):
    """What the batch normalisation of an untrained network is given, in NumPy's float64."""
    layer = {"Linen": lambda: state[0]["Dense_0"], "NNX": lambda: state[0].first, "Equinox": lambda: state[0].first}[
        name
    ]()
    if name == "Linen":
        kernel, bias = layer["kernel"], layer["bias"]
    elif name == "NNX":
        kernel, bias = layer.kernel[...], layer.bias[...]
    else:
        kernel, bias = layer.weight.T, layer.bias
    return np.float64(x).reshape(len(x), -1) @ np.float64(kernel) + np.float64(bias)


@every_library
def test_the_clean_pass_alone_moves_the_averages(name, batch):
    """One step of nine passes moves them once, by a tenth, to the statistics of the clean images."""
    library, (x, y) = batch_norm.LIBRARIES[name], batch
    state = library.init(jax.random.key(0), x[:2])
    given, before = first_layer(name, state, x), averages(name, state)
    after = averages(name, library.step(state, x, y, KEY))
    for old, new, statistic in zip(before, after, (given.mean(0), given.var(0)), strict=True):
        np.testing.assert_allclose(new, 0.9 * old + 0.1 * statistic, rtol=1e-4, atol=1e-5)
        assert (new != old).all()


@every_library
def test_trains_and_is_evaluated_without_change(name, batch):
    """Forty steps: finite averages near the data's; in evaluation mode a pure function that suites and attacks take."""
    library, (x, y) = batch_norm.LIBRARIES[name], batch
    state = library.init(jax.random.key(0), x[:2])
    for i in range(40):
        state = library.step(state, x, y, jax.random.fold_in(KEY, i))
    mean, var = averages(name, state)
    assert np.isfinite(mean).all()
    assert (var > 0).all()
    apply, params = library.trained(state)
    labels = np.asarray(y.argmax(-1))
    np.testing.assert_array_equal(apply(params, x), apply(params, x))
    np.testing.assert_allclose(apply(params, x[:3]), apply(params, x)[:3], rtol=1e-4, atol=1e-4)  # no batch statistics
    assert (np.asarray(apply(params, x)).argmax(-1) == labels).all()
    stages = (evaluation.Attack("PGD", "pgd", steps=5),)
    result = evaluation.auto(apply, params, np.asarray(x), labels, eps=0.05, stages=stages, batch_size=32)
    assert result.accuracy["clean"] == 1
    np.testing.assert_array_equal(averages(name, state)[0], mean)


def test_a_step_of_nnx_has_one_mask_and_the_next_step_another(batch):
    x, _ = batch
    network = batch_norm.NNX.init(jax.random.key(0), x[:2])[0]
    first, second = nnx.clone(network)(x), nnx.clone(network)(x)
    np.testing.assert_array_equal(first, second)
    network(x)
    assert (nnx.clone(network)(x) != first).any()


def test_nnx_without_a_clone_is_refused_by_flax(batch):
    """What the example is for: should Flax ever allow it, the averages would follow the attack's passes."""
    x, y = batch
    network = batch_norm.NNX.init(jax.random.key(0), x[:2])[0]
    with pytest.raises(errors.TraceContextError):
        attacks.pgd(KEY, lambda z: losses.cross_entropy(network(z), y), x, eps=0.1, steps=2)
    with pytest.raises(errors.TraceContextError):
        nnx.grad(lambda net: defenses.pgd(net, x, y, key=KEY, eps=0.1, steps=2)[0])(network)
    x_adv = attacks.pgd(KEY, lambda z: losses.cross_entropy(nnx.clone(network)(z), y), x, eps=0.1, steps=2)
    assert (x_adv != x).any()
