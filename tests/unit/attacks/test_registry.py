"""`ATTACKS`: a method runs its attack as a suite asks for it, and one of the user's own can be registered."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, evaluation, losses
from e2sad_jax.attacks import ATTACKS, Method
from tests.unit.attacks.helpers import KEYS, N, draw, images, logits_of, predicted, size

EPS = 0.1
pytestmark = pytest.mark.usefixtures("unoptimized")


def f(z: jax.Array) -> jax.Array:
    return logits_of(draw(), z)


def margin(y: jax.Array, z: jax.Array) -> jax.Array:
    return losses.margin(f(z), y)


def labels() -> jax.Array:
    return jnp.asarray(predicted(draw(), images()))


def seen(name: str, returned: jax.Array, **kwargs: Any) -> tuple[jax.Array, dict[str, Any]]:
    """What `run` returns of an attack that returns `returned`, and the arguments that this one was given."""
    arguments: dict[str, Any] = {}
    method = ATTACKS[name]

    @functools.wraps(method.function)
    def attack(**given: Any) -> jax.Array:
        arguments.update(given)
        return returned

    norm = kwargs.pop("norm", method.norms[0])
    method = dataclasses.replace(method, function=attack)
    return method.run(f, images(), labels(), **{"key": KEYS, "eps": EPS, "norm": norm, **kwargs}), arguments


@pytest.mark.parametrize("name", ATTACKS)
def test_run_passes_what_the_attack_takes_and_returns_what_it_returns(name):
    x, made = images(), images(seed=3) * 0.1 + images() * 0.9
    method = ATTACKS[name]
    got, arguments = seen(name, made, steps=7, eps=10.0, bounds=(-1.0, 2.0))
    np.testing.assert_array_equal(got, made)
    assert set(arguments) == method.parameters - {"targets", "step_size", "constraint_fn"}
    plain = {"key": KEYS, "eps": 10.0, "pixels": 10, "steps": 7, "queries": 7, "restarts": 1, "bounds": (-1.0, 2.0)}
    for argument, value in {**plain, "norm": method.norms[0], "logits_fn": f}.items():
        if argument in arguments:
            assert arguments[argument] is value or arguments[argument] == value
    np.testing.assert_array_equal(arguments["x"], x)
    for function in ("loss_fn", "margin_fn"):
        if function in arguments:
            np.testing.assert_array_equal(arguments[function](made), margin(labels(), made))
    if "misclassified_fn" in arguments:
        np.testing.assert_array_equal(arguments["misclassified_fn"](made), f(made).argmax(1) != labels())
    if "labels" in arguments:
        np.testing.assert_array_equal(arguments["labels"], labels())
    assert "steps" not in seen(name, made)[1], "without a number of steps the attack takes its own"
    assert seen(name, made, bounds=None)[1].get("bounds", 0) is None
    if "step_size" in method.parameters:
        assert seen(name, made, step_size=0.07)[1]["step_size"] == 0.07
    if "restarts" in method.parameters:
        assert seen(name, made, restarts=3)[1]["restarts"] == 3
    if "targets" in method.parameters:
        assert seen(name, made, targets=(labels() + 1) % 3)[1]["targets"] is not None
    if "loss_fn" in method.parameters:
        given = seen(name, made, loss_fn=jnp.ravel)[1]["loss_fn"]
        if method.family == "score-based":  # it is the margin that is above 0 where the model is wrong
            np.testing.assert_array_equal(given(made), margin(labels(), made))
        else:
            assert given is jnp.ravel


@pytest.mark.parametrize("name", ["fab", "fmn", "ddn", "deepfool", "carlini_wagner", "lbfgs"])
def test_of_a_minimum_norm_attack_what_is_within_the_budget_is_kept(name):
    """In its norm and inside the range; the other images stay."""
    x = images()
    for norm in ATTACKS[name].norms:
        scale = np.linspace(0.2, 1.8, N) * EPS
        way = jnp.where(x > 0.5, -1.0, 1.0)
        way = way if norm == "linf" else way / np.sqrt(x[0].size)
        made = x + jnp.asarray(scale, jnp.float32).reshape(-1, 1, 1, 1) * way
        got, _ = seen(name, made, norm=norm)
        np.testing.assert_array_equal(got, jnp.where((scale < EPS).reshape(-1, 1, 1, 1), made, x))
        np.testing.assert_array_equal(seen(name, x - 0.01, norm=norm)[0][:, 0, 0], x[:, 0, 0], "below the range")


@pytest.mark.parametrize("name", ["greedy_l0", "jsma"])
def test_of_an_attack_on_few_pixels_what_changes_no_more_of_them_is_kept(name):
    """Image i has i pixels changed; and one beyond the range is never kept."""
    x = images()
    made = np.array(x).reshape(N, -1)
    for i in range(N):
        made[i, 2 : 2 + i] = 1 - made[i, 2 : 2 + i]
    made = jnp.asarray(made.reshape(x.shape))
    for eps in (0.0, 3.0, 3.9, jnp.float32(3.0), np.arange(N) % 2 * np.float32(4)):
        kept = (np.arange(N) <= np.asarray(eps)).reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(seen(name, made, eps=eps)[0], np.where(kept, made, x))
    np.testing.assert_array_equal(seen(name, x.at[:, 0, 0].set(-0.1), eps=3)[0], x)
    colours = jnp.zeros((1, 2, 2, 3)).at[0, 0, 1].set(1.0)  # three channels, one pixel
    np.testing.assert_array_equal(attacks._ball.L0Ball(colours * 0, 1, None).contains(colours), [True])


def test_a_number_of_pixels_that_is_traced_is_refused_where_it_is_a_shape():
    with pytest.raises(ValueError, match=r"few_pixels: eps=.*its number of pixels is a shape: it must be a number"):
        jax.jit(lambda y, eps: ATTACKS["few_pixels"].run(f, images(), y, key=KEYS, eps=eps, norm="l0"))(labels(), 1.0)


def test_a_nan_logit_counts_as_misclassified():
    def sometimes(z: jax.Array) -> jax.Array:
        return jnp.where(z[:, :1, 0, 0] > 0.5, jnp.nan, jnp.array([[1.0, 0.0]]))

    x = jnp.array([0.4, 0.6]).reshape(2, 1, 1, 1)
    arguments: dict[str, Any] = {}

    def attack(x: jax.Array, misclassified_fn: Any) -> jax.Array:
        arguments["fooled"] = misclassified_fn(x)
        return x

    Method(attack, "gradient").run(sometimes, x, jnp.zeros(2, int), key=KEYS[:2], eps=EPS)
    np.testing.assert_array_equal(arguments["fooled"], [False, True])


def test_what_a_method_does_not_support_is_refused():
    cases = {
        ("ifgsm", "norm"): ("l2", "ifgsm: norm='l2'; it must be linf"),
        ("carlini_wagner", "norm"): ("linf", "carlini_wagner: norm='linf'; it must be l2"),
        ("fgsm", "restarts"): (2, "fgsm: restarts=2; it has no random restarts"),
        ("apgd", "step_size"): (0.1, "apgd: step_size=0.1; it has no step size"),
    }
    for (name, argument), (value, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            seen(name, images(), **{argument: value})
    with pytest.raises(ValueError, match="row: images have 2 axes; it needs 4"):
        ATTACKS["square"].check("row", ndim=2)
    ATTACKS["square"].check("row", norm="l2", ndim=4)


def test_a_threshold_is_a_detectors_where_the_attack_takes_its_score():
    seen = {}

    def own(loss_fn, x, *, eps, threshold=0.7, population=None):
        seen["own"] = threshold
        return x

    def of_detector(loss_fn, score_fn, x, *, threshold, eps):
        seen["of detector"] = threshold, float(score_fn(x)[0])
        return x

    y = labels()
    Method(own, "gradient").run(f, images(), y, key=KEYS, eps=EPS)
    Method(of_detector, "gradient").run(f, images(), y, key=KEYS, eps=EPS)
    Method(of_detector, "gradient").run(
        f, images(), y, key=KEYS, eps=EPS, constraint_fn=lambda z: jnp.full(len(z), 0.5)
    )
    assert seen == {"own": 0.7, "of detector": (0.0, 0.5)}
    assert Method(own, "gradient").passes() == 1


def test_entries_say_what_they_are():
    assert {name for name, method in ATTACKS.items() if method.random} == {
        *("pgd", "apgd", "orthogonal_pgd", "square", "fab", "few_pixels")
    }
    assert {name for name, method in ATTACKS.items() if "restarts" in method.parameters} == {"pgd", "apgd", "fab"}
    assert {name for name, method in ATTACKS.items() if method.family == "minimum-norm"} == {
        *("fab", "fmn", "ddn", "deepfool", "carlini_wagner", "lbfgs", "greedy_l0", "jsma")
    }
    assert all(getattr(attacks, name) is method.function for name, method in ATTACKS.items())


def corners(key: jax.Array, loss_fn: attacks.core.LossFn, x: jax.Array, *, eps: float, steps: int = 3) -> jax.Array:
    """The worst of some random corners of the ball: an attack of the user's own."""
    best, limits = x, attacks.core.linf_ball(x, eps, (0.0, 1.0))
    for i in range(steps):
        own = jax.vmap(jax.random.fold_in, (0, None))(attacks.core.per_image_keys("corners", key, len(x)), i)
        tried = limits.project(x + eps * jnp.sign(limits.sample(own, x)))
        best = attacks.core.select(loss_fn(tried) > loss_fn(best), tried, best)
    return best


def test_an_attack_of_ones_own_runs_by_name(monkeypatch):
    monkeypatch.setattr(attacks, "ATTACKS", dict(ATTACKS))
    attacks.register("corners", Method(corners, "score-based"))
    assert attacks.ATTACKS["corners"].random
    y = jnp.asarray(predicted(draw(), images()))
    got = attacks.ATTACKS["corners"].run(f, images(), y, key=KEYS, eps=EPS)
    assert (margin(y, got) > margin(y, images())).any()
    assert (size(got - images(), "linf") <= EPS + 1e-6).all()
    for taken in ("corners", "pgd", "clean"):
        with pytest.raises(ValueError, match=f"attack '{taken}' exists already"):
            attacks.register(taken, Method(corners, "score-based"))


def test_a_method_that_no_suite_could_run_is_refused():
    def needs(x: jax.Array, gpu: int) -> jax.Array:
        return x

    with pytest.raises(ValueError, match=r"needs: its argument 'gpu' is none that a suite can give"):
        Method(needs, "gradient")
    with pytest.raises(ValueError, match="family='white-box'; it must be one of gradient, score-based, minimum-norm"):
        Method(corners, "white-box")
    with pytest.raises(ValueError, match=r"norms=\('l1',\); it must be some of linf, l2, l0"):
        Method(corners, "gradient", ("l1",))


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_a_suite_takes_no_label_that_is_no_class(name):
    """Refused where it can be seen; under jit that image becomes NaN, and never one that was attacked as another class."""
    x = jnp.full((3, 4, 4, 1), 0.5) + jnp.arange(3).reshape(3, 1, 1, 1) / 10
    w = jnp.asarray(np.random.RandomState(0).randn(16, 4), jnp.float32)

    def perturbed(y):
        norm = ATTACKS[name].norms[-1]
        steps = 2 if ATTACKS[name].counts else 0
        attack = evaluation.Attack("a", name, 2 if norm == "l0" else 0.1, steps, norm=norm)
        return attack.perturb(lambda z: z.reshape(len(z), -1) @ w, x, y, bounds=(0.0, 1.0), index=jnp.arange(3))

    for wrong in (-1, 4):
        y = jnp.array([0, wrong, 2])
        with pytest.raises(ValueError, match=rf"labels contain {wrong}; each must be a class in \[0, 4\)"):
            perturbed(y)
        got = np.asarray(jax.jit(perturbed)(y))
        np.testing.assert_array_equal(np.isnan(got).all((1, 2, 3)), [False, True, False])
