"""The step and the loop around it: order of images, one compilation, donation, dtypes, stopping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import networks, training
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.defenses import DEFENSES
from tests.helpers import count_compilations, fit, register_loss, tiny_config

N = 50

pytestmark = pytest.mark.usefixtures("little", "standard_promotion")


@pytest.fixture(scope="module")
def natural_loss(tiny, little) -> float:
    """Of the first step of natural training on hard labels."""
    return history_of(tiny_config(defense="natural", steps=1, soft_label=False), tiny)[0]["loss"]


def history_of(config, dataset, **kwargs):
    """The metrics of every step."""
    rows, several = [], kwargs.get("steps_per_dispatch", 1) > 1

    def record(step, metrics, count):
        values = jax.device_get(metrics)
        rows.extend({k: v[i] if several else v for k, v in values.items()} for i in range(count))

    with jax.numpy_dtype_promotion("standard"):
        fit(config, dataset, record=record, **kwargs)
    return rows


def marked(dataset):
    """The data set with images whose pixels are all their number."""
    return dataclasses.replace(
        dataset, x_train=np.arange(N, dtype=np.uint8)[:, None, None, None] * np.ones_like(dataset.x_train)
    )


def name_images(logits_fn, x, y):
    """A loss that only names its images."""
    return logits_fn(x).sum() * 0, {"images": jnp.sort(x[:, 0, 0, 0] * 255)}


@pytest.mark.parametrize(("n", "batch_size"), [(50, 16), (48, 16), (7, 7), (10, 3), (5, 1)])
def test_every_epoch_is_a_permutation_and_no_image_is_dropped(n, batch_size):
    key, stream, steps = jax.random.key(3), [], -(-3 * n // batch_size)
    for step in range(steps):
        order = np.asarray(training.epoch_order(key, jnp.uint32(step * batch_size // n), n))
        offset = step * batch_size % n
        stream.extend(order[offset : offset + batch_size])
    epochs = [stream[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 5:
        assert epochs[0] != epochs[1] != epochs[2], "each epoch has an order of its own"
        assert epochs[0] != list(range(n))


def test_the_step_takes_the_batch_that_the_order_says(tiny, monkeypatch):
    """Seen from outside, over two epochs, at a batch that does not divide them."""
    register_loss(monkeypatch, "names", name_images)
    seen = [row["images"] for row in history_of(tiny_config(defense="names", steps=7), marked(tiny))]
    seen = np.rint(np.concatenate(seen)).astype(int)
    assert len(set(seen[:48])) == 48, "no image twice within an epoch"
    assert sorted(np.bincount(seen, minlength=N)) == sorted([2] * 38 + [3] * 12), "7 * 16 = 2 * 50 + 12"


@pytest.mark.parametrize(
    "defense", [pytest.param(name, marks=[] if name in ("natural", "e2sad") else pytest.mark.slow) for name in DEFENSES]
)
def test_every_defense_learns(defense, tiny, natural_loss, monkeypatch):
    """In one compilation, though its budgets rise; donating its state; its first loss, without a budget, natural."""
    made = count_compilations(monkeypatch)
    given = {"steps": 25, "eps1": 0.1, "eps2": 0.05, "eps_warmup": 5, "soft_label": False, "learning_rate": 1e-2}
    given["temperature"] = 1.0  # at which tempered training is natural, and distillation from a teacher that is sure
    # NuAT's 4.5 is for batches of 64: its term falls with the root of their size.
    config = tiny_config(defense=defense, nuat_weight=4.5 * (16 / 64) ** 0.5, **given)
    model = networks.create(config.model, tiny.num_classes, tiny.image_shape)
    first, rows = training.init_state(config, model, tiny.image_shape, len(tiny.x_train)), []
    last = fit(config, tiny, first, record=lambda step, metrics, count: rows.append(metrics))
    rows = jax.device_get(rows)
    assert made[0]._cache_size() == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert int(last.step) == 25
    assert (last.delta is None) == (defense not in ("free", "uap"))
    # Without a budget all points are the image; what is left of a regulariser is its weight times a part.
    weight, part = {"e2sad": ("lam", "dissimilarity"), "input_gradient": ("gradient_weight", "penalty")}.get(
        defense, ("", "")
    )
    added = config.settings[weight] * rows[0][part] if part else 0.0
    np.testing.assert_allclose(rows[0]["loss"] - added, natural_loss, rtol=1e-4)
    losses = [float(row["loss"]) for row in rows]
    # The attack has its whole budget from step 5 on.
    assert np.mean(losses[-3:]) < 0.75 * losses[0]


def test_with_a_budget_the_first_loss_is_another(tiny, natural_loss):
    (row,) = history_of(tiny_config(defense="n_fgsm", steps=1, soft_label=False), tiny)
    assert abs(row["loss"] - natural_loss) > 1e-3


def test_stop_ends_after_the_step_with_a_checkpoint(tiny):
    saved, seen = [], []
    state = fit(
        tiny_config(defense="natural"),
        tiny,
        record=lambda step, metrics, count: seen.append(step),
        checkpoint=lambda step, state: saved.append((step, int(state.step))),
        stop=lambda: len(seen) == 7,
    )
    assert int(state.step) == 7
    assert saved == [(5, 5), (7, 7)]


def test_the_loop_sends_nothing_to_the_device_unasked(tiny):
    """What would be sent with every step is an error while training goes on, and none afterwards."""
    double, sent = jax.jit(lambda x: 2 * x), []

    def record(step, metrics, count):
        sent.append(step)
        double(np.ones(3, np.float32))

    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        fit(tiny_config(defense="natural", steps=2), tiny, record=record)
    assert sent == [1]
    record(0, {}, 1)


def test_bfloat16_trains_with_float32_parameters(tiny):
    config = tiny_config(precision="bf16", steps=3)
    model = networks.create(config.model, tiny.num_classes, tiny.image_shape, config.precision)
    state = training.init_state(config, model, tiny.image_shape, len(tiny.x_train))
    step = training.make_train_step(config, model, tiny.num_classes, TRANSFORMS["unit"])
    order = training.epoch_order(jax.random.key(0), jnp.uint32(0), N)
    lowered = step.lower(state, tiny.x_train, tiny.y_train, order)
    assert "bf16" in lowered.as_text()
    state, metrics = lowered.compile()(state, jnp.asarray(tiny.x_train), jnp.asarray(tiny.y_train), order)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert metrics["loss"].dtype == jnp.float32


# --- free training's perturbation


@pytest.mark.parametrize(("replays", "steps_per_dispatch"), [(3, 1), (3, 4)])
def test_free_training_replays_each_batch(replays, steps_per_dispatch, tiny, monkeypatch):
    """Over the end of an epoch: batches are those of training without replays, each so many times."""

    def loss(logits_fn, x, y, *, delta):
        value, parts = name_images(logits_fn, x, y)
        return value + delta.sum() * 0, parts

    free = DEFENSES["free"]
    register_loss(monkeypatch, "names", name_images)
    register_loss(monkeypatch, "replayed", loss, settings=free.settings, ascent=free.ascent, replays=free.replays)
    seen = {}
    for defense, steps in (("replayed", 7 * replays), ("names", 7)):
        config = tiny_config(defense=defense, replays=replays, steps=steps, checkpoint_every=100)
        rows = history_of(config, marked(tiny), steps_per_dispatch=steps_per_dispatch)
        seen[defense] = [np.rint(row["images"]).astype(int).tolist() for row in rows]
    assert seen["replayed"] == [batch for batch in seen["names"] for _ in range(replays)]


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
