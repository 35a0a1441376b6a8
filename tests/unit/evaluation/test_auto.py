"""The worst case over several attacks, on models whose worst case is known."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from e2sad_jax.evaluation.auto import auto

from e2sad_jax.evaluation import Attack
from e2sad_jax.evaluation import auto as auto_lib

pytestmark = pytest.mark.usefixtures("all_unoptimized")

N, K, SHAPE, EPS = 60, 5, (4, 4, 1), 0.05
STAGES = (
    Attack("APGD-CE", "apgd", steps=10),
    Attack("APGD-T", "apgd", steps=10, loss="targeted_dlr", targets=4),
    Attack("Square", "square", steps=60),
)


def linear(params, x):
    return x.reshape(len(x), -1) @ params


@pytest.fixture(scope="module")
def problem():
    """Weights, images well inside [0, 1], labels of which some are wrong, and who stands every attack."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(16, K)).astype(np.float32)
    x = rng.uniform(0.2, 0.8, (N, *SHAPE)).astype(np.float32)
    logits = x.reshape(N, -1) @ w
    labels = logits.argmax(1)
    labels[:5] = (labels[:5] + 1) % K
    distance = np.array(
        [
            min((logits[i, y] - logits[i, k]) / np.abs(w[:, y] - w[:, k]).sum() for k in range(K) if k != y)
            for i, y in enumerate(labels)
        ]
    )
    assert np.abs(distance - EPS).min() > 1e-5, "no image is decided by rounding"
    return w, x, labels, distance > EPS


@pytest.fixture(scope="module")
def result(problem):
    w, x, labels, _ = problem
    return auto(linear, w, x, labels, eps=EPS, stages=STAGES, batch_size=16, keep=True)


def test_on_a_linear_model_it_finds_the_exact_worst_case(problem, result):
    _, _, _, stands = problem
    assert 5 < stands.sum() < N - 10
    np.testing.assert_array_equal(result.robust, stands)
    assert list(result.standing) == ["clean", "APGD-CE", "APGD-T", "Square"]
    assert result.accuracy["clean"] == (N - 5) / N
    counts = [int(correct.sum()) for correct in result.standing.values()]
    assert counts == sorted(counts, reverse=True)
    assert list(result.alone.values()) == [a - b for a, b in itertools.pairwise(counts)]


def test_the_images_it_keeps_fool_the_model_inside_the_ball(problem, result):
    w, x, labels, _ = problem
    fooled = result.standing["clean"] & ~result.robust
    assert (np.asarray(linear(w, result.adversarial)).argmax(1) != labels)[fooled].all()
    assert np.abs(result.adversarial - x).max() <= EPS + 1e-6
    np.testing.assert_array_equal(result.adversarial[~fooled], x[~fooled])
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1


def test_what_has_fallen_is_not_attacked_again_and_each_stage_is_compiled_once(problem):
    w, x, labels, _ = problem
    shown, compiled, again = [], [], dataclasses.replace(STAGES[0], name="again")

    def counting(params, z):
        compiled.append(z.shape)
        return linear(params, z)

    def progress(name, images):
        shown.append((name, images))

    result = auto(counting, w, x, labels, eps=EPS, stages=(STAGES[0], again), batch_size=16, progress=progress)
    traces = len(compiled)
    auto(counting, w, x, labels, eps=2 * EPS, stages=STAGES[:1], batch_size=16)
    assert len(compiled) <= traces + 1, "another budget is the same program; only the classes are asked for"
    assert sum(images for _, images in shown) == result.standing["clean"].sum() + result.standing["APGD-CE"].sum()


def test_it_does_not_depend_on_the_batch_size(problem, result):
    w, x, labels, _ = problem
    other = auto(linear, w, x, labels, eps=EPS, stages=STAGES, batch_size=50, keep=True)
    np.testing.assert_allclose(result.adversarial, other.adversarial, atol=1e-6)  # random starts and all
    for name in result.standing:
        np.testing.assert_array_equal(result.standing[name], other.standing[name])


def test_square_finds_what_gradients_do_not_show(problem):
    w, x, labels, _ = problem

    def rounded(params, z):  # no gradient anywhere
        return linear(params, jnp.round(z * 40) / 40)

    result = auto(rounded, w, x, labels, eps=EPS, stages=(STAGES[0], dataclasses.replace(STAGES[2], steps=200)))
    assert result.alone["Square"] > 10
    assert result.alone["Square"] > result.alone["APGD-CE"]


def test_too_few_classes_for_the_targeted_loss_are_refused_with_what_to_do(problem):
    w, x, labels, _ = problem
    with pytest.raises(ValueError, match=r"'APGD-T': .* needs at least 4 classes; the model has 3: leave it out"):
        auto(linear, w[:, :3], x, labels % 3, eps=EPS, stages=STAGES)
    auto(linear, w[:, :3], x, labels % 3, eps=EPS, stages=STAGES[:1])
    with pytest.raises(ValueError, match=r"labels \(59,\) must be one for each of 60 images"):
        auto(linear, w, x, labels[:-1], eps=EPS)
    shown = []
    with pytest.raises(ValueError, match=r"'Square': .*2 axes"):
        auto(linear, w, x.reshape(N, 16), labels, eps=EPS, stages=STAGES, progress=lambda *a: shown.append(a))
    with pytest.raises(ValueError, match=r"'MI': .* mi_fgsm has the l-infinity ball only"):
        auto(linear, w, x, labels, eps=EPS, norm="l2", stages=[Attack("MI", "mi_fgsm", steps=2)])
    with pytest.raises(ValueError, match="each needs a name of its own"):
        auto(linear, w, x, labels, eps=EPS, stages=STAGES[:1] * 2)
    assert shown == [], "found before anything is attacked"


@pytest.mark.parametrize("kind", ["fgsm", "pgd", "apgd", "mi_fgsm"])
def test_a_gradient_that_is_not_a_number_does_not_make_one_of_the_image(kind, problem):
    """As that of a square root at a black pixel: it fools nobody."""
    w, x, labels, _ = problem
    x = x.copy()
    x[:, 0, 0] = 0

    def model(params, z):
        return linear(params, z) + 0 * jnp.where(z > 0, jnp.sqrt(z), 0.0).sum()

    labels = np.asarray(linear(w, x)).argmax(1)
    result = auto(model, w, x, labels, eps=1e-6, stages=[Attack("a", kind, steps=3)], keep=True)
    assert result.robust.mean() > 0.95
    assert np.isfinite(result.adversarial).all()


def test_a_model_that_says_nothing_is_never_right(problem):
    w, x, labels, _ = problem
    result = auto(lambda params, z: linear(params, z) * jnp.nan, w, x, labels, eps=EPS, stages=STAGES[:1])
    assert result.accuracy == {"clean": 0, "APGD-CE": 0}


def test_the_standard_stages_are_autoattacks():
    assert [(s.name, s.steps, s.restarts) for s in auto_lib.STAGES] == [
        ("APGD-CE", 100, 1),
        ("APGD-T", 100, 1),
        ("Square", 5000, 1),
    ]
    assert auto_lib.STAGES[1].targets == 9


def test_the_l2_worst_case_of_a_linear_model(problem):
    w, x, labels, _ = problem
    logits = x.reshape(N, -1) @ w
    distance = np.array(
        [
            min((logits[i, y] - logits[i, k]) / np.linalg.norm(w[:, y] - w[:, k]) for k in range(K) if k != y)
            for i, y in enumerate(labels)
        ]
    )
    eps = 0.15
    stages = tuple(dataclasses.replace(s, steps=30) for s in STAGES)
    result = auto(linear, w, x, labels, eps=eps, norm="l2", stages=stages, batch_size=N)
    near = np.abs(distance - eps) < 2e-3
    assert near.sum() < 5
    np.testing.assert_array_equal(result.robust[~near], (distance > eps)[~near])
