"""What every attack keeps, of one compiled program for each attack, norm and dtype.

Ball and range, budget, dtype and shape, no budget, repetition, strength, keys, independence of the batch, transformations,
gradients, NaN. The attacks are those of `ATTACKS`, and of each what differs in its program.
"""

import functools
from typing import Any

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e2sad_jax._compile import straight_line
from tests.helpers import mostly_slow
from tests.unit.attacks.helpers import (
    BALL,
    CASES,
    COUNTED,
    KEY,
    KEYS,
    MINIMAL,
    REGISTERED,
    SHAPE,
    K,
    N,
    compiled_for,
    draw,
    images,
    jitted,
    logits,
    logits_of,
    predicted,
    promotion,
    size,
    wide,
)

DTYPES = ("float32", "bfloat16")
# In bfloat16 what differs in rounding: every attack and norm of the registry, and the second step once.
IN_BFLOAT16 = [*REGISTERED, "second_total"]
every_case = pytest.mark.parametrize("name", CASES)
in_both = pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in CASES for d in DTYPES if d == "float32" or n in IN_BFLOAT16]
)
unbounded = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[(n, "float32") for n in ("fgsm_linf", "fgsm_l2", "mi_fgsm_linf", "pgd_l2", "apgd_linf", "square_l2")],
        *[(n, "bfloat16") for n in ("fgsm_linf", "fgsm_l2")],
    ],
)
EPS = (0.0, 0.01, 8 / 255, 0.3, 2.0)
PIXELS = (0.0, 1.0, 2.0)
# The sign of rounding noise is arbitrary, so Eq. 7 to the letter is not compared, and need not move.
COMPARED = [name for name in CASES if name != "second_literal"]
FROM_ITS_KEY = [name for name in COMPARED if not CASES[name].one_key]
# Where a transformation may meet another program: every attack and norm, and the second step.
TRANSFORMED = [*[name for name in REGISTERED if name not in COUNTED], "second_total"]


def run(name: str, x: jax.Array, eps: float, bounds: Any = (0.0, 1.0), seed: int = 0) -> jax.Array:
    network = draw()
    return jitted(name, x.dtype.name, bounds)(network, jax.random.split(jax.random.key(seed), N), x, labels(x), eps)


def labels(x: jax.Array) -> np.ndarray:
    with promotion(x.dtype):
        return predicted(draw(), x)


def budget(name: str) -> float:
    return 2.0 if CASES[name].norm == "l0" else 0.3


def allowed(name: str, eps: float) -> float:
    """The budget, and what one rounding may add: to 1e-6 in l-infinity, to a ten-millionth in l2."""
    return eps + 1e-6 if CASES[name].norm == "linf" else eps * (1 + 1e-7)


def check_budget(name: str, dtype: str, bounds: Any) -> None:
    with promotion(dtype):
        for eps in PIXELS if CASES[name].norm == "l0" else EPS:
            for seed in (0, 1):
                x = images(dtype, seed)
                got = run(name, x, eps, bounds, seed)
                assert (got.dtype, got.shape) == (x.dtype, x.shape)
                moved = size(wide(got) - wide(x), CASES[name].norm)
                assert moved.max() <= allowed(name, eps)
                if bounds is not None:
                    assert wide(got).min() >= bounds[0]
                    assert wide(got).max() <= bounds[1]
                if eps == 0:
                    np.testing.assert_array_equal(wide(got), wide(x))
                elif name in COUNTED:
                    assert moved.min() >= 1
                elif name in BALL and name != "second_literal":
                    # A small l2 change of many pixels is lost to rounding towards the image in bfloat16.
                    if dtype == "float32" or CASES[name].norm == "linf" or eps > 0.1:
                        least = (0.5 if dtype == "float32" else 0.4) * (eps if bounds is None else min(eps, 1))
                        assert moved.min() > least
                    if CASES[name].norm == "linf":
                        assert (wide(got) != wide(x)).mean() > 0.3


@in_both
def test_stays_in_ball_and_range_and_uses_the_budget(name, dtype):
    """In the images' own dtype and shape, for each image; without a budget nothing changes."""
    check_budget(name, dtype, (0.0, 1.0))


@unbounded
def test_stays_in_the_ball_without_a_range(name, dtype):
    check_budget(name, dtype, None)


# --- whatever images, network, budget and key


few = functools.partial(
    settings,  # the same examples on every machine
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# No gradient; one whose square is 0; saturated logits; infinite ones.
NETWORKS = st.builds(draw, st.integers(0, 2**32 - 1), st.sampled_from((1.0, 0.0, 1e-30, 1e4, 1e30, 3e38)))
IMAGES = hnp.arrays(np.uint8, (N, *SHAPE), elements=st.integers(0, 255), fill=st.nothing())
BUDGETS = st.sampled_from([1e-8, 8 / 255, 0.3, 1.0, 2.0]) | st.floats(0, 1.5, width=32)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in BALL for d in DTYPES if d == "float32" or n in IN_BFLOAT16]
)
def test_keeps_ball_and_range_of_whatever_is_drawn_and_repeats(name, dtype):
    """In bfloat16 as in float32 to 1e-6."""

    @few(max_examples=12 if dtype == "float32" else 6)
    @given(NETWORKS, IMAGES, BUDGETS, SEEDS)
    def holds(network: Any, pixels: np.ndarray, eps: float, seed: int) -> None:
        x, keys = jnp.asarray(pixels / 255, dtype), jax.random.split(jax.random.key(seed), N)
        attack = functools.partial(jitted(name, dtype), network, keys, x, predicted(network, x))
        got = attack(eps)
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        assert np.isfinite(wide(got)).all()
        assert wide(got).min() >= 0
        assert wide(got).max() <= 1
        assert (size(wide(got) - wide(x), CASES[name].norm) <= np.float64(eps) + 1e-6).all()
        np.testing.assert_array_equal(got, attack(eps))
        if network["scale"] == 0 and not CASES[name].random:
            np.testing.assert_array_equal(got, x)

    with promotion(dtype):
        holds()


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in MINIMAL for d in DTYPES if d == "float32" or n in IN_BFLOAT16]
)
def test_keeps_the_range_of_whatever_is_drawn_and_leaves_what_is_misclassified(name, dtype):
    """With a radius of infinity, which keeps all that is found."""

    @few(max_examples=10 if dtype == "float32" else 5)
    @given(NETWORKS, IMAGES, SEEDS, st.integers(1, N - 1))
    def holds(network: Any, pixels: np.ndarray, seed: int, wrong: int) -> None:
        x, keys = jnp.asarray(pixels / 255, dtype), jax.random.split(jax.random.key(seed), N)
        y, clear = predicted(network, x), np.asarray(logits(network, x))
        clear = np.isfinite(clear).all(1) & (np.sort(clear)[:, -1] > np.sort(clear)[:, -2])  # of one class, not two
        y = np.where(np.arange(N) < wrong, (y + 1) % K, y)
        attack = functools.partial(jitted(name, dtype), network, keys, x, y)
        got = attack(np.inf)
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        assert np.isfinite(wide(got)).all()
        assert wide(got).min() >= 0
        assert wide(got).max() <= 1
        np.testing.assert_array_equal(got, attack(np.inf))
        stays = clear & (np.arange(N) < wrong)
        np.testing.assert_array_equal(wide(got)[stays], wide(x)[stays])
        if network["scale"] == 0:
            np.testing.assert_array_equal(got, x)

    with promotion(dtype):
        holds()


@every_case
def test_a_network_of_nan_gives_finite_images(name):
    """NaN points nowhere: what starts at the image stays there, what starts at random stays in the ball."""
    x, network = images(), draw(scale=np.nan)
    got = jitted(name)(network, KEYS, x, predicted(network, x), 0.1)
    assert np.isfinite(got).all()
    assert got.min() >= 0
    assert got.max() <= 1
    assert (size(got - x, CASES[name].norm) <= allowed(name, 0.1)).all()
    if not CASES[name].random:
        np.testing.assert_array_equal(got, x)


# --- strength


@pytest.mark.parametrize("name", [n for n in BALL if CASES[n].family != "second step" or n == "second_loss"])
@pytest.mark.parametrize("eps", [0.05, 0.2])
def test_raises_the_loss_of_every_image(name, eps):
    """Above the clean margin, and gradients raise it above that of random signs (orthogonal PGD until it is above 0)."""
    x, eps = images(), eps * {"linf": 1, "l2": 3, "l0": 20 if eps < 0.1 else 10}[CASES[name].norm]
    y = labels(x)

    def margin(z: Any) -> np.ndarray:
        values = np.array(logits(draw(), z), np.float64)
        own = np.take_along_axis(values, y[:, None], 1)[:, 0]
        np.put_along_axis(values, y[:, None], -np.inf, 1)
        return values.max(1) - own

    attacked = margin(run(name, x, eps))
    assert (attacked > margin(x) + 1e-4).all()
    if CASES[name].norm == "linf" and CASES[name].family != "score-based" and eps == 0.05:
        for seed in range(5):
            signs = np.random.RandomState(seed).choice([-1, 1], x.shape).astype(np.float32)
            drawn = margin(jnp.clip(x + eps * signs, 0, 1))
            assert (attacked > (np.minimum(drawn, 0) if name == "orthogonal_pgd_linf" else drawn)).all()


@pytest.mark.parametrize("name", MINIMAL)
def test_fools_within_the_budget_or_leaves_the_image(name):
    x = images()
    y, norm = labels(x), CASES[name].norm
    every = run(name, x, np.inf)
    fooled, distance = predicted(draw(), every) != y, size(every - x, norm)
    # JSMA ends where no pair of pixels raises the target and lowers all others.
    assert fooled.mean() > (0.3 if name == "jsma_l0" else 0.7)
    assert (distance[fooled] > 0).all()
    counted = norm == "l0"  # a whole number, for which many images are alike
    eps = float(distance[fooled].min() if counted else np.median(distance[fooled]))
    got = run(name, x, eps)
    within = distance <= eps - (0 if counted else 1e-6)
    np.testing.assert_array_equal(got[within], every[within])
    np.testing.assert_array_equal(got[distance > eps + 1e-6], x[distance > eps + 1e-6])
    assert (within & fooled).sum() > 0
    assert name == "jsma_l0" or within.sum() < N


# --- keys and the batch


@every_case
def test_another_key_is_another_result_where_random_numbers_are_drawn(name):
    """Of a network without a gradient, where an attack stays at its start."""
    x, network, draws = images(), draw(scale=0), CASES[name].random and CASES[name].family != "minimum-norm"
    for n in (network, draw()) if name in BALL else (draw(),):
        first, again, other = (
            jitted(name)(
                n, jax.random.split(jax.random.key(seed), N), x, labels(x), 0.5 if CASES[name].norm != "l0" else 2
            )
            for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        differs = (np.asarray(first) != np.asarray(other)).reshape(N, -1).any(1)
        if not draws:  # FAB draws for its restarts alone
            assert not differs.any()
        elif n is network and name in COUNTED:  # no candidate has a higher loss
            np.testing.assert_array_equal(first, x)
        elif n is network and name != "second_noise":  # which moves along a gradient at a random point
            assert differs.all()
        elif n is not network:
            assert differs.any()


@pytest.mark.parametrize("name", FROM_ITS_KEY)
def test_no_neighbour_changes_an_image(name):
    """Any order, and a batch of other images around it."""
    x, order = images(), np.random.RandomState(0).permutation(N)
    attack = functools.partial(jitted(name), draw())
    y, eps, close = labels(x), budget(name) if name in BALL else np.inf, {"rtol": 0, "atol": CASES[name].close}
    whole = attack(KEYS, x, y, eps)
    assert (whole != x).any()
    np.testing.assert_allclose(attack(KEYS[order], x[order], y[order], eps), whole[order], **close)
    alone = np.array([2] * N)
    alone[1:] = np.random.RandomState(1).randint(0, N, N - 1)
    np.testing.assert_allclose(attack(KEYS[alone], x[alone], y[alone], eps)[0], whole[2], **close)


# --- transformations


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


@pytest.mark.parametrize("name", mostly_slow(TRANSFORMED, ("pgd_linf", "deepfool_l2", "second_total")))
def test_vmap_on_eight_devices_equals_one_image_at_a_time(name):
    """One program: in shard_map one image on each device, there under vmap, with a network and a budget of its own."""
    case, x, spread = CASES[name], images(), PartitionSpec("data")
    most = 100 if CASES[name].norm == "l0" else 1
    y, eps = labels(x), most * np.linspace(0.1, 0.3, N).astype(np.float32)
    networks = [draw(0 if "carlini" in name else seed) for seed in range(N)]  # that one's descent enlarges a rounding

    def one(network: Any, key: jax.Array, image: jax.Array, label: jax.Array, eps: jax.Array) -> jax.Array:
        f = functools.partial(logits_of, network)
        return case.attack(f, key[None], image[None], label[None], eps, (0.0, 1.0))[0]

    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
    program = jax.shard_map(jax.vmap(one), mesh=mesh_of(N), in_specs=(spread,) * 5, out_specs=spread)
    arguments = jax.device_put((several, KEYS, x, jnp.asarray(y), jnp.asarray(eps)), NamedSharding(mesh_of(N), spread))
    with compiled_for("float32"):
        got = jax.jit(program)(*arguments)
    want = [jitted(name)(networks[i], KEYS, x, y, eps[i])[i] for i in range(N)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=0, atol=case.close)
    assert name == "jsma_l0" or (np.asarray(got) != np.asarray(x)).any()  # it has one sign only, and fools few of them


def test_one_key_for_the_batch_under_vmap():
    """Over networks and budgets at once."""
    x, several = images(), jax.tree.map(lambda *leaves: jnp.stack(leaves), *[draw(seed) for seed in range(3)])
    y, eps = jnp.asarray(labels(x)), jnp.array([0.1, 0.2, 0.3])

    def attack(network: Any, eps: jax.Array) -> jax.Array:
        return CASES["second_noise"].attack(functools.partial(logits_of, network), KEYS, x, y, eps, (0.0, 1.0))

    with compiled_for("float32"):
        got = jax.jit(jax.vmap(attack))(several, eps)
    want = [jitted("second_noise")(draw(seed), KEYS, x, labels(x), eps[seed]) for seed in range(3)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=0, atol=2e-6)


def sharded(name: str, how: str) -> jax.Array:
    """The result of a case on several devices, a part of the images on each."""
    x, network, mesh, spread = images(), draw(), mesh_of(N if how == "shard_map" else 4), PartitionSpec("data")

    def attack(keys: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return CASES[name].attack(functools.partial(logits_of, network), keys, x, y, np.float32(0.3), (0.0, 1.0))

    if how == "shard_map":
        attack = jax.shard_map(attack, mesh=mesh, in_specs=(spread,) * 3, out_specs=spread)
    arguments = jax.device_put((KEYS, x, jnp.asarray(labels(x))), NamedSharding(mesh, spread))
    with compiled_for("float32"):
        got = jax.jit(attack)(*arguments)
    assert len(got.sharding.device_set) == mesh.size
    return got


@pytest.mark.parametrize("name", ["pgd_linf", "apgd_l2", "square_linf", "fab_linf"])
def test_eight_devices_in_shard_map_equal_one(name):
    x = images()
    want = jitted(name)(draw(), KEYS, x, labels(x), 0.3)
    np.testing.assert_allclose(sharded(name, "shard_map"), want, rtol=0, atol=CASES[name].close)
    assert (want != x).any()


@pytest.mark.parametrize("name", ["pgd_linf", "second_noise", "second_random"])
def test_a_sharded_batch_equals_one_on_one_device(name):
    """One key for the batch draws alike on one device and on four."""
    x = images()
    want = jitted(name)(draw(), KEYS, x, labels(x), 0.3)
    np.testing.assert_allclose(sharded(name, "jit"), want, rtol=0, atol=CASES[name].close)
    assert (want != x).any()


@pytest.mark.parametrize("name", ["fgsm_linf", "fgsm_l2", "second_total"])
def test_jit_equals_eager(name):
    x = images()
    y = labels(x)
    plain = CASES[name].attack(functools.partial(logits_of, draw()), KEYS, x, jnp.asarray(y), 0.3, (0.0, 1.0))
    np.testing.assert_allclose(jitted(name)(draw(), KEYS, x, y, 0.3), plain, rtol=0, atol=CASES[name].close)
    assert (plain != x).any()


@pytest.mark.parametrize("name", ["ifgsm_linf", "mi_fgsm_linf", "pgd_linf"])
def test_a_compiled_loop_equals_an_unrolled_one(name):
    x, y = images(), jnp.asarray(labels(images()))

    def attack(z: jax.Array) -> jax.Array:
        return CASES[name].attack(functools.partial(logits_of, draw()), KEYS, z, y, 0.3, (0.0, 1.0))

    with compiled_for("float32"):
        with straight_line():
            unrolled, program = jax.jit(lambda z: attack(z))(x), str(jax.make_jaxpr(lambda z: attack(z))(x))
        assert "scan" not in program
        assert "while" not in program
        looped = str(jax.make_jaxpr(lambda z: attack(z))(x))
    assert "scan" in looped or "while" in looped
    np.testing.assert_allclose(jitted(name)(draw(), KEYS, x, y, 0.3), unrolled, rtol=0, atol=CASES[name].close)


@every_case
def test_no_gradient_flows_through_the_result(name):
    """Neither to the images, nor to the network, nor to the budget."""
    x = images()
    y = jnp.asarray(labels(x))

    def total(network: Any, x: jax.Array, eps: jax.Array) -> jax.Array:
        made = CASES[name].attack(functools.partial(logits_of, network), KEYS, x, y, eps, (0.0, 1.0))
        return (made**2).sum()

    with compiled_for("float32"):
        if name in COUNTED:
            gradients = jax.jit(jax.grad(lambda network, x: total(network, x, 1.0), (0, 1)))(draw(), x)
        else:
            gradients = jax.jit(jax.grad(total, (0, 1, 2)))(draw(), x, jnp.float32(0.1))
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, 0)


def test_one_key_is_a_key_for_each_image_by_its_place():
    """And keys of the older kind are the same keys."""
    x = images()
    attack = functools.partial(jitted("pgd_l2"), draw())
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(N))
    got = attack(keys, x, labels(x), 0.3)
    for same in (KEY, jax.random.key_data(KEY), jax.random.key_data(keys)):
        np.testing.assert_array_equal(attack(same, x, labels(x), 0.3), got)
    assert (got != attack(jax.random.key(8), x, labels(x), 0.3)).any()
