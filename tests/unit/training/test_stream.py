"""Training images that stay on the host: the same steps, two dispatches of images on the device, each device its own."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from e2sad_jax import distributed, networks, training
from e2sad_jax.data import Dataset
from e2sad_jax.training import stream
from e2sad_jax.training.presets import preset
from tests.helpers import count_compilations, fit, tiny_config

pytestmark = pytest.mark.usefixtures("little", "standard_promotion")


def bits(tree):
    """The leaves as bytes."""
    return [
        np.asarray(jax.random.key_data(a) if jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key) else a).tobytes()
        for a in jax.tree.leaves(tree)
    ]


CASES = {
    "natural": {"defense": "natural"},
    "robust2": {"defense": "e2sad", **preset("robust2", 0.3)},
    "free": {"defense": "free", "replays": 3},
    "distillation": {"defense": "distillation"},
    "perturbed weights": {"defense": "pgd", "awp": 0.05},
    "augmented": {"defense": "natural", "augment": "crop,flip"},
}


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_steps_are_those_of_images_on_the_device_to_the_bit(case, at_once, tiny, monkeypatch):
    """Over the ends of epochs, in which batches begin in one and end in the next, and of checkpoints."""
    config = tiny_config(**CASES[case], steps=12, checkpoint_every=5, batch_size=24)
    assert len(tiny.x_train) % 24
    assert 2 * len(tiny.x_train) < 12 * 24 or case == "free"
    made = count_compilations(monkeypatch)
    ends = [fit(config.replace(resident=where), tiny, steps_per_dispatch=at_once) for where in ("device", "host")]
    assert bits(ends[0]) == bits(ends[1])
    assert [step._cache_size() for step in made] == [1, 1], "parts of a dispatch are no program of their own"


@pytest.mark.parametrize("case", ["natural", "robust2", "free", "perturbed weights"])
def test_a_run_goes_on_from_the_middle_of_an_epoch(case, tiny):
    config = tiny_config(**CASES[case], steps=11, checkpoint_every=4).replace(resident="host")
    halves = fit(config, tiny, fit(config, tiny, steps=5, steps_per_dispatch=3), steps_per_dispatch=2)
    assert bits(halves) == bits(fit(config.replace(resident="device"), tiny, steps_per_dispatch=3))


def test_a_stop_leaves_what_was_read_ahead(tiny):
    config = tiny_config(defense="natural", steps=12).replace(resident="host")
    asked = iter([False, False, True])
    assert int(fit(config, tiny, stop=lambda: next(asked)).step) == 3


@pytest.mark.parametrize("case", ["natural", "robust2"])
def test_each_device_reads_its_own_images(case, tiny, monkeypatch):
    config, mesh = tiny_config(**CASES[case], steps=6), distributed.mesh(4, 16)
    model = networks.create(config.model, tiny.num_classes, tiny.image_shape)

    def trained(where):
        state = training.init_state(config, model, tiny.image_shape, len(tiny.x_train))
        state = training.place(distributed.replicate(mesh, state), mesh)
        return fit(config.replace(resident=where), tiny, state, mesh=mesh, steps_per_dispatch=2)

    sent, make = [], jax.make_array_from_callback
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *args: sent.append(make(*args)) or sent[-1])
    assert bits(trained("device")) == bits(trained("host"))
    assert len(sent) >= 3
    assert all(part.data.shape[:2] == (2, 4) for part in sent[0].addressable_shards)


def test_no_more_than_two_dispatches_of_images_are_on_the_device(tiny, monkeypatch):
    config = tiny_config(defense="natural", steps=12, batch_size=8).replace(resident="host")
    shape, most = (3, 8, *tiny.image_shape), []
    others = jax.live_arrays()  # of tests before, held so that no new one takes their place

    def count(*args):
        own = [a.shape for a in jax.live_arrays() if not any(a is other for other in others)]
        most.append(own.count(shape))
        assert tiny.x_train.shape not in own

    done, wait, ask = [], jax.block_until_ready, stream.Stream.ask
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: done.append(bool(tree)) or wait(tree))
    monkeypatch.setattr(stream.Stream, "ask", lambda self, *args: done.append(args[0]) or ask(self, *args))
    fit(config, tiny, record=count, steps_per_dispatch=3)
    assert max(most) == 1, "that which trains"
    assert done == [0, False, 3, True, 5, True, 7, True, 10, True], "waits for the one before, then reads"


def test_what_lies_on_the_device(monkeypatch):
    images = np.zeros((10, 4, 4, 1), np.uint8)
    config = tiny_config(defense="natural")
    assert stream.is_resident(config, images), "the CPU has no memory of its own"
    assert not stream.is_resident(config.replace(resident="host"), images)
    for limit, resident in ((320, True), (319, False)):
        device = types.SimpleNamespace(memory_stats=lambda limit=limit: {"bytes_limit": limit})
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert stream.is_resident(config, images) is resident
        assert stream.is_resident(config.replace(resident="device"), images)
    remembering = tiny_config(**CASES["robust2"], batch_size=10)
    for limit, resident in ((640, True), (639, False)):
        device = types.SimpleNamespace(memory_stats=lambda limit=limit: {"bytes_limit": limit})
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert stream.is_resident(remembering, images) is resident, "a byte for each pixel"


def test_large_images_are_sent_in_fewer_steps(tiny, monkeypatch):
    monkeypatch.setattr(stream, "SENT", 3 * 16 * tiny.x_train[:1].nbytes)
    for batch_size, steps in ((16, 3), (17, 2), (1000, 1)):
        assert stream.most_steps(tiny_config(defense="natural", batch_size=batch_size), tiny.x_train) == steps
    assert stream.most_steps(tiny_config(defense="free", replays=4, steps=8), tiny.x_train) == 12
    config, counts = tiny_config(defense="natural", steps=7, checkpoint_every=7), []
    fit(
        config.replace(resident="host"),
        tiny,
        record=lambda step, metrics, count: counts.append(count),
        steps_per_dispatch=64,
    )
    assert max(counts) == 3


def test_images_of_floats_are_sent_as_they_are(tiny):
    half: Dataset = dataclasses.replace(
        tiny, x_train=np.float32(tiny.x_train / 255), x_test=np.float32(tiny.x_test / 255)
    )
    config = tiny_config(defense="natural", steps=3)
    assert bits(fit(config, half)) == bits(fit(config.replace(resident="host"), half))


def test_the_callers_device_and_types_are_those_of_the_images(tiny):
    config = tiny_config(defense="natural", steps=2).replace(resident="host")
    with jax.default_device(jax.devices()[1]):
        assert fit(config, tiny).step.devices() == {jax.devices()[1]}


def test_what_cannot_be_is_refused(tiny):
    config = tiny_config(defense="natural", steps=2).replace(resident="host")
    model = networks.create(config.model, tiny.num_classes, tiny.image_shape)
    quiet = {"record": lambda *a: None, "checkpoint": lambda *a: None}
    with pytest.raises(ValueError, match="resident='host' is for one run"):
        training.fit([config, config.replace(seed=1)], model, tiny, None, **quiet)
    with pytest.raises(ValueError, match="must be below 4,294,967,296: fewer steps"):
        fit(config, tiny, steps=2**28)
