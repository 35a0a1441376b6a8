"""The evaluator: every image counts once, whatever the batches, devices and other attacks; NaN is never right."""

import gc
import types
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, distributed, evaluation, losses
from e2sad_jax._compile import pure
from e2sad_jax.comparison import evaluate_model
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.evaluation import Attack, in_batches
from e2sad_jax.evaluation.evaluator import Evaluation
from e2sad_jax.evaluation.programs import programs_of
from e2sad_jax.runs import opening, trainer
from tests.unit.evaluation.conftest import K, N, linear

EPS = 0.02
SUITE = (
    Attack("clean", "clean"),
    Attack("fgsm", "fgsm", EPS, 1),
    Attack("pgd", "pgd", EPS, 3, 0.02, restarts=2),
    Attack("targeted", "pgd", EPS / 2, 2, loss="targeted_dlr", targets=2),
)
kept = pure(lambda params, x: linear(params, x))  # so that its programs serve all tests


def evaluate(problem, suite=SUITE, **settings):
    return evaluation.evaluate(kept, problem.w, problem.images, problem.labels, suite, **settings)


@pytest.fixture(scope="module")
def whole(problem):
    return evaluate(problem, batch_size=N)


def test_outcomes_are_those_of_the_attacks_called_directly(problem, whole):
    x, labels, y = jnp.asarray(problem.images), jnp.asarray(problem.labels), jax.nn.one_hot(problem.labels, K)

    def loss_fn(z):
        return losses.cross_entropy(linear(problem.w, z), y)

    def wrong(z):
        return linear(problem.w, z).argmax(-1) != labels

    stream = jax.random.fold_in(jax.random.key(0), 2)
    keys = jax.vmap(lambda i: jax.random.fold_in(stream, i))(jnp.arange(N))
    by_hand = {
        "clean": x,
        "fgsm": attacks.fgsm(loss_fn, x, eps=EPS),
        "pgd": attacks.pgd(keys, loss_fn, x, eps=EPS, steps=3, step_size=0.02, restarts=2, misclassified_fn=wrong),
    }
    assert list(whole) == list(whole.names) == [attack.name for attack in SUITE]
    for name, z in by_hand.items():
        np.testing.assert_array_equal(whole[name].correct, ~np.asarray(wrong(z)), err_msg=name)
        np.testing.assert_array_equal(whole[name].prediction, linear(problem.w, z).argmax(-1), err_msg=name)
    assert whole["clean"].accuracy == (N - 5) / N
    assert 0 < whole["fgsm"].accuracy < (N - 5) / N, "the attack must bite, and not fool all"
    with pytest.raises(KeyError):
        whole["ifgsm"]


def test_a_targeted_attack_keeps_the_first_class_that_fools(problem, whole):
    x, labels = jnp.asarray(problem.images), jnp.asarray(problem.labels)
    predicted = [
        np.asarray(
            linear(
                problem.w,
                SUITE[3].perturb(
                    lambda z: linear(problem.w, z), x, labels, bounds=(0.0, 1.0), index=jnp.arange(N), rank=rank
                ),
            ).argmax(-1)
        )
        for rank in (1, 2)
    ]
    expected = np.where(predicted[0] != problem.labels, predicted[0], predicted[1])
    np.testing.assert_array_equal(whole["targeted"].prediction, expected)


@pytest.mark.parametrize(("batch_size", "devices", "backwards"), [(7, 1, True), (1000, 8, False), (15, 2, True)])
def test_no_outcome_depends_on_batches_devices_or_other_attacks(problem, whole, batch_size, devices, backwards):
    mesh = distributed.mesh(devices, devices)
    suite = SUITE[:0:-1] if backwards else SUITE
    other = evaluate(problem, suite, batch_size=batch_size, mesh=mesh)
    assert other.prediction.shape == (len(suite), N)
    for name, outcome in other.items():
        np.testing.assert_array_equal(outcome.prediction, whole[name].prediction)


def test_a_cascade_attacks_only_what_has_not_fallen(problem, whole):
    shown = {}

    def visit(attack, places, inputs, right):
        assert inputs.shape == (len(places), *problem.images.shape[1:])
        shown[attack.name] = [*shown.get(attack.name, []), *places]

    session = Evaluation(programs_of(kept, None, (0, 1)), problem.w, problem.images, problem.labels, 12, 0)
    outcomes = session.outcomes(SUITE, cascade=True, visit=visit)
    np.testing.assert_array_equal(outcomes.correct, np.logical_and.accumulate(whole.correct))
    np.testing.assert_array_equal(outcomes.worst_case(), whole.worst_case())
    np.testing.assert_array_equal(outcomes.correct[-1], whole.worst_case())
    for row, attack in enumerate(SUITE[1:3]):
        assert shown[attack.name] == list(np.flatnonzero(outcomes.correct[row]))
    assert sorted(set(shown["targeted"])) == list(np.flatnonzero(outcomes.correct[2]))
    fallen = ~outcomes.correct[1]
    np.testing.assert_array_equal(outcomes.prediction[3][fallen], outcomes.prediction[1][fallen])
    np.testing.assert_array_equal(outcomes.prediction == problem.labels, outcomes.correct)


@pytest.mark.parametrize("cascade", [False, True])
def test_progress_counts_every_gradient_once(problem, cascade):
    seen, names = {}, []

    def progress(name, gradients):
        names.append(name)
        kind = name.split(" (")[0]
        seen[kind] = seen.get(kind, 0) + gradients

    outcomes = evaluate(problem, batch_size=12, cascade=cascade, progress=progress)
    assert seen == {"clean": N, "fgsm": N, "pgd": 2 * 3 * N, "targeted": 2 * 2 * N}
    robust = outcomes.worst_case().mean()
    assert names[-1] == (f"targeted ({robust:.3f} robust so far)" if cascade else "targeted")
    assert names[:2] == ["clean", "clean"], "an attack is named before its first batch is done"


def test_inputs_are_transformed_and_attacked_in_their_bounds(problem):
    """On [-1, 1] inputs an attack may go below 0; uint8 needs no transform of one's own."""
    stored = np.uint8(problem.images * 255)
    transform, seen = TRANSFORMS["standardize"], []
    session = Evaluation(programs_of(kept, transform.apply, transform.bounds), problem.w, stored, problem.labels, N, 0)
    session.outcomes([Attack("fgsm", "fgsm", 0.1)], visit=lambda attack, places, inputs, right: seen.append(inputs))
    x = np.asarray(transform.apply(jnp.asarray(stored)))
    assert seen[0].min() < -0.05
    assert np.abs(seen[0] - x).max() <= 0.1 + 1e-6
    assert seen[0].min() >= -1
    as_floats, as_stored = (
        evaluation.evaluate(kept, problem.w, images, problem.labels, SUITE[:2], batch_size=N)
        for images in (stored.astype(np.float32) / 255, stored)
    )
    np.testing.assert_array_equal(as_floats.prediction, as_stored.prediction)
    np.testing.assert_array_equal(evaluation.predict(kept, problem.w, stored), as_stored["clean"].prediction)


def test_transfer_shows_the_substitutes_images_to_all():
    """Attacks by hand: images 0.3 nearer to zero or farther from it."""

    def apply(weight, x):
        return jnp.concatenate([x.reshape(len(x), 1) * weight, jnp.zeros((len(x), 1))], axis=1)

    images = np.array([0.5, 0.2, -0.4, -0.1], np.float32).reshape(4, 1, 1, 1)
    labels, one, backwards = np.array([0, 0, 1, 1]), np.float32(1), np.float32(-1)
    attack, steps = Attack("FGSM", "fgsm", 0.3, 1), []

    def ask(substitute, *targets, **settings):
        pairs = [(apply, target) for target in targets]
        results = evaluation.transfer((apply, substitute), pairs, images, labels, attack, bounds=(-1, 1), **settings)
        return [result.correct.tolist() for result in results]

    # For `one` an image moves by 0.3 towards zero: those nearer than that cross it. `backwards` is wrong on all clean
    # images, and right on those that crossed.
    own, other = ask(one, one, backwards)
    assert own == [True, False, True, False]
    assert other == [False, True, False, True]
    # Images made for `backwards` move away from zero.
    assert ask(backwards, one, backwards) == [[True] * 4, [False] * 4]
    mesh = distributed.mesh(2, 2)
    assert ask(one, one, backwards, batch_size=3, mesh=mesh) == [own, other]
    ask(one, one, batch_size=3, progress=lambda name, gradients: steps.append(gradients))
    assert steps == [0, 3, 1]


def test_batches_come_one_behind_and_are_filled_up():
    events = []

    def run(places):
        events.append(("run", places.tolist()))
        return places

    for places, result in in_batches(run, np.array([3, 1, 4, 1, 5]), 2):
        events.append(("read", places.tolist()))
        assert result[: len(places)].tolist() == places.tolist()
    assert events == [
        ("run", [3, 1]),
        ("run", [4, 1]),
        ("read", [3, 1]),
        ("run", [5, 5]),
        ("read", [4, 1]),
        ("read", [5]),
    ]


def test_a_function_is_compiled_once_a_call_and_judged_anew_in_the_next(problem):
    """Its weights may be others then; and no cache keeps it."""
    traces, held = [], {"w": np.zeros_like(problem.w)}

    def hidden(params, x):
        traces.append(x.shape)
        return linear(held["w"], x)

    functions = [hidden]

    def call(*suite):
        return evaluation.evaluate(functions[0], None, problem.images, problem.labels, suite, batch_size=N)

    one = Attack("a", "fgsm", 0.001)
    assert call(one)["a"].accuracy < 0.5, "all images are of one class"
    first = len(traces)
    held["w"] = problem.w
    outcomes = call(one, Attack("b", "fgsm", 0.002), Attack("c", "fgsm", 0.003))
    assert outcomes["a"].accuracy > 0.8
    assert len(traces) == 2 * first, "three budgets are one program"
    gone = weakref.ref(hidden)
    functions.clear()
    del hidden
    gc.collect()
    assert gone() is None


def test_programs_of_pure_functions_serve_later_calls(problem):
    traces = []

    @pure
    def network(params, x):
        traces.append(x.shape)
        return linear(params, x)

    counts = []
    for weight in (1, 2):
        evaluation.evaluate(network, weight * problem.w, problem.images, problem.labels, [SUITE[1]], batch_size=N)
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.zeros(N - 1, int)}, r"labels \(39,\) int64 must be one integer for each of 40 images"),
        ({"labels": np.zeros(N)}, r"labels \(40,\) float64 must be one integer"),
        ({"labels": np.full(N, K)}, r"labels reach from 5 to 5; the model has 5 classes"),
        ({"labels": np.full(N, -1)}, r"labels reach from -1 to -1"),
        ({"images": np.zeros((0, 4, 4, 1))}, r"images have shape \(0, 4, 4, 1\).*there must be some"),
        ({"images": np.zeros((N, 4, 4, 1), int)}, r"images are int.*; they must be uint8 or floating point"),
        ({"batch_size": 0}, r"batch_size=0; it must be at least 1"),
        ({"attacks": SUITE[:1] * 2}, r"attacks are named clean, clean; each needs a name of its own"),
        ({"attacks": (Attack("x", "pgd", 0.1),)}, r"attack 'x': steps=0"),
        ({"apply": lambda params, x: x}, r"returns shape \(2, 4, 4, 1\) for 2 images; it must return logits"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_an_attack(problem, changes, message):
    given = {"apply": linear, "images": problem.images, "labels": problem.labels, "attacks": SUITE, **changes}
    told = []
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate(params=problem.w, progress=lambda *what: told.append(what), **given)
    assert not told


# One network all of whose logits are NaN, images of class 0, through every entry.

ALL_ZERO = np.zeros(N, np.int32)


def nan(params, x):
    return linear(params, x) * jnp.nan


def by_evaluate(problem):
    outcomes = evaluation.evaluate(nan, problem.w, problem.images, ALL_ZERO, SUITE[1:3])
    assert (outcomes.prediction == -1).all()
    assert not evaluation.evaluate(nan, problem.w, problem.images, ALL_ZERO, SUITE[:1], cascade=True).correct.any()
    return [outcome.accuracy for outcome in outcomes.values()]


def by_predict(problem):
    return [(evaluation.predict(nan, problem.w, problem.images) == 0).mean()]


def by_auto(problem):
    stages = (Attack("APGD", "apgd", steps=2), Attack("Square", "square", steps=3))
    result = evaluation.auto(nan, problem.w, problem.images, ALL_ZERO, eps=EPS, stages=stages)
    assert result.nan == {"clean": N, "APGD": 0, "Square": 0}, "the stages have nothing left to attack"
    return result.accuracy.values()


def by_transfer(problem):
    targets, to_nan = [(nan, problem.w), (linear, problem.w)], SUITE[1]
    found = evaluation.transfer((nan, problem.w), targets, problem.images, ALL_ZERO, to_nan)
    assert found[1].accuracy > 0, "another model sees the images as they were"
    return [found[0].accuracy]


def by_model(problem):
    model = evaluation.Model("nan", nan, problem.w, problem.images, ALL_ZERO)
    return [model.clean().mean(), model.right_on(problem.images).mean(), model.under(SUITE[1])[0].mean()]


def by_diagnose(problem):
    effort = evaluation.Effort(
        budgets=(1.0,), steps=(1,), restarts=1, pgd_steps=1, apgd_steps=1, queries=3, targets=1, fmn=1
    )
    model = evaluation.of_function(lambda x: nan(problem.w, x), problem.images, ALL_ZERO)
    result = evaluation.diagnose(model, eps=EPS, effort=effort, substitute=model)
    suspicious = {check["name"] for check in result["checks"] if check["suspicious"]}
    assert "zero gradients" in suspicious, "NaN is nothing to follow"
    assert result["verdict"].startswith("model: 40 of 40 images have NaN logits: they count as misclassified")
    assert result["nan"]["clean"] == N
    return [
        result["clean"],
        *(accuracy for curve in result["over_eps"]["accuracy"].values() for accuracy in curve),
        *result["over_steps"]["accuracy"],
        *result["over_restarts"]["accuracy"],
        result["transfer"]["accuracy"],
        result["transfer"]["accuracy_of_substitute"],
        *result["worst_case"]["accuracy"].values(),
        result["worst_case"]["robust"],
    ]


def by_the_choice_of_checkpoints(problem):
    config: Any = types.SimpleNamespace(eps1=EPS, norm="linf", eval_batch_size=N, seed=0, transform="unit")
    chosen_on: Any = types.SimpleNamespace(x_test=problem.images, y_test=ALL_ZERO)
    nothing: dict[str, Any] = dict.fromkeys(("dataset", "train_set", "steps", "workdir", "checkpoints", "mesh"))
    run = opening.Run(config=config, validation_set=chosen_on, model=NanNetwork(), **nothing)
    found = trainer.validate(run, types.SimpleNamespace(params={"w": problem.w}, average=None), lambda: 0)
    return [found["clean"], found["robust"], found["score"]]


class NanNetwork:
    """As a Flax module is seen by `networks.apply_fn`."""

    def apply(self, params, x):
        return nan(params["w"], x)


def by_comparison(problem):
    loaded = types.SimpleNamespace(
        apply=nan, params=problem.w, transform=TRANSFORMS["unit"], step=3, dataset={"num_classes": problem.w.shape[-1]}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_model, "load", lambda workdir, which: loaded)
        config = types.SimpleNamespace(workdir="", eps1=EPS, norm="linf", defense="natural")
        found = evaluate_model._attacked(config, "last", problem.images, ALL_ZERO, [Attack("APGD", "apgd", steps=1)])
    assert found["nan"] == "40 of 40 images have NaN logits: they count as misclassified"
    return [found["clean"], found["robust"], *found["after"].values()]


@pytest.mark.parametrize(
    "entry",
    [
        by_evaluate,
        by_predict,
        by_auto,
        by_transfer,
        by_model,
        by_diagnose,
        by_the_choice_of_checkpoints,
        by_comparison,
    ],
)
def test_nan_is_never_right(problem, entry):
    assert all(value == 0 for value in entry(problem))


def test_what_turns_to_nan_under_attack_alone_has_fallen(problem):
    """It is right on clean images; under attack its logits are NaN, whose first class is no answer."""

    def brittle(params, x):
        moved = jnp.abs(x - jnp.round(x * 10) / 10).max(axis=(1, 2, 3)) > 1e-4
        return jnp.where(moved[:, None], jnp.nan, jnp.eye(K)[jnp.zeros(len(x), int)] + 0 * linear(params, x))

    images = np.round(problem.images, 1)
    outcomes = evaluation.evaluate(brittle, problem.w, images, ALL_ZERO, [SUITE[0], Attack("pgd", "pgd", 0.03, 1)])
    counts = {name: outcome.nan for name, outcome in outcomes.items()}
    assert counts == {"clean": 0, "pgd": N}
    assert evaluation.nan_logits(counts, N) == "40 of 40 images have NaN logits under pgd: they count as misclassified"
    assert outcomes["clean"].accuracy == 1
    assert outcomes["pgd"].accuracy == 0
