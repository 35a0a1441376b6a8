"""One run on eight devices: the same numbers as on one device; what is refused; what is sent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import distributed, networks, training
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.defenses import DEFENSES
from e2sad_jax.errors import ConfigError
from e2sad_jax.training import Config
from experiments.step_cost.compiled import collective_bytes
from tests.helpers import teacher_of, tiny_config

pytestmark = pytest.mark.usefixtures("little")


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam mixes float and int32; everything of ours in the step is held to strict promotion elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def trained(config: Config, dataset, devices: int, dtype=jnp.float64, **kwargs):
    """Losses and state after `config.steps`, on so many devices."""
    mesh = distributed.mesh(devices, config.batch_size)
    model = networks.create(config.model, dataset.num_classes, dataset.image_shape)
    state = training.init_state(config, model, dataset.image_shape, len(dataset.x_train))
    params = jax.tree.map(lambda a: a.astype(dtype), state.params)
    state = state.replace(params=params, opt_state=training.optimizer(config).init(params))
    state = training.place(distributed.replicate(mesh, state), mesh)
    seen = []
    state = training.fit(
        config,
        model,
        dataset,
        state,
        steps=config.steps,
        record=lambda step, metrics, count: seen.extend(np.ravel(metrics["loss"])[:count].tolist()),
        checkpoint=lambda *a: None,
        mesh=mesh,
        teacher=teacher_of(config, dataset),
        **kwargs,
    )
    return seen, state


@pytest.mark.parametrize(
    ("defense", "awp"),
    [
        ("pgd", 0.05),
        *(pytest.param(name, 0.0, marks=[] if name == "natural" else pytest.mark.slow) for name in DEFENSES),
    ],
)
def test_two_devices_train_as_one_does(defense, awp, tiny):
    """Losses and parameters within 1e-5, over an epoch's end.

    In float64: in float32 another order of a sum turns the sign of a gradient that is nearly zero now and then, and both
    the attack and Adam make a whole step of it.
    """
    config = tiny_config(
        defense=defense,
        awp=awp,
        second_step="noise",
        replays=1,
        steps=4,
        soft_label=False,
        eps1=0.1,
        learning_rate=1e-2,
    )
    with jax.enable_x64(True):
        one, two = trained(config, tiny, 1), trained(config, tiny, 2)
    assert len(one[0]) == 4
    assert len(set(one[0])) == 4
    np.testing.assert_allclose(one[0], two[0], atol=1e-5)
    for a, b in zip(jax.tree.leaves(one[1].params), jax.tree.leaves(two[1].params), strict=True):
        assert b.sharding.is_fully_replicated
        assert len(b.sharding.device_set) == 2
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_several_steps_a_dispatch_and_float32_on_eight_devices(tiny):
    config = tiny_config(defense="natural", steps=9)
    one, eight = trained(config, tiny, 1, jnp.float32), trained(config, tiny, 8, jnp.float32, steps_per_dispatch=4)
    np.testing.assert_allclose(one[0], eight[0], atol=1e-5)


def compiled_step(config: Config, dataset, devices: int):
    """The compiled step of a run, and what it is called with."""
    mesh = distributed.mesh(devices, config.batch_size)
    model = networks.create(config.model, dataset.num_classes, dataset.image_shape)
    step = training.make_train_step(config, model, dataset.num_classes, TRANSFORMS["unit"], mesh=mesh)
    order = training.epoch_order(jax.random.key(0), jnp.uint32(0), len(dataset.x_train))
    state = training.init_state(config, model, dataset.image_shape, len(dataset.x_train))
    labels = (dataset.y_train, teacher_of(config, dataset)) if config.entry.learns else dataset.y_train
    rest = distributed.replicate(mesh, (dataset.x_train, labels, order))
    arguments = (training.place(distributed.replicate(mesh, state), mesh), *rest)
    return step.lower(*arguments).compile(), arguments


POINTS = {"natural": 1, "fgsm": 2, "e2sad": 3}  # of the loss, where its gradients are summed one after the other


@pytest.mark.parametrize(
    "defense", [pytest.param(name, marks=[] if name in ("natural", "e2sad") else pytest.mark.slow) for name in DEFENSES]
)
def test_each_device_works_on_its_part_of_the_batch_and_sends_gradients_only(defense, tiny):
    """By the compiled program: activations of a part of the batch; sums over the devices, of each point's gradients."""
    program, (state, *_) = compiled_step(tiny_config(defense=defense, eps1=0.1), tiny, 8)
    text = program.as_text()
    assert "f32[16,8,8,4]" not in text, "the first layer's output for the whole batch"
    assert "f32[2,8,8,4]" in text
    sent = collective_bytes(program)
    parameters = 4 * networks.count_parameters(state.params)
    if defense in POINTS:
        assert set(sent) == {"all-reduce"}
        assert POINTS[defense] * 0.9 * parameters <= sent["all-reduce"] <= POINTS[defense] * parameters + 64
    assert 0.9 * parameters <= sent["all-reduce"] <= 6 * parameters, defense
    others = sum(size for kind, size in sent.items() if kind != "all-reduce")
    assert others <= 4 * tiny.x_train[:16].size, "at most a batch of images, as free training's perturbation"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 0, 0), r"--coordinator=: must be HOST:PORT"),
        (("here", 0, 2), r"--coordinator=here: must be HOST:PORT of process 0, or auto"),
        (("127.0.0.1:9", 0, 0), r"--num_processes=0: must be at least 1"),
        (("127.0.0.1:9", 2, 2), r"--process_id=2: must be in \[0, 1\]"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        distributed.connect(*arguments)
    distributed.connect()  # alone
