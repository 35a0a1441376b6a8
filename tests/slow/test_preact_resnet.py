"""PreActResNet-18 learns under attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import networks
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.networks import preact_resnet
from tests.helpers import fit, tiny_config

pytestmark = pytest.mark.usefixtures("unoptimized", "standard_promotion")


def test_the_network_itself_learns_under_attack(tiny, monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "preact_resnet18", functools.partial(preact_resnet.PreActResNet18, width=2))
    config = tiny_config(model="preact_resnet18", defense="fgsm", eps1=0.05, steps=12, learning_rate=0.02)
    history = []
    state = fit(config, tiny, record=lambda step, metrics, count: history.append(float(metrics["loss"])))
    assert np.mean(history[-3:]) < 0.9 * history[0]
    logits = networks.logits_fn(networks.create(config.model, 3, (8, 8, 1)), state.params)
    assert np.isfinite(jax.jit(logits)(TRANSFORMS["unit"].apply(jnp.asarray(tiny.x_test)))).all()
