"""The memory of perturbations: each image's attack starts where its last one ended, wherever and however it is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import distributed, networks, training
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.defenses._registry import MEMORY
from e2sad_jax.errors import ConfigError
from e2sad_jax.training import memory
from experiments.step_cost.compiled import collective_bytes
from tests.helpers import register_loss, tiny_config

N, EPS, LEVELS = 50, 0.2, 127

pytestmark = pytest.mark.usefixtures("little", "standard_promotion")


def counting(logits_fn, x, y, *, eps, start=None):
    """A defense whose perturbation goes up by one level of int8 with each visit, in all pixels, and from 100 to -100."""
    levels = start / jnp.where(eps > 0, eps, 1) * LEVELS
    up = jnp.where(levels > 99.5, -100.0, levels + 1)
    parts = {"images": x[:, 0, 0, 0] * 255, "levels": levels[:, 0, 0, 0], "delta": up * eps / LEVELS}
    return logits_fn(x).sum() * 0, parts


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    register_loss(monkeypatch, "counts", counting, settings=(dataclasses.replace(MEMORY, default="int8"),))


def marked(dataset):
    """The data set with images whose pixels are all their number."""
    numbers = np.arange(N, dtype=np.uint8)[:, None, None, None]
    return dataclasses.replace(dataset, x_train=numbers * np.ones_like(dataset.x_train))


def visits_of(config, dataset, *, state=None, steps=None, members=1, devices=1, **kwargs):
    """For each run, the pairs of image and level in the order of training; and the state reached."""
    configs = [dataclasses.replace(config, seed=config.seed + i) for i in range(members)]
    mesh = distributed.mesh(devices, config.batch_size)
    model = networks.create(config.model, dataset.num_classes, dataset.image_shape)
    if state is None:
        states = [training.init_state(c, model, dataset.image_shape, N) for c in configs]
        state = distributed.replicate(mesh, training.stack(states) if members > 1 else states[0])
    state = training.place(state, mesh, population=members > 1)
    seen = [[] for _ in configs]

    def record(step, metrics, count):
        pairs = np.stack([np.asarray(metrics["images"]), np.asarray(metrics["levels"])], -1)
        pairs = pairs.reshape(-1, members, config.batch_size, 2)[:count]
        for member in range(members):
            seen[member].extend(map(tuple, np.rint(pairs[:, member].reshape(-1, 2)).astype(int)))

    state = training.fit(
        configs if members > 1 else config,
        model,
        dataset,
        state,
        steps=steps or config.steps,
        record=record,
        checkpoint=lambda *a: None,
        mesh=mesh,
        **kwargs,
    )
    return seen, state


def check(visits):
    """Each image's next visit starts one level above its last; the first ones start at random."""
    first, last = {}, {}
    batches = [visits[i : i + 16] for i in range(0, len(visits), 16)]
    for batch in batches:
        before = dict(last)
        for image, level in batch:
            if image in before:
                assert level == (-100 if before[image] > 99 else before[image] + 1), image
            first.setdefault(image, level)
            last[image] = level
    assert len(first) == N
    assert len(set(first.values())) > 20
    assert min(first.values()) < -60 < 60 < max(first.values())


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"steps_per_dispatch": 3},
        {"devices": 8},
        pytest.param({"members": 2}, marks=pytest.mark.slow),
        pytest.param({"devices": 8, "members": 2, "steps_per_dispatch": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_images_next_attack_starts_where_its_last_one_ended(how, tiny):
    """Over ends of epochs, within a batch too: 16 does not divide 50."""
    config = tiny_config(defense="counts", steps=13, eps1=EPS)
    seen, state = visits_of(config, marked(tiny), **how)
    for visits in seen:
        check(visits)
    if how.get("members"):
        assert seen[0] != seen[1]
    assert state.memory["delta"].dtype == jnp.int8
    if devices := how.get("devices"):
        share = state.memory["delta"].sharding.shard_shape(state.memory["delta"].shape)
        assert share[-2] == 64 // devices, "50 images, rounded up to whole batches"


def test_a_rising_budget_carries_the_perturbation_with_it(tiny):
    """In units of the budget; while that is 0 what was drawn stays."""
    config = tiny_config(defense="counts", steps=10, eps1=EPS, eps_warmup=5)
    dataset = marked(tiny)
    model = networks.create(config.model, dataset.num_classes, dataset.image_shape)
    drawn = np.asarray(training.init_state(config, model, dataset.image_shape, N).memory["delta"])
    (visits,), _ = visits_of(config, dataset)
    first = dict(reversed(visits[16:50]))
    assert all(first[image] == drawn[image, 0] for image in first)
    later = [(image, level) for image, level in visits[50:] if image in first]
    assert len(later) > 30
    seen = {image: level for image, level in later[:30]}
    assert all(level == (-100 if first[image] > 99 else first[image] + 1) for image, level in seen.items())


def test_a_state_put_elsewhere_goes_on_where_it_was(tiny):
    """Half a run on one device, half on eight: the visits of one run; gathered, all of the memory is on each device."""
    config, dataset = tiny_config(defense="counts", steps=12, eps1=EPS), marked(tiny)
    (whole,), want = visits_of(config, dataset)
    (first,), state = visits_of(config, dataset, steps=5)
    mesh = distributed.mesh(8, 16)
    (second,), state = visits_of(config, dataset, state=distributed.replicate(mesh, jax.device_get(state)), devices=8)
    assert first + second == whole
    gathered = training.gather(state, mesh)
    assert gathered.memory["delta"].sharding.is_fully_replicated
    np.testing.assert_array_equal(gathered.memory["delta"], want.memory["delta"])


def test_devices_send_rows_and_not_the_memory(tiny):
    """Gathered and scattered where the rows lie: what is sent is the batch's perturbations, and gradients."""
    config = tiny_config(defense="pgd", memory="int8", attack_steps=1, eps1=0.1)
    many = dataclasses.replace(tiny, x_train=np.tile(tiny.x_train, (40, 1, 1, 1)), y_train=np.tile(tiny.y_train, 40))
    mesh = distributed.mesh(8, config.batch_size)
    model = networks.create(config.model, tiny.num_classes, tiny.image_shape)
    step = training.make_train_step(config, model, tiny.num_classes, TRANSFORMS["unit"], mesh=mesh)
    order = training.epoch_order(jax.random.key(0), jnp.uint32(0), len(many.x_train))
    state = distributed.replicate(mesh, training.init_state(config, model, tiny.image_shape, len(many.x_train)))
    rest = distributed.replicate(mesh, (many.x_train, many.y_train, order))
    program = step.lower(training.place(state, mesh), *rest).compile()
    sent, size = collective_bytes(program), state.memory["delta"].nbytes
    gradients, batch = 4 * networks.count_parameters(state.params), 16 * 64
    assert sum(sent.values()) < gradients + 12 * batch < gradients + size / 8, sent
    assert f"s8[{size // 64},8,8,1]" not in program.as_text(), "no device has all rows"


def test_it_is_updated_in_place(tiny):
    config = tiny_config(defense="pgd", memory="int8", attack_steps=1)
    model = networks.create(config.model, tiny.num_classes, tiny.image_shape)
    step = training.make_train_step(config, model, tiny.num_classes, TRANSFORMS["unit"])
    order = training.epoch_order(jax.random.key(0), jnp.uint32(0), N)
    state = training.init_state(config, model, tiny.image_shape, N)
    new, metrics = step(state, jnp.asarray(tiny.x_train), jnp.asarray(tiny.y_train), order)
    assert state.memory["delta"].is_deleted()
    changed = np.asarray(new.memory["delta"]) != np.asarray(
        training.init_state(config, model, tiny.image_shape, N).memory["delta"]
    )
    assert sorted(np.flatnonzero(changed.any(1))) == sorted(np.asarray(order[:16]))
    assert set(metrics) == {"loss", "grad_norm", "adversarial"}


# --- what is kept


@pytest.mark.parametrize(("name", "error"), [("int8", 0.5 / 127), ("bf16", 2**-9)])
def test_rounding(name, error):
    """At most half a level: 1/254 of the budget as int8."""
    values = jnp.asarray(np.random.RandomState(0).uniform(-1, 1, (6, 4, 4, 1)) * 0.3, jnp.float32)
    empty = {"delta": jnp.zeros((10, 16), memory.DTYPES[name])}
    rows = jnp.asarray([3, 1, 9, 0, 5, 7])
    got = memory.recall(memory.note(empty, rows, {"delta": values}, 0.3), rows, 0.3, (4, 4, 1))["delta"]
    worst = np.abs(got - values).max() / 0.3
    assert error / 4 < worst <= error * 1.001
    assert (
        np.abs(
            memory.recall(memory.note(empty, rows, {"delta": values}, 0.3), rows, 0.6, (4, 4, 1))["delta"] - 2 * got
        ).max()
        < 1e-6
    )


def test_the_later_of_two_visits_in_a_batch_stays():
    empty = {"delta": jnp.zeros((4, 1), jnp.int8), "momentum": jnp.zeros((4, 1), jnp.int8)}
    rows, values = jnp.asarray([2, 0, 2]), jnp.asarray([0.1, 0.2, -0.3]).reshape(3, 1, 1, 1)
    noted = memory.note(empty, rows, {"delta": values, "momentum": values}, 1.0)
    for kept in noted.values():
        np.testing.assert_array_equal(kept.ravel(), np.rint(np.array([0.2, 0, -0.3, 0]) * 127))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_first_perturbations_fill_the_ball(norm):
    config = training.configure(defense="pgd", memory="bf16", norm=norm, batch_size=16)
    drawn = memory.begin(config, 250, (8, 8, 1), jax.random.key(0))["delta"].astype(jnp.float32).reshape(256, -1)
    lengths = np.linalg.norm(drawn, axis=1) if norm == "l2" else np.abs(drawn).max(1)
    assert lengths.max() <= 1.01
    assert lengths.mean() > 0.95
    assert abs(np.mean(drawn)) < 0.01
    assert len(np.unique(drawn, axis=0)) == 256


def test_bytes(tiny):
    config = training.configure(defense="pgd", memory="int8", batch_size=128)
    assert training.nbytes(config, 59_500, (28, 28, 1)) == 59_520 * 784
    assert training.nbytes(config.replace(memory="bf16"), 59_500, (28, 28, 1)) == 2 * 59_520 * 784
    assert training.nbytes(config.replace(memory="none"), 59_500, (28, 28, 1)) == 0
    assert training.nbytes(training.configure(defense="pgi", batch_size=100), 100, (4, 4, 1)) == 2 * 100 * 16


def test_who_has_none_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"--memory='int8': --defense=natural does not read it; .* pgd"):
        training.configure(defense="natural", memory="int8")
    model = networks.create("digits_cnn", 3, tiny.image_shape)
    with pytest.raises(ValueError, match=r"memory=int8 .* needs training_images"):
        training.init_state(training.configure(defense="pgd", memory="int8"), model, tiny.image_shape)


def test_a_memory_of_other_images_is_refused(tiny):
    config = tiny_config(defense="counts", steps=3, eps1=EPS)
    model = networks.create(config.model, tiny.num_classes, tiny.image_shape)
    with pytest.raises(
        ValueError, match=r"memory has 16 rows; for 50 training images in batches of 16 it must have 64"
    ):
        visits_of(config, tiny, state=training.init_state(config, model, tiny.image_shape, 8))


def test_a_loss_that_keeps_its_perturbation_to_itself(monkeypatch, tiny):
    def silent(logits_fn, x, y, *, start=None):
        return logits_fn(x).sum(), {}

    register_loss(monkeypatch, "silent", silent, settings=(MEMORY,))
    with pytest.raises(ValueError, match="silent: its loss was given start and returns no part 'delta'"):
        visits_of(tiny_config(defense="silent", memory="int8"), tiny)


def test_a_loss_that_takes_no_start_has_no_memory(monkeypatch):
    with pytest.raises(ValueError, match="has the setting memory, and its loss takes no 'start'"):
        register_loss(monkeypatch, "plain", lambda f, x, y: (f(x).sum(), {}), settings=(MEMORY,))
