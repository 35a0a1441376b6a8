"""MagNet, which is broken: autoencoders that reject images far from the training set and move the others towards it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from e2sad_jax import losses, networks
from e2sad_jax._arguments import logits as checked_logits
from e2sad_jax._compile import once
from e2sad_jax.attacks import core
from e2sad_jax.attacks.core import Bounds, LogitsFn
from e2sad_jax.inference.detection import threshold
from e2sad_jax.networks.mixed import Conv

ImagesFn = Callable[[jax.Array], jax.Array]  # images to images
ScoreFn = Callable[[jax.Array], jax.Array]  # images [N, ...] to [N]
Parts = dict[str, jax.Array]


class Autoencoder(nn.Module):
    """MagNet's autoencoder: 3x3 convolutions with a sigmoid after each, images `[N, H, W, C]` to images.

    Attributes:
      blocks: of the encoder; a number is a convolution of so many filters, "average" halves height and width. The decoder has
        them in reverse, and a convolution of C filters. The paper's for MNIST are (3, "average", 3), I, and (3,), II.
    """

    blocks: Sequence[int | str] = (3, "average", 3)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, last = x.shape[-1], len(self.blocks)
        for place, block in enumerate((*self.blocks, *reversed(self.blocks), channels)):
            if isinstance(block, int):
                x = nn.sigmoid(Conv(block, (3, 3), padding=1)(x))
            elif place < last:
                n, height, width, c = x.shape
                x = x.reshape(n, height // 2, 2, width // 2, 2, c).mean((2, 4))
            else:
                x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        return x


def autoencoder(
    key: jax.Array, image_shape: Sequence[int], *, blocks: Sequence[int | str] = (3, "average", 3)
) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """Makes an untrained `Autoencoder`.

    Args:
      key: a random key.
      image_shape: (H, W, C).
      blocks: of the encoder.

    Returns:
      The function, parameters and images `[N, H, W, C]` to images, and its parameters.

    Raises:
      ValueError: if height or width cannot be halved as often as `blocks` says.
    """
    model, halves = Autoencoder(tuple(blocks)), 2 ** list(blocks).count("average")
    height, width, _ = image_shape
    if height % halves or width % halves:
        raise ValueError(f"autoencoder: image_shape={tuple(image_shape)}; {blocks} needs multiples of {halves}")
    return networks.apply_fn(model), once(model.init, key, jnp.zeros((1, *image_shape)))


def reconstruction_loss(
    reconstruct_fn: ImagesFn, key: jax.Array, x: jax.Array, *, noise: float = 0.1, bounds: Bounds = (0.0, 1.0)
) -> tuple[jax.Array, Parts]:
    """The loss of a denoising autoencoder: the mean squared error of the image from its noisy copy.

    Args:
      reconstruct_fn: images `[N, ...]` to images.
      key: a random key of the noise.
      x: clean images `[N, ...]`.
      noise: standard deviation of the Gaussian noise, at least 0, in the images' own units.
      bounds: range of valid images, to clip the noisy ones to; None for no clipping.

    Returns:
      The loss, a scalar, and its parts by name.

    Raises:
      ValueError: if `noise` or `bounds` is out of range.

    Reference: Meng and Chen, 2017, https://arxiv.org/abs/1705.09064
    """
    loss = jnp.square(reconstruct_fn(_noisy("reconstruction_loss", key, x, noise, bounds)) - x).mean()
    return loss, {"reconstruction": loss}


def diverse_loss(
    reconstruct_fns: Sequence[ImagesFn],
    key: jax.Array,
    x: jax.Array,
    *,
    noise: float = 0.1,
    alpha: float = 0.2,
    bounds: Bounds = (0.0, 1.0),
) -> tuple[jax.Array, Parts]:
    """The loss of several autoencoders that are to differ, one of which is picked at random in use.

    sum_i MSE(AE_i(x'), x) - alpha sum_i MSE(AE_i(x'), mean_j AE_j(x')), with x' the noisy image.

    Carlini and Wagner, 2017 (https://arxiv.org/abs/1711.08478) fool such sets with autoencoders of their own.

    Args:
      reconstruct_fns: images `[N, ...]` to images, at least one.
      key: as of `reconstruction_loss`.
      x: clean images `[N, ...]`.
      noise: as of `reconstruction_loss`.
      alpha: weight of the difference, at least 0.
      bounds: as of `reconstruction_loss`.

    Returns:
      The loss, a scalar, and its parts by name, before their weights.

    Raises:
      ValueError: if `noise`, `alpha` or `bounds` is out of range.

    Reference: Meng and Chen, 2017, https://arxiv.org/abs/1705.09064 (Section 4.5)
    """
    core.checks.number("diverse_loss", "alpha", alpha)
    noisy = _noisy("diverse_loss", key, x, noise, bounds)
    made = jnp.stack([reconstruct(noisy) for reconstruct in reconstruct_fns])
    axes = tuple(range(1, made.ndim))
    reconstruction = jnp.square(made - x[None]).mean(axes).sum()
    apart = jnp.square(made - made.mean(0, keepdims=True)).mean(axes).sum()
    return reconstruction - alpha * apart, {"reconstruction": reconstruction, "difference": apart}


def _noisy(name: str, key: jax.Array, x: jax.Array, noise: float, bounds: Bounds) -> jax.Array:
    core.checks.number(name, "noise", noise)
    x, _, _, bounds = core.checks.threat_model(name, x, bounds=bounds)
    noisy = x + noise * jax.random.normal(core.threefry(name, key), x.shape, x.dtype)
    return noisy if bounds is None else jnp.clip(noisy, *bounds)


def train_autoencoder(
    key: jax.Array,
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    x: jax.Array,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    noise: float = 0.1,
    bounds: Bounds = (0.0, 1.0),
    record: Callable[[int], None] | None = None,
) -> Any:
    """Trains an autoencoder on clean images by `reconstruction_loss` and Adam.

    Args:
      key: a random key.
      apply: parameters and images `[N, ...]` to images.
      params: initial parameters.
      x: training images `[n, ...]`, at least a batch; what is left of an epoch is in the next one.
      epochs: passes over the images, at least 1.
      batch_size: images a step, at least 1.
      learning_rate: Adam's.
      noise: as of `reconstruction_loss`.
      bounds: as of `reconstruction_loss`.
      record: called after each step with the number of steps so far.

    Returns:
      The trained parameters.

    Raises:
      ValueError: if an argument is out of range.
    """
    x = core.checks.threat_model("train_autoencoder", x, bounds=bounds, epochs=epochs, batch_size=batch_size).x
    if batch_size > len(x):
        raise ValueError(f"train_autoencoder: batch_size={batch_size}; it must be at most the {len(x)} images")
    tx = optax.adam(learning_rate)
    shuffle, draw = jax.random.split(core.threefry("train_autoencoder", key))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, images: jax.Array, rows: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return reconstruction_loss(lambda z: apply(params, z), key, images[rows], noise=noise, bounds=bounds)[0]

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    for batch, rows in enumerate(_batches(shuffle, len(x), epochs, batch_size)):
        params, state = step(params, state, x, jnp.asarray(rows), jax.random.fold_in(draw, batch))
        if record is not None:
            record(batch + 1)
    return params


def _batches(key: jax.Array, n: int, epochs: int, batch_size: int) -> np.ndarray:
    """Rows of whole batches, `[steps, batch_size]`, cut from the permutations of all epochs."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    order = np.concatenate([rng.permutation(n) for _ in range(epochs)])
    return order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)


def error_score(reconstruct_fn: ImagesFn, x: jax.Array, *, p: int) -> jax.Array:
    """MagNet's detector by reconstruction error: the mean of |x - AE(x)|^p over the pixels of an image.

    Args:
      reconstruct_fn: images `[N, ...]` to images.
      x: images `[N, ...]`.
      p: 1 or 2. The authors' code takes 2 for autoencoder I of MNIST and 1 for II.

    Returns:
      Scores `[N]`, at least 0.

    Raises:
      ValueError: if `p` is neither.
    """
    if p not in (1, 2):
        raise ValueError(f"error_score: p={p}; it must be 1 or 2")
    apart = core.as_float32(x) - core.as_float32(reconstruct_fn(x))
    return (jnp.abs(apart) if p == 1 else jnp.square(apart)).reshape(len(x), -1).mean(-1)


def divergence_score(
    logits_fn: LogitsFn, reconstruct_fn: ImagesFn, x: jax.Array, *, temperature: float = 10.0
) -> jax.Array:
    """MagNet's detector by divergence: how much reconstruction changes the model's prediction at a temperature.

    JSD(softmax(z(x) / T), softmax(z(AE(x)) / T)), the Jensen-Shannon divergence in nats.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      reconstruct_fn: images `[N, ...]` to images.
      x: images `[N, ...]`.
      temperature: T, above 0.

    Returns:
      Scores `[N]` in [0, log 2].

    Raises:
      ValueError: if `temperature` is out of range, or the logits are not `[N, K]`.
    """
    core.checks.number("divergence_score", "temperature", temperature, positive=True)

    def log_probabilities(z: jax.Array) -> jax.Array:
        z = core.as_float32(checked_logits("divergence_score", logits_fn(z), len(x)))
        return jax.nn.log_softmax(z / temperature)

    own, other = log_probabilities(x), log_probabilities(reconstruct_fn(x))
    middle = jnp.logaddexp(own, other) - np.log(2.0, dtype=own.dtype)
    return sum(losses.expectation(jnp.exp(p), p - middle) for p in (own, other)) / 2  # type: ignore[return-value]


class MagNet(NamedTuple):
    """A model's defense by MagNet: a reformer, and detectors with their thresholds.

    All of it has gradients, so attacks need no `attacks.bpda`: attack `defended(logits_fn)` with `score` as the detector, 1 its
    threshold. **It is broken:** such attacks fool models and detectors at once with little more distortion (Carlini and
    Wagner, 2017, https://arxiv.org/abs/1711.08478).

    Attributes:
      reformer: images to images.
      score_fns: of the detectors, images `[N, ...]` to scores `[N]`.
      thresholds: of each; an image is rejected if one of its scores is above.
      bounds: range of valid images, to which reformed ones are clipped; or None.
    """

    reformer: ImagesFn
    score_fns: tuple[ScoreFn, ...]
    thresholds: tuple[float, ...]
    bounds: Bounds = (0.0, 1.0)

    def defended(self, logits_fn: LogitsFn) -> LogitsFn:
        """The model on reformed images."""

        def logits(x: jax.Array) -> jax.Array:
            reformed = self.reformer(x)
            return logits_fn(reformed if self.bounds is None else jnp.clip(reformed, *self.bounds))

        return logits

    def score(self, x: jax.Array) -> jax.Array:
        """The largest of the detectors' scores in units of their thresholds, `[N]`: above 1 an image is rejected."""
        return jnp.stack([f(x) / t for f, t in zip(self.score_fns, self.thresholds, strict=True)]).max(0)

    def rejected(self, x: jax.Array) -> jax.Array:
        """Whether a detector rejects each image, bool `[N]`."""
        found = [f(x) > t for f, t in zip(self.score_fns, self.thresholds, strict=True)]
        return jnp.stack(found).any(0)


def magnet(
    reformer: ImagesFn,
    score_fns: Sequence[ScoreFn],
    held_out: jax.Array,
    *,
    false_positive_rate: float = 0.001,
    bounds: Bounds = (0.0, 1.0),
) -> MagNet:
    """Fixes the thresholds of MagNet's detectors on held-out training images.

    Args:
      reformer: images `[N, ...]` to images: a trained autoencoder.
      score_fns: of the detectors, at least one: `error_score`, `divergence_score`.
      held_out: clean images that no autoencoder was trained on, `[n, ...]`; never test images.
      false_positive_rate: share of them that each detector rejects, in [0, 1): floor(n rate) images.
      bounds: range of valid images, or None.

    Returns:
      The defense.

    Raises:
      ValueError: if there is no detector, a threshold would be 0, or the rate is out of range.

    Reference: Meng and Chen, 2017, https://arxiv.org/abs/1705.09064
    """
    if not score_fns:
        raise ValueError("magnet: score_fns is empty; it must hold at least one detector")
    thresholds = tuple(threshold(score(held_out), false_positive_rate) for score in score_fns)
    if min(thresholds) <= 0:
        raise ValueError(f"magnet: thresholds={thresholds}; a detector gives no score above 0 to the held-out images")
    return MagNet(reformer, tuple(score_fns), thresholds, bounds)
