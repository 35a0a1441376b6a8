"""FMN: distances of linear models, no farther than DeepFool on a network, and what it leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks
from tests.unit.attacks.helpers import size
from tests.unit.attacks.test_deepfool import exact, images, linear, network, stretched

pytestmark = pytest.mark.usefixtures("unoptimized")


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("classes", [2, 5])
def test_of_a_linear_model_it_finds_the_nearest_boundary(norm, classes):
    x, (distance, _) = images(), exact(classes, norm)
    got = jax.jit(lambda z: attacks.fmn(linear(classes), z, norm=norm))(x)
    assert (linear(classes)(got).argmax(1) != linear(classes)(x).argmax(1)).all()
    assert (size(got - x, norm) >= 0.999 * distance).all()
    exactly = np.isclose(size(got - x, norm), distance, rtol=0.02)
    assert exactly.sum() >= (len(x) if classes == 2 else len(x) - 1), "it follows the class that leads, not all of them"


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_on_a_network_it_comes_nearer_than_deepfool(norm):
    x = images()
    labels = network(x).argmax(1)
    near, rough = (
        jax.jit(functools.partial(attack, network, norm=norm))(x, labels) for attack in (attacks.fmn, attacks.deepfool)
    )
    assert (network(near).argmax(1) != labels).all()
    assert size(near - x, norm).mean() < size(rough - x, norm).mean()
    assert (size(near - x, norm) < 1.05 * size(rough - x, norm)).all()


def test_more_steps_find_no_farther_image():
    """The nearest image of all steps is kept, and the radius closes in on it."""
    x = images()
    lengths = [size(attacks.fmn(network, x, steps=steps) - x, "l2").mean() for steps in (10, 40, 160)]
    assert lengths[0] >= lengths[1] >= lengths[2] > 0


def test_an_image_without_a_boundary_or_of_another_class_stays():
    x = images()
    flat = lambda z: jnp.broadcast_to(jnp.array([1.0, 0.0]), (len(z), 2))  # noqa: E731
    np.testing.assert_array_equal(attacks.fmn(flat, x), x)
    wrong = (linear(3)(x).argmax(1) + 1) % 3
    np.testing.assert_array_equal(attacks.fmn(linear(3), x, wrong), x)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_it_stays_in_any_range_and_dtype(dtype):
    stretched(attacks.fmn, dtype)
