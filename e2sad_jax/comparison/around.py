"""The defenses at inference that a comparison of cited systems builds around one network."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import attacks, inference, training
from e2sad_jax._compile import jit
from e2sad_jax.comparison.request import Request
from e2sad_jax.data import Dataset
from e2sad_jax.data.dataset import hold_out
from e2sad_jax.evaluation import Attack, in_batches
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs.classifier import Classifier

FALSE_POSITIVES = 0.05  # of held-out training images, for every detector
COPIES = 10  # mutations of an image, or mutants of the network
AUTOENCODER_STEPS, GAN_STEPS, PROJECTION_STEPS = 2000, 4000, 200
COUNTED = 8  # images of the programs whose FLOPs are counted

Function = Callable[[Any, jax.Array], Any]  # of the network's parameters and images


@dataclasses.dataclass(frozen=True)
class Base:
    """The naturally trained network, and what defenses around it are built from.

    Attributes:
      request: the comparison.
      network: the network.
      train: inputs of the training set, `[n, H, W, C]`.
      held_out: inputs that were held out of it, `[m, H, W, C]`.
      num_classes: number of classes K.
    """

    request: Request
    network: Classifier
    train: np.ndarray
    held_out: np.ndarray
    num_classes: int

    @classmethod
    def of(cls, request: Request, network: Classifier, dataset: Dataset) -> "Base":
        """That of a network which a comparison has trained on a data set."""
        train, held_out = hold_out(dataset, request.validation_examples)
        return cls(
            request,
            network,
            inputs(network, np.asarray(train.x_train)),
            inputs(network, held_out.x_test),
            dataset.num_classes,
        )

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.train.shape[1:]

    @property
    def stages(self) -> list[Attack]:
        """The whole protocol."""
        return self.request.stages(self.num_classes)

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        """The network: logits `[N, K]`."""
        return self.network.apply(params, x)

    def on_held_out(self, function: Function) -> np.ndarray:
        """What a function of the network's parameters and images has for those held out, `[m, ...]`."""
        program, x = jit(function), self.held_out
        batches = in_batches(lambda full: program(self.network.params, x[full]), np.arange(len(x)), min(250, len(x)))
        return np.concatenate([np.asarray(values)[: len(places)] for places, values in batches])

    def flops(self, function: Function) -> float:
        """FLOPs of a function of the network's parameters and `COUNTED` images."""
        x = jnp.zeros((COUNTED, *self.image_shape))
        return training.function_counts(function, self.network.params, x)["flops"]


@dataclasses.dataclass(frozen=True)
class Around:
    """A defense around a network.

    Attributes:
      apply: parameters and images (and a key, with `draws`) to logits, as attacks see it.
      score_fn: of its detector, parameters and images to `[N]`; or None.
      stages: the attacks that are made for it.
      inference: FLOPs of a prediction of `COUNTED` images.
      made: FLOPs of making it, beside the network's training.
      draws: as of `evaluation.auto`.
      nearest: whether the nearest images that fool it are sought too, at any l2 distance: what it was broken with.
      more: functions of the same values as `apply` with other gradients, each with the attacks that follow them.
    """

    apply: Callable[..., jax.Array]
    score_fn: Function | None
    stages: Sequence[Attack]
    inference: float
    made: float = 0.0
    draws: int = 0
    nearest: bool = False
    more: Sequence[tuple[Callable[..., jax.Array], Sequence[Attack]]] = ()


def inputs(network: Classifier, images: np.ndarray) -> np.ndarray:
    """Images as stored to inputs of the network."""
    return np.asarray(jax.device_get(network.transform.apply(jax.device_put(images))))


def squeezing(base: Base) -> Around:
    """Feature squeezing: one bit and a 2 x 2 median, as for MNIST in its paper."""

    def score(squeezers: Sequence[Callable[[jax.Array], jax.Array]], params: Any, x: jax.Array) -> jax.Array:
        return inference.squeezing_score(functools.partial(base.apply, params), squeezers, x)

    bits = functools.partial(inference.bit_depth, bits=1, bounds=base.network.transform.bounds)
    plain = functools.partial(score, [bits, inference.median])
    attacked = functools.partial(score, [attacks.bpda(bits), inference.median])
    return Around(base.apply, attacked, base.stages, _with_score(base, plain), nearest=True)


def input_mutation(base: Base) -> Around:
    """Noise of half the budget on the image. The draws are the same for all images: the attack knows them."""
    low, high = base.network.transform.bounds
    draws = jax.random.uniform(jax.random.key(0), (COPIES, 1, *base.image_shape), minval=-1, maxval=1)

    def score(params: Any, x: jax.Array) -> jax.Array:
        moved = jnp.clip(x[None] + base.request.eps / 2 * draws.astype(x.dtype), low, high)
        logits = base.apply(params, moved.reshape(-1, *x.shape[1:]))
        return _changes(logits.reshape(COPIES, len(x), -1), base.apply(params, x))

    return Around(base.apply, score, base.stages[:1], _with_score(base, score))


def model_mutation(base: Base) -> Around:
    """Mutants with negated neurons, at the rate that its paper has for MNIST."""
    labels = base.on_held_out(lambda params, x: base.apply(params, x).argmax(-1))
    mutants = inference.mutants(
        jax.random.key(0),
        base.network.apply,
        base.network.params,
        jnp.asarray(base.held_out),
        jnp.asarray(labels),
        operator="invert",
        rate=0.05,
        count=COPIES,
    )

    def score(params: Any, x: jax.Array) -> jax.Array:
        logits = jax.lax.map(
            lambda mutant: base.apply(mutant, x), mutants
        )  # under vmap convolutions have groups, which are slow
        return _changes(logits, base.apply(params, x))

    return Around(base.apply, score, base.stages[:1], _with_score(base, score))


def magnet(base: Base) -> Around:
    """MagNet with both autoencoders of its paper's for MNIST. All of it has gradients."""
    batch = min(256, len(base.train))
    epochs = -(-AUTOENCODER_STEPS * batch // len(base.train))
    x, bounds = jnp.asarray(base.train), base.network.transform.bounds
    scores, reconstruct, made = [], [], 0.0
    for number, (blocks, p) in enumerate((((3, "average", 3), 2), ((3,), 1))):
        first, key = jax.random.split(jax.random.key(number))
        apply, params = inference.autoencoder(first, base.image_shape, blocks=blocks)
        steps = epochs * len(x) // batch
        with _advancing(f"train autoencoder {number + 1} of MagNet", steps) as record:
            params = inference.train_autoencoder(
                *(key, apply, params, x),
                epochs=epochs,
                batch_size=batch,
                learning_rate=3e-3,
                bounds=bounds,
                record=record,
            )
        reconstruct.append(functools.partial(apply, params))
        scores.append(functools.partial(inference.error_score, reconstruct[-1], p=p))
        gradient = jax.grad(
            lambda p, z, apply=apply, key=key: inference.reconstruction_loss(lambda w: apply(p, w), key, z)[0]
        )
        made += steps * training.function_counts(gradient, params, jnp.zeros((batch, *base.image_shape)))["flops"]
    held_out, rate = jnp.asarray(base.held_out), FALSE_POSITIVES / 2
    built = inference.magnet(reconstruct[0], scores, held_out, false_positive_rate=rate, bounds=bounds)

    def defended(params: Any, z: jax.Array) -> jax.Array:
        return built.defended(functools.partial(base.apply, params))(z)

    def score(params: Any, z: jax.Array) -> jax.Array:
        return built.score(z)

    price = base.flops(lambda params, z: (defended(params, z), built.score(z)))
    return Around(defended, score, base.stages, price, made, nearest=True)


def defense_gan(base: Base) -> Around:
    """Defense-GAN with a dense generator. A projection starts anew for each query.

    Attacks take its own gradient, and the identity's (BPDA), which its published break takes.
    """
    latent, x, eps = 16, jnp.asarray(base.train), base.request.eps
    gan = inference.gan(jax.random.key(0), base.image_shape, latent=latent, hidden=(64, 64))
    with _advancing("train Defense-GAN", GAN_STEPS) as record:
        gan, _ = inference.train_gan(jax.random.key(1), gan, x, steps=GAN_STEPS, learning_rate=1e-3, record=record)

    def projected(key: jax.Array, z: jax.Array, steps: int = PROJECTION_STEPS, unroll: bool = True) -> jax.Array:
        return inference.project(key, gan.generate_fn, z, steps=steps, restarts=4, latent=latent, unroll=unroll).images

    def apply(params: Any, z: jax.Array, key: jax.Array) -> jax.Array:
        return base.apply(params, projected(key, z))

    def approximated(params: Any, z: jax.Array, key: jax.Array) -> jax.Array:
        return base.apply(params, attacks.bpda(lambda z: projected(key, z, unroll=False))(z))

    def price(steps: int) -> float:
        return base.flops(lambda params, z: base.apply(params, projected(jax.random.key(0), z, steps)))

    one, two = price(1), price(2)  # so many steps without a loop would take long to compile
    critic = jax.grad(lambda p, z: inference.wgan_gp_critic(lambda w: gan.criticise(p, w), z, z, jax.random.key(0))[0])
    step = training.function_counts(critic, gan.critic, jnp.zeros((50, *base.image_shape)))["flops"]
    return Around(
        apply,
        None,
        [Attack("PGD-40 through the projection", "pgd", eps, 40, eps / 10)],
        one + (PROJECTION_STEPS - 1) * (two - one),
        GAN_STEPS * 5 * step,  # five of the critic for each of the generator, which costs less than one of them
        draws=1,
        more=[(approximated, [Attack("PGD-100 by BPDA", "pgd", eps, 100, eps / 20)])],
    )


AROUND: Mapping[str, Callable[[Base], Around]] = {
    "feature squeezing": squeezing,
    "input mutation": input_mutation,
    "model mutation": model_mutation,
    "MagNet": magnet,
    "Defense-GAN": defense_gan,
}


@contextlib.contextmanager
def _advancing(title: str, steps: int) -> Iterator[Callable[[int], None]]:
    """A bar of steps, which what it gives advances by one."""
    with Bar(title, steps, "steps") as bar:
        yield lambda step: bar.update(1)


def _with_score(base: Base, score: Function) -> float:
    return base.flops(lambda params, x: (base.apply(params, x), score(params, x)))


def _changes(mutated: jax.Array, own: jax.Array) -> jax.Array:
    """The share of mutations, logits `[M, N, K]`, that change the predicted class; with the probabilities' gradient."""
    label = own.argmax(-1)
    likely = jnp.take_along_axis(jax.nn.softmax(mutated), label[None, :, None], -1)[..., 0].mean(0)
    share = (mutated.argmax(-1) != label[None]).mean(0, dtype=likely.dtype)
    return share - (likely - jax.lax.stop_gradient(likely))
