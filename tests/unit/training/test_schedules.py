"""What changes in the course of training: learning rate, budgets, free training's perturbation; and resuming them."""

import contextlib
import dataclasses
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import networks, training
from e2sad_jax.errors import WorkdirError
from e2sad_jax.runs import run, trainer
from e2sad_jax.runs.checkpoint import Checkpoints
from e2sad_jax.training.config import Config
from tests.unit.training.test_train import N, fit, load_state, no_evaluation, no_last_evaluation, tiny_config  # noqa: F401

pytestmark = pytest.mark.usefixtures("little")

SETTINGS = (  # the later ones
    *("schedule", "eps_warmup", "noise", "replays", "beta", "align_weight", "gradient_weight"),
    *("random_start", "ball_second"),
)


@pytest.fixture(autouse=True)
def standard_promotion(monkeypatch):
    monkeypatch.setattr(
        trainer, "validate", lambda run, state, stop: {"score": 0.0}
    )  # checkpoints are not attacked here
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("steps", [10, 11, 1])
@pytest.mark.parametrize("schedule", ["cyclic", "piecewise", "cosine"])
def test_learning_rate_is_the_closed_form(schedule, steps):
    half, three_quarters, t = max(1, steps // 2), 3 * steps // 4, np.arange(steps + 1)
    want = {
        "cyclic": np.interp(t, [0, half, max(steps, 2 * half)], [0, 0.4, 0]),
        "piecewise": np.where(t < half, 0.4, np.where(t < three_quarters, 0.04, 0.004)),
        "cosine": 0.2 * (1 + np.cos(np.pi * t / steps)),
    }[schedule]
    rate = training.learning_rate(Config(schedule=schedule, learning_rate=0.4), steps)
    if steps > 1:
        np.testing.assert_allclose([rate(i) for i in t], want, atol=1e-6)
    assert np.isfinite([float(rate(i)) for i in t]).all()


def test_a_constant_rate_is_a_number():
    assert training.learning_rate(Config(learning_rate=0.4), 10) == 0.4


def test_updates_follow_the_schedule_over_all_steps_of_the_run(tiny, monkeypatch):
    """With constant gradients Adam moves every parameter by the learning rate: 4 epochs are 13 steps of 16."""

    def plane(logits_fn, x, y, key):
        return logits_fn(jnp.ones_like(x[:1])).sum(), {}

    class Sum(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.param("w", lambda key: jnp.zeros((1, 3))) + 0 * x.sum()

    monkeypatch.setattr(training, "training_loss", lambda config, bounds: plane)
    config = tiny_config(epochs=4.0, schedule="cyclic", learning_rate=0.1)
    state, seen = training.init_state(config, Sum(), tiny.image_shape), []
    training.fit(
        dataclasses.replace(config, checkpoint_every=1),
        Sum(),
        tiny,
        state,
        steps=13,
        record=lambda *a: None,
        checkpoint=lambda step, state: seen.append(
            (float(np.asarray(state.params["params"]["w"])[0, 0]), counts(state))
        ),
    )
    want = np.interp(np.arange(13), [0, 6, 13], [0, 0.1, 0])
    np.testing.assert_allclose(-np.diff([0, *(value for value, _ in seen)]), want, rtol=1e-3, atol=1e-6)
    assert [count for _, count in seen] == [[i, i] for i in range(1, 14)], (
        "Adam's count and the schedule's are the step"
    )


def counts(state: training.TrainState) -> list[int]:
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return [int(leaf) for path, leaf in leaves if "count" in jax.tree_util.keystr(path)]


@pytest.mark.parametrize(("attack_step_size", "warmup"), [(0.0, 4), (0.2, 4), (0.0, 0.5)])
def test_budgets_rise_linearly_in_one_compilation(attack_step_size, warmup, tiny, monkeypatch):
    steps, make, real = [], training.make_train_step, training.training_loss
    monkeypatch.setattr(training, "make_train_step", lambda *a, **k: steps.append(make(*a, **k)) or steps[-1])

    def watched(config, bounds):
        def loss_fn(*arguments):
            loss, parts = real(config, bounds)(*arguments)
            budgets = [config.eps1, config.eps2, config.attack_step_size]
            return loss, {**parts, "budgets": jnp.stack([jnp.asarray(b, jnp.float32) for b in budgets])}

        return loss_fn

    monkeypatch.setattr(training, "training_loss", watched)
    config = tiny_config(
        defense="pgd", eps_warmup=warmup, eps1=0.4, eps2=0.1, steps=8, attack_step_size=attack_step_size
    )
    seen = []
    fit(config, tiny, record=lambda step, metrics, count: seen.append(np.asarray(metrics["budgets"])))
    grown = np.minimum(np.arange(8) / 4, 1)[:, None]
    np.testing.assert_allclose(seen, grown * [0.4, 0.1, attack_step_size], rtol=1e-6)
    assert steps[0]._cache_size() == 1


def test_the_first_step_of_a_warm_up_is_natural_training(tiny):
    def first_loss(**changes):
        losses = []
        config = tiny_config(steps=1, eps1=0.3, **changes)
        fit(config, tiny, record=lambda step, metrics, count: losses.append(float(metrics["loss"])))
        return losses[0]

    natural, warm = first_loss(defense="natural"), first_loss(defense="n_fgsm", eps_warmup=5)
    assert warm == pytest.approx(natural, abs=1e-5)
    assert abs(first_loss(defense="n_fgsm") - natural) > 1e-3


@pytest.mark.parametrize("replays", [1, 3])
@pytest.mark.parametrize("steps_per_dispatch", [1, 4])
def test_free_training_replays_each_batch(replays, steps_per_dispatch, tiny, monkeypatch):
    """Over the end of an epoch: batches are those of training without replays, each so many times."""
    marked = dataclasses.replace(
        tiny, x_train=np.arange(N, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 1), np.uint8)
    )

    def name_images(logits_fn, x, y, key, *delta):
        kept = sum(d.sum() * 0 for d in delta)
        return logits_fn(x).sum() * 0 + kept, {"images": jnp.sort(x[:, 0, 0, 0] * 255)}

    monkeypatch.setattr(training, "training_loss", lambda config, bounds: name_images)
    seen = {}
    for defense, steps in (("free", 7 * replays), ("natural", 7)):
        seen[defense] = []

        def record(step, metrics, count, rows=seen[defense]):
            rows.extend(np.rint(np.asarray(metrics["images"]).reshape(-1, 16)[:count]).astype(int).tolist())

        config = tiny_config(defense=defense, replays=replays, steps=steps, checkpoint_every=100)
        fit(config, marked, record=record, steps_per_dispatch=steps_per_dispatch)
    assert seen["free"] == [batch for batch in seen["natural"] for _ in range(replays)]


def test_free_perturbation_is_carried_and_stays_in_the_ball(tiny):
    """One ascent of eps a step from zeros: at first 0 or the edge; the next batch begins with the last one's."""
    deltas = []
    config = tiny_config(defense="free", eps1=0.1, replays=2, steps=4, checkpoint_every=1)
    fit(config, tiny, checkpoint=lambda step, state: deltas.append(np.asarray(state.delta)))
    assert deltas[0].shape == (16, 8, 8, 1)
    assert (np.isclose(deltas[0], 0) | np.isclose(np.abs(deltas[0]), 0.1)).all()
    assert np.isclose(np.abs(deltas[0]), 0.1).mean() > 0.5
    assert all(np.abs(delta).max() <= 0.1 + 1e-7 for delta in deltas)
    assert np.isclose(deltas[1], deltas[2]).mean() > 0.2, "kept over to the next batch, where its ascent goes outwards"
    assert not np.array_equal(deltas[1], deltas[2])
    state = training.init_state(
        dataclasses.replace(config, defense="natural"), networks.create(config.model, 3, (8, 8, 1)), (8, 8, 1)
    )
    assert state.delta is None


@pytest.mark.parametrize(
    "changes",
    [
        {"defense": "free", "replays": 3, "eps_warmup": 7, "schedule": "cyclic"},
        {"defense": "n_fgsm", "schedule": "cosine"},
    ],
    ids=lambda changes: changes["defense"],
)
def test_an_interrupted_run_goes_on_bit_for_bit(changes, no_evaluation, tmp_path, monkeypatch):  # noqa: F811
    """Stopped by a signal within a replay, within the warm-up and within the schedule; and its length is its own."""
    config = tiny_config(**changes, workdir=str(tmp_path / "whole"))
    run.train_and_report(config, "mnist")
    parts = dataclasses.replace(config, workdir=str(tmp_path / "parts"))
    take, flag = training.fit, []

    def stopping(*arguments, record, **kwargs):
        def recording(step, metrics, count):
            record(step, metrics, count)
            flag[:] = [step] if step == 4 else []

        return take(*arguments, record=recording, **{**kwargs, "stop": lambda: bool(flag)})

    with monkeypatch.context() as patch:
        patch.setattr("e2sad_jax.runs.trainer.fit", stopping)
        with contextlib.suppress(Exception):
            run.train_and_report(parts, "mnist")
    assert int(load_state(parts, tmp_path / "parts").step) == 4
    with pytest.raises(WorkdirError, match="--steps: 12 there, 20 here"):
        run.train_and_report(dataclasses.replace(parts, steps=20), "mnist")
    run.train_and_report(parts, "mnist")
    whole, resumed = (load_state(config, tmp_path / name) for name in ("whole", "parts"))
    chex.assert_trees_all_equal(whole.replace(key=None), resumed.replace(key=None))
    assert counts(resumed) == [12, 12]
    assert (resumed.delta is None) == (changes["defense"] != "free")


# --- runs from before these settings


def test_runs_from_before_keep_their_names_and_go_on(no_evaluation, tmp_path):  # noqa: F811
    """The digest of a configuration, the settings in config.json and what a checkpoint holds."""
    assert Config().digest() == "0b5d1cd7"
    assert Config(defense="pgd", lam=0.3).digest() == "71ca2922"
    config = tiny_config(workdir=str(tmp_path / "w"), defense="natural", steps=2)
    run.train_and_report(config, "mnist")
    path = tmp_path / "w" / "config.json"
    values = json.loads(path.read_text())
    for name in SETTINGS:
        del values["config"][name]
    del values["sha256"]  # nor was there a digest
    path.write_text(json.dumps(values))
    assert run.train_and_report(dataclasses.replace(config, steps=3), "mnist")["steps"] == 3
    state = training.init_state(config, networks.create(config.model, 3, (8, 8, 1)), (8, 8, 1))
    with Checkpoints(tmp_path / "w") as checkpoints:
        assert int(checkpoints.restore(state).step) == 3


def test_the_identity_has_what_differs_from_before():
    before = Config().identity()
    assert not set(SETTINGS) & set(before)
    assert Config(eps_warmup=3).identity() == {**before, "eps_warmup": 3}
    assert json.dumps(Config(eps_warmup=3.0).identity()) == json.dumps(Config(eps_warmup=3).identity())
    assert Config(eps_warmup=0.25, steps=7).identity() == {**before, "eps_warmup": 0.25, "steps": 7}
    assert Config(schedule="cosine", steps=7).identity() == {**before, "schedule": "cosine", "steps": 7}
    assert Config(schedule="cosine", epochs=2.0).identity() == {**before, "schedule": "cosine", "epochs": 2.0}
