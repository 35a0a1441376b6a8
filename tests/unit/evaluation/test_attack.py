"""A row of a suite: what it runs, what it costs, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, evaluation
from e2sad_jax.evaluation import SUITES, Attack
from tests.unit.evaluation.conftest import K, N, linear

EVERY_ROW = {
    "fgsm": Attack("a", "fgsm", 0.1),
    "ifgsm": Attack("a", "ifgsm", 0.1, 2),
    "mi_fgsm": Attack("a", "mi_fgsm", 0.1, 2, 0.06),
    "pgd": Attack("a", "pgd", 0.1, 2, 0.06, restarts=2),
    "apgd": Attack("a", "apgd", 0.1, 2, loss="margin"),
    "orthogonal_pgd": Attack("a", "orthogonal_pgd", 0.3, 10),
    "square": Attack("a", "square", 0.1, 10),
    "fab": Attack("a", "fab", 0.1, 3, loss="targeted_dlr"),
    "fmn": Attack("a", "fmn", 0.1, 5),
    "ddn": Attack("a", "ddn", 0.3, 30, norm="l2"),
    "deepfool": Attack("a", "deepfool", 0.1, norm="l2"),
    "carlini_wagner": Attack("a", "carlini_wagner", 0.3, 5, norm="l2"),
    "lbfgs": Attack("a", "lbfgs", 0.3, 10, norm="l2"),
    "few_pixels": Attack("a", "few_pixels", 2, 2, norm="l0"),
    "greedy_l0": Attack("a", "greedy_l0", 4, norm="l0"),
    "jsma": Attack("a", "jsma", 8, norm="l0"),
}


def test_every_registered_attack_is_tried_here():
    assert set(EVERY_ROW) == set(attacks.ATTACKS)


@pytest.mark.parametrize("kind", EVERY_ROW)
def test_a_row_stays_in_its_ball_and_in_the_bounds(kind, problem):
    attack, bounds, x = EVERY_ROW[kind], (0.15, 1.0), jnp.asarray(problem.images[:8])
    attack.check(K, x.ndim)

    @jax.jit
    def made(seed):
        return attack.perturb(
            lambda z: linear(problem.w, z), x, problem.labels[:8], bounds=bounds, index=jnp.arange(8), seed=seed
        )

    z = made(0)
    assert z.shape == x.shape
    assert z.dtype == x.dtype
    change = np.asarray(z - x).reshape(8, -1)
    size = np.linalg.norm(change, {"linf": np.inf, "l2": 2, "l0": 0}[attack.norm], axis=1)
    assert 0 < size.max() <= attack.eps + 1e-6
    assert 0.15 - 1e-6 <= float(z.min()) <= float(z.max()) <= 1
    if kind in ("pgd", "square"):
        assert float(jnp.abs(z - made(1)).max()) > 0.01, "the seed counts"


def test_a_targeted_row_walks_to_the_class_of_its_rank(problem):
    attack = Attack("a", "pgd", 0.05, 5, loss="targeted_dlr")
    x, labels = jnp.asarray(problem.images), jnp.asarray(problem.labels)
    logits = np.array(linear(problem.w, problem.images))
    logits[np.arange(N), problem.labels] = -np.inf
    order = np.argsort(-logits, axis=1)

    @jax.jit
    def made(rank):
        return attack.perturb(
            lambda z: linear(problem.w, z), x, labels, bounds=(0.0, 1.0), index=jnp.arange(N), rank=rank
        )

    for rank in (1, 3):
        target = order[:, rank - 1]
        before, after = (np.asarray(linear(problem.w, z)) for z in (x, made(rank)))
        gap = [(f[np.arange(N), target] - f[np.arange(N), problem.labels]) for f in (before, after)]
        assert (gap[1] > gap[0]).mean() > 0.9


def test_an_attack_of_the_users_own_is_a_row(problem, monkeypatch):
    monkeypatch.setattr(attacks, "ATTACKS", dict(attacks.ATTACKS))

    def darken(x, *, eps, bounds):
        return jnp.clip(x - eps, *bounds)

    with pytest.raises(ValueError, match="kind='darken'; it must be one of clean, fgsm"):
        Attack("mine", "darken", 0.1).check(K, 4)
    attacks.register("darken", attacks.Method(darken, "score-based"))
    row = Attack("mine", "darken", 0.1)
    outcome = evaluation.evaluate(linear, problem.w, problem.images, problem.labels, [row])["mine"]
    np.testing.assert_array_equal(outcome.prediction, linear(problem.w, problem.images - np.float32(0.1)).argmax(1))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Attack("a", "nothing"), "attack 'a': kind='nothing'; it must be one of clean, fgsm, "),
        (Attack("a", "pgd", 0.1, 2, loss="mse"), "loss='mse'; it must be one of ce, margin, dlr, targeted_dlr"),
        (Attack("a", "pgd", 0.1), r"steps=0; it must be at least 1"),
        (Attack("a", "fab", 0.1, -1), r"steps=-1; it must be at least 0"),
        (Attack("a", "mi_fgsm", 0.1, 2, norm="l2"), r"norm='l2'; it must be linf"),
        (Attack("a", "fgsm", 0.1, restarts=2), r"restarts=2; it has no random restarts"),
        (Attack("a", "jsma", 3, 5, norm="l0"), r"steps=5; jsma has no number of steps to choose, leave it out"),
        (Attack("a", "apgd", 0.1, 2, loss="targeted_dlr", targets=0), r"targets=0; it must be at least 1"),
        (Attack("a", "untargeted", 0.1, loss="targeted_dlr"), r"untargeted has no targets to walk to"),
        (Attack("a", "square", 0.1, 2), r"images have 2 axes; it needs 4"),
        (
            Attack("a", "apgd", 0.1, 2, loss="targeted_dlr"),
            r"targeted_dlr needs at least 4 classes; the model has 2: l",
        ),
        (Attack("a", "apgd", 0.1, 2, loss="dlr"), r"dlr needs at least 3 classes; the model has 2: leave it out"),
    ],
)
def test_what_is_not_possible_is_refused(attack, message, monkeypatch):
    monkeypatch.setitem(attacks.ATTACKS, "untargeted", attacks.Method(lambda logits_fn, x: x, "minimum-norm"))
    with pytest.raises(ValueError, match=message):
        attack.check(2, 2)


def test_an_attack_without_targets_is_not_run_once_for_each_of_them():
    """Square sees the margin alone: towards nine classes it would make the same images nine times."""
    with pytest.raises(ValueError, match="loss='targeted_dlr'; square has no targets to walk to, leave the loss out"):
        Attack("a", "square", 0.1, 2, loss="targeted_dlr").check(4, 4)


def test_a_class_of_infinitely_low_logit_is_a_target_and_the_label_never(monkeypatch):
    aims = []

    def walk(logits_fn, x, labels, *, targets):
        aims.append(np.asarray(targets))
        return x

    monkeypatch.setitem(attacks.ATTACKS, "walk", attacks.Method(walk, "minimum-norm"))
    labels = jnp.asarray([3, 1])
    for rank in (1, 2, 3):
        Attack("a", "walk", 1.0, loss="targeted_dlr").perturb(
            lambda z: jnp.asarray([[-jnp.inf, 1, 2, 3], [-jnp.inf, 3, 2, 1]], jnp.float32) + 0 * z[:, :1],
            jnp.zeros((2, 1)),
            labels,
            bounds=(0.0, 1.0),
            index=jnp.arange(2),
            rank=rank,
        )
    np.testing.assert_array_equal(np.stack(aims), [[2, 2], [1, 3], [0, 0]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": -0.1}, "eps=-0.1; it must be a number, finite and at least 0"),
        ({"eps": float("nan")}, "eps=nan; it must be a number, finite"),
        ({"eps": float("inf")}, "eps=inf; it must be a number, finite"),
        ({"eps": 1e39}, r"eps=1e\+39; it must be a number, finite"),
        ({"eps": 10**400}, "eps=an integer of 1,329 bits; it must be a number, finite"),
        ({"eps": None}, "eps=None; it must be a number"),
        ({"eps": "0.1"}, "eps='0.1'; it must be a number"),
        ({"eps": np.float32(-1)}, r"eps=.*-1.0.*; it must be a number, finite and at least 0"),
        ({"eps": jnp.float32(np.nan)}, "eps=.*nan.*; it must be a number, finite"),
        ({"eps": np.full(3, 0.1)}, r"eps has shape \(3,\); it must be one number, .*scale the inputs"),
        ({"eps": 0.1, "step_size": 0}, "step_size=0; it must be a number, finite and above 0"),
    ],
)
def test_a_budget_is_refused_before_it_is_traced(settings, message):
    with pytest.raises(ValueError, match=f"attack 'a': {message}"):
        Attack("a", "pgd", steps=2, **settings)


def test_a_traced_budget_is_taken_as_it_is(problem):
    x, row = jnp.asarray(problem.images[:2]), Attack("a", "fgsm")

    @jax.jit
    def made(eps):
        return dataclasses.replace(row, eps=eps).perturb(
            lambda z: linear(problem.w, z), x, problem.labels[:2], bounds=(0.0, 1.0), index=jnp.arange(2)
        )

    np.testing.assert_allclose(np.abs(made(jnp.float32(0.1)) - x).max(), 0.1, atol=1e-6)


def test_gradients_of_a_row():
    assert Attack("a", "clean").gradients() == 1
    assert Attack("a", "pgd", 0.1, 4, restarts=3).gradients(K) == 12
    assert Attack("a", "square", 0.1, 30).gradients(K) == 10, "three queries count as one"
    assert Attack("a", "square", 0.1).gradients(K) == 5000 // 3, "by default"
    assert Attack("a", "fgsm", 0.1).gradients(K) == 1
    assert Attack("a", "few_pixels", 1, 30, norm="l0").gradients(K) == 30 * 400 // 3, "each generation has 400 images"
    assert Attack("a", "carlini_wagner", 1, 10, norm="l2").gradients(K) == 90, "nine times"
    targeted = Attack("a", "apgd", 0.1, 7, loss="targeted_dlr")
    assert (targeted.gradients(), targeted.gradients(K), targeted.gradients(100)) == (63, 28, 63)
    assert dataclasses.replace(targeted, targets=2).gradients(K) == 14


def test_suites_are_the_documented_ones():
    rows = {name: [(a.kind, a.eps, a.steps, a.step_size) for a in suite] for name, suite in SUITES.items()}
    assert rows["mnist"] == [
        ("clean", 0.0, 0, None),
        ("fgsm", 0.3, 1, None),
        ("fgsm", 0.4, 1, None),
        ("ifgsm", 0.3, 10, None),
        ("ifgsm", 0.3, 30, None),
        ("pgd", 0.3, 40, 0.02),
    ]
    eps = 24 / 255
    assert rows["svhn"][:5] == [("clean", 0.0, 0, None), ("fgsm", eps, 1, None)] + [
        ("ifgsm", eps, k, None) for k in (10, 20, 30)
    ]
    assert {eps for _, eps, _, _ in rows["digits"]} == {0.0, 0.2, 0.3}
    assert rows["svhn"][5][:3] == ("pgd", eps, 40)
    assert rows["cifar10"][2:] == [("ifgsm", 8 / 255, 10, None)] + [("pgd", 8 / 255, k, 2 / 255) for k in (10, 50)]
    for suite in SUITES.values():
        for attack in suite:
            attack.check(10, 4)
