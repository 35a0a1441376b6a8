"""Carlini and Wagner's attack: distances of linear models, nearer images than DeepFool's, and its search of c."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from tests.unit.attacks.helpers import size
from tests.unit.attacks.test_deepfool import exact, images, linear, network, stretched


def cw(logits_fn: Callable[[jax.Array], jax.Array], x: jax.Array, labels: jax.Array, **kwargs: Any) -> jax.Array:
    """In fewer and longer steps than by default."""
    kwargs = {"steps": 120, "binary_steps": 7, "learning_rate": 0.03, "initial_c": 0.1, **kwargs}
    return attacks.carlini_wagner(logits_fn, x, labels, **kwargs)


@pytest.mark.parametrize(("classes", "confidence"), [(2, 0.5), (3, 0.0)])
def test_of_a_linear_model_it_comes_near_the_distance(classes, confidence):
    x, f = images(), linear(classes)
    labels = f(x).argmax(1)
    got = jax.jit(lambda z: cw(f, z, labels, confidence=confidence))(x)
    distance, point = exact(classes, "l2", confidence)
    assert (point > 0).all()
    assert (point < 1).all()
    assert (losses.margin(f(got), labels) > confidence).all()
    assert (size(got - x, "l2") > 0.999 * distance).all()
    assert (size(got - x, "l2") < 1.02 * distance).all()


@pytest.mark.parametrize(("first", "tried"), [(1e-4, 12), (10.0, 16)])
def test_is_the_same_search_from_any_first_c(first, tried):
    """From a far too small and a far too large one; in small steps, as one that overshoots would end the search."""
    x, f = images(), linear(3)
    labels = f(x).argmax(1)
    run = {"steps": 400, "learning_rate": 0.004, "initial_c": first, "binary_steps": tried}
    got = jax.jit(lambda z: cw(f, z, labels, **run))(x)
    np.testing.assert_allclose(size(got - x, "l2"), exact(3, "l2")[0], rtol=0.03)


def test_finds_nearer_images_of_a_network_than_deepfool():
    """In the mean, and none much farther."""
    x = images()
    labels = network(x).argmax(1)
    near = jax.jit(lambda z: cw(network, z, labels))(x)
    deep = jax.jit(lambda z: attacks.deepfool(network, z, labels))(x)
    assert (losses.margin(network(near), labels) > 0).all()
    assert (size(near - x, "l2") < 1.03 * size(deep - x, "l2")).all()
    assert size(near - x, "l2").mean() < 0.995 * size(deep - x, "l2").mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stays_in_another_range_and_fools_in_the_images_own_dtype(dtype):
    stretched(cw, dtype)
