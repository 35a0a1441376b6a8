"""Attacks on few pixels against what is exact: all places and values of one pixel, and the best sets of a linear model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from e2sad_jax.attacks.few_pixels import _three
from tests import cited
from tests.helpers import mostly_slow

KEY = jax.random.key(0)
fast_to_compile = pytest.mark.usefixtures("unoptimized")


def changed(got: jax.Array, x: jax.Array) -> np.ndarray:
    """The number of pixels that differ, `[N]`."""
    return np.asarray(got != x).reshape(len(x), -1).sum(1)


# --- greedy


@fast_to_compile
def test_of_a_linear_model_it_changes_the_fewest_pixels_that_there_are(shared):
    given, golden = cited.networks(shared), cited.values(shared, "l0_exact")
    f = given.logits["linear"]
    got = jax.jit(lambda x: attacks.greedy_l0(f, x, given.labels))(given.x)
    assert (f(got).argmax(1) != given.labels).all()
    np.testing.assert_array_equal(changed(got, given.x), golden["least_pixels"])
    best = golden["best_margin"][:, list(golden["best_margin_pixels"]).index(5)]
    within = jax.jit(lambda x: attacks.greedy_l0(f, x, given.labels, pixels=5))(given.x)
    np.testing.assert_array_equal(f(within).argmax(1) != given.labels, best > 0)
    np.testing.assert_array_equal(within[best <= 0], given.x[best <= 0])


@pytest.mark.slow
def test_greedy_needs_fewer_pixels_than_jsma_towards_the_same_class(shared):
    """Of the convolutional network, image by image."""
    given, golden = cited.networks(shared), cited.values(shared, "jsma")
    f, x, targets = given.logits["cnn"], given.x[:8], jnp.asarray(golden["target"][:8])
    got = jax.jit(lambda x: attacks.greedy_l0(f, x, targets=targets))(x)
    np.testing.assert_array_equal(f(got).argmax(1), targets)
    jsma = golden["cnn_theta1_logits_image"][:8]
    both = golden["cnn_theta1_logits_success"][:8]
    assert both.sum() > 4
    assert (changed(got, x)[both] <= changed(jsma, x)[both]).all()
    assert (changed(got, x) > 0).all()


@fast_to_compile
def test_a_pixel_is_all_channels_of_a_place():
    """By hand: every place alone, all channels set to the end that raises the lead."""
    rs = np.random.RandomState(0)
    w = rs.randn(3, 4, 2).astype(np.float32)
    x = jnp.asarray(rs.rand(5, 3, 4, 2), jnp.float32)

    def f(z: jax.Array) -> jax.Array:
        lead = (z * w[None]).sum((1, 2, 3)) - 6
        return jnp.stack([jnp.zeros_like(lead), lead], 1)

    z = np.asarray(x)
    gains = np.maximum((1 - z) * w, (0 - z) * w).sum(-1).reshape(5, -1)
    needs = 6 - (z * w).sum((1, 2, 3))
    y = np.zeros(5, np.int32)
    fewest = [
        0 if need < 0 else 1 + int((np.cumsum(np.sort(gain)[::-1]) <= need).sum())
        for need, gain in zip(needs, gains, strict=True)
    ]
    assert max(fewest) > 1
    got = jax.jit(lambda x: attacks.greedy_l0(f, x, y))(x)
    assert (f(got).argmax(1) == 1).all()
    np.testing.assert_array_equal(np.asarray(got != x).any(-1).reshape(5, -1).sum(1), fewest)


# --- differential evolution


@pytest.mark.parametrize(("net", "images", "steps"), mostly_slow([("linear", 16, 100), ("cnn", 16, 100)], []))
def test_one_pixel_comes_near_the_best_of_all_and_never_beyond(net, images, steps, shared):
    """The least probability of the label over 784 places and 16 levels; between the levels the CNN has slightly less."""
    given, golden = cited.networks(shared), cited.values(shared, "onepixel")
    f, x, y = given.logits[net], given.x[:images], given.labels[:images]
    target = losses.soft_labels(y, 10, 0)
    attack = jax.jit(
        lambda key, x: attacks.few_pixels(key, lambda z: losses.cross_entropy(f(z), target), x, steps=steps)
    )
    got = attack(KEY, x)
    least, clean = (golden[f"{net}_{of}_probability"][:images] for of in ("16levels_least", "clean"))
    left = np.asarray(jax.nn.softmax(f(got)))[np.arange(images), y]
    assert (left >= least - (2e-6 if net == "linear" else 2e-3)).all()
    assert ((clean - left >= 0.95 * (clean - least)).mean()) >= 0.9
    np.testing.assert_array_equal(changed(got, x), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pixels", "steps", "least", "mean"), [(3, 100, 0.6, 0.75), (3, 400, 0.75, 0.95), (5, 1000, 0.75, 0.9)]
)
def test_more_pixels_come_most_of_the_way(pixels, steps, least, mean, shared):
    """To the best of a linear model, the nearer the longer: the search is no exhaustive one."""
    given, golden = cited.networks(shared), cited.values(shared, "l0_exact")
    f, x, y = given.logits["linear"], given.x[:8], given.labels[:8]
    got = jax.jit(lambda x: attacks.few_pixels(KEY, lambda z: losses.margin(f(z), y), x, pixels=pixels, steps=steps))(x)
    best = golden["best_margin"][:8, list(golden["best_margin_pixels"]).index(pixels)]
    clean, reached = (np.asarray(losses.margin(f(z), y)) for z in (x, got))
    way = (reached - clean) / (best - clean)
    assert (way <= 1 + 1e-5).all()
    assert way.min() > least
    assert way.mean() > mean
    assert (changed(got, x) <= pixels).all()


RS = np.random.RandomState(2)
W = RS.randn(12, 3).astype(np.float32)
X = jnp.asarray(RS.rand(6, 3, 4, 1), jnp.float32)


def linear(z: jax.Array) -> jax.Array:
    return z.reshape(len(z), -1) @ W


Y = linear(X).argmax(1)


def margin(z: jax.Array) -> jax.Array:
    return losses.margin(linear(z), Y)


def small(pixels: int, **settings) -> jax.Array:
    settings = {"population": 30, "steps": 40, **settings}
    return jax.jit(lambda x: attacks.few_pixels(KEY, margin, x, pixels=pixels, **settings))(X)


@fast_to_compile
@pytest.mark.parametrize("pixels", [1, 2])
def test_of_small_images_it_finds_the_best_of_all(pixels):
    """All sets of pixels at either end of the range, where the highest margin of a linear model is."""
    best = np.full(len(X), -np.inf)
    for places in itertools.combinations(range(12), pixels):
        for values in itertools.product((0.0, 1.0), repeat=pixels):
            z = np.array(X).reshape(len(X), 12)
            z[:, places] = values
            best = np.maximum(best, margin(jnp.asarray(z.reshape(X.shape))))
    got = margin(small(pixels))
    assert (got <= best + 1e-5).all()
    np.testing.assert_allclose(got, best, rtol=0, atol=0.05)
    assert (best > margin(X) + 0.1).all()


@fast_to_compile
def test_more_pixels_than_there_are_and_none():
    assert (margin(small(100)) > margin(small(1))).all()
    np.testing.assert_array_equal(small(0), X)


@pytest.mark.slow
@fast_to_compile
def test_an_image_that_is_misclassified_changes_no_more():
    """After two generations as after twenty; and one that is so from the start stays."""

    def wrong(z: jax.Array) -> jax.Array:
        return margin(z) > margin(X) + 0.01

    few, many = (small(2, steps=steps, misclassified_fn=wrong) for steps in (2, 20))
    assert np.asarray(wrong(few)).all()
    np.testing.assert_array_equal(few, many)
    assert (margin(small(2, steps=20)) > margin(many)).any()
    np.testing.assert_array_equal(small(2, misclassified_fn=lambda z: z[:, 0, 0, 0] >= 0), X)


@fast_to_compile
def test_an_image_that_no_candidate_makes_worse_stays():
    got = jax.jit(lambda x: attacks.few_pixels(KEY, lambda z: jnp.zeros(len(z)), x, population=5, steps=2))(X)
    np.testing.assert_array_equal(got, X)


@fast_to_compile
def test_parents_are_distinct():
    drawn = np.asarray(jax.vmap(lambda k: _three(k, 3))(jax.random.split(KEY, 50)))  # [50, 3, 3]
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.broadcast_to(np.arange(3)[None, :, None], drawn.shape))
    assert len(np.unique(drawn.transpose(0, 2, 1).reshape(-1, 3), axis=0)) == 6
