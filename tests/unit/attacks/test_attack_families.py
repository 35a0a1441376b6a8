"""What every attack of the further families keeps: ball and range, eps 0, keys, neighbours, jit, vmap and grad; l2 balls."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from e2sad_jax import attacks, losses

N, SHAPE, K = 6, (4, 3, 2), 4
D = int(np.prod(SHAPE))
KEY = jax.random.key(5)
RS = np.random.RandomState(0)
W1, W2 = RS.randn(D, 10).astype(np.float32), RS.randn(10, K).astype(np.float32)
Logits = Callable[[jax.Array], jax.Array]


def network(z: jax.Array, scale: jax.typing.ArrayLike = 1.0) -> jax.Array:
    return jnp.tanh(scale * ((z.astype(jnp.float32).reshape(z.shape[0], -1) - 0.5) @ W1)) @ W2


def loss_of(f: Logits) -> Logits:
    """All images are of class 0, so that any part of a batch has its loss."""
    return lambda z: losses.margin(f(z), jnp.zeros(z.shape[0], int))


# Name: the norm of its ball, and the attack as a function of logits, keys, images, eps and bounds.
ATTACKS: dict[str, tuple[str, Callable[..., jax.Array]]] = {
    "fgsm_l2": ("l2", lambda f, k, x, **kw: attacks.fgsm(loss_of(f), x, norm="l2", **kw)),
    "pgd_l2": ("l2", lambda f, k, x, **kw: attacks.pgd(k, loss_of(f), x, steps=3, norm="l2", **kw)),
    "mi_fgsm": ("linf", lambda f, k, x, **kw: attacks.mi_fgsm(loss_of(f), x, steps=3, **kw)),
    "apgd": ("linf", lambda f, k, x, **kw: attacks.apgd(k, loss_of(f), x, steps=5, **kw)),
    "apgd_l2": (
        "l2",
        lambda f, k, x, **kw: attacks.apgd(
            k, loss_of(f), x, steps=4, restarts=2, norm="l2", misclassified_fn=lambda z: loss_of(f)(z) > 0, **kw
        ),
    ),
    "square": ("linf", lambda f, k, x, **kw: attacks.square(k, lambda z: loss_of(f)(z) - 1e6, x, queries=40, **kw)),
    "square_l2": (
        "l2",
        lambda f, k, x, **kw: attacks.square(k, lambda z: loss_of(f)(z) - 1e6, x, queries=40, norm="l2", **kw),
    ),
}
every_attack = pytest.mark.parametrize("name", ATTACKS)
RANDOM = [name for name in ATTACKS if name not in ("fgsm_l2", "mi_fgsm")]


@pytest.fixture(autouse=True)
def quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """XLA compiles in half the time without the optimizations that rounding to bfloat16 must survive."""
    jax.config.update("jax_disable_most_optimizations", "bfloat16" not in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def images(dtype: Any = jnp.float32) -> jax.Array:
    x = np.random.RandomState(1).rand(N, *SHAPE)
    x[:, 0, 0], x[:, 0, 1] = 0, 1
    return jnp.asarray(x, dtype)


@functools.cache
def jitted(name: str, bounds: Any = (0.0, 1.0)) -> Callable[..., jax.Array]:
    return jax.jit(lambda keys, x, eps: ATTACKS[name][1](network, keys, x, eps=eps, bounds=bounds))


def size(change: np.ndarray, norm: str) -> np.ndarray:
    flat = change.reshape(len(change), -1)
    return np.abs(flat).max(1) if norm == "linf" else np.sqrt((flat**2).sum(1))


@every_attack
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_stays_in_the_ball_and_the_range(name, dtype, bounds):
    """Of each image by itself, and it uses most of the ball; eps of 0 changes nothing."""
    norm = ATTACKS[name][0]
    with jax.numpy_dtype_promotion("strict" if dtype == "float32" else "standard"):
        x = images(dtype)
        clean = np.asarray(x, np.float64)
        for eps in (0.0, 0.03, 0.4, 2.0):
            got = jitted(name, bounds)(jax.random.split(KEY, N), x, eps)
            assert got.dtype == dtype
            assert got.shape == x.shape
            moved = size(np.asarray(got, np.float64) - clean, norm)
            assert moved.max() <= eps + (1e-6 if norm == "linf" else 1e-7 * eps)
            if eps > (0 if dtype == "float32" or norm == "linf" else 0.1):
                assert moved.min() > (0.5 if dtype == "float32" else 0.4) * (eps if bounds is None else min(eps, 1))
            if bounds is not None:
                assert np.asarray(got, np.float64).min() >= 0
                assert np.asarray(got, np.float64).max() <= 1


@every_attack
def test_raises_the_loss_and_repeats_by_key(name):
    x, keys, eps = images(), jax.random.split(KEY, N), 0.1 if ATTACKS[name][0] == "linf" else 0.4
    got = jitted(name)(keys, x, eps)
    assert (loss_of(network)(got) > loss_of(network)(x)).all()
    np.testing.assert_array_equal(got, jitted(name)(keys, x, eps))
    other = jitted(name)(jax.random.split(jax.random.key(6), N), x, 1.0)
    assert ((other != jitted(name)(keys, x, 1.0)).reshape(N, -1).any(1).all()) == (name in RANDOM)


@every_attack
def test_no_neighbour_changes_an_image(name):
    """Any order, any part of the batch, and each image alone under vmap."""
    x, keys, order = images(), jax.random.split(KEY, N), np.random.RandomState(0).permutation(N)
    attack = functools.partial(jitted(name), eps=0.3)
    whole = attack(keys, x)
    np.testing.assert_allclose(attack(keys[order], x[order]), whole[order], rtol=0, atol=1e-5)
    np.testing.assert_allclose(attack(keys[1:3], x[1:3]), whole[1:3], rtol=0, atol=1e-5)
    alone = jax.vmap(lambda key, image: attack(key[None], image[None])[0])(keys, x)
    np.testing.assert_allclose(alone, whole, rtol=0, atol=1e-5)


@every_attack
def test_equal_inside_shard_map(name):
    """Half of the images on each of two devices."""
    x, keys, mesh = images(), jax.random.split(KEY, N), Mesh(np.array(jax.devices()[:2]), ("data",))

    def attack(keys: jax.Array, x: jax.Array) -> jax.Array:
        return ATTACKS[name][1](network, keys, x, eps=0.3)

    split = jax.jit(jax.shard_map(attack, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")))
    np.testing.assert_allclose(split(keys, x), jitted(name)(keys, x, 0.3), rtol=0, atol=1e-5)


@every_attack
def test_passes_no_gradient_to_the_network(name):
    """A loss of the images made depends on the network's parameter only through its own use of it."""
    x, keys = images(), jax.random.split(KEY, N)

    def objective(scale: jax.Array, attacked: jax.Array | None = None) -> jax.Array:
        f = functools.partial(network, scale=scale)
        made = ATTACKS[name][1](f, keys, x, eps=0.2) if attacked is None else attacked
        return loss_of(f)(made).sum()

    made = ATTACKS[name][1](network, keys, x, eps=0.2)
    got = jax.jit(jax.grad(objective))(jnp.float32(1))
    np.testing.assert_allclose(got, jax.grad(objective)(jnp.float32(1), made), rtol=1e-4)
    to_images = jax.jit(jax.grad(lambda z: ATTACKS[name][1](network, keys, z, eps=0.2).sum()))(x)
    np.testing.assert_array_equal(to_images, jnp.zeros_like(x))


@every_attack
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_no_gradient_and_saturated_logits_stay_finite(name, scale):
    x = images()
    got = jax.jit(lambda k, z: ATTACKS[name][1](lambda u: 1e4 * network(u, scale), k, z, eps=0.3))(KEY, x)
    assert np.isfinite(got).all()
    if scale == 0 and name not in RANDOM:
        np.testing.assert_array_equal(got, x)


# --- the l2 ball

C = RS.randn(N, *SHAPE).astype(np.float32)


def linear(z: jax.Array) -> jax.Array:
    return (z.astype(jnp.float32) * C).sum((1, 2, 3))


LINEAR = {
    "fgsm": lambda x, **kw: attacks.fgsm(linear, x, **kw),
    "pgd": lambda x, **kw: attacks.pgd(KEY, linear, x, steps=20, step_size=0.5, **kw),
    "apgd": lambda x, **kw: attacks.apgd(KEY, linear, x, steps=30, **kw),
    "mi_fgsm": lambda x, **kw: attacks.mi_fgsm(linear, x, **kw),
}


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd"])
def test_linear_loss_in_the_l2_ball_ends_at_its_tip(name):
    """The maximum of c x over the ball: eps c / ||c||_2 from its middle."""
    eps, x = 0.25, images()
    tip = np.asarray(x) + eps * C / np.sqrt((C**2).sum((1, 2, 3), keepdims=True))
    got = jax.jit(lambda z: LINEAR[name](z, eps=eps, norm="l2", bounds=None))(x)
    np.testing.assert_allclose(got, tip, rtol=0, atol=1e-6 if name == "fgsm" else 2e-3)
    value = np.float64(C * tip).sum((1, 2, 3))
    np.testing.assert_allclose(linear(got), value, rtol=0, atol=2e-4)
    if name == "fgsm":
        clipped = jax.jit(lambda z: LINEAR[name](z, eps=eps, norm="l2"))(x)
        np.testing.assert_allclose(clipped, tip.clip(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["apgd", "mi_fgsm"])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), None])
def test_linear_loss_in_the_box_ends_in_its_corner(name, bounds):
    x = images()
    corner = np.asarray(x) + 0.25 * np.sign(C)
    got = jax.jit(lambda z: LINEAR[name](z, eps=0.25, bounds=bounds))(x)
    np.testing.assert_allclose(got, corner if bounds is None else corner.clip(*bounds), rtol=0, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-4, 0.5, 20.0])
def test_rounding_adds_up_to_nothing_in_large_images(eps):
    """150,528 pixels, each rounded by itself, and a sum of as many squares."""
    rs, shape = np.random.RandomState(2), (2, 224, 224, 3)
    x, c = (jnp.asarray(a, jnp.float32) for a in (rs.rand(*shape), rs.randn(*shape)))
    for steps in (1, 3):
        got = attacks.pgd(KEY, lambda z: (z * c).sum((1, 2, 3)), x, eps=eps, steps=steps, norm="l2", bounds=None)
        moved = size(np.float64(got) - np.float64(x), "l2")
        assert (moved <= eps).all()
        assert (moved > (0.85 if eps == 1e-4 else 0.99) * eps).all()


def test_l2_start_is_uniform_in_the_ball():
    """The share within r is r^D, and no direction is preferred."""
    x = jnp.zeros((4000, 3))
    got = np.asarray(attacks.pgd(KEY, lambda z: 0 * z[:, 0], x, eps=2.0, steps=1, norm="l2", bounds=None)) / 2
    radius = size(got, "l2")
    for r in (0.3, 0.5, 0.8, 0.95):
        np.testing.assert_allclose((radius < r).mean(), r**3, rtol=0, atol=5 * np.sqrt(0.25 / 4000))
    np.testing.assert_allclose(got.mean(0), 0, atol=5 * np.sqrt(0.2 / 4000))
    np.testing.assert_allclose((got.T @ got) / 4000, np.eye(3) / 5, atol=0.02)


def test_tiny_gradients_have_a_direction():
    """Their squares are zero in float32."""
    x = images()
    want = attacks.fgsm(linear, x, eps=0.3, norm="l2")
    np.testing.assert_allclose(attacks.fgsm(lambda z: 1e-30 * linear(z), x, eps=0.3, norm="l2"), want, atol=1e-6)


def test_images_of_one_number_have_the_same_ball_in_both_norms():
    x, up = jnp.array([0.1, 0.5, 0.95]), jnp.array([1.0, -1.0, 1.0])
    for attack in (attacks.fgsm, functools.partial(attacks.pgd, KEY, steps=3), functools.partial(attacks.apgd, KEY)):
        for norm in ("linf", "l2"):
            got = attack(lambda z: z * up, x, eps=0.2, norm=norm)
            np.testing.assert_allclose(got, [0.3, 0.3, 1.0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_refuses_an_unknown_norm(name):
    with pytest.raises(ValueError, match=f"{name}: norm='l1'; it must be one of linf, l2"):
        LINEAR[name](images(), eps=0.1, norm="l1")


# --- momentum


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_mi_fgsm_by_hand(decay):
    """Dong et al., Algorithm 1, dividing by the l1 norm, in NumPy."""
    peak, eps, steps = np.random.RandomState(8).rand(N, 5), 0.3, 6
    x = np.full((N, 5), 0.5)
    z, g = x.copy(), np.zeros_like(x)
    for _ in range(steps):
        gradient = -4 * (z - peak) ** 3
        g = decay * g + gradient / np.abs(gradient).sum(1, keepdims=True)
        z = (z + eps / steps * np.sign(g)).clip(x - eps, x + eps).clip(0, 1)

    def loss(u: jax.Array) -> jax.Array:
        return -((u - peak.astype(np.float32)) ** 4).sum(1)

    got = attacks.mi_fgsm(loss, jnp.asarray(x, jnp.float32), eps=eps, steps=steps, decay=decay)
    np.testing.assert_allclose(got, z, rtol=0, atol=1e-6)
    if decay == 0:
        plain = attacks.ifgsm(loss, jnp.asarray(x, jnp.float32), eps=eps, steps=steps)
        np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize("argument", ["eps", "decay", "step_size"])
def test_mi_fgsm_refuses(argument):
    with pytest.raises(ValueError, match=f"mi_fgsm: {argument}=-1"):
        attacks.mi_fgsm(linear, images(), **{"eps": 0.1, argument: -1})
