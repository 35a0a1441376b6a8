"""Several devices: the defenses and dispatches that compile for long; the others are in tests/unit/training."""

import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax.defenses import DEFENSES
from tests.helpers import tiny_config
from tests.unit.training import test_devices as unit
from tests.unit.training.test_devices import standard_promotion  # noqa: F401

pytestmark = pytest.mark.usefixtures("little")


def test_two_devices_train_free_as_one_does(tiny):
    unit.test_two_devices_train_as_one_does("free", tiny)


@pytest.mark.parametrize("defense", [name for name in DEFENSES if name not in ("natural", "e2sad")])
def test_each_device_works_on_its_part_of_the_batch_and_sends_gradients_only(defense, tiny):
    unit.test_each_device_works_on_its_part_of_the_batch_and_sends_gradients_only(defense, tiny)


def test_several_steps_a_dispatch_and_float32_on_eight_devices(tiny):
    config = tiny_config(defense="natural", steps=9)
    one, eight = (
        unit.trained(config, tiny, 1, jnp.float32),
        unit.trained(config, tiny, 8, jnp.float32, steps_per_dispatch=4),
    )
    np.testing.assert_allclose(one[0], eight[0], atol=1e-5)
