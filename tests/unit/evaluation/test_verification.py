"""Adversarial images are looked at again: how far they are, and what the model says of them in other batches."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax.evaluation import Detector, of_function, verify

X = np.full((6, 4), 0.5, np.float32)
Y = np.zeros(6, np.int32)


def logits(x):
    """Class 1 where the first pixel is above 0.55."""
    return jnp.stack([jnp.full(len(x), 0.55), x[:, 0]], 1)


def moved(*by):
    images = X.copy()
    images[:, 0] += np.array(by, np.float32)
    return images


def test_what_fools_the_model_is_counted_and_measured():
    model = of_function(logits, X, Y)
    found = verify(model, moved(0, 0.04, 0.06, 0.1, 0.1, -0.1), eps=0.1)
    np.testing.assert_array_equal(found.fooled, [False, False, True, True, True, False])
    assert (found.outside, found.differ, found.batch_sizes) == (0, 0, (6, 4))
    np.testing.assert_allclose(found.largest, 0.1, rtol=1e-6)
    assert found.as_dict()["fooled"] == 3
    assert verify(model, X, eps=0.1).largest == 0


@pytest.mark.parametrize(
    ("norm", "eps", "outside"), [("linf", 0.1, 1), ("linf", 0.05, 3), ("l2", 0.15, 1), ("l2", 0.11, 2)]
)
def test_what_lies_beyond_the_budget_is_counted_if_it_fools(norm, eps, outside):
    images = moved(0.2, -0.3, 0.06, 0.1, 0, 0)
    images[3, 1] += 0.05  # of l2 length 0.112
    assert verify(of_function(logits, X, Y), images, eps=eps, norm=norm).outside == outside


def test_what_lies_beyond_the_range_is_counted():
    model = of_function(logits, X, Y)
    model = dataclasses.replace(model, images=np.full_like(X, 0.95), bounds=(0.0, 1.0), labels=Y)
    images = np.full_like(X, 0.95)
    images[2, 0] = 1 + 1e-7  # rounding
    assert verify(model, np.minimum(images, 1), eps=0.2).outside == 0


def test_an_image_whose_class_depends_on_the_batch_counts_as_correct():
    model = of_function(lambda x: logits(x + (0.03 if len(x) % 6 else 0)), X, Y)
    found = verify(model, moved(0, 0, 0.04, 0.1, 0.1, 0), eps=0.1)
    np.testing.assert_array_equal(found.fooled, [False, False, False, True, True, False])
    assert found.differ == 1


def test_what_the_model_rejects_fools_it_not():
    model = of_function(logits, X, Y)
    detector = Detector(lambda params, x: x[:, 0], 0.58, 1.0)
    found = verify(dataclasses.replace(model, detector=detector), moved(0, 0, 0.06, 0.1, 0.1, 0), eps=0.1)
    np.testing.assert_array_equal(found.fooled, [False, False, True, False, False, False])
