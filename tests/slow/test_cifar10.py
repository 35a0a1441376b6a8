"""`experiments.cifar10` at its full shape: one step of 128 images by PreActResNet-18 compiles, and its loss is finite."""

import jax
import numpy as np
import pytest

from e2sad_jax import networks, training
from e2sad_jax.data import KNOWN
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.runs.recipes import RECIPES
from tests.helpers import readable

# Of an image's forward pass in this network, as published with https://github.com/kuangliu/pytorch-cifar
MULTIPLICATIONS = 0.556e9


@pytest.mark.usefixtures("standard_promotion")
def test_a_step_of_the_command():
    recipe, known = RECIPES["cifar10"], KNOWN["cifar10"]
    own = {**recipe.settings, **training.preset(recipe.preset, recipe.settings["eps1"]), **recipe.robust}
    config, plain = (training.configure(**readable(defense=name, **own)) for name in ("e2sad", "natural"))
    assert (config.model, config.batch_size, known.image_shape) == ("preact_resnet18", 128, (32, 32, 3))
    model = networks.create(num_classes=known.num_classes, image_shape=known.image_shape, **config.network())
    n = 2 * config.batch_size
    step = training.make_train_step(config, model, known.num_classes, TRANSFORMS[config.transform])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, *known.image_shape), np.uint8)
    state = training.init_state(config, model, known.image_shape, n)
    arguments = state, images, rng.integers(0, 10, n), training.epoch_order(jax.random.key(0), np.uint32(0), n)
    program = step.lower(*arguments).compile()
    memory = program.memory_analysis()
    state, metrics = program(*arguments)
    loss = float(metrics["loss"])
    flops = training.step_flops(config, known.image_shape, known.num_classes)
    print(
        f"{flops / 1e12:.2f} TFLOPs, {memory.temp_size_in_bytes / 1e9:.2f} GB of intermediate values, loss {loss:.3f}"
    )
    assert np.isfinite(loss)
    assert int(state.step) == 1
    natural = training.step_flops(plain, known.image_shape, known.num_classes)
    assert 0.85 < natural / (3 * 2 * MULTIPLICATIONS * config.batch_size) < 1, "XLA counts no products with padding"
    assert 2.2 < flops / natural < 2.5, (
        "a first step, and a second one that costs its forward and its backward pass alone"
    )
    assert memory.temp_size_in_bytes < 4e9
