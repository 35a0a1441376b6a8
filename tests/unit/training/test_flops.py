"""FLOPs are those of the products, and of every turn of a loop."""

import jax
import jax.numpy as jnp
import pytest

from e2sad_jax import attacks, training
from e2sad_jax.errors import ConfigError


def test_counts_of_a_function_are_those_of_its_products_and_of_every_turn_of_its_loops():
    """A product of an [n, n] matrix with itself is 2 n^3; an attack's steps would be counted once if they were a loop."""
    n = 32
    w = jnp.full((n, n), 0.1)
    products = training.function_counts(lambda a: a @ a @ a, jax.ShapeDtypeStruct((n, n), jnp.float32))
    assert products["flops"] == pytest.approx(2 * 2 * n**3, rel=0.01)

    def attacked(steps: int) -> float:
        def attack(x: jax.Array) -> jax.Array:
            return attacks.ifgsm(lambda z: jnp.tanh(z @ w).sum(-1), x, eps=0.1, steps=steps)

        jax.jit(attack)(w)  # compiled for running, with its loop
        return training.function_counts(attack, w)["flops"]

    assert attacked(6) - attacked(3) == pytest.approx(3 * 4 * n**3, rel=0.2), "a pass there and back is two products"


def test_without_a_cpu_nothing_is_counted(monkeypatch):
    def none(platform=None):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "devices", none)
    config = training.configure(defense="natural", model="digits_cnn")
    assert training.step_counts(config, (28, 28, 1), 10) is None
    with pytest.raises(ConfigError, match="JAX_PLATFORMS leaves out the CPU, for which FLOPs are counted: add cpu"):
        training.step_flops(config, (28, 28, 1), 10)
