"""masking.alignment: the cosine of gradients at an image and at FGSM's point, of functions whose gradients are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import evaluation
from e2sad_jax.evaluation import masking

X = np.float32([[0.5, 0.5, 0.5], [0.4, 0.6, 0.5]])
Y = np.array([0, 0])


def model(of):
    return evaluation.of_function(lambda x: jnp.stack([jnp.zeros(len(x)), of(x)], 1), X, Y)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_keeps_its_direction_is_aligned(norm):
    assert masking.alignment(model(lambda x: x @ jnp.array([1.0, -2.0, 0.5])), 0.1, norm) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 0.2)])
def test_a_gradient_that_turns_round_within_the_step_is_opposed(norm, eps):
    """The other class's logit peaks half a step ahead along the first pixel."""
    peak = jnp.array(X[:, 0] + eps / 2)
    assert masking.alignment(model(lambda x: -jnp.square(x[:, 0] - peak)), eps, norm) == pytest.approx(-1, abs=1e-6)


def test_in_the_plane_it_is_the_cosine_of_the_turn():
    """Gradient (1, 2 t) at t = 0.1 and (1, 2 (t + eps)) after a step, its third entry 0."""
    f = model(lambda x: x[:, 0] + jnp.square(x[:, 1] - jnp.array(X[:, 1]) + 0.1))
    before, after = np.array([1, 0.2]), np.array([1, 2 * (0.1 + 0.3)])
    cosine = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
    assert masking.alignment(f, 0.3) == pytest.approx(cosine, abs=1e-5)
