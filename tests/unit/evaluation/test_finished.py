"""An evaluation that was killed goes on from its finished batches, and from no others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, evaluation
from e2sad_jax.evaluation import Attack, auto
from e2sad_jax.evaluation.finished import Finished
from tests.unit.evaluation.conftest import N, linear

STAGES = (
    Attack("APGD-CE", "apgd", steps=5),
    Attack("APGD-T", "apgd", steps=5, loss="targeted_dlr", targets=2),
    Attack("Square", "square", steps=30),
)
TOTAL = N * (1 + 5 + 10 + 10)


class KilledError(Exception):
    pass


class Taken:
    """Counts gradients, those of finished batches apart; dies at the call `last`."""

    def __init__(self, last=10**9):
        self.now, self.before, self.calls, self.last = 0, 0, 0, last

    def __call__(self, name, gradients):
        self.calls += 1
        if self.calls > self.last:
            raise KilledError
        if name == "finished before":
            self.before += gradients
        else:
            self.now += gradients


def measured(problem, folder, taken=None, **changes):
    given = {"images": problem.images, "labels": problem.labels, "params": problem.w, "eps": 0.02, "seed": 0, **changes}
    return auto(
        given.pop("apply", linear),
        given.pop("params"),
        given.pop("images"),
        given.pop("labels"),
        **{"stages": STAGES, "batch_size": 12, "keep": True, "progress": taken, "resume": folder, **given},
    )


def same(result, other):
    np.testing.assert_array_equal(result.adversarial, other.adversarial)
    for name, standing in other.standing.items():
        np.testing.assert_array_equal(result.standing[name], standing)
    assert result.alone == other.alone


@pytest.fixture(scope="module")
def whole(problem):
    return measured(problem, None)


def test_after_a_kill_only_the_rest_is_computed(problem, whole, tmp_path):
    assert 0 < whole.robust.sum() < N - 10
    with pytest.raises(KilledError):
        measured(problem, tmp_path, Taken(last=12))
    there = len(Finished(tmp_path))
    assert there > 4
    rest = Taken()
    same(measured(problem, tmp_path, rest), whole)
    assert rest.before > 0
    assert rest.before + rest.now == TOTAL
    again = Taken()
    same(measured(problem, tmp_path, again), whole)
    assert again.now < rest.now
    Finished(tmp_path).clear()
    assert not tmp_path.exists()


def test_more_targets_go_on_from_fewer_whatever_size_a_small_batch_has(problem, tmp_path):
    """A batch is what its images are: more targets to come may choose another size to fill it up to."""
    attack = Attack("APGD-T", "apgd", steps=60, loss="targeted_dlr", targets=1)
    measured(problem, tmp_path, stages=[attack], batch_size=32)
    taken = Taken()
    measured(problem, tmp_path, taken, stages=[dataclasses.replace(attack, targets=4)], batch_size=32)
    assert taken.before >= 60 * 35, "all images that are right were attacked towards the first target"


@pytest.mark.parametrize("what", ["images", "labels", "params", "eps", "seed", "apply"])
def test_batches_of_another_question_do_not_count(problem, tmp_path, what):
    other = {
        "images": problem.images + np.float32(1e-6),
        "labels": np.roll(problem.labels, 1),
        "params": problem.w * np.float32(1.001),
        "eps": 0.021,
        "seed": 1,
        "apply": lambda params, x: 3 * linear(params, x),  # of the same predictions
    }[what]
    measured(problem, tmp_path, stages=STAGES[:1])
    taken = Taken()
    measured(problem, tmp_path, taken, stages=STAGES[:1], **{what: other})
    assert taken.before == 0
    assert taken.now == N * (1 + 5)


def test_a_damaged_batch_is_computed_again(problem, whole, tmp_path):
    measured(problem, tmp_path)
    files = sorted(tmp_path.iterdir())
    for number, path in enumerate(files):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if number % 2 else content[:200] + b"?" + content[201:])
    taken = Taken()
    same(measured(problem, tmp_path, taken), whole)
    assert taken.before == 0


def test_inputs_that_were_not_kept_are_computed_again(problem, whole, tmp_path):
    measured(problem, tmp_path, keep=False)
    taken = Taken()
    measured(problem, tmp_path, taken, keep=False)
    assert taken.before > 0
    assert taken.before + taken.now == TOTAL
    same(measured(problem, tmp_path), whole)


def test_a_suite_keeps_every_image(problem, tmp_path):
    model = evaluation.of_function(lambda x: linear(problem.w, x), problem.images, problem.labels, batch_size=12)
    attack = Attack("PGD", "pgd", 0.02, 3)
    _, images = model.attacked(attack)
    object.__setattr__(model, "finished", Finished(tmp_path))
    for _ in range(2):
        taken = Taken()
        outcome, again = model.attacked(attack, progress=taken)
        np.testing.assert_array_equal(images, again)
    assert taken.before == 3 * N
    _, other = model.attacked(attack, restart=1, progress=taken)
    assert taken.before == 3 * N
    assert np.abs(other - images).max() > 0
    assert outcome.correct.shape == (N,)


def test_a_later_part_and_another_model_are_questions_of_their_own(problem, tmp_path):
    """Of as many images, at the same places."""
    halves = [(problem.images[:20], problem.labels[:20]), (problem.images[20:], problem.labels[20:])]
    turned = [halves[0], (halves[1][0][::-1], halves[1][1][::-1])]
    results, taken = [], Taken()
    for parts, folder in ((halves, tmp_path), (turned, None), (turned, tmp_path)):
        given = {"images": parts, "labels": None, "stages": STAGES[:1], "batch_size": 20}
        results.append(measured(problem, folder, taken if folder else None, **given))
    same(results[2], results[1])
    assert taken.before == 15 * 5, "the first half again, but for five images that are misclassified without attack"
    first = evaluation.of_function(lambda x: linear(problem.w, x), problem.images, problem.labels, batch_size=20)
    object.__setattr__(first, "finished", Finished(tmp_path))
    second = dataclasses.replace(first, apply=lambda _, x: 0.5 * linear(problem.w, x))
    for model, before in ((first, 0), (second, 0), (first, 2 * N), (second, 2 * N)):
        taken = Taken()
        model.evaluate([Attack("PGD", "pgd", 0.02, 2)], progress=taken)
        assert taken.before == before


def test_a_gradient_that_was_given_to_rounding_is_another_question(problem, tmp_path):
    def rounded(params, x):
        return linear(params, jnp.round(x * 50) / 50)

    def through(params, x):
        return linear(params, attacks.bpda(lambda z: jnp.round(z * 50) / 50)(x))

    masked = measured(problem, tmp_path, stages=STAGES[:1], apply=rounded)
    assert masked.robust.sum() > measured(problem, tmp_path, stages=STAGES[:1], apply=through).robust.sum()
    with pytest.raises(ValueError, match="resume is empty; it must name a folder"):
        measured(problem, "")


def test_keys_integers_and_bfloat16_are_kept_too(problem, tmp_path):
    given = {
        "params": {"w": problem.w, "key": jax.random.key(0)},
        "apply": lambda params, x: linear(params["w"], x.astype(jnp.float32)),
        "images": problem.images.astype(jnp.bfloat16),
        "stages": [Attack("a", "pgd", steps=np.int64(3))],
        "bounds": (0.0, 1.0),
    }
    first, taken = measured(problem, tmp_path, **given), Taken()
    same(measured(problem, tmp_path, taken, **given), first)
    assert taken.before > 0


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(problem, whole, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="finished batches cannot be kept") as said:
        same(measured(problem, tmp_path / "file" / "folder"), whole)
    assert len(said) == 1
