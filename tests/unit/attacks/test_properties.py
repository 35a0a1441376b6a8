"""What every attack keeps, whatever images, network, budget and key: drawn by hypothesis, compiled once per attack."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from e2sad_jax import attacks, losses

N, SHAPE, K = 8, (4, 3, 1), 3  # an image for each of the devices
D = int(np.prod(SHAPE))
Logits = Callable[[jax.Array], jax.Array]
Attack = Callable[[Logits, jax.Array, jax.Array, jax.Array, Any], jax.Array]
Network = dict[str, np.ndarray]

# The same examples on every machine; the slowest is the compiler's.
few = functools.partial(
    settings,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def logits_of(network: Any, z: jax.Array) -> jax.Array:
    """Linear but for a kink in each pixel, so that rounding turns no sign of a gradient."""
    flat = z.reshape(z.shape[0], -1).astype(jnp.float32)
    return network["scale"] * (flat @ network["linear"] + jnp.abs(flat - network["kink"]) @ network["bent"])


def rising(f: Logits, y: jax.Array) -> Logits:
    return lambda z: losses.margin(f(z), y)


def ball(name: str, **kwargs: Any) -> Attack:
    """An attack with a budget, as a function of logits, keys, images, labels and eps."""

    def attack(f: Logits, keys: jax.Array, x: jax.Array, y: jax.Array, eps: Any) -> jax.Array:
        function = getattr(attacks, name)
        if name == "second_step":
            key = keys if kwargs["objective"] == "total" else keys[0]
            return function(f, x, eps=eps, key=key, bounds=(0.0, 1.0), **kwargs)
        args = (keys,) if name in ("pgd", "apgd", "square") else ()
        return function(*args, rising(f, y), x, eps=eps, **kwargs)

    return attack


def minimal(name: str, **kwargs: Any) -> Attack:
    """An attack that looks for the smallest change; it has no budget."""
    return lambda f, keys, x, y, eps: getattr(attacks, name)(f, x, y, **kwargs)


BALL: dict[str, Attack] = {
    "fgsm": ball("fgsm"),
    "fgsm_l2": ball("fgsm", norm="l2"),
    "second_step": ball("second_step", objective="total"),
    "second_step_random": ball("second_step", objective="random"),
    "mi_fgsm": ball("mi_fgsm", steps=3),
    "ifgsm": ball("ifgsm", steps=3),
    "pgd": ball("pgd", steps=2, restarts=2),
    "pgd_l2": ball("pgd", steps=2, norm="l2"),
    "apgd": ball("apgd", steps=4),
    "apgd_l2": ball("apgd", steps=4, norm="l2"),
    "square": ball("square", queries=8),
    "square_l2": ball("square", queries=8, norm="l2"),
}
MINIMAL: dict[str, Attack] = {
    "deepfool": minimal("deepfool", steps=4),
    "deepfool_linf": minimal("deepfool", steps=4, norm="linf"),
    "carlini_wagner": minimal("carlini_wagner", steps=12, binary_steps=3, learning_rate=0.1, initial_c=1.0),
    "fab": minimal("fab", steps=4),
    "fab_l2": minimal("fab", steps=4, norm="l2"),
}
EVERY = {**BALL, **MINIMAL}
WHOLE = [name for name in EVERY if name != "second_step_random"]  # that takes a key for the batch
# To how many units of float32 at 1 an iterate of another program may differ: one that divides by lengths, or descends.
CLOSE = {name: 2e-6 if name in ("fgsm", "second_step", "mi_fgsm", "ifgsm", "pgd", "square") else 1e-5 for name in EVERY}
CLOSE |= {"carlini_wagner": 2e-4, "fab": 1e-4, "fab_l2": 1e-4}


@pytest.fixture(autouse=True)
def quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """XLA compiles in half the time without the optimizations that rounding to bfloat16 must survive."""
    jax.config.update("jax_disable_most_optimizations", "bfloat16" not in request.node.name)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@st.composite
def networks(draw: st.DrawFn, scales: tuple[float, ...]) -> Network:
    rs = np.random.RandomState(draw(st.integers(0, 2**32 - 1)))
    return {
        "linear": rs.randn(D, K).astype(np.float32),
        "bent": rs.randn(D, K).astype(np.float32),
        "kink": (rs.randint(0, 255, (1, D)) / 255 + 0.5 / 255).astype(np.float32),
        "scale": np.float32(draw(st.sampled_from(scales))),
    }


IMAGES = hnp.arrays(np.uint8, (N, *SHAPE), elements=st.integers(0, 255), fill=st.nothing())
BUDGETS = st.sampled_from([1e-8, 8 / 255, 0.3, 1.0, 2.0]) | st.floats(0, 1.5, width=32)
KEYS = st.integers(0, 2**32 - 1)
EXTREME = networks((1.0, 0.0, 1e-30, 1e4, 1e30, 3e38))  # no gradient; one whose square is 0; saturated; infinite logits


@functools.cache
def jitted(name: str) -> Callable[..., jax.Array]:
    return jax.jit(lambda network, keys, x, y, eps: EVERY[name](functools.partial(logits_of, network), keys, x, y, eps))


@jax.jit
def logits(network: Any, x: jax.Array) -> jax.Array:
    return logits_of(network, x)


def drawn(network: Network, pixels: np.ndarray, seed: int, dtype: Any = jnp.float32) -> tuple[Any, ...]:
    """Arguments of a jitted attack but for eps: labels are what the network predicts."""
    x = jnp.asarray(pixels / 255, dtype)
    y = np.nan_to_num(np.asarray(logits(network, x))).argmax(1).astype(np.int32)
    return network, jax.random.split(jax.random.key(seed), N), x, y


def size(change: np.ndarray, norm: str) -> np.ndarray:
    flat = change.reshape(len(change), -1)
    return np.abs(flat).max(1) if norm == "linf" else np.sqrt((flat**2).sum(1))


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BALL)
def test_stays_in_ball_and_range_repeats_and_is_nothing_without_a_budget(name, dtype):
    """In bfloat16 as in float32 to 1e-6: what rounding would lead out goes to the next number inside."""

    @few(max_examples=12 if dtype == "float32" else 6)
    @given(EXTREME, IMAGES, BUDGETS, KEYS)
    def holds(network: Network, pixels: np.ndarray, eps: float, seed: int) -> None:
        arguments = drawn(network, pixels, seed, dtype)
        x, got = arguments[2], jitted(name)(*arguments, np.float32(eps))
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        assert np.isfinite(wide(got)).all()
        assert (wide(got) >= 0).all()
        assert (wide(got) <= 1).all()
        assert (size(wide(got) - wide(x), "l2" if name.endswith("l2") else "linf") <= np.float64(eps) + 1e-6).all()
        np.testing.assert_array_equal(got, jitted(name)(*arguments, np.float32(eps)))
        np.testing.assert_array_equal(jitted(name)(*arguments, np.float32(0)), x)

    with jax.numpy_dtype_promotion("strict" if dtype == "float32" else "standard"):
        holds()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MINIMAL)
def test_stays_in_the_range_repeats_and_leaves_what_is_misclassified(name, dtype):
    @few(max_examples=10 if dtype == "float32" else 5)
    @given(EXTREME, IMAGES, KEYS, st.integers(1, N - 1))
    def holds(network: Network, pixels: np.ndarray, seed: int, wrong: int) -> None:
        arguments = drawn(network, pixels, seed, dtype)
        x, y = arguments[2:]
        clear = np.asarray(logits(network, x))
        clear = np.isfinite(clear).all(1) & (np.sort(clear)[:, -1] > np.sort(clear)[:, -2])  # of one class, not two
        y = np.where(np.arange(N) < wrong, (y + 1) % K, y)
        got = jitted(name)(*arguments[:3], y, np.float32(0))
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        assert np.isfinite(wide(got)).all()
        assert (wide(got) >= 0).all()
        assert (wide(got) <= 1).all()
        np.testing.assert_array_equal(got, jitted(name)(*arguments[:3], y, np.float32(0)))
        stays = clear & (np.arange(N) < wrong)
        np.testing.assert_array_equal(wide(got)[stays], wide(x)[stays])
        if network["scale"] == 0:
            np.testing.assert_array_equal(got, x)

    with jax.numpy_dtype_promotion("strict" if dtype == "float32" else "standard"):
        holds()


@pytest.mark.parametrize("name", WHOLE)
def test_is_the_same_alone_under_vmap_and_on_eight_devices(name):
    """And it moves: what did nothing would be the same everywhere."""
    mesh, spread = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")

    def attack(network: Any, keys: jax.Array, x: jax.Array, y: jax.Array, eps: Any) -> jax.Array:
        return EVERY[name](functools.partial(logits_of, network), keys, x, y, eps)

    def one(network: Any, key: jax.Array, image: jax.Array, label: jax.Array, eps: Any) -> jax.Array:
        return attack(network, key[None], image[None], label[None], eps)[0]

    alone = jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0, None)))
    on_devices = (PartitionSpec(), spread, spread, spread, PartitionSpec())
    split = jax.jit(jax.shard_map(attack, mesh=mesh, in_specs=on_devices, out_specs=spread))

    @few(max_examples=3)
    @given(networks((1.0, 0.1)), IMAGES, st.sampled_from([8 / 255, 0.3]), KEYS)
    def holds(network: Network, pixels: np.ndarray, eps: float, seed: int) -> None:
        arguments = (*drawn(network, pixels, seed), np.float32(eps))
        whole = jitted(name)(*arguments)
        np.testing.assert_allclose(alone(*arguments), whole, rtol=0, atol=CLOSE[name])
        np.testing.assert_allclose(split(*arguments), whole, rtol=0, atol=CLOSE[name])
        moved.append(bool((whole != arguments[2]).any()))

    moved: list[bool] = []
    holds()
    assert any(moved)


@pytest.mark.parametrize("name", ["fgsm", "fgsm_l2", "second_step", "ifgsm", "pgd_l2"])
def test_is_the_same_without_jit(name):
    @few(max_examples=3)
    @given(networks((1.0,)), IMAGES, KEYS)
    def holds(network: Network, pixels: np.ndarray, seed: int) -> None:
        network, keys, x, y = drawn(network, pixels, seed)
        plain = EVERY[name](functools.partial(logits_of, network), keys, x, y, 0.3)
        np.testing.assert_allclose(jitted(name)(network, keys, x, y, np.float32(0.3)), plain, rtol=0, atol=CLOSE[name])

    holds()
