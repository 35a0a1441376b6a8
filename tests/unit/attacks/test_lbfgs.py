"""L-BFGS: minima of strictly convex problems by another solver, and its distances with those of a search by that solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from e2sad_jax.attacks.core import linf_ball
from e2sad_jax.attacks.lbfgs import minimise
from tests import cited
from tests.helpers import mostly_slow
from tests.unit.attacks.helpers import size
from tests.unit.attacks.test_deepfool import stretched


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("c", mostly_slow(["1.0", "0.1", "0.01"], ["0.01"]))
def test_comes_to_the_one_minimum_of_a_linear_model(c, shared):
    """Of c ||x' - x||^2 + J in [0, 1]; many pixels of the minimum are at a bound."""
    given, golden = cited.networks(shared), cited.values(shared, "lbfgs")
    x, f, y = given.x[:16], given.logits["linear"], losses.soft_labels(jnp.asarray(golden["target"][:16]), 10, 0)
    want, value = golden[f"linear_c{c}_image"], golden[f"linear_c{c}_value"]

    def objective(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.square(z - x).sum((1, 2, 3)) + losses.cross_entropy(f(z), y) / float(c), f(z)

    run = jax.jit(
        lambda x: minimise(
            objective, x, linf_ball(x, jnp.inf, (0.0, 1.0)), steps=200, history=10, visit=lambda s, z, _: s, seen=()
        )[0]
    )
    got = run(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)
    np.testing.assert_allclose(objective(got)[0] * float(c), value, rtol=1e-5)
    assert np.abs(want - x).max() > 10 * 2e-4


@pytest.mark.slow
@pytest.mark.parametrize(("net", "each", "mean"), [("linear", 1.02, 1.01), ("cnn", 1.3, 1.05)])
def test_comes_as_near_as_a_search_with_another_solver(net, each, mean, shared):
    given, golden = cited.networks(shared), cited.values(shared, "lbfgs")
    want, f = golden[f"{net}_search_l2"], given.logits[net]
    x, targets = given.x[: len(want)], jnp.asarray(golden["target"][: len(want)])
    got = jax.jit(lambda x: attacks.lbfgs(f, x, targets=targets))(x)
    np.testing.assert_array_equal(f(got).argmax(1), targets)
    way = size(got - x, "l2")
    assert (way <= each * want).all()
    assert way.mean() <= mean * want.mean()
    # No image of the target is nearer than the boundary to that class.
    deep = jax.jit(lambda x: attacks.deepfool(f, x, targets=targets, overshoot=0.0, bounds=None))(x)
    if net == "linear":
        assert (way >= 0.999 * size(deep - x, "l2")).all()
    assert float(got.min()) >= 0
    assert float(got.max()) <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stays_in_another_range_and_fools_in_the_images_own_dtype(dtype):
    def attack(f, x, labels, **kwargs):
        return attacks.lbfgs(f, x, labels, history=3, steps=30, initial_c=1.0, binary_steps=6, **kwargs)

    stretched(attack, dtype)
