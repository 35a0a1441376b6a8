"""The worst case over several attacks, on models whose worst case is known."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import evaluation
from e2sad_jax._compile import pure
from e2sad_jax.evaluation import Attack, auto
from tests.unit.evaluation.conftest import N, linear

EPS = 0.02
STAGES = (
    Attack("APGD-CE", "apgd", steps=10),
    Attack("APGD-T", "apgd", steps=10, loss="targeted_dlr", targets=4),
    Attack("Square", "square", steps=60),
)
kept = pure(lambda params, x: linear(params, x))


@pytest.fixture(scope="module")
def result(problem):
    return auto(kept, problem.w, problem.images, problem.labels, eps=EPS, stages=STAGES, batch_size=16, keep=True)


def test_on_a_linear_model_it_finds_the_exact_worst_case(problem, result):
    distance = problem.distance(1)
    assert np.abs(distance - EPS).min() > 1e-5, "no image is decided by rounding"
    assert 5 < (distance > EPS).sum() < N - 10
    np.testing.assert_array_equal(result.robust, distance > EPS)
    assert list(result.standing) == ["clean", "APGD-CE", "APGD-T", "Square"]
    assert result.accuracy["clean"] == (N - 5) / N
    counts = [int(correct.sum()) for correct in result.standing.values()]
    assert counts == sorted(counts, reverse=True)
    assert list(result.alone.items()) == [
        (stage.name, a - b) for stage, (a, b) in zip(STAGES, itertools.pairwise(counts), strict=True)
    ]


def test_it_says_how_often_the_model_was_asked(problem, result):
    """Images that have fallen are asked no more, nor, of a targeted attack, those that have fallen to a target before."""
    clean, first, second = (int(result.standing[name].sum()) for name in ("clean", "APGD-CE", "APGD-T"))
    assert result.passes["clean"] == N
    assert result.passes["APGD-CE"] == 10 * clean
    assert 10 * (first + 3 * second) <= result.passes["APGD-T"] <= 10 * 4 * first
    assert result.passes["Square"] == 60 * second
    other = auto(kept, problem.w, problem.images, problem.labels, eps=EPS, stages=STAGES, batch_size=50)
    assert other.passes == result.passes, "padding counts as no image"


def test_the_images_it_keeps_fool_the_model_inside_the_ball(problem, result):
    x, fooled = problem.images, result.standing["clean"] & ~result.robust
    assert (linear(problem.w, result.adversarial).argmax(1) != problem.labels)[fooled].all()
    assert np.abs(result.adversarial - x).max() <= EPS + 1e-6
    np.testing.assert_array_equal(result.adversarial[~fooled], x[~fooled])
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1


def test_it_does_not_depend_on_the_batch_size(problem, result):
    other = auto(kept, problem.w, problem.images, problem.labels, eps=EPS, stages=STAGES, batch_size=50, keep=True)
    np.testing.assert_allclose(result.adversarial, other.adversarial, atol=1e-6)  # random starts and all
    for name in result.standing:
        np.testing.assert_array_equal(result.standing[name], other.standing[name])


@pytest.mark.parametrize(("steps", "sizes"), [(10, {32}), (200, {32, 4})])
def test_few_images_of_a_long_attack_are_not_filled_up_to_a_whole_batch(problem, steps, sizes):
    """A program of their own is compiled where it saves more than that."""
    traced = set()

    def apply(params, x):
        traced.add(len(x))
        return linear(params, x)

    stages = [Attack("APGD-CE", "apgd", steps=steps)]
    settings = dict(eps=EPS, stages=stages, keep=True)
    found = auto(apply, problem.w, problem.images, problem.labels, batch_size=32, **settings)
    assert {size for size in traced if size > 2} == sizes  # two images tell the shape of the logits
    whole = auto(kept, problem.w, problem.images, problem.labels, batch_size=N, **settings)
    np.testing.assert_array_equal(found.robust, whole.robust)
    np.testing.assert_allclose(found.adversarial, whole.adversarial, atol=1e-6)


def test_later_parts_take_the_small_batches_that_the_first_has_compiled(problem):
    traced = []

    def apply(params, x):
        traced.append(len(x))
        return linear(params, x)

    parts = [(problem.images[:25], problem.labels[:25]), (problem.images[25:], problem.labels[25:])]
    stages = [Attack("APGD-T", "apgd", steps=200, loss="targeted_dlr", targets=2)]
    settings = dict(eps=EPS, stages=stages, batch_size=16)
    auto(apply, problem.w, iter(parts[:1]), None, **settings)
    assert 4 in traced or 2 in traced
    of_first = traced.copy()
    traced.clear()
    auto(apply, problem.w, iter([parts[0], parts[0]]), None, **settings)
    assert traced == of_first, "the same images once more"


def test_passes_of_a_random_model_are_those_of_its_draws(problem):
    def apply(params, x, key):
        return linear(params, x) + 1e-3 * jax.random.normal(key, (len(x), 1))

    stages, settings = [Attack("APGD-CE", "apgd", steps=2)], dict(eps=EPS, batch_size=20)
    one, many = (
        auto(apply, problem.w, problem.images, problem.labels, stages=stages, draws=d, **settings) for d in (1, 3)
    )
    assert many.passes == {name: 3 * count for name, count in one.passes.items()}


def test_the_parts_of_a_data_set_give_what_all_of_it_gives(problem, result):
    """Of any lengths, read one after the other; random starts belong to the place in the whole."""
    cuts, traced = [0, 17, 20, N], []

    def parts():
        for first, end in itertools.pairwise(cuts):
            yield problem.images[first:end], problem.labels[first:end]

    def apply(params, x):
        traced.append(x.shape)
        return linear(params, x)

    other = auto(apply, problem.w, parts(), None, eps=EPS, stages=STAGES, batch_size=16, keep=True)
    np.testing.assert_allclose(result.adversarial, other.adversarial, atol=1e-6)
    for name in result.standing:
        np.testing.assert_array_equal(result.standing[name], other.standing[name])
    assert (other.alone, other.nan, other.passes) == (result.alone, result.nan, result.passes)
    of_all = len(traced)
    auto(apply, problem.w, itertools.islice(parts(), 1), None, eps=EPS, stages=STAGES, batch_size=16)
    assert len(traced) == 2 * of_all, "later parts compile nothing"
    with pytest.raises(ValueError, match=r"auto: part 1: labels"):
        auto(kept, problem.w, [(problem.images, problem.labels), (problem.images, problem.labels[:3])], None, eps=EPS)
    with pytest.raises(
        ValueError, match=r"auto: part 0 of images is a ndarray; it must be \(images, labels\), or give labels"
    ):
        auto(kept, problem.w, problem.images, None, eps=EPS)
    with pytest.raises(ValueError, match="images has no parts; it must have at least one"):
        auto(kept, problem.w, [], None, eps=EPS)


def test_square_finds_what_gradients_do_not_show(problem):
    def rounded(params, z):  # no gradient anywhere
        return linear(params, jnp.round(z * 40) / 40)

    stages = (dataclasses.replace(STAGES[0], steps=2), dataclasses.replace(STAGES[2], steps=200))
    result = auto(rounded, problem.w, problem.images, problem.labels, eps=0.05, stages=stages)
    assert result.alone["Square"] > 5
    assert result.alone["Square"] > result.alone["APGD-CE"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": np.zeros(N - 1, int)}, r"labels \(39,\) int64 must be one integer for each of 40 images"),
        ({"images": np.zeros((N, 16), np.float32)}, r"'Square': images have 2 axes"),
        ({"norm": "l2", "stages": [Attack("MI", "mi_fgsm", steps=2)]}, r"'MI': norm='l2'; it must be linf"),
        ({"stages": STAGES[:1] * 2}, "each needs a name of its own"),
        ({"stages": [Attack("clean", "pgd", steps=1)]}, "each needs a name of its own"),
        ({"eps": float("nan")}, "auto: eps=nan; it must be a number, finite and at least 0"),
        ({"eps": -0.1}, "auto: eps=-0.1"),
        ({"params": np.zeros((16, 3), np.float32), "labels": np.zeros(N, int)}, r"at least 4 classes; .* has 3: leave"),
    ],
)
def test_what_is_not_possible_is_refused_before_anything_is_attacked(problem, settings, message):
    shown = []
    given = {"params": problem.w, "images": problem.images, "labels": problem.labels, "eps": EPS, "stages": STAGES}
    with pytest.raises(ValueError, match=message):
        auto(linear, progress=lambda *what: shown.append(what), **{**given, **settings})
    assert shown == []


@pytest.mark.parametrize(("kind", "steps"), [("fgsm", 1), ("pgd", 2), ("apgd", 2), ("mi_fgsm", 2)])
def test_a_nan_gradient_does_not_make_a_nan_image(kind, steps, problem):
    """As that of a square root at a black pixel: it fools nobody."""
    x = problem.images.copy()
    x[:, 0, 0] = 0

    def model(params, z):
        return linear(params, z) + 0 * jnp.where(z > 0, jnp.sqrt(z), 0.0).sum()

    labels = linear(problem.w, x).argmax(1)
    result = auto(model, problem.w, x, labels, eps=1e-6, stages=[Attack("a", kind, steps=steps)], keep=True)
    assert result.robust.mean() > 0.95
    assert np.isfinite(result.adversarial).all()


def test_the_standard_stages_are_autoattacks():
    assert [(s.name, s.steps, s.restarts, s.targets) for s in (*evaluation.STAGES[:2], evaluation.FAB)] == [
        ("APGD-CE", 100, 1, 9),
        ("APGD-T", 100, 1, 9),
        ("FAB-T", 100, 1, 9),
    ]
    assert evaluation.STAGES[2] == Attack("Square", "square", steps=5000)


@pytest.mark.parametrize(
    ("norm", "names"), [("linf", ["APGD-CE", "APGD-T", "Square"]), ("l2", ["APGD-CE", "APGD-T", "FAB-T", "Square"])]
)
def test_fab_is_a_stage_of_the_l2_ball(problem, norm, names):
    nothing = problem.labels * 0 + (linear(problem.w, problem.images).argmax(1) + 1) % 5  # nothing is left to attack
    result = auto(kept, problem.w, problem.images, nothing, eps=EPS, norm=norm, batch_size=N)
    assert list(result.standing) == ["clean", *names]


def test_the_l2_worst_case_of_a_linear_model(problem):
    distance, eps = problem.distance(2), 0.05
    stages = tuple(dataclasses.replace(stage, steps=30) for stage in STAGES[:2])
    result = auto(linear, problem.w, problem.images, problem.labels, eps=eps, norm="l2", stages=stages, batch_size=N)
    near = np.abs(distance - eps) < 2e-3
    assert near.sum() < 5
    np.testing.assert_array_equal(result.robust[~near], (distance > eps)[~near])
