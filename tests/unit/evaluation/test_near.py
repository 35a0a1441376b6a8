"""Images far from the boundary, which later attacks leave out, and the control that tries whether that was right."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import evaluation
from e2sad_jax.evaluation import Attack, auto
from e2sad_jax.evaluation import near as near_module
from e2sad_jax.evaluation.near import Near
from tests.unit.evaluation.conftest import N, linear

EPS = 0.02
STAGES = (
    Attack("APGD-CE", "apgd", steps=10),
    Attack("APGD-T", "apgd", steps=10, loss="targeted_dlr", targets=4),
    Attack("Square", "square", steps=60),
)


@pytest.fixture(autouse=True)
def _small_control(monkeypatch):
    monkeypatch.setattr(near_module, "LEAST", 4)


def measured(problem, apply=linear, **settings):
    given = {"eps": EPS, "stages": STAGES, "batch_size": 16, "keep": True, **settings}
    return auto(apply, problem.w, problem.images, problem.labels, **given)


@pytest.fixture(scope="module")
def whole(problem):
    return measured(problem)


@pytest.mark.parametrize("near", [1.5, 2.0])
def test_what_it_leaves_out_lies_outside_the_ball_and_is_what_it_saves(problem, whole, near):
    result = measured(problem, near=near)
    np.testing.assert_array_equal(result.robust, whole.robust)
    np.testing.assert_array_equal(result.adversarial, whole.adversarial)
    far = problem.distance(1) / EPS  # in budgets
    assert 5 < result.left_out.sum() < result.robust.sum()
    assert far[result.left_out].min() > 1 + (near - 1) / 2  # the last stage's bound, which a linear model's lead tells
    assert (far[result.robust & ~result.left_out] < near).any()
    assert result.passes["APGD-CE"] == whole.passes["APGD-CE"]
    assert result.passes["Square"] == whole.passes["Square"] - 60 * result.left_out.sum()
    assert result.passes["APGD-T"] < whole.passes["APGD-T"]
    assert whole.left_out is None


def test_later_attacks_need_images_to_be_nearer_and_a_tenth_is_never_left_out():
    shares, places = np.linspace(0.01, 0.99, 1000), np.arange(1000)  # of the lead that attacks have taken
    near = Near(2.0, 1000, seed=0)
    near.look(Attack("clean", "clean"), places, np.full(1000, 4.0))
    near.look(STAGES[0], places, 4.0 * (1 - shares))
    near.look(STAGES[1], places[:10], np.full(10, 5.0))  # another attack that finds less
    standing = shares < 0.9
    assert near.control.sum() == 100
    for number, reach in ((1, np.inf), (2, 2), (3, 1.5), (4, 1 + 1 / 3)):
        np.testing.assert_array_equal(
            near.left_out(number, standing), standing & (1 / shares > reach) & ~near.control, err_msg=str(number)
        )
    assert (Near(2.0, 1000, seed=1).control != near.control).any()
    assert Near(2.0, 30, seed=1).control.sum() == 4, "the least number"
    near_and_in_control = np.flatnonzero(near.control & (shares > 0.8))[0]
    assert not near.refuted(2, standing & (places != near_and_in_control)), "that was to be expected"
    assert near.refuted(2, standing & (places != np.flatnonzero(near.control)[0]))
    assert not near.left_out(5, standing).any()


def hidden(params, z):
    """No gradient anywhere: only queries find anything."""
    return linear(params, jnp.round(z * 40) / 40)


def test_if_the_control_falls_every_image_takes_every_stage(problem):
    stages = (
        dataclasses.replace(STAGES[0], steps=2),
        dataclasses.replace(STAGES[1], steps=2),
        dataclasses.replace(STAGES[2], steps=100),
        Attack("Square 2", "square", steps=5),
    )
    settings = dict(apply=hidden, eps=0.1, stages=stages)
    shown = []
    every = measured(problem, **settings)
    result = measured(problem, **settings, near=2.0, progress=lambda name, gradients: shown.append((name, gradients)))
    assert every.alone["Square"] > 10
    assert every.accuracy["APGD-CE"] == every.accuracy["APGD-T"], "the leads say that all images are far"
    for name, standing in every.standing.items():
        np.testing.assert_array_equal(result.standing[name], standing)
    np.testing.assert_array_equal(result.adversarial, every.adversarial)
    assert result.passes == every.passes
    assert not result.left_out.any()
    assert sum(gradients for _, gradients in shown) == N * (1 + 2 + 8 + 33 + 1)
    named = [float(name.split("(")[1].split()[0]) for name, _ in shown if "robust so far" in name]
    assert named == sorted(named, reverse=True)
    assert named[-1] == pytest.approx(result.robust.mean(), abs=6e-4)


def test_the_progress_of_what_is_left_out_counts_as_taken(problem):
    shown = []
    result = measured(problem, near=1.5, progress=lambda name, gradients: shown.append((name, gradients)))
    assert result.left_out.any()
    assert sum(gradients for _, gradients in shown) == N * (1 + 10 + 40 + 20)
    assert shown[-1][0] == f"Square ({result.robust.mean():.3f} robust so far)"


def test_it_goes_on_where_it_was_stopped(problem, tmp_path):
    first = measured(problem, near=1.5, resume=tmp_path)
    shown = []
    again = measured(
        problem, near=1.5, resume=tmp_path, progress=lambda name, gradients: shown.append((name, gradients))
    )
    np.testing.assert_array_equal(again.left_out, first.left_out)
    assert again.passes == first.passes
    assert sum(gradients for name, gradients in shown if name == "finished before") > 10 * N


def test_each_part_has_a_control_of_its_own(problem):
    parts = [(problem.images[:20], problem.labels[:20]), (problem.images[20:], problem.labels[20:])]
    result = auto(linear, problem.w, parts, None, eps=EPS, stages=STAGES, near=1.5)
    assert result.left_out.shape == (N,)
    assert result.left_out[:20].any()
    assert result.left_out[20:].any()


def test_infinite_leads_tell_nothing(problem):
    """A class that cannot be leaves the lead finite; two classes of which one cannot be do not."""

    def sure(params, z):
        logits = linear(params, z)
        best = logits.max(-1, keepdims=True)
        return jnp.where(logits == best, logits, -jnp.inf)

    images, labels = problem.images[5:], problem.labels[5:]
    result = auto(sure, problem.w, images, labels, eps=1e-6, stages=[STAGES[0], STAGES[2]], near=1.0)
    assert result.passes["Square"] == 60 * 35
    assert not result.left_out.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"near": 0.5}, r"auto: near=0.5; it must be at least 1"),
        ({"near": float("nan")}, r"auto: near=nan; it must be a number"),
        ({"near": 2, "detector": evaluation.Detector(lambda p, x: x.sum((1, 2, 3)), 0.0, 1.0)}, "near .* detector"),
    ],
)
def test_what_is_not_possible_is_refused(problem, settings, message):
    with pytest.raises(ValueError, match=message):
        measured(problem, **settings)
