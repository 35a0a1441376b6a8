"""MagNet: scores against reference values, losses by hand, thresholds by count, a tiny training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, data, inference
from tests import cited

KEY = jax.random.key(2)
pytestmark = pytest.mark.usefixtures("unoptimized")


@pytest.fixture(scope="module")
def digits():
    return jnp.asarray(np.float32(data.load("digits").x_train[:400] / 255))


@pytest.fixture(scope="module")
def trained(digits):
    """Autoencoder II after 60 steps, and before."""
    with jax.numpy_dtype_promotion("standard"):
        apply, first = inference.autoencoder(KEY, digits.shape[1:], blocks=(3,))
        seen = []
        params = inference.train_autoencoder(
            KEY, apply, first, digits[:300], epochs=20, batch_size=100, learning_rate=3e-2, record=seen.append
        )
    assert seen == list(range(1, 61))
    return lambda z: apply(first, z), lambda z: apply(params, z)


def test_scores_are_the_reference_values(shared):
    net, want = cited.networks(shared), cited.values(shared, "closed_forms")
    made = jnp.asarray(want["magnet_reconstruction"])
    for p in (1, 2):
        got = inference.error_score(lambda z: made, net.x, p=p)
        np.testing.assert_allclose(got, want[f"magnet_mark_p{p}"], rtol=1e-5)
    for temperature in (1, 10, 40):
        got = inference.divergence_score(net.logits["cnn"], lambda z: made, net.x, temperature=temperature)
        np.testing.assert_allclose(got, want[f"magnet_jsd_T{temperature}"], rtol=1e-4, atol=3e-6)


def test_what_is_not_changed_has_no_score(digits):
    logits = lambda z: 50 * z.reshape(len(z), -1)[:, 300:310]  # noqa: E731
    same = lambda z: z  # noqa: E731
    assert not np.abs(inference.error_score(same, digits, p=1)).max()
    assert np.abs(inference.divergence_score(logits, same, digits)).max() < 1e-6
    turned = inference.divergence_score(logits, lambda z: z[::-1], digits, temperature=0.01)
    np.testing.assert_allclose(np.max(turned), np.log(2), rtol=1e-3)


@pytest.mark.slow
def test_architectures_are_the_papers():
    """I: 3x3 convolutions of 3, 3, 3, 3 and 1 filters, halved and doubled in between; II: of 3, 3 and 1."""
    for blocks, filters in (((3, "average", 3), (3, 3, 3, 3, 1)), ((3,), (3, 3, 1))):
        apply, params = inference.autoencoder(KEY, (28, 28, 1), blocks=blocks)
        kernels = sorted((name, leaf["kernel"].shape) for name, leaf in params["params"].items())
        assert [shape[-1] for _, shape in kernels] == list(filters)
        assert all(shape[:2] == (3, 3) for _, shape in kernels)
        made = apply(params, jnp.zeros((2, 28, 28, 1)))
        assert made.shape == (2, 28, 28, 1)
        assert 0 < float(made.min()) <= float(made.max()) < 1
    with pytest.raises(ValueError, match=r"image_shape=\(9, 8, 1\); .* needs multiples of 2"):
        inference.autoencoder(KEY, (9, 8, 1))


def test_losses_by_hand(digits):
    x, makers = digits[:8], [lambda z: z, lambda z: 0.5 * z, lambda z: 1 - z]
    plain, parts = inference.reconstruction_loss(makers[1], KEY, x, noise=0.0)
    np.testing.assert_allclose(plain, np.square(0.5 * np.asarray(x)).mean(), rtol=1e-5)
    assert parts["reconstruction"] == plain
    noisy, _ = inference.reconstruction_loss(makers[0], KEY, x, noise=0.1, bounds=None)
    np.testing.assert_allclose(noisy, 0.01, rtol=0.1)
    clipped, _ = inference.reconstruction_loss(makers[0], KEY, x, noise=0.1)
    assert clipped < 0.8 * noisy
    alone = sum(inference.reconstruction_loss(f, KEY, x)[0] for f in makers)
    both, _ = inference.diverse_loss(makers, KEY, x, alpha=0.0)
    np.testing.assert_allclose(both, alone, rtol=1e-5)
    spread, parts = inference.diverse_loss(makers, KEY, x, noise=0.0, alpha=0.3)
    made = np.stack([f(np.float64(x)) for f in makers])
    np.testing.assert_allclose(parts["difference"], 3 * made.var(0).mean(), rtol=1e-4)
    np.testing.assert_allclose(spread, parts["reconstruction"] - 0.3 * parts["difference"], rtol=1e-5)


def test_thresholds_reject_exactly_their_share():
    """Of 200 images with distinct scores; one score above its threshold is enough."""
    x = jnp.asarray(np.random.RandomState(0).rand(200, 4), jnp.float32)
    scores = [lambda z, i=i: 0.1 + z[:, i] for i in range(2)]
    for rate, count in ((0.0, 0), (0.004, 0), (0.05, 10), (0.052, 10), (0.5, 100)):
        defense = inference.magnet(lambda z: z, scores, x, false_positive_rate=rate)
        for f, limit in zip(scores, defense.thresholds, strict=True):
            assert int((f(x) > limit).sum()) == count
        either = np.asarray((scores[0](x) > defense.thresholds[0]) | (scores[1](x) > defense.thresholds[1]))
        np.testing.assert_array_equal(defense.rejected(x), either)
        np.testing.assert_array_equal(defense.score(x) > 1, either)


@pytest.mark.slow
def test_a_trained_autoencoder_restores_images_and_scores_noise(digits, trained):
    """On images that it has not seen."""
    before, after = trained
    held_out = digits[300:]
    assert (
        inference.error_score(after, held_out, p=2).mean() < 0.25 * inference.error_score(before, held_out, p=2).mean()
    )
    defense = inference.magnet(
        after, [lambda z, p=p: inference.error_score(after, z, p=p) for p in (1, 2)], held_out, false_positive_rate=0.05
    )
    noise = jnp.clip(held_out + 0.4 * jax.random.rademacher(KEY, held_out.shape, jnp.float32), 0, 1)
    assert float(defense.rejected(held_out).mean()) <= 0.1
    assert float(defense.rejected(noise).mean()) > 0.9


@pytest.mark.slow
def test_a_defended_model_has_gradients_and_takes_clipped_images(digits, trained):
    """What attacks need: no backward pass has to be made up for it."""
    _, after = trained
    x = digits[:20]
    logits = lambda z: z.reshape(len(z), -1)[:, 300:303]  # noqa: E731
    defense = inference.magnet(lambda z: 3 * after(z), [lambda z: inference.error_score(after, z, p=1)], digits[300:])
    defended = defense.defended(logits)
    np.testing.assert_allclose(defended(x), logits(jnp.clip(3 * after(x), 0, 1)), atol=1e-6)
    plain = inference.MagNet(after, (), ()).defended(logits)
    moved = attacks.fgsm(lambda z: plain(z)[:, 1], x, eps=0.1)
    assert (plain(moved)[:, 1] > plain(x)[:, 1]).mean() > 0.9


def test_refuses(digits):
    with pytest.raises(ValueError, match="error_score: p=3; it must be 1 or 2"):
        inference.error_score(lambda z: z, digits, p=3)
    with pytest.raises(ValueError, match=r"temperature=0; .*above 0"):
        inference.divergence_score(lambda z: z, lambda z: z, digits, temperature=0)
    with pytest.raises(ValueError, match=r"reconstruction_loss: noise=-1; .*at least 0"):
        inference.reconstruction_loss(lambda z: z, KEY, digits, noise=-1)
    with pytest.raises(ValueError, match="batch_size=401; it must be at most the 400 images"):
        inference.train_autoencoder(KEY, lambda p, z: z, {}, digits, batch_size=401)
    with pytest.raises(ValueError, match="score_fns is empty"):
        inference.magnet(lambda z: z, [], digits)
    with pytest.raises(ValueError, match="no score above 0"):
        inference.magnet(lambda z: z, [lambda z: inference.error_score(lambda z: z, z, p=1)], digits)
