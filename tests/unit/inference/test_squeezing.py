"""Feature squeezing: levels and medians of SciPy's and ART's, exactly, and the detector's scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, inference
from tests import cited

pytestmark = pytest.mark.usefixtures("unoptimized")


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_arts(shared, bits):
    want, x = cited.values(shared, "squeezing"), np.asarray(cited.networks(shared).x)
    for name, images in (("image", x), ("noisy", want["noisy"])):
        got = np.asarray(jax.jit(lambda z: inference.bit_depth(z, bits))(images))
        levels = got * (2**bits - 1)
        np.testing.assert_array_equal(np.rint(levels), want[f"bits{bits}_{name}_levels"])
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)
        np.testing.assert_array_equal(inference.bit_depth(got, bits), got)


@pytest.mark.parametrize("size", [2, 3])
def test_medians_are_scipys(shared, size):
    want, x = cited.values(shared, "squeezing"), np.asarray(cited.networks(shared).x)

    def run(images):
        return np.asarray(inference.median(jnp.asarray(images), size))

    np.testing.assert_array_equal(np.rint(run(x) * 255), want[f"median{size}_image_uint8"])
    np.testing.assert_array_equal(run(want["noisy"]), want[f"median{size}_noisy"])
    np.testing.assert_array_equal(run(want["rgb"]), want[f"median{size}_rgb"])


def random_images(channels=2):
    return jnp.asarray(np.random.default_rng(0).uniform(size=(3, 6, 5, channels)), jnp.float32)


def test_eight_bits_leave_stored_images_as_they_are():
    x = jnp.arange(256, dtype=jnp.float32).reshape(1, 16, 16, 1) / 255
    np.testing.assert_array_equal(inference.bit_depth(x, 8), x)
    got = inference.bit_depth(2 * x - 1, 1, bounds=(-1.0, 1.0))
    np.testing.assert_array_equal(got, jnp.where(x < 0.5, -1.0, 1.0))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_median_commutes_with_rising_functions_and_keeps_flat_images(size):
    x = random_images()
    np.testing.assert_array_equal(inference.median(x**3, size), inference.median(x, size) ** 3)
    assert (inference.median(x, size) != x).any()
    np.testing.assert_array_equal(inference.median(jnp.full_like(x, 0.3), size), jnp.full_like(x, 0.3))
    gradient = jax.grad(lambda z: inference.median(z, size)[0, 3, 3, 0])(x)
    assert float(gradient.sum()) == 1
    assert int((gradient != 0).sum()) == 1


def test_squeezers_keep_the_dtype_and_refuse_what_they_cannot_use():
    x = random_images().astype(jnp.bfloat16)
    assert inference.bit_depth(x, 3).dtype == inference.median(x).dtype == x.dtype
    cases = {
        "bits=0": lambda: inference.bit_depth(x, 0),
        "bounds=None": lambda: inference.bit_depth(x, 1, bounds=None),
        r"\[N, H, W, C\]": lambda: inference.median(x[0]),
        "size=6": lambda: inference.median(x, 6),
        "squeezers is empty": lambda: inference.squeezing_score(lambda z: z, [], x),
        "NaN": lambda: inference.threshold([0.1, np.nan], 0.1),
        "false_positive_rate=1": lambda: inference.threshold([0.1], 1),
    }
    for message, refused in cases.items():
        with pytest.raises(ValueError, match=message):
            refused()
    for squeezers in (inference.median, x, [x]):
        with pytest.raises(TypeError, match=r"\[inference.median\] for one"):
            inference.squeezing_score(lambda z: z, squeezers, x)


@pytest.mark.parametrize("name", ["cnn", "linear"])
def test_scores_are_those_of_probabilities_in_float64(shared, name):
    nets, want = cited.networks(shared), cited.values(shared, "detector")
    f = nets.logits[name]
    one_bit, smooth = (lambda z: inference.bit_depth(z, 1)), inference.median
    sets = {"clean": nets.x, **{k: want[f"{name}_{k}_images"] for k in ("fgsm01", "fgsm03")}}
    for key, x in sets.items():
        columns = [want[f"{name}_{key}_l1_{squeezer}"] for squeezer in ("bit1", "median2")]
        for squeezers, expected in (
            ([one_bit], columns[0]),
            ([smooth], columns[1]),
            ([one_bit, smooth], np.max(columns, 0)),
        ):
            got = inference.squeezing_score(f, squeezers, jnp.asarray(x))
            np.testing.assert_allclose(got, expected, atol=5e-5)


@pytest.mark.parametrize(
    ("squeeze", "eps", "before", "after"),
    [
        pytest.param(inference.median, 0.2, 0.6, 0.9, marks=pytest.mark.slow, id="median"),
        pytest.param(lambda v: inference.bit_depth(v, 3), 0.2, 0.05, 0.2, id="bits"),
    ],
)
def test_detectors_by_squeezing_fall_to_attacks_that_evade_them(shared, squeeze, eps, before, after):
    """A detector stops oblivious FGSM, whose images nearly all fool the network, better than the attack that knows it."""
    nets = cited.networks(shared)
    f, x, y = nets.logits["linear"], jnp.asarray(nets.x), jnp.asarray(nets.labels)

    def score(z):
        return inference.squeezing_score(f, [squeeze], z)

    def approximated(z):
        return inference.squeezing_score(f, [attacks.bpda(squeeze)], z)

    def loss(z):
        return -jax.nn.log_softmax(f(z))[jnp.arange(32), y]

    limit = inference.threshold(score(x), 0.05)
    judge = attacks.wrong_and_accepted(f, score, limit, y)
    oblivious = attacks.fgsm(loss, x, eps=0.1)
    assert float((f(oblivious).argmax(1) != y).mean()) > 0.8
    assert float(judge(oblivious).mean()) < before
    evasive = attacks.evading(loss, approximated, limit, weight=10.0)
    made = jax.jit(lambda z: attacks.apgd(jax.random.key(0), evasive, z, eps=eps, steps=40, misclassified_fn=judge))(x)
    assert float(judge(made).mean()) > after


def test_a_threshold_rejects_at_most_the_share():
    rng = np.random.default_rng(0)
    for n in (1, 7, 100, 1000):
        scores = rng.permutation(n).astype(np.float32)
        for rate in (0.0, 0.05, 0.1, 0.3, 0.99):
            above = int((scores > inference.threshold(scores, rate)).sum())
            assert above == int(np.floor(round(n * rate, 9))), (n, rate)
    assert inference.threshold(jnp.asarray([2.0, 2.0, 1.0]), 0.5) == 2.0
