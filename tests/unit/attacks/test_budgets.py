"""Budgets per image and masks, ranges per feature: one rule for every attack and defense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, defenses, losses
from e2sad_jax.attacks import core
from tests.helpers import mostly_slow
from tests.unit.attacks.helpers import (
    BALL,
    CASES,
    COUNTED,
    KEY,
    KEYS,
    REGISTERED,
    SHAPE,
    N,
    compiled_for,
    draw,
    images,
    jitted,
    logits_of,
    predicted,
    size,
)

pytestmark = pytest.mark.usefixtures("all_unoptimized")

NAN = float("nan")


def summed(z: jax.Array) -> jax.Array:
    return z.reshape(z.shape[0], -1).sum(1)


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        [*[n for n in REGISTERED if n not in COUNTED], "second_total", "second_random"],
        ("fgsm_linf", "pgd_l2", "apgd_linf", "second_total"),
    ),
)
def test_arrays_say_what_numbers_say(name):
    """A budget for each image, and a range for each pixel, traced: what each image gets with its own number."""
    case, x, network = CASES[name], images(), draw()
    most = 10 if case.norm == "l0" else 1
    y, eps = predicted(network, x), most * np.where(np.arange(N) % 2, 0.3, 0.1).astype(np.float32)

    @jax.jit
    def program(eps: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
        f = functools.partial(logits_of, network)
        return case.attack(f, KEYS, x, jnp.asarray(y), eps, (lower, upper))

    zeros = np.zeros(SHAPE, np.float32)
    with compiled_for("float32"):
        one_each = eps.reshape(N, 1, 1, 1)
        masks = one_each if case.norm != "linf" else np.broadcast_to(one_each, x.shape)
        got = program(masks, zeros, zeros + 1)
        want = np.where(
            eps[:, None, None, None] < most * 0.2,
            jitted(name)(network, KEYS, x, y, most * 0.1),
            jitted(name)(network, KEYS, x, y, most * 0.3),
        )
        np.testing.assert_allclose(got, want, rtol=0, atol=case.close)
        if name in BALL:
            assert (size(got - x, case.norm)[1::2] > 0.15).any()  # beyond the smaller budget
        if case.norm == "linf" and name in BALL:  # no budget, no move; and no pixel leaves its own range
            mask = np.where(np.arange(SHAPE[0]) % 2, 0.2, 0).astype(np.float32).reshape(-1, 1, 1)
            upper = np.where(np.arange(SHAPE[1]) == 2, 0.6, 1).astype(np.float32).reshape(1, -1, 1)
            inside = jnp.asarray(np.minimum(x, upper))
            rows = jax.jit(
                lambda e, hi: case.attack(
                    functools.partial(logits_of, network), KEYS, inside, jnp.asarray(y), e, (0.0, hi)
                )
            )
            moved = np.asarray(rows(mask, upper))
            assert (np.abs(moved - inside) <= mask + 1e-6).all()
            assert (moved <= upper).all()
            assert (np.abs(moved - inside)[:, 1::2] > 0.1).any()


def test_one_per_image_is_no_mask():
    """The reported cases: the result had the budget's shape, or each channel a budget."""
    x = jnp.full((5, 28, 28, 1), 0.5)
    eps = jnp.linspace(0.1, 0.3, 5)
    np.testing.assert_allclose(
        attacks.fgsm(summed, x, eps=eps), 0.5 + np.broadcast_to(eps.reshape(5, 1, 1, 1), x.shape), rtol=1e-6
    )
    x = jnp.full((3, 8, 8, 3), 0.5)
    with pytest.raises(ValueError, match=r"eps has shape \(3,\).*make it \(3, 1, 1, 1\) .*image, \(1, 1, 1, 3\)"):
        attacks.fgsm(summed, x, eps=np.array([0.01, 0.1, 0.3]))
    for axis, shape in ((0, (3, 1, 1, 1)), (3, (1, 1, 1, 3))):
        got = attacks.fgsm(summed, x, eps=np.array([0.01, 0.1, 0.3]).reshape(shape))
        np.testing.assert_allclose(np.moveaxis(got, axis, 0)[:, 0, 0, 0], [0.51, 0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(  # an l2 ball has no mask, so nothing else can be meant
        size(attacks.fgsm(summed, x, eps=np.array([0.01, 0.1, 0.3]), norm="l2") - x, "l2"),
        [0.01, 0.1, 0.3],
        rtol=1e-4,
    )


TABULAR = np.array([[0.5, 50.0, 5.0], [0.2, 20.0, 2.0]], np.float32)


def test_tabular_ranges():
    """A range for each feature, in every attack; NumPy's float64 is what JAX makes of it."""
    bounds = (np.zeros(3), np.array([1.0, 100.0, 10.0]))
    got = attacks.fgsm(summed, np.float64(TABULAR), eps=np.array([0.1, 60.0, 0.0]), bounds=bounds)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [[0.6, 100, 5], [0.3, 80, 2]], rtol=1e-6)
    for lower, upper in (((0, 0, 0), (1, 100, 4)), ((0, 0, 3), (1, 100, 10))):
        with pytest.raises(
            ValueError, match=r"images have [52] where bounds are \([03], (4|10)\), at \[2\] .*normalise"
        ):
            attacks.fgsm(summed, TABULAR, eps=0.1, bounds=(np.array(lower), np.array(upper)))

    def logits(z: jax.Array) -> jax.Array:
        return losses.binary_logits(z[:, 2] - 3 + z[:, 1] * 1e-3)

    for attack in (attacks.deepfool, attacks.carlini_wagner, attacks.fab):
        found = attack(logits, jnp.asarray(TABULAR), jnp.array([1, 0]), bounds=bounds)
        assert (np.asarray(logits(found)).argmax(1) == [0, 1]).all()
        assert (np.asarray(found) >= bounds[0]).all()
        assert (np.asarray(found) <= bounds[1]).all()


X = jnp.full((2, 4, 3, 1), 0.5)
WRONG = [
    ({"eps": np.array([0.1, NAN])}, r"eps\[1\]=nan; it must be finite and at least 0"),
    ({"eps": [0.1, -0.2]}, r"eps\[1\]=-0\.2"),
    ({"eps": jnp.full((4, 3, 1), 0.1).at[2, 1, 0].set(jnp.inf)}, r"eps\[2, 1, 0\]=inf"),
    ({"eps": np.ones(3)}, r"eps has shape \(3,\); it must be a number, .*\(2,\), or broadcast .*\(4, 3, 1\)"),
    ({"eps": np.ones((2, 4))}, r"eps has shape \(2, 4\)"),
    ({"eps": np.ones((3, 4, 3, 1))}, r"eps has shape \(3, 4, 3, 1\)"),
    ({"eps": np.array(["a", "b"])}, "eps is <U1"),
    ({"eps": None}, "eps=None"),
    ({"eps": 10**400}, "eps=an integer of 1,329 bits; it must be a number, finite"),
    ({"eps": 1e39}, r"eps=1e\+39; it must be a number, finite"),
    ({"eps": np.array([1e39, 0.1])}, r"eps\[0\]=1e\+39"),
    ({"eps": np.array(1j)}, "eps=.*it must be a number"),
    ({"eps": "0.1"}, "eps='0.1'"),
    ({"eps": np.ones((4, 3, 1)), "norm": "l2"}, r"eps has shape \(4, 3, 1\); the l2 ball"),
    ({"bounds": 1.0}, r"bounds=1\.0; it must be two"),
    ({"bounds": (0.0, 0.5, 1.0)}, ".*it must be two"),
    ({"bounds": (np.zeros(2), 1.0)}, r"bounds have shape \(2,\)"),
    (
        {"bounds": (np.zeros((4, 3, 1)), np.eye(4, 3)[..., None])},
        r"bounds are \(0, 0\), at \[0, 1, 0\] of an image; the lower must be below",
    ),
    ({"x": X.at[1, 2, 1, 0].set(NAN)}, r"images reach from nan to nan, .*remove NaN"),
    ({"bounds": ("0", "1")}, ".*it must be of numbers"),
    ({"bounds": (-1.0, 0.0)}, r"images reach from 0\.5 to 0\.5, beyond bounds"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_refuses_arrays(wrong, message):
    given = {"x": X, "eps": 0.1, **wrong}
    with pytest.raises(ValueError, match=f"^fgsm: {message}"):
        attacks.fgsm(summed, **given)
    if "norm" not in given:  # the same rule, said with the defense's name
        with pytest.raises(ValueError, match=f"^ifgsm: {message}"):
            defenses.ifgsm(lambda z: z.reshape(2, -1), y=jnp.full((2, 12), 1 / 12), steps=2, **given)


def test_defenses_name_their_own_budgets():
    def logits(z: jax.Array) -> jax.Array:
        return z.reshape(len(z), -1)

    for budget in ("eps1", "eps2"):
        with pytest.raises(ValueError, match=rf"^e2sad: {budget}\[1\]=-1\.0; "):
            defenses.e2sad(logits, X, jnp.full((2, 12), 1 / 12), **{budget: [0.1, -1]})


def test_images_may_be_beyond_their_range_by_rounding():
    """2.64 is 2.640625 in bfloat16."""
    bounds = (-1.98, 2.64)
    for dtype, beyond in (("float32", 2.6400003), ("bfloat16", 2.640625), ("float16", 2.641)):
        with jax.numpy_dtype_promotion("standard"):
            attacks.fgsm(summed, jnp.full((2, 3), beyond, dtype), eps=0.1, bounds=bounds)
    with pytest.raises(ValueError, match="images reach from"):
        attacks.fgsm(summed, jnp.full((2, 3), 2.6401), eps=0.1, bounds=bounds)
    attacks.fgsm(summed, jnp.full((2, 3), 1e9), eps=0.1, bounds=(0.0, np.inf))


def test_bounds_may_be_a_list_and_traced():
    want = attacks.fgsm(summed, X, eps=0.7)
    for bounds in ([0, 1], np.array([0.0, 1.0]), jnp.array([0.0, 1.0])):
        np.testing.assert_array_equal(attacks.fgsm(summed, X, eps=0.7, bounds=bounds), want)
    traced = jax.jit(lambda lo, hi: attacks.pgd(KEY, summed, X, eps=0.7, steps=2, bounds=(lo, hi)))
    np.testing.assert_array_equal(traced(0.0, 1.0), want)


def test_keys_of_every_generator():
    """Under `rbg`, many TPU programs' default, what a key draws under vmap depends on the batch."""
    x = jnp.full((8, 4, 8, 2), 0.5)
    keys = jax.random.split(jax.random.key(3, impl="rbg"), 8)
    whole, part = (
        jax.jit(lambda k, z: attacks.pgd(k, summed, z, eps=0.2, steps=1, step_size=1e-6))(keys[i], x[i])
        for i in (slice(0, 8), slice(2, 5))
    )
    np.testing.assert_array_equal(whole[2:5], part)
    assert len(np.unique(np.asarray(whole).reshape(8, -1), axis=0)) == 8
    for impl in ("rbg", "unsafe_rbg"):
        one = core.per_image_keys("pgd", jax.random.key(3, impl=impl), 4)
        more = core.per_image_keys("pgd", jax.random.key(3, impl=impl), 8)[:4]
        np.testing.assert_array_equal(jax.random.key_data(one), jax.random.key_data(more))
        raw = core.per_image_keys("pgd", jax.random.key_data(jax.random.key(3, impl=impl)), 4)
        np.testing.assert_array_equal(jax.random.key_data(one), jax.random.key_data(raw))
    for wrong in (0, 3.0, None, jnp.ones(2), jnp.uint32(3)):
        with pytest.raises(TypeError, match=r"pgd: key is .*; it must be a random key, jax\.random\.key\(seed\)"):
            attacks.pgd(wrong, summed, x, eps=0.1, steps=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_strict_promotion_of_every_dtype(dtype):
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        x = jnp.full((2, 3), 0.5, dtype)
        moved = attacks.fgsm(summed, x, eps=0.25)
        assert moved.dtype == dtype
        assert (moved == 0.75).all()
