"""Defense-GAN, which is broken: classify the image of a generator that is nearest to the given one."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from e2sad_jax import networks
from e2sad_jax._compile import once
from e2sad_jax.attacks import core
from e2sad_jax.attacks.core import LossFn
from e2sad_jax.networks.mixed import Conv

GenerateFn = Callable[[jax.Array], jax.Array]  # latent vectors [N, latent] to images [N, ...]
Parts = dict[str, jax.Array]


class Generator(nn.Module):
    """Latent vectors `[N, latent]` to images `[N, H, W, C]` in (0, 1).

    Attributes:
      image_shape: (H, W, C).
      features: d of the convolutional form: a layer of ceil(H / 8) x ceil(W / 8) x 4d units, then transposed 5x5 convolutions
        of stride 2 with 2d, d and C filters, cut to ceil(H / 4), ceil(H / 2) and H rows, and columns likewise. For 28x28x1
        images and d = 64 it is the authors'.
      hidden: units of the layers of the dense form; if there are any, `features` is not read.
    """

    image_shape: tuple[int, int, int]
    features: int = 64
    hidden: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        height, width, channels = self.image_shape
        if self.hidden:
            for units in self.hidden:
                z = nn.relu(nn.Dense(units)(z))
            return nn.sigmoid(nn.Dense(height * width * channels)(z).reshape(-1, *self.image_shape))
        sizes = [(-(-height // k), -(-width // k)) for k in (8, 4, 2, 1)]
        x = nn.relu(nn.Dense(math.prod(sizes[0]) * 4 * self.features)(z)).reshape(-1, *sizes[0], 4 * self.features)
        for filters, (h, w) in zip((2 * self.features, self.features, channels), sizes[1:], strict=True):
            x = nn.ConvTranspose(filters, (5, 5), (2, 2))(x)[:, :h, :w]
            x = nn.sigmoid(x) if (h, w) == (height, width) else nn.relu(x)
        return x


class Critic(nn.Module):
    """Images `[N, H, W, C]` to one number each, `[N]`, high for real ones.

    Attributes:
      features: d of the convolutional form: 5x5 convolutions of stride 2 with d, 2d and 4d filters, LeakyReLU 0.2, then a
        linear layer.
      hidden: as of `Generator`.
    """

    features: int = 64
    hidden: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for filters in () if self.hidden else (self.features, 2 * self.features, 4 * self.features):
            x = nn.leaky_relu(Conv(filters, (5, 5), (2, 2), padding=2)(x), 0.2)
        x = x.reshape(x.shape[0], -1)
        for units in self.hidden:
            x = nn.leaky_relu(nn.Dense(units)(x), 0.2)
        return nn.Dense(1)(x)[:, 0]


class Gan(NamedTuple):
    """A generator and its critic, functions of parameters, and both parameters.

    Attributes:
      generate: parameters and latent vectors `[N, latent]` to images.
      criticise: parameters and images to `[N]`.
      generator: the generator's parameters.
      critic: the critic's.
      latent: size of a latent vector.
    """

    generate: Callable[[Any, jax.Array], jax.Array]
    criticise: Callable[[Any, jax.Array], jax.Array]
    generator: Any
    critic: Any
    latent: int

    @property
    def generate_fn(self) -> GenerateFn:
        """Latent vectors to images, as `project` takes it."""
        return functools.partial(self.generate, self.generator)


def gan(
    key: jax.Array,
    image_shape: Sequence[int],
    *,
    latent: int = 128,
    features: int = 64,
    hidden: Sequence[int] = (),
) -> Gan:
    """Makes an untrained generator and critic; by default Defense-GAN's for MNIST, for an accelerator.

    Small images on a CPU take the dense form: `gan(key, shape, latent=16, hidden=(64, 64))`.

    Args:
      key: a random key.
      image_shape: (H, W, C).
      latent: size of a latent vector.
      features: d of the convolutional form.
      hidden: units of the layers of the dense form; empty for the convolutional one.
    """
    height, width, channels = image_shape
    generator, critic = Generator((height, width, channels), features, tuple(hidden)), Critic(features, tuple(hidden))
    keys = jax.random.split(core.threefry("gan", key))
    made = once(generator.init, keys[0], jnp.zeros((1, latent)))
    judged = once(critic.init, keys[1], jnp.zeros((1, *image_shape)))
    return Gan(networks.apply_fn(generator), networks.apply_fn(critic), made, judged, latent)


def gradient_penalty(critic_fn: LossFn, x: jax.Array) -> jax.Array:
    """The mean over images of (||grad_x D(x)||_2 - 1)^2; the norm is over all of an image, not over one of its axes.

    Args:
      critic_fn: images `[N, ...]` to `[N]`, twice differentiable.
      x: images `[N, ...]`, mixes of real and generated ones.

    Returns:
      A scalar. Where the gradient vanishes, the norm's own is taken as 0.
    """
    gradient = core.as_float32(core.input_gradient(critic_fn, x)).reshape(len(x), -1)
    squares = jnp.square(gradient).sum(-1)
    size = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return jnp.square(size - 1).mean()


def wgan_gp_critic(
    critic_fn: LossFn, real: jax.Array, fake: jax.Array, key: jax.Array, *, weight: float = 10.0
) -> tuple[jax.Array, Parts]:
    """The critic's loss in a Wasserstein GAN: E D(fake) - E D(real) + weight * `gradient_penalty` at random mixes.

    Args:
      critic_fn: images `[N, ...]` to `[N]`.
      real: images of the training set, `[N, ...]`.
      fake: generated ones, `[N, ...]`.
      key: a random key of the mixes, one share per image.
      weight: of the penalty, at least 0.

    Returns:
      The loss, a scalar, and its parts by name, before their weights.

    Raises:
      ValueError: if `weight` is out of range.

    Reference: Gulrajani et al., 2017, https://arxiv.org/abs/1704.00028
    """
    core.checks.number("wgan_gp_critic", "weight", weight)
    share = jax.random.uniform(core.threefry("wgan_gp_critic", key), (len(real), *[1] * (real.ndim - 1)), real.dtype)
    distance = critic_fn(real).mean() - critic_fn(fake).mean()
    penalty = gradient_penalty(critic_fn, real + share * (fake - real))
    return weight * penalty - distance, {"distance": distance, "penalty": penalty}


def wgan_generator(critic_fn: LossFn, fake: jax.Array) -> tuple[jax.Array, Parts]:
    """The generator's loss in a Wasserstein GAN: -E D(fake); a scalar, and its parts by name."""
    score = critic_fn(fake).mean()
    return -score, {"score": score}


def train_gan(
    key: jax.Array,
    model: Gan,
    x: jax.Array,
    *,
    steps: int = 200_000,
    critic_steps: int = 5,
    batch_size: int = 50,
    learning_rate: float = 1e-4,
    weight: float = 10.0,
    record: Callable[[int], None] | None = None,
) -> tuple[Gan, dict[str, jax.Array]]:
    """Trains a GAN as Defense-GAN does: `critic_steps` steps of the critic for one of the generator, Adam (0.5, 0.9).

    Args:
      key: a random key.
      model: the untrained GAN.
      x: training images `[n, H, W, C]` in [0, 1].
      steps: of the generator, at least 1.
      critic_steps: of the critic for each of them, at least 1.
      batch_size: images a step, drawn with replacement; at least 1.
      learning_rate: of both.
      weight: of the gradient penalty.
      record: called after each step of the generator with the number of its steps so far.

    Returns:
      The trained GAN, and the parts of the last step's losses by name. A trained critic's `distance` falls while the
      generator improves.

    Raises:
      ValueError: if an argument is out of range.

    Reference: Samangouei et al., 2018, https://arxiv.org/abs/1805.06605
    """
    x = core.checks.threat_model(
        "train_gan", x, bounds=(0.0, 1.0), steps=steps, critic_steps=critic_steps, batch_size=batch_size
    ).x
    tx = optax.adam(learning_rate, b1=0.5, b2=0.9)
    key = core.threefry("train_gan", key)

    def latents(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, (batch_size, model.latent))

    def descend(loss: Callable[[Any], Any], params: Any, state: Any) -> tuple[Any, Any, Parts]:
        gradient, parts = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, parts

    @functools.partial(jax.jit, donate_argnums=0)
    def step(params: Any, images: jax.Array, key: jax.Array) -> tuple[Any, Parts]:
        generator, critic, made, judged = params
        own_key, *others = jax.random.split(key, critic_steps + 1)
        for some in others:
            rows, draw, mix = jax.random.split(some, 3)
            real = images[jax.random.randint(rows, (batch_size,), 0, len(images))]
            fake = model.generate(generator, latents(draw))

            def critic_loss(p: Any, real: jax.Array = real, fake: jax.Array = fake, mix: jax.Array = mix) -> Any:
                return wgan_gp_critic(lambda z: model.criticise(p, z), real, fake, mix, weight=weight)

            critic, judged, parts = descend(critic_loss, critic, judged)
        z = latents(own_key)
        generator, made, own = descend(
            lambda p: wgan_generator(lambda x: model.criticise(critic, x), model.generate(p, z)), generator, made
        )
        return (generator, critic, made, judged), {**parts, **own}

    params = jax.tree.map(jnp.copy, (model.generator, model.critic))
    params = (*params, *map(tx.init, params))
    for number in range(steps):
        params, parts = step(params, x, jax.random.fold_in(key, number))
        if record is not None:
            record(number + 1)
    return model._replace(generator=params[0], critic=params[1]), parts


class Projection(NamedTuple):
    """What `project` finds.

    Attributes:
      images: G(z), `[N, ...]`.
      z: latent vectors `[N, latent]`.
      error: mean squared error of each image's pixels, `[N]`: a detector's score, high for images far from the generator's.
    """

    images: jax.Array
    z: jax.Array
    error: jax.Array


def project(
    key: jax.Array | None,
    generate_fn: GenerateFn,
    x: jax.Array,
    *,
    steps: int = 200,
    restarts: int = 10,
    learning_rate: float = 10.0,
    momentum: float = 0.7,
    latent: int = 128,
    start: jax.Array | None = None,
    unroll: bool = False,
) -> Projection:
    """Defense-GAN's projection: the image of a generator that is nearest to each image, by gradient descent in its input.

    min over z of mean_pixels (G(z) - x)^2, by `steps` steps of descent with momentum from each of `restarts` starts
    z ~ N(0, 1 / latent); the rate is a tenth in the last fifth of the steps. The best of the final points counts.

    The model is then asked about `images`, which are a constant to a gradient unless `unroll`. **That is no robustness:** the
    gradient through all steps, of `unroll`, makes adversarial images, and so does that of the identity, through
    `attacks.bpda(lambda x: project(key, G, x).images)` (Athalye et al., 2018, https://arxiv.org/abs/1802.00420). Others lie
    among the generator's own images (Jalal et al., 2017, https://arxiv.org/abs/1712.09196). Draw another key for each query
    (`attacks.eot`): with one key the attack is overstated.

    Args:
      key: a random key, one or one per image; not read with `start`.
      generate_fn: latent vectors `[N, latent]` to images.
      x: images `[N, ...]`, floating point.
      steps: of descent, at least 1.
      restarts: number of starts, at least 1.
      learning_rate: of the first four fifths, above 0.
      momentum: in [0, 1).
      latent: size of a latent vector.
      start: latent vectors to start from, `[restarts, N, latent]`, instead of random ones.
      unroll: whether a gradient flows back through all steps to `x`; each is computed again in the backward pass. Otherwise the
        result is a constant.

    Returns:
      The `Projection`. That of an image does not depend on the rest of the batch.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if an argument is out of range.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> x = jnp.array([[0.25, 0.75], [0.9, 0.9]])
    >>> found = project(jax.random.key(0), lambda z: jnp.concatenate([z, 1 - z], 1), x, latent=1, learning_rate=0.1, restarts=1)
    >>> print(np.round(np.asarray(found.images), 3), np.round(np.asarray(found.error), 3))
    [[0.25 0.75]
     [0.5  0.5 ]] [0.   0.16]

    Reference: Samangouei et al., 2018, https://arxiv.org/abs/1805.06605
    """
    x = core.checks.threat_model("project", x, bounds=None, steps=steps, restarts=restarts, latent=latent).x
    core.checks.number("project", "learning_rate", learning_rate, positive=True)
    if core.is_number(momentum) and not 0 <= float(momentum) < 1:
        raise ValueError(f"project: momentum={momentum}; it must lie in [0, 1)")
    n, wide = len(x), core.as_float32(x if unroll else jax.lax.stop_gradient(x))
    if start is None:
        keys = jax.vmap(lambda k: jax.random.split(k, restarts), out_axes=1)(core.per_image_keys("project", key, n))
        start = jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (latent,), wide.dtype)))(keys) / math.sqrt(latent)
    elif start.shape != (restarts, n, latent):
        raise ValueError(f"project: start has shape {start.shape}; it must be {(restarts, n, latent)}")
    target = jnp.broadcast_to(wide, (restarts, *wide.shape)).reshape(-1, *x.shape[1:])

    def error(z: jax.Array) -> jax.Array:
        return jnp.square(core.as_float32(generate_fn(z)) - target).reshape(len(z), -1).mean(-1)

    def body(i: int | jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z, velocity = state
        velocity = momentum * velocity + core.input_gradient(error, z)
        rate = jnp.where(jnp.asarray(i) >= 0.8 * steps, learning_rate / 10, learning_rate).astype(z.dtype)
        return z - rate * velocity, velocity

    first = start.reshape(-1, latent)
    z, _ = core.repeat_long(steps, jax.checkpoint(body) if unroll else body, (first, jnp.zeros_like(first)))
    errors = error(z).reshape(restarts, n)
    best = jnp.nanargmin(jnp.where(jnp.isfinite(errors), errors, jnp.inf), 0)
    z = jnp.take_along_axis(z.reshape(restarts, n, latent), best[None, :, None], 0)[0]
    found = Projection(generate_fn(z).astype(x.dtype), z, jnp.take_along_axis(errors, best[None], 0)[0])
    return found if unroll else jax.lax.stop_gradient(found)
