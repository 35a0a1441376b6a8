"""`wrap`: the logits and the attacks of a model with its normalisation written out, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import evaluation, networks
from e2sad_jax._compile import is_pure, pure
from e2sad_jax.evaluation import Attack, wrap

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.1)
RS = np.random.RandomState(0)
X = RS.uniform(0.1, 0.9, (6, 4, 5, 3)).astype(np.float32)
W = RS.randn(60, 4).astype(np.float32)
Y = np.arange(6) % 4


def of_inputs(params, x):
    """A model of normalised inputs in its own layout."""
    return x.reshape(len(x), -1) @ params


def by_hand(first):
    """The logits of `X` in NumPy."""
    z = (np.float64(X) - MEAN) / STD
    return (z.transpose(0, 3, 1, 2) if first else z).reshape(6, -1) @ W


@pytest.mark.parametrize("first", [False, True])
def test_its_logits_are_those_of_normalised_images(first):
    got = wrap(of_inputs, mean=MEAN, std=np.float32(STD), channels_first=first)(W, X)
    np.testing.assert_allclose(got, by_hand(first), rtol=1e-5, atol=1e-4)


def test_numbers_serve_all_channels_and_nothing_changes_nothing():
    np.testing.assert_allclose(wrap(of_inputs, mean=0.5)(W, X), of_inputs(W, X - 0.5), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(wrap(of_inputs, std=1 / 255)(W, X), of_inputs(W, X * 255), rtol=1e-5, atol=1e-2)
    np.testing.assert_array_equal(wrap(lambda params, x: x)(None, X), X)
    half = wrap(lambda params, x: x, mean=MEAN, std=2)(None, jnp.asarray(X, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_attacks_keep_their_budget_in_the_units_of_the_images():
    """FGSM of a linear model goes by eps to the sign of the gradient, whatever the scale of a channel."""
    apply = wrap(of_inputs, mean=MEAN, std=STD, channels_first=True)
    labels = np.asarray(apply(W[:, :2], X)).argmax(1)
    model = evaluation.of_function(apply, X, labels, params=W[:, :2])
    moved = model.under(Attack("FGSM", "fgsm", 0.05, 1, loss="margin"))[1] - X
    away = (W[:, 0] - W[:, 1]).reshape(3, 4, 5).transpose(1, 2, 0)
    want = 0.05 * np.sign(away) * np.where(labels == 1, 1, -1)[:, None, None, None]
    np.testing.assert_allclose(moved, want, atol=1e-6)


def test_a_random_model_takes_its_key():
    def noisy(params, x, key):
        return of_inputs(params, x + jax.random.normal(key, x.shape))

    apply = wrap(noisy, mean=MEAN, std=STD)
    got = evaluation.evaluate(apply, W, X, Y, [Attack("clean", "clean")], draws=2)
    assert got["clean"].correct.shape == (6,)


def test_images_that_are_normalised_already_are_refused_with_the_remedy():
    with pytest.raises(
        ValueError, match=r"reach outside bounds=\(0, 1\).* evaluation.wrap\(apply, mean=..., std=...\)"
    ):
        evaluation.auto(of_inputs, W, (X - 0.5) / 0.2, Y, eps=0.1)


def test_programs_are_kept_of_a_pure_function_alone():
    @pure
    def own(params, x):
        return of_inputs(params, x)

    assert is_pure(wrap(own, mean=MEAN))
    assert not is_pure(wrap(of_inputs, mean=MEAN))
    mean = np.array(MEAN)
    apply = wrap(own, mean=mean)
    before = apply(W, X)
    mean[:] = 0
    np.testing.assert_array_equal(apply(W, X), before, "what it does not depend on any more")
    network = networks.create("digits_cnn", 10, (28, 28, 1))
    assert is_pure(wrap(networks.apply_fn(network), mean=0.5, std=0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": 0}, "wrap: std=0; it must be above 0"),
        ({"std": (0.2, -0.1, 0.2)}, "wrap: std=-0.1; it must be above 0"),
        ({"std": np.nan}, "wrap: std=nan; it must be above 0: one finite number, or one for each channel"),
        ({"std": ()}, r"wrap: std=\(\); it must be"),
        ({"mean": "0.5, 0.5"}, "wrap: mean='0.5, 0.5'; it must be .*: one finite number"),
        ({"mean": np.zeros((1, 1, 1, 3))}, r"wrap: mean=.* of shape \(1, 1, 1, 3\); it must be"),
        ({"mean": (0.5, 123.7, 0.5)}, r"mean=123.7; it must lie in \[0, 1\].* take mean / 255, 0.485, and std / 255"),
        ({"mean": -0.1}, r"mean=-0.1; it must lie in \[0, 1\], as the images do$"),
        ({"mean": MEAN, "std": (0.2, 0.2)}, "mean has 3 channels and std 2; both must"),
    ],
)
def test_numbers_that_cannot_be_right_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        wrap(of_inputs, **arguments)
    assert "\n" not in str(caught.value)


def test_what_it_cannot_apply_to_is_refused():
    with pytest.raises(ValueError, match=r"wrap: apply is a ndarray; it must be a function \(params, inputs\)"):
        wrap(W)
    with pytest.raises(ValueError, match=r"have shape \(6, 4, 5, 3\); .* the 1 channels of mean and std$"):
        wrap(of_inputs, mean=(0.5,))(W, X)
    with pytest.raises(ValueError, match=r"have shape \(6, 3, 4, 5\); .*images.transpose\(0, 2, 3, 1\)"):
        wrap(of_inputs, mean=MEAN, channels_first=True)(W, X.transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"shape \(6, 60\); with channels_first they must be \[N, H, W, C\]"):
        wrap(of_inputs, channels_first=True)(W, X.reshape(6, -1))
    with pytest.raises(TypeError, match=r"wrap: images are uint8; .*x / 255"):
        wrap(of_inputs, mean=MEAN)(W, np.uint8(X * 255))
