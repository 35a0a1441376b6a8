"""Distances of adversarial images, and robust accuracy at every budget, by the closed form of a linear model."""

import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, evaluation
from e2sad_jax.evaluation import Attack, accuracy_at, distances, optimality
from tests.unit.evaluation.conftest import linear

CLEAN = np.full((4, 2, 2, 3), 0.5, np.float32)
BUDGETS = np.array([0, 0.01, 0.03, 0.1, 0.3])


def moved():
    images = CLEAN.copy()
    images[0, 0, 0] += [0.25, 0.125, 0]
    images[1, 0, 0, 0] -= 0.25
    images[2] += 0.125
    return images


@pytest.mark.parametrize(
    ("norm", "want"),
    [
        ("linf", [0.25, 0.25, 0.125, 0]),
        ("l2", [np.hypot(0.25, 0.125), 0.25, 0.125 * np.sqrt(12), 0]),
        ("l0", [1, 1, 4, 0]),
    ],
)
def test_a_distance_is_the_norm_of_the_change_where_it_fools(norm, want):
    fooled = np.array([True, False, True, True])
    got = distances(CLEAN, jnp.asarray(moved()), fooled, norm=norm)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, np.where(fooled, want, np.inf), rtol=1e-12)


def test_bytes_are_images_in_0_1():
    clean = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    read = clean.astype(np.float32) / 255
    for norm in ("linf", "l2", "l0"):
        assert distances(clean, read, [True], norm=norm) == [0]


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_one_run_of_minimum_norm_gives_the_accuracy_at_every_budget(problem, norm, dual):
    """Of two classes: an image is robust as long as the hyperplane is farther than the budget."""
    w, labels = problem.w[:, :2], np.asarray(linear(problem.w[:, :2], problem.images)).argmax(1)
    labels[:5] = 1 - labels[:5]
    far = problem._replace(w=w, labels=labels).distance(dual, classes=2)
    near = np.asarray(attacks.fmn(lambda z: linear(w, z), jnp.asarray(problem.images), jnp.asarray(labels), norm=norm))
    fooled = evaluation.predict(linear, w, near) != labels
    found = distances(problem.images, near, fooled, norm=norm)
    assert fooled.all()
    np.testing.assert_allclose(found, np.maximum(far, 0), rtol=1e-3, atol=1e-5)
    got = accuracy_at(found, BUDGETS)
    np.testing.assert_array_equal(got, [(far > b).mean() for b in BUDGETS])
    assert got[0] == 35 / 40
    assert got[0] > got[1] > got[-1]


@pytest.mark.parametrize("eps", [0.1, 0.3, 1 / 255])
def test_at_the_edge_of_the_ball_an_image_has_fallen_as_in_an_evaluation(problem, eps):
    """FGSM's images are at eps, in float32."""
    model = evaluation.of_function(linear, problem.images, problem.labels, params=problem.w)
    outcome, images = model.attacked(Attack("FGSM", "fgsm", eps, 1))
    found = distances(problem.images, images, ~outcome.correct, norm="linf")
    assert accuracy_at(found, eps) == outcome.accuracy
    assert accuracy_at(found, 0.99 * eps) == 1


def test_accuracy_counts_what_is_farther_than_the_budget():
    far = [0.0, 0.1, 0.2, np.inf]
    np.testing.assert_array_equal(accuracy_at(far, [[0, 0.05], [0.1, 1e9]]), [[0.75, 0.75], [0.5, 0.25]])
    assert float(accuracy_at(far, 0.15)) == 0.5
    assert accuracy_at([1e-9], 0) == 1, "rounding is not added to no budget"


def test_what_cannot_be_right_is_refused():
    some = np.ones(4, bool)
    cases = [
        ((CLEAN, CLEAN, some, "l1"), "norm='l1'; it must be one of linf, l2, l0"),
        ((CLEAN, CLEAN[:, :1], some, "l2"), r"adversarial images have shape \(4, 1, 2, 3\); it must be that of clean"),
        ((CLEAN, CLEAN * np.nan, some, "l2"), "adversarial images contain NaN"),
        ((CLEAN, CLEAN, some[:2], "l2"), r"fooled is bool \(2,\); it must be bool, one for each of 4 images"),
        ((CLEAN, CLEAN, np.arange(4), "l2"), r"fooled is int64 \(4,\); .*adversarial\) != labels"),
    ]
    for (clean, made, fooled, norm), message in cases:
        with pytest.raises(ValueError, match=message):
            distances(clean, made, fooled, norm=norm)
    for given, message in [
        (([], 0), r"distances have shape \(0,\)"),
        (([[1.0]], 0), r"distances have shape \(1, 1\); it must be \[N\]"),
        (([np.nan], 0), "distances contain nan; each must be at least 0"),
        (([1.0], [0, -0.5]), "budgets contain -0.5; each must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            accuracy_at(*given)


def test_optimality_is_the_share_of_the_area_that_an_attack_takes():
    """Against the areas below the curves, summed at many budgets."""
    rng = np.random.default_rng(0)
    nearest = np.where(rng.random(50) < 0.1, 0.0, rng.random(50))
    own = np.where(rng.random(50) < 0.2, np.inf, nearest * 1.5)
    own[nearest == 0] = 0
    budgets = (np.arange(100_000) + 0.5) / 100_000 * nearest.max()
    area, least = (np.mean((far[:, None] > budgets).mean(0)) for far in (own, nearest))
    clean = (nearest > 0).mean()
    assert optimality(own, nearest) == pytest.approx((clean - area) / (clean - least), abs=1e-4)
    assert optimality(nearest, nearest) == 1
    assert optimality(np.where(nearest > 0, np.inf, 0), nearest) == 0


@pytest.mark.parametrize(
    ("own", "nearest", "share"),
    [
        ([1.0], [1.0], 1.0),
        ([np.inf, 1.0], [np.inf, 1.0], 1.0),
        ([1.0, 1.0, 0.0], [1.0, 1.0, 0.0], 1.0),
        ([np.inf], [1.0], 0.0),
    ],
)
def test_optimality_where_all_fall_at_one_distance(own, nearest, share):
    assert optimality(own, nearest) == share


def test_optimality_of_what_cannot_be_is_refused():
    for own, nearest, message in [
        ([1.0], [1.0, 2.0], r"distances have shape \(1,\) and nearest \(2,\); both must be \[N\], N at least 1"),
        ([[1.0]], [[1.0]], r"distances have shape \(1, 1\)"),
        ([1.0, 1.0], [1.0, 2.0], "image 1 has distance 1, below its nearest 2; nearest is the second argument"),
        ([np.inf], [0.0], "image 0 has distance inf and nearest 0; one that is misclassified as it is must have 0"),
        ([np.nan], [1.0], "distances contain nan; each must be at least 0"),
        ([1.0], [-1.0], "nearest contain -1; each must be at least 0"),
        ([np.inf], [np.inf], "no distance of nearest is finite and above 0"),
        ([0.0], [0.0], "no distance of nearest is finite and above 0"),
        ([], [], r"distances have shape \(0,\)"),
        (["a"], ["b"], "optimality: distances and nearest must be numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimality(own, nearest)
