"""Fixtures of the tests of evaluation: a linear model, whose attacks have a closed form."""

from typing import NamedTuple

import numpy as np
import pytest

N, K, SHAPE = 40, 5, (4, 4, 1)


class Problem(NamedTuple):
    """Weights, images well inside [0, 1], labels of which the first five are wrong."""

    w: np.ndarray
    images: np.ndarray
    labels: np.ndarray

    def distance(self, dual: int, classes: int = K) -> np.ndarray:
        """How far each image is from the nearest other class, in the norm whose dual is the `dual`-norm; below 0 if wrong."""
        logits = np.float64(linear(self.w, self.images))
        return np.array(
            [
                min(
                    (logits[i, y] - logits[i, k]) / np.linalg.norm(self.w[:, y] - self.w[:, k], dual)
                    for k in range(classes)
                    if k != y
                )
                for i, y in enumerate(self.labels)
            ]
        )


def linear(params, x):
    return (x.reshape(len(x), -1) - 0.5) @ params


@pytest.fixture(scope="session")
def problem() -> Problem:
    rng = np.random.default_rng(1)
    w = rng.normal(size=(16, K)).astype(np.float32)
    images = rng.uniform(0.2, 0.8, (N, *SHAPE)).astype(np.float32)
    labels = linear(w, images).argmax(1)
    labels[:5] = (labels[:5] + 1) % K
    return Problem(w, images, labels)


@pytest.fixture(scope="module", autouse=True)
def _unoptimized(all_unoptimized):
    """Programs of these tests run a few times."""
