"""The compiler options of our own `jit`."""

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import _compile, networks
from e2sad_jax._compile import jit, once

# The flag of docs/running.md, for programs that are compiled by plain `jax.jit`.
FLAG = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"

# A product and the sum of its squares in each row, of enough rows that YNNPACK's fused kernel takes them in several parts.
ROWS = np.stack([np.arange(40_000), np.zeros(40_000), np.zeros(40_000)], axis=1).astype(np.float32)

PLAIN = """
import jax, jax.numpy as jnp, numpy as np
rows = np.stack([np.arange(40_000), np.zeros(40_000), np.zeros(40_000)], axis=1).astype(np.float32)
got = jax.jit(jax.vmap(lambda row: ((jnp.eye(3) @ row) ** 2).sum()))(rows)
np.testing.assert_allclose(got, (rows.astype(np.float64) ** 2).sum(1), rtol=1e-5)
"""


def test_sums_of_squared_products_are_right():
    got = jit(jax.vmap(lambda row: ((jnp.eye(3) @ row) ** 2).sum()))(ROWS)
    np.testing.assert_allclose(got, (ROWS.astype(np.float64) ** 2).sum(1), rtol=1e-5)


def test_the_documented_flag_makes_sums_of_plain_programs_right():
    environment = {**os.environ, "XLA_FLAGS": FLAG, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", PLAIN], check=True, timeout=300, env=environment)


def test_a_program_is_traced_for_the_platform_of_its_mesh():
    """Whose devices need not be here; what is traced afterwards is for the default device again."""
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="tpu")]))
    seen = []

    def function(x):
        seen.append(_compile.platform())
        return x

    assert _compile.jit(function, mesh=mesh)(1) == 1
    assert _compile.jit(function)(2) == 2
    assert seen == ["tpu", "cpu"]
    assert _compile.platform() == "cpu"


def test_what_runs_once_has_the_bits_of_an_optimised_program():
    """Initial parameters are those of before, though less is compiled."""
    init, image = networks.create("digits_cnn", 10, (12, 12, 1)).init, jnp.zeros((1, 12, 12, 1))
    optimised = jax.jit(init, compiler_options={"xla_backend_optimization_level": "3"})
    key = jax.random.key(0)
    jax.tree.map(np.testing.assert_array_equal, once(init, key, image), optimised(key, image))
    shapes = jax.eval_shape(lambda: once(init, jax.random.key(0), jnp.zeros((1, 12, 12, 1))))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, once(init, key, image)), "inside of a program"
