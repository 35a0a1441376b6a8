"""Evaluation: every image counts once, whatever the batches; the suites are the paper's and one that is not weak."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.evaluation import SUITES, Attack, Outcome, evaluate, perturb, worst_case

N, K = 23, 4
SUITE = (
    Attack("clean", "clean"),
    Attack("fgsm", "fgsm", 0.1, 1),
    Attack("ifgsm", "ifgsm", 0.1, 3),
    Attack("pgd", "pgd", 0.1, 4, 0.05, restarts=2),
)


class Linear(nn.Module):
    """A linear classifier: attacks on it have a closed form."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(K)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, 5, 5, 1)).astype(np.uint8)
    model = Linear()
    params = model.init(jax.random.key(1), jnp.zeros((1, 5, 5, 1)))
    labels = np.asarray(model.apply(params, jnp.asarray(images) / 255).argmax(-1)).astype(np.int32)
    labels[:3] = (labels[:3] + 1) % K  # three that are wrong already
    return model, params, images, labels


def run(problem, **kwargs):
    model, params, images, labels = problem
    return evaluate(model, params, images, labels, SUITE, transform=TRANSFORMS["unit"], num_classes=K, **kwargs)


def test_outcomes_are_those_of_the_attacks_one_by_one(problem):
    """Against the attacks called directly on all images at once."""
    model, params, images, labels = problem
    x, y = jnp.asarray(images).astype(jnp.float32) / 255, losses.soft_labels(jnp.asarray(labels), K, 0.0)

    def loss_fn(z):
        return losses.cross_entropy(model.apply(params, z), y)

    def wrong(z):
        return model.apply(params, z).argmax(-1) != labels

    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(N))
    by_hand = {
        "clean": x,
        "fgsm": attacks.fgsm(loss_fn, x, eps=0.1),
        "ifgsm": attacks.ifgsm(loss_fn, x, eps=0.1, steps=3),
        "pgd": attacks.pgd(keys, loss_fn, x, eps=0.1, steps=4, step_size=0.05, restarts=2, misclassified_fn=wrong),
    }
    outcomes = run(problem, batch_size=N)
    assert list(outcomes) == list(by_hand)
    for name, z in by_hand.items():
        np.testing.assert_array_equal(outcomes[name].correct, ~np.asarray(wrong(z)), err_msg=name)
        np.testing.assert_array_equal(outcomes[name].prediction, model.apply(params, z).argmax(-1), err_msg=name)
    assert outcomes["clean"].accuracy == 20 / 23
    assert 0 < outcomes["fgsm"].accuracy < 20 / 23, "the attack must bite, and not destroy all"


@pytest.mark.parametrize("batch_size", [1, 5, 22, 1000])
def test_no_outcome_depends_on_the_batch_and_no_image_is_dropped(problem, batch_size):
    whole, split = run(problem, batch_size=N), run(problem, batch_size=batch_size)
    for name, outcome in whole.items():
        assert outcome.correct.shape == (N,)
        np.testing.assert_array_equal(outcome.prediction, split[name].prediction)


def test_progress_counts_every_gradient_once(problem):
    seen = {}
    run(problem, batch_size=5, progress=lambda name, n: seen.update({name: seen.get(name, 0) + n}))
    assert seen == {"clean": N, "fgsm": N, "ifgsm": 3 * N, "pgd": 2 * 4 * N}


def test_attacks_see_hard_labels_and_the_bounds_of_the_transform(problem):
    """On [-1, 1] inputs an attack may go below 0."""
    model, params, images, labels = problem
    x = TRANSFORMS["standardize"].apply(jnp.asarray(images))
    y = jax.nn.one_hot(labels, K)
    z = perturb(
        SUITE[1], lambda z: model.apply(params, z), x, y, bounds=TRANSFORMS["standardize"].bounds, index=jnp.arange(N)
    )
    assert float(z.min()) < -0.05
    assert float(jnp.abs(z - x).max()) <= 0.1 + 1e-6
    assert float(z.min()) >= -1


def test_random_starts_depend_on_the_seed(problem):
    model, params, images, labels = problem
    x, y = jnp.asarray(images).astype(jnp.float32) / 255, jax.nn.one_hot(labels, K)
    one, two = (
        perturb(
            Attack("p", "pgd", 0.1, 1, 0.001),
            lambda z: model.apply(params, z),
            x,
            y,
            bounds=(0.0, 1.0),
            index=jnp.arange(N),
            seed=seed,
        )
        for seed in (0, 1)
    )
    assert float(jnp.abs(one - two).max()) > 0.05


def test_unknown_kind_is_refused(problem):
    _model, _params, _images, _ = problem
    with pytest.raises(ValueError, match="kind='deepfool' must be one of clean, fgsm"):
        perturb(
            Attack("x", "deepfool"), None, jnp.zeros((1, 2)), jnp.eye(3)[:1], bounds=(0.0, 1.0), index=jnp.arange(1)
        )


def test_worst_case_counts_an_example_only_if_every_attack_leaves_it():
    outcomes = {
        "a": Outcome(np.array([True, True, False]), np.zeros(3)),
        "b": Outcome(np.array([True, False, True]), np.zeros(3)),
    }
    np.testing.assert_array_equal(worst_case(outcomes), [True, False, False])


def test_suites_are_the_ones_that_are_promised():
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
