"""Models that reject images and models that draw: an image falls if one and the same is misclassified and accepted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import evaluation
from e2sad_jax.evaluation import Attack, Detector, diagnosis
from tests.helpers import mostly_slow
from tests.unit.evaluation.conftest import linear

EPS, THRESHOLD = 0.1, -0.05
SUITE = [
    Attack("clean", "clean"),
    Attack("APGD", "apgd", eps=EPS, steps=30, loss="margin"),
    Attack("Square", "square", eps=EPS, steps=300),
]


def sides(params, x):
    """Two classes: the first pixel below and above one half."""
    lead = params["sharp"] * (x[:, 0, 0, 0] - 0.5)
    return jnp.stack([-lead, lead], 1)


def oblique(params, x):
    """A score that rises towards the second class and with the second pixel."""
    return params["detector"] * (0.8 * (x[:, 0, 0, 0] - 0.5) + 0.6 * (x[:, 0, 1, 0] - 0.5))


PARAMS = {"sharp": np.float32(10), "detector": np.float32(1), "name": "no array"}


def images():
    """A grid in the first two pixels, off all boundaries; all labels are 0."""
    first, second = np.meshgrid(np.linspace(0.3, 0.52, 7) + 0.003, np.linspace(0.2, 0.7, 6) + 0.004)
    x = np.full((42, 2, 2, 1), 0.5, np.float32)
    x[:, 0, 0, 0], x[:, 0, 1, 0] = first.ravel(), second.ravel()
    return x, np.zeros(42, np.int32)


def expected(x):
    """Whether each clean image is right and accepted, and whether the ball holds an image that fools the model."""
    first, second = np.float64(x[:, 0, 0, 0]), np.float64(x[:, 0, 1, 0])
    score = 0.8 * (first - 0.5) + 0.6 * (second - 0.5)
    lowest = 0.8 * np.maximum(first - EPS - 0.5, 0) + 0.6 * (second - EPS - 0.5)  # of the images on the wrong side
    return (first < 0.5) & (score <= THRESHOLD), (first + EPS > 0.5) & (lowest <= THRESHOLD)


DETECTOR = Detector(oblique, THRESHOLD, weight=100.0)


@pytest.fixture(scope="module")
def judged():
    x, y = images()
    stages = SUITE[1:]
    return (
        x,
        y,
        evaluation.auto(sides, PARAMS, x, y, eps=EPS, stages=stages, detector=DETECTOR, batch_size=20, keep=True),
    )


def test_the_pair_of_a_rejecting_model_has_its_closed_form(judged):
    x, _, result = judged
    clean, fooled = expected(x)
    assert 0.1 < clean.mean() < 0.9
    assert 0.1 < fooled.mean() < 0.9
    np.testing.assert_array_equal(result.standing["clean"], clean)
    np.testing.assert_array_equal(result.robust, ~fooled)
    assert result.accuracy["clean"] == clean.mean()
    assert result.accuracy["Square"] == 1 - fooled.mean()
    assert (result.rejected & fooled).any()  # images that are rejected are attacked too
    at_once = (x[:, 0, 0, 0] > 0.5) & ~result.rejected
    assert sum(result.alone.values()) == (fooled & ~at_once).sum()


def test_adversarial_images_are_misclassified_and_accepted_at_once(judged):
    x, y, result = judged
    made, fell = result.adversarial, ~result.robust
    assert np.abs(made - x).max() <= EPS + 1e-6
    assert (made[fell, 0, 0, 0] > 0.5).all()
    assert (np.asarray(oblique(PARAMS, made))[fell] <= THRESHOLD).all()
    model = evaluation.Model("m", sides, PARAMS, x, y, detector=DETECTOR)
    np.testing.assert_array_equal(model.right_on(made), result.robust)
    np.testing.assert_array_equal(model.clean(), result.standing["clean"])


@pytest.mark.slow
def test_each_attack_alone_evades_the_detector_and_rejections_are_reported(judged):
    x, y, result = judged
    outcomes = evaluation.evaluate(sides, PARAMS, x, y, SUITE, detector=DETECTOR, batch_size=42)
    clean, fooled = expected(x)
    np.testing.assert_array_equal(outcomes["clean"].correct, clean)
    np.testing.assert_array_equal(outcomes["clean"].rejected, result.rejected)
    np.testing.assert_array_equal(outcomes["APGD"].correct, ~fooled)
    assert not (fooled & ~outcomes["Square"].correct).all()  # its squares reach corners of the ball only
    assert (~outcomes["Square"].correct).sum() > 5
    assert not (~fooled & ~outcomes["Square"].correct).any()
    np.testing.assert_array_equal(outcomes.worst_case(), ~fooled)
    wrong = outcomes["APGD"].prediction != y
    np.testing.assert_array_equal(outcomes["APGD"].correct, ~wrong | outcomes["APGD"].rejected)
    blind = dataclasses.replace(DETECTOR, weight=1e-6)  # a gradient attack that does not evade finds less
    assert (
        evaluation.evaluate(sides, PARAMS, x, y, [SUITE[1]], detector=blind)["APGD"].correct.mean() > (~fooled).mean()
    )


def test_orthogonal_pgd_evades_a_detector_whatever_its_weight():
    x, y = images()
    clean, fooled = expected(x)
    for weight in (1e-6, 1e6):
        detector = dataclasses.replace(DETECTOR, weight=weight)
        result = evaluation.auto(sides, PARAMS, x, y, eps=EPS, stages=[evaluation.ORTHOGONAL], detector=detector)
        np.testing.assert_array_equal(result.standing["clean"], clean)
        np.testing.assert_array_equal(result.robust, ~fooled)


def test_by_default_orthogonal_pgd_is_among_the_attacks_on_a_detector(monkeypatch):
    x, y = images()

    def outcomes(self, attacks, **_):
        raise StopIteration([attack.name for attack in attacks])

    monkeypatch.setattr("e2sad_jax.evaluation.evaluator.Evaluation.outcomes", outcomes)
    for detector, more in ((None, []), (DETECTOR, ["Orthogonal PGD"])):
        with pytest.raises(StopIteration) as asked:
            evaluation.auto(sides, PARAMS, x, y, eps=EPS, detector=detector)
        assert asked.value.value == ["clean", "APGD-CE", "APGD-T", *more, "Square"]
        with pytest.raises(StopIteration) as asked:
            evaluation.of_function(sides, x, y, params=PARAMS, detector=detector).auto(eps=EPS)
        assert asked.value.value == ["clean", "APGD-CE", "APGD-T", *more, "Square"]


def test_the_worst_case_of_a_diagnosis_has_orthogonal_pgd_where_the_model_rejects():
    names = [stage.name for stage in EFFORT.stages(4, rejects=True)]
    assert names == ["APGD-CE", "APGD-T", "Orthogonal PGD"]
    assert [stage.name for stage in EFFORT.stages(4)] == ["APGD-CE", "APGD-T"]


def test_a_decision_in_place_of_a_score_is_refused():
    x, y = images()
    detector = Detector(lambda params, z: oblique(params, z) > 0, 0.5, weight=1.0)
    for attack in (evaluation.ORTHOGONAL, SUITE[1]):
        with pytest.raises(TypeError, match="detector: score_fn returned bool; it must return floating point scores"):
            evaluation.auto(sides, PARAMS, x, y, eps=EPS, stages=[attack], detector=detector)


def test_fooled_here_and_accepted_there_is_not_fooled():
    """The detector rejects exactly what is misclassified: some images fool the model, others pass, none does both."""
    x, y = images()

    def lead(params, x):
        return x[:, 0, 0, 0] - 0.5

    result = evaluation.auto(sides, PARAMS, x, y, eps=EPS, stages=SUITE[1:], detector=Detector(lead, 0.0, 10.0))
    assert result.robust.all()
    np.testing.assert_array_equal(result.standing["clean"], x[:, 0, 0, 0] < 0.5)


@pytest.mark.parametrize("attacks", mostly_slow([2, 3], [2]))
def test_a_detector_that_rejects_nothing_changes_nothing_and_one_that_rejects_all_leaves_nothing_right(
    problem, attacks
):
    suite = [dataclasses.replace(attack, eps=0.02, steps=5) for attack in SUITE[:attacks]]
    arguments = (linear, problem.w, problem.images, problem.labels)
    plain = evaluation.evaluate(*arguments, suite)

    def flat(params, x):
        return x.sum((1, 2, 3)) * 0

    never, always = (
        evaluation.evaluate(*arguments, suite, detector=Detector(flat, threshold, 1.0)) for threshold in (1.0, -1.0)
    )
    assert plain.rejected is None
    assert plain["clean"].rejected is None
    np.testing.assert_array_equal(never.prediction, plain.prediction)
    np.testing.assert_array_equal(never.correct, plain.correct)
    assert not never.rejected.any()
    assert always["clean"].accuracy == 0
    assert always.worst_case().all()


def test_nan_scores_reject_nothing():
    x, y = images()

    def nan(params, x):
        return x[:, 0, 0, 0] * jnp.nan

    outcome = evaluation.evaluate(sides, PARAMS, x, y, SUITE[:1], detector=Detector(nan, 0.0, 1.0))["clean"]
    assert not outcome.rejected.any()


def test_a_detector_that_cannot_be_is_refused():
    x, y = images()
    cases = {
        "score_fn is a float": lambda: Detector(0.5, 0.5, 1.0),
        "threshold=nan": lambda: Detector(oblique, np.nan, 1.0),
        "weight=0": lambda: Detector(oblique, 0.0, weight=0),
        "detector returned shape": lambda: evaluation.evaluate(
            sides, PARAMS, x, y, SUITE[:1], detector=Detector(lambda params, x: x, 0.0, 1.0)
        ),
        "draws=-1": lambda: evaluation.evaluate(sides, PARAMS, x, y, SUITE[:1], draws=-1),
    }
    for message, refused in cases.items():
        with pytest.raises(ValueError, match=message):
            refused()


EFFORT = diagnosis.Effort(
    budgets=(1.0,), steps=(2,), restarts=1, pgd_steps=10, apgd_steps=20, queries=0, worst_case=True
)


@pytest.mark.slow
def test_diagnosis_of_a_rejecting_model_reports_the_pair():
    x, y = images()
    model = evaluation.of_function(sides, x, y, params=PARAMS, detector=DETECTOR)
    report = evaluation.diagnose(model, eps=EPS, effort=EFFORT, keep=True)
    clean, fooled = expected(x)
    assert report["clean"] == clean.mean()
    assert report["rejected"] == (np.asarray(oblique(PARAMS, x)) > THRESHOLD).mean()
    assert report["robust"] == 1 - fooled.mean()
    assert report["overturned"] == 0
    np.testing.assert_array_equal(model.right_on(report["worst_images"]), ~fooled)


# Models that draw.


def noisy(params, x, key):
    """The linear model behind noise on the image."""
    return linear(params, x + 0.02 * jax.random.normal(key, x.shape))


def test_a_model_that_ignores_its_key_is_judged_as_one_without(problem):
    suite = [dataclasses.replace(attack, eps=0.02, steps=5) for attack in SUITE[:2]]
    arguments = (problem.w, problem.images, problem.labels)
    plain = evaluation.evaluate(linear, *arguments, suite)
    drawn = evaluation.evaluate(lambda params, x, key: linear(params, x), *arguments, suite, draws=3)
    np.testing.assert_array_equal(drawn.correct, plain.correct)
    assert 0 < drawn["APGD"].accuracy < drawn["clean"].accuracy


def test_attacks_on_the_mean_of_draws_reach_the_distance_of_the_mean_model(problem):
    """Noise on the image of a linear model moves no boundary: robust are those that are farther away than eps."""
    eps = 0.012
    stages = [Attack("APGD", "apgd", steps=20, loss="margin")]
    run = {"eps": eps, "stages": stages, "draws": 50}
    arguments = (noisy, problem.w, problem.images, problem.labels)
    result = evaluation.auto(*arguments, **run)
    away = problem.distance(1)
    clear = (np.abs(away) > 0.004) & (np.abs(away - eps) > 0.004)
    assert clear.mean() > 0.4
    assert ((away > eps) & clear).any()
    assert ((away > 0) & (away < eps) & clear).any()
    np.testing.assert_array_equal(result.standing["clean"][clear], (away > 0)[clear])
    np.testing.assert_array_equal(result.robust[clear], (away > eps)[clear])


def test_the_draws_of_an_image_depend_on_seed_and_image_alone(problem):
    def coin(params, x, key):
        """Random classes."""
        return jax.random.normal(key, (len(x), 5)) + 0 * linear(params, x)

    def predicted(seed=0, order=slice(None), batch_size=40, draws=1):
        model = evaluation.of_function(
            coin,
            problem.images[order],
            problem.labels[order],
            params=problem.w,
            seed=seed,
            batch_size=batch_size,
            draws=draws,
        )
        return model.predict(model.images)

    first = predicted()
    assert len(set(first.tolist())) == 5
    np.testing.assert_array_equal(predicted(batch_size=7), first)
    np.testing.assert_array_equal(predicted(order=slice(None, None, -1)), first[::-1])
    assert (predicted(seed=1) != first).mean() > 0.5
    assert (predicted(draws=2) != first).any()


def test_the_verdict_is_of_draws_that_no_attack_has_seen(problem):
    """A model whose right answer is a draw: attacks cannot learn the verdict's, and the clean accuracy is chance."""
    programs = evaluation.of_function(
        lambda params, x, key: jax.random.normal(key, (len(x), 5)),
        problem.images,
        problem.labels,
        params=problem.w,
        draws=1,
    )._compiled()[0]
    seen, judged = (np.asarray(f(problem.w, problem.images)).argmax(1) for f in (programs.apply, programs.verdict))
    assert 0.05 < (seen == judged).mean() < 0.5
