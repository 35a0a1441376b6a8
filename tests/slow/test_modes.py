"""Every attack and defense under JAX's switches and transformations, and of two and a thousand classes."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import losses
from tests.unit.attacks.helpers import CASES, KEYS, REGISTERED, draw, images, logits_of, predicted, size
from tests.unit.defenses import toy

ATTACKS = [*REGISTERED, "fab_targeted_linf", "second_total", "second_noise", "second_random"]
every_attack = pytest.mark.parametrize("name", ATTACKS)
every_defense = pytest.mark.parametrize("name", toy.VARIANTS)
N = 8


@contextlib.contextmanager
def switched(*names, **values):
    before = {name: getattr(jax.config, name) for name in (*names, *values)}
    for name, value in {**dict.fromkeys(names, True), **values}.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(autouse=True)
def _unoptimized(unoptimized):
    """Few runs of many programs."""


def given(dtype=jnp.float32):
    x = images(dtype)
    return draw(), KEYS, x, jnp.asarray(predicted(draw(), images())), jnp.asarray(0.3, dtype)


def budget(name, eps=0.3):
    """Of the l0 ball a number of pixels, which is a number and no array."""
    return 20.0 if CASES[name].norm == "l0" else eps


def attack(name, network, keys, x, y, eps):
    eps = budget(name, eps)
    return CASES[name].attack(functools.partial(logits_of, network), keys, x, y, eps, (0.0, 1.0))


def margins(x, y):
    return np.asarray(losses.margin(logits_of(draw(), jnp.asarray(x, jnp.float32)), y))


@functools.cache
def plain(name):
    return np.asarray(jax.jit(functools.partial(attack, name))(*given()))


def same(name, got, close=1.0):
    np.testing.assert_allclose(np.float64(got), plain(name), rtol=0, atol=close * CASES[name].close)
    assert (plain(name) != np.asarray(given()[2])).any()


@every_attack
def test_an_attack_under_debug_nans_and_infs(name):
    """Compiled, where JAX looks at what a program returns."""
    with switched("jax_debug_nans", "jax_debug_infs"):
        same(name, jax.jit(functools.partial(attack, name))(*given()))


@every_attack
def test_an_attack_without_jit_under_debug_nans(name):
    """Operation by operation: none makes a NaN, so the first that JAX reports is the user's own."""
    with switched("jax_debug_nans", "jax_disable_jit"):
        same(name, attack(name, *given()))


@every_attack
def test_an_attack_with_no_transfer_between_host_and_device(name):
    arguments = jax.device_put(given())
    program = jax.jit(functools.partial(attack, name))
    with jax.transfer_guard("disallow"):
        got = program(*arguments)
    same(name, got)


@every_attack
def test_an_attack_leaks_no_tracer(name):
    with jax.checking_leaks():
        same(name, jax.jit(functools.partial(attack, name))(*given()))


@every_attack
def test_an_attack_in_64_bits(name):
    """Images of float64 give float64, those of float32 float32, near the same; float64 points are drawn anew."""
    plain(name)  # in 32 bits
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for dtype in (jnp.float64, jnp.float32):
            network, keys, x, y, eps = given(dtype)
            got = jax.jit(functools.partial(attack, name))(network, keys, x, y, eps)
            assert got.dtype == dtype
            if (
                dtype == jnp.float64
                and CASES[name].random
                and name.split("_")[0] not in ("fab", "square")
                and name != "second_random"
            ):
                assert (size(got - x, CASES[name].norm) <= budget(name) + 1e-12).all()
                assert name == "second_noise" or (margins(got, y) > margins(x, y)).all()
            else:
                same(name, got, close=20)


@every_attack
@pytest.mark.parametrize("how", ["scan", "remat", "eager"])
def test_an_attack_inside(how, name):
    network, keys, x, y, eps = given()
    if how == "scan":  # over the budget, twice the same
        got = jax.jit(
            lambda: jax.lax.scan(lambda c, e: (c, attack(name, network, keys, x, y, e)), 0, jnp.stack([eps] * 2))
        )
        got = got()[1]
        np.testing.assert_array_equal(got[0], got[1])
        got = got[0]
    elif how == "remat":
        got = jax.jit(jax.checkpoint(functools.partial(attack, name)))(network, keys, x, y, eps)
    else:
        got = attack(name, network, keys, x, y, eps)
    same(name, got)


# --- defenses


def defended(name, weights, x, y):
    return jax.value_and_grad(lambda w: toy.VARIANTS[name](toy.net(w), x, y)[0])(weights)


@functools.cache
def plain_defense(name):
    return jax.jit(functools.partial(defended, name))(toy.draw(), *toy.batch())


@every_defense
def test_a_defense_under_debug_nans_and_infs(name):
    with switched("jax_debug_nans", "jax_debug_infs"):
        toy.close(jax.jit(functools.partial(defended, name))(toy.draw(), *toy.batch()), plain_defense(name))


@every_defense
def test_a_defense_without_jit_under_debug_nans(name):
    with switched("jax_debug_nans", "jax_disable_jit"):
        toy.close(defended(name, toy.draw(), *toy.batch()), plain_defense(name))


@every_defense
def test_a_defense_that_transfers_nothing_and_leaks_no_tracer(name):
    arguments = jax.device_put((toy.draw(), *toy.batch()))
    with jax.transfer_guard("disallow"), jax.checking_leaks():
        got = jax.jit(functools.partial(defended, name))(*arguments)
    toy.close(got, plain_defense(name))


@every_defense
@pytest.mark.parametrize("how", ["scan", "remat"])
def test_a_defense_inside(how, name):
    """Training steps in a scan: the same loss and gradient twice; and with its forward pass computed again."""
    (x, y), weights = toy.batch(), toy.draw()
    if how == "scan":
        program = jax.jit(lambda w: jax.lax.scan(lambda c, _: (c, defended(name, c, x, y)), w, None, length=2)[1])
        got = program(weights)
        toy.close(jax.tree.map(lambda leaf: leaf[1], got), plain_defense(name))
        got = jax.tree.map(lambda leaf: leaf[0], got)
    else:
        loss = jax.checkpoint(lambda w: toy.VARIANTS[name](toy.net(w), x, y)[0])
        got = jax.jit(jax.value_and_grad(loss))(weights)
    toy.close(got, plain_defense(name))
