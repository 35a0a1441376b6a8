"""Defense-GAN: penalties and projections in closed form, and a tiny training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, data, inference
from tests import cited

KEY = jax.random.key(3)
pytestmark = pytest.mark.usefixtures("unoptimized")


@pytest.fixture
def forms(shared):
    return cited.networks(shared).x, cited.values(shared, "closed_forms")


def line(z):
    """A generator of one latent number: images on a line, in the shape of images."""
    way = jnp.asarray([[1.0, -2.0, 0.5, 1.0]], z.dtype)
    return (0.5 + z * way).reshape(-1, 2, 2, 1)


def test_gradient_penalties_are_those_of_linear_and_quadratic_critics(forms):
    """(||v|| - 1)^2 whatever the points; and at given mixes, over whole images, also where they have several axes."""
    x, want = forms
    v = jnp.asarray(want["gp_v"], jnp.float32)
    real = np.asarray(x[:16]).reshape(16, -1)
    mixed = jnp.asarray(real + want["gp_alpha"] * (want["gp_fake"] - real), jnp.float32)
    flat = lambda z: z.reshape(len(z), -1)  # noqa: E731
    for points in (mixed, mixed.reshape(16, 28, 28, 1)):
        linear = inference.gradient_penalty(lambda z: flat(z) @ v, points)
        np.testing.assert_allclose(linear, want["gp_linear"], rtol=1e-4)
        quadratic = inference.gradient_penalty(lambda z: jnp.square(flat(z)).sum(-1) / 2, points)
        np.testing.assert_allclose(quadratic, want["gp_quadratic"], rtol=1e-5)
        assert abs(float(quadratic) - want["gp_quadratic_wrong_axis"]) > 1


def test_losses_of_a_critic_and_a_generator_by_hand():
    rs = np.random.RandomState(0)
    real, fake = (jnp.asarray(rs.rand(6, 2, 2, 1), jnp.float32) for _ in range(2))
    v = jnp.asarray([[1.0, 2.0], [-2.0, 4.0]]).reshape(1, 2, 2, 1)  # of length 5
    critic = lambda z: (z * v).reshape(len(z), -1).sum(-1)  # noqa: E731
    loss, parts = inference.wgan_gp_critic(critic, real, fake, KEY, weight=3.0)
    apart = float((critic(real) - critic(fake)).mean())
    np.testing.assert_allclose(parts["distance"], apart, rtol=1e-5)
    np.testing.assert_allclose(parts["penalty"], 16, rtol=1e-5)
    np.testing.assert_allclose(loss, 48 - apart, rtol=1e-5)
    np.testing.assert_allclose(inference.wgan_generator(critic, fake)[0], -critic(fake).mean(), rtol=1e-6)
    flat = jax.grad(lambda s: inference.gradient_penalty(lambda z: s * 0 * z.sum((1, 2, 3)), real))(1.0)
    assert np.isfinite(flat)


def test_projection_onto_a_linear_generator_step_by_step(forms):
    """Descent with momentum, the rate a tenth in the last fifth; to least squares; the best of three starts."""
    x, want = forms
    A, c = (jnp.asarray(want[f"gan_{name}"], jnp.float32) for name in "Ac")
    generate = lambda z: (z @ A.T + c[None]).reshape(-1, 28, 28, 1)  # noqa: E731
    run = jax.jit(
        lambda s: inference.project(
            None, generate, x[:4], steps=50, restarts=len(s), latent=8, start=s, learning_rate=2.0
        )
    )
    start = jnp.asarray(want["gan_start"], jnp.float32)
    found = run(start)
    z = want["gan_z"][want["gan_best"], np.arange(4)]
    np.testing.assert_allclose(found.z, z, rtol=1e-3, atol=1e-3)  # which start is best is a matter of rounding here
    np.testing.assert_allclose(found.error, want["gan_error"].min(0), rtol=1e-4)
    np.testing.assert_allclose(found.error, want["gan_least_error"], rtol=1e-3)
    np.testing.assert_allclose(found.images, generate(found.z), atol=1e-6)
    for i in range(3):
        alone = run(start[i : i + 1])
        np.testing.assert_allclose(alone.z, want["gan_z"][i], rtol=1e-4, atol=2e-4)
        assert (found.error <= alone.error + 1e-7).all()


def test_a_projection_is_each_images_own():
    """By its key, in any batch; another key starts elsewhere; an image of the generator comes back."""
    bent = lambda z: line(jnp.sin(3 * z) / 3)  # noqa: E731
    x = jnp.asarray(np.random.RandomState(1).rand(5, 2, 2, 1), jnp.float32)
    keys = jax.random.split(KEY, 5)
    given = dict(steps=20, restarts=3, latent=1, learning_rate=0.05)
    run = jax.jit(lambda keys, x, steps: inference.project(keys, bent, x, **given | {"steps": steps}), static_argnums=2)
    whole, part = run(keys, x, 20), run(keys[2:4], x[2:4], 20)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[2:4], b, atol=1e-6), whole, part)
    first, other = (run(jax.random.key(seed), x, 1) for seed in (8, 9))
    assert np.abs(other.z - first.z).min() > 0
    z = jnp.asarray([[0.1], [-0.2]])
    again = jax.jit(lambda z: inference.project(None, bent, bent(z), **given | {"restarts": 1}, start=z[None]))(z)
    np.testing.assert_allclose(again.z, z, atol=1e-6)
    assert np.abs(again.error).max() < 1e-10


@pytest.mark.slow
def test_more_restarts_are_never_worse():
    waves = lambda z: line(jnp.sin(20 * z) / 4 + z)  # noqa: E731
    x = jnp.asarray(np.random.RandomState(2).rand(6, 2, 2, 1), jnp.float32)
    errors = [
        np.asarray(
            inference.project(
                jax.random.split(KEY, 6), waves, x, steps=15, restarts=r, latent=1, learning_rate=1e-3
            ).error
        )
        for r in (1, 8)
    ]
    assert (errors[1] <= errors[0] + 1e-6).all()
    assert errors[1].mean() < errors[0].mean()


@pytest.mark.slow
def test_gradients_through_a_projection():
    """None by default; one of the identity by BPDA; the exact one unrolled, against finite differences."""
    x, given = jnp.full((1, 2, 2, 1), 0.6), dict(steps=6, restarts=1, latent=1, learning_rate=0.1)

    def value(z, **kwargs):
        return inference.project(KEY, line, z, **given, **kwargs).images[0, 0, 1, 0]

    assert not np.abs(jax.grad(value)(x)).max()
    through = attacks.bpda(lambda z: inference.project(KEY, line, z, **given).images)
    np.testing.assert_array_equal(jax.grad(lambda z: through(z)[0, 0, 1, 0])(x).ravel(), [0, 1, 0, 0])
    np.testing.assert_allclose(through(x), inference.project(KEY, line, x, **given).images)
    exact = np.asarray(jax.grad(lambda z: value(z, unroll=True))(x)).ravel()
    for i in range(4):
        way = np.zeros(4, np.float32)
        way[i] = 1e-2
        way = jnp.asarray(way.reshape(1, 2, 2, 1))
        np.testing.assert_allclose((value(x + way) - value(x - way)) / 2e-2, exact[i], rtol=2e-2, atol=1e-4)
    assert np.abs(exact).min() > 1e-3


@pytest.mark.slow
def test_the_papers_networks_have_its_shapes():
    """Latent 128, d = 64: 4x4x256, cut to 7x7x128, 14x14x64, 28x28x1; the critic's convolutions halve."""
    model = jax.eval_shape(lambda: inference.gan(KEY, (28, 28, 1))[2:4])
    generator = {name: leaf["kernel"].shape for name, leaf in model[0]["params"].items()}
    assert generator == {
        "Dense_0": (128, 4096),
        "ConvTranspose_0": (5, 5, 256, 128),
        "ConvTranspose_1": (5, 5, 128, 64),
        "ConvTranspose_2": (5, 5, 64, 1),
    }
    critic = {name: leaf["kernel"].shape for name, leaf in model[1]["params"].items()}
    assert critic == {
        "Conv_0": (5, 5, 1, 64),
        "Conv_1": (5, 5, 64, 128),
        "Conv_2": (5, 5, 128, 256),
        "Dense_0": (4096, 1),
    }
    for shape in ((9, 12, 3),):
        tiny = inference.gan(KEY, shape, latent=4, features=2)
        images = tiny.generate_fn(jnp.ones((3, 4)))
        assert images.shape == (3, *shape)
        assert tiny.criticise(tiny.critic, images).shape == (3,)


@pytest.mark.slow
def test_a_tiny_gan_comes_nearer_to_its_images():
    """And only then can it project them."""
    digits = jnp.asarray(np.float32(data.load("digits").x_train[:256, ::4, ::4] / 255))
    with jax.numpy_dtype_promotion("standard"):
        first = inference.gan(KEY, digits.shape[1:], latent=8, hidden=(32, 32))
        seen = []
        model, parts = inference.train_gan(
            KEY, first, digits, steps=150, critic_steps=2, batch_size=32, learning_rate=2e-3, record=seen.append
        )
    assert seen == list(range(1, 151))
    assert all(np.isfinite(leaf) for leaf in parts.values())
    project = jax.jit(
        lambda p: inference.project(KEY, lambda z: model.generate(p, z), digits[:20], steps=40, restarts=2, latent=8)
    )
    before, after = (project(one.generator).error.mean() for one in (first, model))
    assert after < 0.6 * before


def test_refuses():
    x = jnp.zeros((2, 2, 2, 1))
    with pytest.raises(ValueError, match=r"project: momentum=1; it must lie in \[0, 1\)"):
        inference.project(KEY, line, x, latent=1, momentum=1)
    with pytest.raises(ValueError, match=r"project: restarts=0; .*at least 1"):
        inference.project(KEY, line, x, latent=1, restarts=0)
    with pytest.raises(ValueError, match=r"start has shape \(1, 2, 1\); it must be \(10, 2, 1\)"):
        inference.project(None, line, x, latent=1, start=jnp.zeros((1, 2, 1)))
    with pytest.raises(TypeError, match="project: key is NoneType"):
        inference.project(None, line, x, latent=1)
    with pytest.raises(ValueError, match=r"weight=-1; .*at least 0"):
        inference.wgan_gp_critic(lambda z: z.sum((1, 2, 3)), x, x, KEY, weight=-1)
