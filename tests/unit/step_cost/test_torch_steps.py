"""The steps in PyTorch are the same steps: from equal parameters and batches their losses are ours."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from e2sad_jax import networks, training
from e2sad_jax.training import Config, configure
from experiments.step_cost import measure
from experiments.step_cost.peers import pytorch
from experiments.step_cost.request import Kind
from experiments.step_cost.step import Step

SHAPE = (8, 8, 1)
CONFIG = configure(defense="ifgsm", model="digits_cnn", batch_size=16, attack_steps=3)


@pytest.fixture(scope="module")
def ours():
    """Our parameters at the start and the losses of the first steps, by defense."""
    found = {}

    def of(defense):
        if defense not in found:
            step = Step(CONFIG.replace(defense=defense), SHAPE, 10)
            found[defense] = (step.parameters(), step.losses(3))
        return found[defense]

    return of


def check(config, ours, change=lambda step: None):
    parameters, losses = ours
    step = pytorch.TorchStep(config, SHAPE, 10, parameters)
    change(step)
    # So small a network departs less in three steps than `measure.TOLERANCES` allow.
    measure.check_losses(Kind("torch", config.defense, 0, "float32"), losses, step.losses(3), (2e-5,) * 3)


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("defense", ["natural", "fgsm", "ifgsm", "hamm", "e2sad"])
def test_losses_are_ours(defense, ours):
    check(CONFIG.replace(defense=defense), ours(defense))


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(
    "wrong",
    [{"eps1": 0.29}, {"eps2": 0.11}, {"lam": 0.11}, {"alpha": 0.59}, {"delta": 0.24}, {"learning_rate": 1.1e-3}],
    ids=str,
)
def test_a_wrong_peer_is_caught(wrong, ours):
    with pytest.raises(measure.PeerError, match="not the same steps"):
        check(CONFIG.replace(defense="e2sad", **wrong), ours("e2sad"))


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(
    "change",
    [
        lambda step: setattr(step, "_step", 1),
        lambda step: step._optimizer.param_groups[0].update(eps=1e-4),
        lambda step: step._optimizer.param_groups[0].update(betas=(0.8, 0.999)),
    ],
    ids=["batches", "eps of Adam", "betas of Adam"],
)
def test_a_peer_with_other_batches_or_another_optimiser_is_caught(change, ours):
    with pytest.raises(measure.PeerError):
        check(CONFIG, ours("e2sad"), change)


def test_pgd_has_its_own_random_start(ours):
    state = training.init_state(CONFIG, networks.create("digits_cnn", 10, SHAPE), SHAPE)
    step = pytorch.TorchStep(CONFIG.replace(defense="pgd"), SHAPE, 10, state.params)
    before = [p.detach().clone() for p in step._net.parameters()]
    assert step.losses(2) is None
    after, twin = list(step._net.parameters()), list(step._twin.parameters())
    assert all((a != b).any() for a, b in zip(after, before, strict=True)), "it trains"
    assert all((a == b).all() for a, b in zip(after, twin, strict=True)), "and attacks what it trains"


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(("name", "shape"), [("svhn_cnn", (20, 22, 3)), ("mnist_cnn", (9, 12, 1))])
def test_a_network_with_the_same_parameters_gives_the_same_logits(name, shape):
    config = Config(model=name, mean="0.3", std="0.5" if shape[-1] == 1 else "0.4,0.5,0.6")
    model = networks.create(num_classes=7, image_shape=shape, **config.network())
    params = training.init_state(config, model, shape).params
    x = np.random.default_rng(0).random((4, *shape), np.float32)
    with torch.no_grad():
        got = pytorch.network(config, shape, 7, params)(torch.tensor(x).permute(0, 3, 1, 2))
    np.testing.assert_allclose(got, model.apply(params, jnp.asarray(x)), rtol=1e-4, atol=1e-5)
