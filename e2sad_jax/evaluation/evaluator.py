"""Attack suites and the accuracy that is left under them, example by example."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from e2sad_jax import _streams, attacks, distributed, networks
from e2sad_jax._compile import jit
from e2sad_jax.attacks import core
from e2sad_jax.data.transforms import Transform
from e2sad_jax.losses import cross_entropy, dlr, margin, soft_labels, targeted_dlr

KINDS = ("clean", "fgsm", "ifgsm", "mi_fgsm", "pgd", "apgd", "square", "fab")
LOSSES = ("ce", "margin", "dlr", "targeted_dlr")  # cross-entropy, Carlini-Wagner's margin, difference of logits ratio
TARGETED = ("targeted_dlr",)
ROUND = ("fgsm", "pgd", "apgd", "square", "fab")  # that have an l2 ball too


@dataclasses.dataclass(frozen=True)
class Attack:
    """One row of a suite.

    Attributes:
      name: the row's name, unique in its suite.
      kind: one of `KINDS`.
      eps: budget in the units of the network's input.
      steps: gradient steps; of "square", queries.
      step_size: None for the attack's default (ifgsm: eps / steps).
      restarts: random restarts (pgd, apgd, fab).
      loss: what rises, one of `LOSSES`. Of "fab", which looks for boundaries, only whether it is targeted counts:
        otherwise each of its steps takes the gradients of all logits.
      norm: of the ball, "linf" or "l2" (fgsm, pgd, apgd, square, fab).
      targets: of a targeted loss: how many wrong classes are tried in turn, the likeliest first.
    """

    name: str
    kind: str
    eps: float = 0.0
    steps: int = 0
    step_size: float | None = None
    restarts: int = 1
    loss: str = "ce"
    norm: str = "linf"
    targets: int = 9

    def gradients(self) -> int:
        """Gradients taken per image, for the progress bar; a clean pass counts as one."""
        return max(1, self.steps) * self.restarts * (self.targets if self.loss in TARGETED else 1)


SUITES: Mapping[str, tuple[Attack, ...]] = {
    "mnist": (
        Attack("clean", "clean"),
        Attack("FGSM 0.3", "fgsm", 0.3, 1),
        Attack("FGSM 0.4", "fgsm", 0.4, 1),
        Attack("IFGSM-10", "ifgsm", 0.3, 10),
        Attack("IFGSM-30", "ifgsm", 0.3, 30),
        Attack("PGD-40", "pgd", 0.3, 40, 0.02),
    ),
    "digits": (
        Attack("clean", "clean"),
        Attack("FGSM 0.2", "fgsm", 0.2, 1),
        Attack("FGSM 0.3", "fgsm", 0.3, 1),
        Attack("IFGSM-10", "ifgsm", 0.2, 10),
        Attack("IFGSM-30", "ifgsm", 0.2, 30),
        Attack("PGD-40", "pgd", 0.2, 40, 0.2 / 15),  # the same share of the ball as in the other suites
    ),
    "svhn": (
        Attack("clean", "clean"),
        Attack("FGSM 24/255", "fgsm", 24 / 255, 1),
        Attack("IFGSM-10", "ifgsm", 24 / 255, 10),
        Attack("IFGSM-20", "ifgsm", 24 / 255, 20),
        Attack("IFGSM-30", "ifgsm", 24 / 255, 30),
        Attack("PGD-40", "pgd", 24 / 255, 40, 2 / 255),
    ),
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one attack did to each example.

    Attributes:
      correct: bool `[N]`, whether the prediction is right.
      prediction: int32 `[N]`, the predicted class.
    """

    correct: np.ndarray
    prediction: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())


def evaluate(
    model: nn.Module,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray,
    suite: Sequence[Attack],
    *,
    transform: Transform,
    num_classes: int,
    batch_size: int = 250,
    seed: int = 0,
    progress: Callable[[str, int], None] = lambda name, gradients: None,
    mesh: Mesh | None = None,
) -> dict[str, Outcome]:
    """Runs each attack of `suite` on every image and keeps what became of it.

    Attacks use hard labels, whatever the model was trained on. The last batch is padded to full size and its padding
    left out of the result, so no image is dropped and nothing is compiled twice. Random numbers belong to the image's
    place in `images`, so the result does not depend on `batch_size`.

    Args:
      model: network to attack.
      params: its variables.
      images: `[N, H, W, C]` as stored, before `transform`.
      labels: `[N]`, integers in `[0, num_classes)`.
      suite: attacks to run, as in `SUITES`.
      transform: from stored images to the network's input.
      num_classes: number of classes K.
      batch_size: images at once.
      seed: seed of the random starts.
      progress: called with an attack's name and the gradients taken per image, times images, since the last call.
      mesh: devices to split batches over that they divide; `params` must lie whole on each of them.

    Returns:
      An `Outcome` for each attack, by name, `[N]`.
    """
    n = len(images)
    batch_size = min(batch_size, n)
    outcomes = {}
    for attack in suite:
        attack_batch = _attack_batch(model, attack, transform, num_classes)
        predictions = []
        for index, rows in batches(n, batch_size):
            batch = distributed.split_batch(mesh, (images[rows], labels[rows], index))
            predictions.append(attack_batch(params, *batch, np.uint32(seed)))
            if len(predictions) > 1:  # one batch behind, so that the device never waits for the host
                predictions[-2].block_until_ready()
            progress(attack.name, min(batch_size, n - int(index[0])) * attack.gradients())
        prediction = np.concatenate([np.asarray(p) for p in predictions])[:n]
        outcomes[attack.name] = Outcome(prediction == labels, prediction)
    return outcomes


def batches(n: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one size over `n` images: their places `[B]`, and their rows, the last of which fills up the last batch."""
    size = min(batch_size, n)
    for first in range(0, n, size):
        index = np.arange(first, first + size)
        yield index, np.minimum(index, n - 1)


@functools.lru_cache(maxsize=32)
def _attack_batch(model: nn.Module, attack: Attack, transform: Transform, num_classes: int) -> Callable[..., jax.Array]:
    """The jitted `(params, images, labels, index, seed) -> predicted classes`, compiled once for all models alike."""
    make = _making(model, attack, transform, num_classes)

    @jit
    def attack_batch(params: Any, *batch: Any) -> jax.Array:
        return networks.logits_fn(model, params)(make(params, *batch)).argmax(-1)

    return attack_batch


def transfer(
    substitute: tuple[nn.Module, Any],
    targets: Sequence[tuple[nn.Module, Any]],
    images: np.ndarray,
    labels: np.ndarray,
    attack: Attack,
    *,
    transform: Transform,
    num_classes: int,
    batch_size: int = 250,
    seed: int = 0,
    progress: Callable[[str, int], None] = lambda name, gradients: None,
) -> list[Outcome]:
    """Black-box attack: images are made for the substitute and shown to the targets (Section 4.1.2, Table 2).

    Args:
      substitute: network that the attack sees, with its variables.
      targets: networks that are asked, with theirs; the substitute may be among them: then that one is a white box.
      images: `[N, H, W, C]` as stored, before `transform`.
      labels: `[N]`, integers in `[0, num_classes)`.
      attack: how the images are made.
      transform: from stored images to the networks' input, the same for all.
      num_classes: number of classes K.
      batch_size: images at once.
      seed: seed of the random starts.
      progress: as of `evaluate`.

    Returns:
      An `Outcome` for each target, `[N]`.
    """
    n = len(images)
    batch_size = min(batch_size, n)
    model, params = substitute
    make, predictions = _make_batch(model, attack, transform, num_classes), []
    for index, rows in batches(n, batch_size):
        made = make(params, images[rows], labels[rows], index, np.uint32(seed))
        predictions.append([_predict(target)(variables, made) for target, variables in targets])
        if len(predictions) > 1:
            jax.block_until_ready(predictions[-2])
        progress(attack.name, min(batch_size, n - int(index[0])) * attack.gradients())
    each = np.concatenate(jax.device_get(predictions), axis=1)[:, :n]
    return [Outcome(prediction == labels, prediction) for prediction in each]


@functools.lru_cache(maxsize=32)
def _make_batch(model: nn.Module, attack: Attack, transform: Transform, num_classes: int) -> Callable[..., jax.Array]:
    """`_making`, jitted."""
    return jit(_making(model, attack, transform, num_classes))


def _making(model: nn.Module, attack: Attack, transform: Transform, num_classes: int) -> Callable[..., jax.Array]:
    """`(params, images, labels, index, seed) -> adversarial network inputs`."""

    def make(params: Any, images: jax.Array, labels: jax.Array, index: jax.Array, seed: jax.Array) -> jax.Array:
        x, y = transform.apply(images), soft_labels(labels, num_classes, 0.0)
        return perturb(attack, networks.logits_fn(model, params), x, y, bounds=transform.bounds, index=index, seed=seed)

    return make


@functools.lru_cache(maxsize=32)
def _predict(model: nn.Module) -> Callable[..., jax.Array]:
    return jit(lambda params, x: networks.logits_fn(model, params)(x).argmax(-1))


def perturb(
    attack: Attack,
    logits_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    y: jax.Array,
    *,
    bounds: tuple[float, float],
    index: jax.Array,
    seed: jax.typing.ArrayLike = 0,
    rank: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """The images that `attack` makes of `x`; of "fab" those that lie within its budget, the others stay as they are.

    Args:
      attack: what to run; its budget may be traced.
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: images `[N, ...]` inside `bounds`.
      y: one-hot labels `[N, K]`.
      bounds: range of valid images.
      index: `[N]`, each image's place in the data set, which its random numbers depend on.
      seed: seed of the random numbers.
      rank: of a targeted loss: try only the wrong class of this rank, 1 for the likeliest; None for all of
        `attack.targets`, of which the first that fools the model is kept.

    Returns:
      `[N, ...]`, as `x`.

    Raises:
      ValueError: if the attack's kind or loss is unknown, or a loss needs more classes.
    """
    check_attack(attack, y.shape[-1], x.ndim)
    if attack.kind == "clean":
        return x
    labels = y.argmax(-1)
    if attack.loss not in TARGETED:
        loss = _loss(attack.loss, logits_fn, y)
        return _perturb(attack, logits_fn, x, labels, None, loss, bounds, index, seed)
    order = jnp.argsort(jnp.where(y > 0, -jnp.inf, logits_fn(x)), axis=-1)  # the label comes first, the likeliest last

    def towards(rank: jax.typing.ArrayLike) -> jax.Array:
        targets = jnp.take(order, -jnp.asarray(rank), axis=-1)

        def loss_fn(z: jax.Array) -> jax.Array:
            return targeted_dlr(logits_fn(z), labels, targets)

        return _perturb(attack, logits_fn, x, labels, targets, loss_fn, bounds, index, seed)

    if rank is not None:
        return towards(rank)

    def next_target(i: int | jax.Array, best: jax.Array) -> jax.Array:
        fooled = logits_fn(best).argmax(-1) != labels
        return jnp.where(fooled.reshape(-1, *[1] * (x.ndim - 1)), best, towards(i + 2))

    return core.repeat(min(attack.targets, y.shape[-1] - 1) - 1, next_target, towards(1))


def check_attack(attack: Attack, num_classes: int, ndim: int) -> None:
    """Makes sure that an attack is possible.

    Args:
      attack: the attack.
      num_classes: of the model.
      ndim: axes of a batch of images.

    Raises:
      ValueError: if not, with the attack's name and what to do.
    """
    name = f"attack {attack.name!r}"
    if attack.kind not in KINDS or attack.loss not in LOSSES:
        raise ValueError(
            f"{name}: kind={attack.kind!r} must be one of {', '.join(KINDS)}, and loss={attack.loss!r} one of "
            f"{', '.join(LOSSES)}"
        )
    if attack.norm != "linf" and attack.kind not in ("clean", *ROUND):
        raise ValueError(f"{name}: norm={attack.norm!r}; {attack.kind} has the l-infinity ball only, leave it out")
    if attack.kind == "square" and ndim != 4:
        raise ValueError(f"{name}: images have {ndim} axes; square needs [N, H, W, C], leave it out for others")
    least = 2 if attack.kind == "fab" else {"targeted_dlr": 4, "dlr": 3}.get(attack.loss, 2)
    if num_classes < least:
        raise ValueError(
            f"{name}: its loss {attack.loss} needs at least {least} classes; the model has {num_classes}: leave it out"
        )


def _loss(name: str, logits_fn: Callable[[jax.Array], jax.Array], y: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """Images to losses `[N]`, to be maximised."""
    labels = y.argmax(-1)
    of_logits = {
        "ce": lambda logits: cross_entropy(logits, y),
        "margin": lambda logits: margin(logits, labels),
        "dlr": lambda logits: dlr(logits, labels),
    }[name]
    return lambda z: of_logits(logits_fn(z))


def _perturb(
    attack: Attack,
    logits_fn: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    labels: jax.Array,
    targets: jax.Array | None,
    loss_fn: Callable[[jax.Array], jax.Array],
    bounds: tuple[float, float],
    index: jax.Array,
    seed: jax.typing.ArrayLike,
) -> jax.Array:
    """`perturb` with a loss, towards `targets` if it is that of some."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(jax.random.key(seed), _streams.EVALUATION), index)
    budget: dict[str, Any] = {"eps": attack.eps, "bounds": bounds}
    ball = {**budget, "norm": attack.norm}
    random: dict[str, Any] = {
        "restarts": attack.restarts,
        "misclassified_fn": lambda z: logits_fn(z).argmax(-1) != labels,
    }
    match attack.kind:
        case "fgsm":
            return attacks.fgsm(loss_fn, x, **ball)
        case "ifgsm":
            return attacks.ifgsm(loss_fn, x, steps=attack.steps, step_size=attack.step_size, **budget)
        case "mi_fgsm":
            return attacks.mi_fgsm(loss_fn, x, steps=attack.steps, step_size=attack.step_size, **budget)
        case "pgd":
            return attacks.pgd(keys, loss_fn, x, steps=attack.steps, step_size=attack.step_size, **random, **ball)
        case "apgd":
            return attacks.apgd(keys, loss_fn, x, steps=attack.steps, **random, **ball)
        case "fab":
            near = attacks.fab(
                logits_fn, x, labels, targets=targets, steps=attack.steps, restarts=attack.restarts, key=keys, **ball
            )
            held = core.ball(attack.norm, x, attack.eps, bounds).contains(core.as_float32(near))
            return jnp.where(core.broadcast(held, x), near, x)
    return attacks.square(keys, lambda z: margin(logits_fn(z), labels), x, queries=attack.steps, **ball)


def worst_case(outcomes: Mapping[str, Outcome]) -> np.ndarray:
    """Per example, whether the prediction is right under every attack, bool `[N]`."""
    return np.all([outcome.correct for outcome in outcomes.values()], axis=0)
