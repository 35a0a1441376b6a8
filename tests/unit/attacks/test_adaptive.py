"""Attacks on defenses: gradients through rounding, means over draws, evasion of detectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from e2sad_jax.evaluation import Attack, Detector, evaluate
from tests import cited
from tests.helpers import mostly_slow
from tests.unit.attacks.helpers import images, size
from tests.unit.attacks.test_carlini_wagner import cw
from tests.unit.attacks.test_deepfool import linear, network

KEY = jax.random.key(3)
pytestmark = pytest.mark.usefixtures("unoptimized")


def rounded(bits: int):
    return lambda z: jnp.rint(z * (2**bits - 1)) / (2**bits - 1)


# BPDA.


def test_bpda_has_the_values_of_the_one_and_the_derivatives_of_the_other_function():
    x = jnp.asarray(np.random.default_rng(0).uniform(-3, 3, (500, 3)), jnp.float32)
    through = attacks.bpda(lambda z: jnp.floor(z * 7) / 3, lambda z: jnp.sin(z))
    np.testing.assert_array_equal(jax.jit(through)(x), jnp.floor(x * 7) / 3)  # the sum back + (function - back) is not
    _, tangent = jax.jvp(through, (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(tangent, jnp.cos(x), rtol=1e-6)
    second = jax.grad(lambda z: jax.grad(lambda z: through(z).sum())(z).sum())(x)
    np.testing.assert_allclose(second, -jnp.sin(x), rtol=1e-6)
    each = jax.vmap(jax.grad(lambda z: through(z).sum()))(x)
    np.testing.assert_allclose(each, jnp.cos(x), rtol=1e-6)


def test_bpda_in_bfloat16_and_of_the_identity():
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (200,)), jnp.bfloat16)
    np.testing.assert_array_equal(attacks.bpda(rounded(3))(x), rounded(3)(x))
    same = attacks.bpda(lambda z: z)
    np.testing.assert_array_equal(same(x), x)
    np.testing.assert_array_equal(jax.grad(lambda z: same(z).sum())(x), np.ones(200))


def test_bpda_refuses_a_function_and_an_approximation_of_different_shapes():
    with pytest.raises(ValueError, match=r"function returns shape \(2,\), back \(3,\)"):
        attacks.bpda(lambda z: z[:2])(jnp.zeros(3))


def test_fgsm_of_a_linear_network_behind_rounding_has_the_signs_of_its_weights():
    w = jnp.asarray([0.5, -2.0, 0.1, -0.3], jnp.float32)
    x = jnp.full((1, 4), 0.45)
    for bits in (1, 3, 8):
        got = attacks.fgsm(lambda z, bits=bits: attacks.bpda(rounded(bits))(z) @ w, x, eps=0.25)
        np.testing.assert_allclose(got - x, 0.25 * jnp.sign(w)[None], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "bits"),
    mostly_slow([("cnn", 1), ("cnn", 3), ("linear", 1), ("linear", 3)], [("linear", 1), ("linear", 3)]),
)
def test_attacks_through_rounding_are_arts(shared, name, bits):
    """FGSM pixel by pixel; PGD, whose signs soon differ, by how many images it fools."""
    nets, want = cited.networks(shared), cited.values(shared, "bpda")
    f, x, y = nets.logits[name], jnp.asarray(nets.x), nets.labels

    def defended(z):
        return f(attacks.bpda(rounded(bits))(z))

    def loss(z):
        return losses.cross_entropy(defended(z), jax.nn.one_hot(y, 10))

    gradient = jax.grad(lambda z: loss(z).sum())(x)
    got, plain = attacks.fgsm(loss, x, eps=0.2), want[f"{name}_bits{bits}_fgsm02"]
    clear = np.abs(gradient) > 1e-7
    assert clear.mean() > 0.5
    np.testing.assert_allclose(got[clear], plain[clear], atol=1e-6)
    made = attacks.pgd(None, loss, x, eps=0.2, step_size=0.05, steps=10, random_start=False)
    fooled = np.asarray(defended(made).argmax(1) != y)
    assert fooled.mean() >= want[f"{name}_bits{bits}_pgd10_fooled"].mean() - 1 / 32
    naive = attacks.fgsm(lambda z: losses.cross_entropy(f(rounded(bits)(z)), jax.nn.one_hot(y, 10)), x, eps=0.2)
    np.testing.assert_array_equal(naive, x)  # without it there is nothing to follow


# EOT.


@pytest.mark.slow
def test_eot_of_a_loss_without_draws_is_that_loss():
    x = images()
    labels = network(x).argmax(1)

    def loss(z):
        return losses.margin(network(z), labels)

    expected = attacks.eot(KEY, lambda keys, z: loss(z), samples=5)
    np.testing.assert_allclose(expected(x), loss(x), rtol=1e-6)
    gradients = [jax.grad(lambda z, f=f: f(z).sum())(x) for f in (expected, loss)]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_eot_of_a_quadratic_loss_under_noise_is_the_loss_plus_the_trace():
    """E[(x + s u)' A (x + s u)] = x' A x + s^2 tr(A); its gradient is 2 A x."""
    rng, s, d = np.random.default_rng(1), 0.3, 5
    root = rng.normal(size=(d, d))
    a = jnp.asarray(root @ root.T / d, jnp.float32)
    x = jnp.asarray(rng.uniform(size=(4, d)), jnp.float32)

    def loss(keys, z):
        z = z + s * jax.vmap(lambda k: jax.random.normal(k, (d,)))(keys)
        return ((z @ a) * z).sum(1)

    value = jax.jit(attacks.eot(KEY, loss, samples=20_000))
    want = ((x @ a) * x).sum(1) + s**2 * jnp.trace(a)
    np.testing.assert_allclose(value(x), want, rtol=0.02)
    np.testing.assert_allclose(jax.grad(lambda z: value(z).sum())(x), 2 * x @ a, atol=0.03)
    assert (np.abs(np.asarray(attacks.eot(KEY, loss, samples=1)(x) - want)) > 1e-3).any()


def test_draws_of_an_image_change_with_it_and_with_the_key_and_not_with_its_batch():
    x = jnp.asarray(np.random.default_rng(2).uniform(size=(6, 4, 4, 1)), jnp.float32)

    def drawn(keys, z):
        return jax.vmap(jax.random.normal)(keys)

    f = jax.jit(attacks.eot(KEY, drawn, samples=1))
    got = np.asarray(f(x))
    assert len(np.unique(got)) == 6
    np.testing.assert_array_equal(f(x[::-1][:4]), got[::-1][:4])
    moved = np.asarray(f(x.at[:, 2, 3, 0].set(np.nextafter(x[:, 2, 3, 0], 2))))
    assert (moved != got).all()
    assert (np.asarray(attacks.eot(jax.random.key(4), drawn, samples=1)(x)) != got).all()
    flat = np.asarray(f(jnp.asarray(np.eye(16, dtype=np.float32).reshape(16, 4, 4, 1))))  # of few different bits
    assert len(np.unique(flat)) == 16
    many = np.asarray(attacks.eot(KEY, drawn, samples=4)(jnp.zeros((500, 2)) + jnp.arange(500.0)[:, None]))
    assert abs(many.mean()) < 4 / np.sqrt(2000)
    assert abs(many.std() * 2 - 1) < 0.15


def test_pgd_on_the_mean_of_draws_succeeds_where_one_fixed_draw_misleads_it():
    """Every draw flips a random half of the gradient; the mean over 200 points to the truth."""
    d = 16
    w = jnp.asarray(np.random.default_rng(3).choice([-1.0, 1.0], d), jnp.float32)

    def loss(keys, z):
        flip = jax.vmap(lambda k: jax.random.choice(k, jnp.asarray([-1.0, 1.5]), (d,)))(keys)
        return ((z - 0.5) * flip * w[None]).sum(1)

    x = jnp.full((8, d), 0.5)
    run = {"eps": 0.1, "steps": 5, "random_start": False}
    averaged = attacks.pgd(None, attacks.eot(KEY, loss, samples=200), x, **run)
    once = attacks.pgd(None, lambda z: loss(jax.random.split(KEY, 8), z), x, **run)
    agreement = [float((jnp.sign(made - x) == w[None]).mean()) for made in (averaged, once)]
    assert agreement[0] > 0.95
    assert agreement[1] < 0.7


def test_eot_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="samples=0"):
        attacks.eot(KEY, lambda keys, z: z.sum(1), samples=0)
    with pytest.raises(ValueError, match="per-example losses"):
        attacks.eot(KEY, lambda keys, z: z, samples=2)(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="one key"):
        attacks.eot(jax.random.split(KEY, 2), lambda keys, z: z.sum(1), samples=2)(jnp.zeros((2, 3)))
    with pytest.raises(TypeError, match="random key"):
        attacks.eot(3, lambda keys, z: z.sum(1), samples=2)(jnp.zeros((2, 3)))


# Detectors. The classifier looks along one axis, the detector along another that is oblique to it.

AXIS = np.eye(2, 6, dtype=np.float32)[0]
OBLIQUE = np.asarray([0.8, 0.6, 0, 0, 0, 0], np.float32)


def two_classes(z):
    lead = (z - 0.5) @ AXIS
    return jnp.stack([-lead, lead], 1)


def score(z):
    return (z - 0.5) @ OBLIQUE


def clean_images():
    x = np.random.default_rng(5).uniform(0.4, 0.6, (8, 6)).astype(np.float32)
    x[:, 0] = np.linspace(0.30, 0.44, 8)
    return jnp.asarray(x), jnp.zeros(8, jnp.int32)


THRESHOLD = -0.05


def fooled(z, labels):
    return np.asarray(attacks.wrong_and_accepted(two_classes, score, THRESHOLD, labels)(z))


def test_wrong_and_accepted_asks_both_of_one_image():
    z = jnp.asarray([[0.6, 0.5], [0.6, 0.2], [0.4, 0.2]], jnp.float32)
    z = jnp.concatenate([z, jnp.full((3, 4), 0.5)], 1)
    assert fooled(z, jnp.zeros(3, jnp.int32)).tolist() == [False, True, False]

    def nan(z):
        return jnp.full((3, 2), jnp.nan)

    accepted = attacks.wrong_and_accepted(nan, score, THRESHOLD, jnp.zeros(3, jnp.int32))(z)
    assert np.asarray(accepted).tolist() == [False, True, True]


def test_attacks_on_detectors_refuse_what_they_cannot_use():
    x, labels = clean_images()

    def climb(score_fn=score, threshold=THRESHOLD):
        return attacks.orthogonal_pgd(
            None, score, score_fn, x, misclassified_fn=lambda z: z[:, 0] > 0.5, threshold=threshold, eps=0.1, steps=1
        )

    cases = {
        "wrong_and_accepted: threshold=nan": lambda: attacks.wrong_and_accepted(two_classes, score, np.nan, labels),
        "evading: threshold=nan": lambda: attacks.evading(score, score, np.nan, weight=1),
        "orthogonal_pgd: threshold=nan": lambda: climb(threshold=jnp.nan),
        r"labels have shape \(4,\)": lambda: attacks.wrong_and_accepted(two_classes, score, 0, labels[:4])(x),
        "labels contain 2": lambda: attacks.wrong_and_accepted(two_classes, score, 0, labels + 2)(x),
        r"score_fn returned shape \(\) for 8 images; it must return one value": lambda: climb(lambda z: z.sum()),
    }
    for message, refused in cases.items():
        with pytest.raises(ValueError, match=message):
            refused()
    with pytest.raises(TypeError, match="score_fn returned bool"):
        attacks.evading(score, lambda z: score(z) > THRESHOLD, 0.5, weight=1)(x)


def test_evading_subtracts_the_excess_of_the_score():
    x, labels = clean_images()

    def loss(z):
        return losses.margin(two_classes(z), labels)

    x = x.at[:4, :2].add(0.1)
    got = attacks.evading(loss, score, THRESHOLD, weight=3.0)(x)
    excess = np.maximum(np.asarray(score(x)) - THRESHOLD, 0)
    assert (excess > 0).any()
    assert (excess == 0).any()
    np.testing.assert_allclose(got, np.asarray(loss(x)) - 3 * excess, rtol=1e-5)
    with pytest.raises(ValueError, match="weight"):
        attacks.evading(loss, score, THRESHOLD, weight=0)
    with pytest.raises(ValueError, match="score_fn returned shape"):
        attacks.evading(loss, lambda z: z, THRESHOLD, weight=1.0)(x)


@pytest.mark.slow
def test_attacks_that_evade_the_detector_fool_the_model_where_others_are_rejected():
    x, labels = clean_images()

    def loss(z):
        return losses.margin(two_classes(z), labels)

    def wrong(z):
        return two_classes(z).argmax(1) != labels

    judge = attacks.wrong_and_accepted(two_classes, score, THRESHOLD, labels)
    run = {"eps": 0.3, "steps": 40, "step_size": 0.02}
    oblivious = attacks.pgd(KEY, loss, x, **run)
    assert np.asarray(wrong(oblivious)).all()
    assert not fooled(oblivious, labels).any()
    evasive = attacks.evading(loss, score, THRESHOLD, weight=3.0)
    assert fooled(attacks.apgd(KEY, evasive, x, eps=0.3, steps=40, misclassified_fn=judge), labels).all()
    for key, norm, eps, least in ((KEY, "linf", 0.3, 0.7), (None, "l2", 0.5, 1.0)):  # some starts lie too far off
        settings = {**run, "eps": eps, "norm": norm, "misclassified_fn": wrong, "threshold": THRESHOLD}
        made = jax.jit(lambda z, key=key, s=settings: attacks.orthogonal_pgd(key, loss, score, z, **s))(x)
        assert fooled(made, labels).mean() >= least
        assert (size(made - x, norm) <= eps + 1e-6).all()
        assert made.min() >= 0
        assert made.max() <= 1


def test_orthogonal_pgd_returns_the_image_where_it_finds_nothing():
    x, labels = clean_images()

    def loss(z):
        return losses.margin(two_classes(z), labels)

    def wrong(z):
        return two_classes(z).argmax(1) != labels

    made = attacks.orthogonal_pgd(KEY, loss, score, x, misclassified_fn=wrong, threshold=-9.0, eps=0.3, steps=5)
    np.testing.assert_array_equal(made, x)


def test_orthogonal_pgd_returns_the_accepted_point_of_the_highest_loss_where_nothing_fools():
    """The loss is the first pixel; the detector's score jumps, without a gradient, where that is above 0.65."""
    made = attacks.orthogonal_pgd(
        None,
        lambda z: z[:, 0],
        lambda z: z[:, 1] + (z[:, 0] > 0.65).astype(z.dtype),
        jnp.full((1, 2), 0.5),
        misclassified_fn=lambda z: z[:, 0] > 2,
        threshold=0.9,
        eps=0.3,
        steps=3,
        step_size=0.1,
    )
    np.testing.assert_allclose(made, [[0.6, 0.5]], atol=1e-6)


def test_a_step_of_orthogonal_pgd_leaves_the_other_function_alone():
    """In the l2 ball, of linear functions: up the loss at one score; where it is misclassified, down the score at one loss."""
    a, b = np.asarray([[3.0, 1, 0], [1, 2, 2]], np.float32)
    x = jnp.full((2, 3), 0.5)

    def wrong(z):
        return jnp.asarray([False, True])

    def final(z):  # the first of the images is wrong in the end
        return jnp.asarray([True, True])

    for which, row in ((wrong, 1), (final, 0)):
        made = attacks.orthogonal_pgd(
            None,
            lambda z: z @ a,
            lambda z: z @ b,
            x,
            misclassified_fn=which,
            threshold=9.0,
            eps=0.1,
            steps=1,
            step_size=0.05,
            norm="l2",
        )
        change = np.float64(made - x)[row]
        straight, held = (-b, a)
        direction = straight - held * (straight @ held) / (held @ held)
        np.testing.assert_allclose(change, 0.05 * direction / np.linalg.norm(direction), atol=1e-5)


def test_orthogonal_pgd_removes_the_component_of_gradients_whose_squares_vanish_or_overflow():
    a, b = np.asarray([[3.0, 1, 0], [1, 2, 2]], np.float32)
    x = jnp.full((1, 3), 0.5)
    judge = {"misclassified_fn": lambda z: z[:, 0] != 0.5, "threshold": 3e38}
    run = {"eps": 0.1, "steps": 1, "step_size": 0.05, "norm": "l2", **judge}
    for scale in (1.0, 1e-25, 1e25):
        made = attacks.orthogonal_pgd(None, lambda z, c=scale: z @ (c * a), lambda z, c=scale: z @ (c * b), x, **run)
        change = np.float64(made - x)[0]
        assert abs(np.linalg.norm(change) - 0.05) < 1e-4
        assert abs(change @ b) < 1e-5


def test_a_score_is_compared_with_the_threshold_and_not_with_its_rounding():
    """In bfloat16 the threshold, a little below the score, is the score."""
    z, labels = jnp.full((1, 6), 0.75), jnp.zeros(1, jnp.int32)
    judge = attacks.wrong_and_accepted(two_classes, lambda z: jnp.full(len(z), 0.5, jnp.bfloat16), 0.4999, labels)
    assert not np.asarray(judge(z)).any()
    detector = Detector(lambda params, x: jnp.full(len(x), 0.5, jnp.bfloat16), 0.4999, weight=1.0)
    outcome = evaluate(lambda params, x: two_classes(x), None, z, labels, [Attack("clean", "clean")], detector=detector)
    assert outcome["clean"].rejected.all()


def nearest_valid(x, a, level, b, most):
    """The point nearest to x with a x >= level and b x <= most: a projection onto one or both planes."""
    alone = x + a * (level - a @ x) / (a @ a)
    if b @ alone <= most:
        return alone
    both = np.stack([a, b])
    return x + both.T @ np.linalg.solve(both @ both.T, np.asarray([level, most]) - both @ x)


def test_carlini_wagner_with_a_linear_constraint_comes_near_the_projection():
    x, labels = clean_images()
    run = {"steps": 300, "learning_rate": 0.01, "binary_steps": 9}
    got = jax.jit(lambda z: cw(two_classes, z, labels, constraint_fn=lambda z: score(z) - THRESHOLD, **run))(x)
    assert fooled(got, labels).all()
    rows = np.float64(x) - 0.5
    exact = [nearest_valid(row, np.float64(AXIS), 0, np.float64(OBLIQUE), THRESHOLD) - row for row in rows]
    distance = np.linalg.norm(exact, axis=1)
    assert (size(got - x, "l2") > 0.999 * distance).all()
    assert (size(got - x, "l2") < 1.02 * distance).all()
    without = cw(two_classes, x, labels, **run)
    assert (distance > 1.02 * size(without - x, "l2")).any()  # the constraint is felt


def test_carlini_wagner_under_a_constraint_that_always_holds_and_one_that_never_does():
    x, f = images(), linear(3)
    labels = f(x).argmax(1)
    run = {"steps": 20, "binary_steps": 3, "initial_c": 1.0, "learning_rate": 0.1}
    free = cw(f, x, labels, **run)
    assert (size(free - x, "l2") > 0).all()
    np.testing.assert_array_equal(cw(f, x, labels, constraint_fn=lambda z: jnp.full(len(z), -1.0), **run), free)
    np.testing.assert_array_equal(cw(f, x, labels, constraint_fn=lambda z: jnp.full(len(z), 1.0), **run), x)
    wrong = (labels + 1) % 3  # images that are misclassified stay only where they are valid
    np.testing.assert_array_equal(cw(f, x, wrong, constraint_fn=lambda z: jnp.full(len(z), -1.0), **run), x)


def test_carlini_wagner_goes_on_where_a_constraint_has_no_gradient():
    """The distance from the start has none there: its square root's is infinite, times zero."""
    x, labels = clean_images()

    def farther(z):
        return jnp.sqrt(jnp.square(z - x).sum(1)) - 1

    run = {"steps": 100, "binary_steps": 6}
    got = cw(two_classes, x, labels, constraint_fn=farther, **run)
    np.testing.assert_allclose(size(got - x, "l2"), size(cw(two_classes, x, labels, **run) - x, "l2"), atol=1e-3)
    assert (two_classes(got).argmax(1) != labels).all()
    hidden = cw(two_classes, x, labels, constraint_fn=lambda z: z.sum(1) * jnp.nan, **run)
    assert (two_classes(hidden).argmax(1) != labels).all()  # what rejects nothing forbids nothing


def test_carlini_wagner_in_float16_with_a_c_beyond_its_numbers():
    x, labels = clean_images()

    def f(z):
        lead = (z[:, 0] - 0.5) / 1000
        return jnp.stack([-lead, lead], 1)

    got = cw(f, x.astype(jnp.float16), labels, initial_c=1e5, binary_steps=1)
    assert (f(got).argmax(1) != labels).all()
