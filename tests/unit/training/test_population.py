"""Several steps in one dispatch and several runs in one step: equal to single runs, and resumable each by itself."""

import chex
import jax
import numpy as np
import pytest

from e2sad_jax import networks, training
from e2sad_jax.runs import trainer
from e2sad_jax.training import Config
from tests.helpers import count_compilations, tiny_config

N = 50

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def standard_promotion(monkeypatch, little):
    """Optax's Adam mixes float and int32. Checkpoints are not attacked here: that takes longer than the training."""
    monkeypatch.setattr(trainer, "validate", lambda run, state, stop: {"score": 0.0})
    with jax.numpy_dtype_promotion("standard"):
        yield


def config_of(**changes) -> Config:
    return tiny_config(**{"steps": 8, "checkpoint_every": 4, "log_every": 1, "eps1": 0.1, "eps2": 0.05, **changes})


MEMBERS = [
    config_of(seed=3),
    config_of(seed=3, lam=1.0),
    config_of(seed=4, eps1=0.2),
]


def alone(config, dataset, **kwargs):
    model = networks.create(config.model, dataset.num_classes, dataset.image_shape)
    state = training.init_state(config, model, dataset.image_shape, len(dataset.x_train))
    rows = []

    def record(step, metrics, count):
        values = jax.device_get(metrics)
        rows.extend({k: np.atleast_1d(v)[i] for k, v in values.items()} for i in range(count))

    state = training.fit(
        config, model, dataset, state, steps=config.steps, record=record, checkpoint=lambda *a: None, **kwargs
    )
    return state, rows


@pytest.fixture(scope="module")
def singles(tiny, little):
    with jax.numpy_dtype_promotion("standard"):
        return [alone(config, tiny) for config in MEMBERS]


def close(a, b):
    chex.assert_trees_all_close(a.params, b.params, atol=2e-5)
    assert int(a.step) == int(b.step)


def test_several_steps_in_one_dispatch_are_those_steps_compiled_once(tiny, singles, monkeypatch):
    """Five at most at once: the checkpoint of step 4 and the end of the epoch, inside step 4, cut them."""
    made = count_compilations(monkeypatch)
    saved = []
    counts = []
    model = networks.create("digits_cnn", 3, tiny.image_shape)
    rows = []

    def record(step, metrics, count):
        counts.append(count)
        values = jax.device_get(metrics)
        rows.extend({k: v[i] for k, v in values.items()} for i in range(count))

    state = training.fit(
        MEMBERS[0],
        model,
        tiny,
        training.init_state(MEMBERS[0], model, tiny.image_shape, len(tiny.x_train)),
        steps=8,
        record=record,
        checkpoint=lambda step, state: saved.append(step),
        steps_per_dispatch=5,
    )
    assert counts == [4, 3, 1], "to the checkpoint, to the next epoch (step 7 is the last that begins in the second)"
    assert saved == [4, 8]
    assert made[0]._cache_size() == 1
    close(state, singles[0][0])
    assert [float(r["loss"]) for r in rows] == pytest.approx([float(r["loss"]) for r in singles[0][1]], abs=1e-5)


def together(members, dataset, **kwargs):
    """The states and the losses `[steps, P]` of runs that train as one population."""
    model = networks.create("digits_cnn", 3, dataset.image_shape)
    state = training.stack([training.init_state(c, model, dataset.image_shape, len(dataset.x_train)) for c in members])
    rows = []

    def record(step, metrics, count):
        rows.extend(np.asarray(metrics["loss"]).reshape(-1, len(members))[:count])

    state = training.fit(
        members, model, dataset, state, steps=members[0].steps, record=record, checkpoint=lambda *a: None, **kwargs
    )
    return training.unstack(state), np.stack(rows)


def test_a_population_equals_separate_runs(tiny, singles):
    """Other seeds, weights and budgets; several steps a dispatch."""
    members, losses = together(MEMBERS, tiny, steps_per_dispatch=3)
    for i, (member, (single, metrics)) in enumerate(zip(members, singles, strict=True)):
        close(member, single)
        assert losses[:, i].tolist() == pytest.approx([float(m["loss"]) for m in metrics], abs=1e-5)
    kernels = [jax.tree.leaves(m.params)[-1] for m in members]
    assert float(abs(kernels[0] - kernels[1]).max()) > 1e-4, "they are different runs"


@pytest.mark.parametrize(
    ("defense", "own"),
    [("pgd", {}), ("e2sad", {"second_step": "noise"}), ("free", {"replays": 2}), ("pgd", {"awp": 0.05})],
    ids=["keys-of-images", "key-of-batch", "perturbation", "perturbed weights"],
)
def test_every_kind_of_random_number_is_that_of_a_run_alone(defense, own, tiny):
    """Two seeds and two budgets; and the perturbation that free training keeps."""
    common = dict(defense=defense, steps=3, **own)
    members = [config_of(seed=1, **common), config_of(seed=2, eps1=0.05, **common)]
    _, losses = together(members, tiny)
    for i, config in enumerate(members):
        _, metrics = alone(config, tiny)
        assert losses[:, i].tolist() == pytest.approx([float(m["loss"]) for m in metrics], rel=1e-4)


def test_what_may_train_together():
    keys = [training.population_key(c) for c in MEMBERS]
    assert keys[0] == keys[1] == keys[2]
    for changes in (
        {"second_step": "loss"},
        {"alpha": 0.5},
        {"soft_label": False},
        {"batch_size": 8},
        {"defense": "fgsm"},
    ):
        assert training.population_key(config_of(**changes)) != keys[0]
    assert training.varied_settings(MEMBERS) == ["eps1", "lam"]
    assert training.varied_settings([config_of(seed=1, eps2=0.02), config_of(seed=2)]) == ["eps2"]
