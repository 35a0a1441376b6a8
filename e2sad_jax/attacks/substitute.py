"""The practical black box: a substitute trained on a model's answers, to be attacked in its place."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from e2sad_jax import _arguments, losses
from e2sad_jax.attacks import _checks
from e2sad_jax.attacks._ball import linf_ball, project_and_cast
from e2sad_jax.attacks._numerics import as_float32, finite, input_gradient, threefry
from e2sad_jax.attacks._types import Bounds, LogitsFn


class Substitute(NamedTuple):
    """A substitute, and what it has cost.

    Attributes:
      params: its parameters.
      images: all that the oracle was asked, `[queries, ...]`.
      labels: the oracle's answers, `[queries]`, int32.
      queries: how many images the oracle was asked.
      agreement: share of `images` that the substitute puts in the oracle's class. It was trained on them: on other images it
        agrees less.
    """

    params: Any
    images: jax.Array
    labels: jax.Array
    queries: int
    agreement: float


def augment(
    logits_fn: LogitsFn, x: jax.Array, labels: jax.Array, *, step: jax.typing.ArrayLike, bounds: Bounds = (0.0, 1.0)
) -> jax.Array:
    """Jacobian-based augmentation: for each image a new one, where the substitute's output for its class changes fastest.

    x + step sign(grad_x z_y(x)), with y the oracle's class and z the substitute's logits.

    Args:
      logits_fn: the substitute, images `[N, ...]` to logits `[N, K]`.
      x: images `[N, ...]`, floating point, inside `bounds`.
      labels: the oracle's classes, `[N]`, integers; not the substitute's own predictions.
      step: lambda, in the images' own units; negative to go down.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Images of the shape and dtype of `x`; no gradient flows through them.

    Raises:
      TypeError: if `x` is not floating point, or `labels` are not integers.
      ValueError: if an argument is out of range, or the logits are not `[N, K]`.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[0.5, 0.95]])
    >>> print(augment(lambda z: z @ jnp.array([[1.0, 0.0], [2.0, 0.0]]), x, jnp.array([0]), step=0.1))
    [[0.6 1. ]]

    Reference: Papernot et al., 2017, https://arxiv.org/abs/1602.02697
    """
    _checks.number("augment", "step", abs(step))
    x, size, _, bounds = _checks.threat_model("augment", x, eps=abs(step), bounds=bounds)
    if not len(x):
        return x

    def own_logit(z: jax.Array) -> jax.Array:
        logits = as_float32(_checks.logits("augment", logits_fn(z), len(x)))
        own = _checks.classes("augment", "labels", labels, *logits.shape)
        return jnp.take_along_axis(logits, own[:, None], 1, mode="clip")[:, 0]

    gradient = finite(as_float32(input_gradient(own_logit, x)))
    return project_and_cast(linf_ball(x, size, bounds), as_float32(x) + step * jnp.sign(gradient), x.dtype)


def substitute(
    key: jax.Array,
    oracle_fn: Callable[[jax.Array], Any],
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    x: jax.Array,
    *,
    rounds: int = 6,
    epochs: int = 10,
    step: float = 0.1,
    period: int = 3,
    reservoir: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    batch_size: int = 128,
    bounds: Bounds = (0.0, 1.0),
) -> Substitute:
    """Trains a substitute of a model that only says classes; an adversarial image of it often fools the model too.

    Each round labels the new images by the oracle, trains the substitute on all there are, from where it was, and then adds
    `augment`'s image of each, with lambda = step (-1)^floor(round / period). The last round adds none. So N images become
    N 2^(rounds - 1), each asked once.

    Then attack `lambda z: apply(result.params, z)` by any attack, and show the images to the model: `evaluation.transfer`
    counts. Evaluate on other images than `x`, with several keys: results differ much between them. It does not run under `jit`
    or `vmap`: it calls the oracle, and compiles its training itself.

    Args:
      key: a random key.
      oracle_fn: images `[M, ...]` to integer classes `[M]`. Any Python function, of a remote service for example; it is
        called once a round, outside of `jit`.
      apply: the substitute, parameters and images `[N, ...]` to logits `[N, K]`.
      params: its initial parameters, a pytree.
      x: images to start from, `[N, ...]`, floating point, inside `bounds`.
      rounds: number of trainings, at least 1.
      epochs: passes of each over the images so far, at least 1.
      step: lambda of the augmentation, at least 0, in the images' own units.
      period: rounds after which lambda changes its sign, at least 1.
      reservoir: at most so many new images a round: those of a random sample. None: one of each image.
      optimizer: of Optax; its state is kept from round to round. None: Adam, 1e-3.
      batch_size: images a training step, at least 1.
      bounds: range of valid images, or None for no clipping.

    Returns:
      The trained `Substitute`.

    Raises:
      TypeError: if `x` is not floating point, `key` is no random key, or the oracle's classes are no integers.
      ValueError: if an argument is out of range, or the oracle does not return one class of the substitute's for each image.

    >>> import jax, jax.numpy as jnp, optax
    >>> x = jnp.array([[0.1, 0.9], [0.2, 0.4], [0.8, 0.3], [0.9, 0.8]])
    >>> oracle = lambda images: [int(a > b) for a, b in images]  # asks nothing but classes
    >>> apply, params = lambda w, z: z @ w, jnp.zeros((2, 2))
    >>> result = substitute(jax.random.key(0), oracle, apply, params, x, rounds=3, optimizer=optax.sgd(1.0))
    >>> print(result.queries, result.agreement)
    16 1.0

    Reference: Papernot et al., 2017, https://arxiv.org/abs/1602.02697 (Algorithms 1 and 2); periodic step and reservoir:
    https://arxiv.org/abs/1605.07277
    """
    x, *_ = _checks.threat_model(
        "substitute",
        x,
        bounds=bounds,
        rounds=rounds,
        epochs=epochs,
        period=period,
        batch_size=batch_size,
        reservoir=1 if reservoir is None else reservoir,
    )
    _checks.number("substitute", "step", step)
    if not len(x):
        raise ValueError(f"substitute: images have shape {x.shape}; it needs at least one")
    tx = optax.adam(1e-3) if optimizer is None else optimizer
    rng = np.random.default_rng(np.asarray(jax.random.key_data(threefry("substitute", key))))
    num_classes = _arguments.logits("substitute", jax.eval_shape(apply, params, x), len(x)).shape[1]

    @jax.jit
    def train_step(params: Any, state: Any, batch: jax.Array, y: jax.Array, there: jax.Array) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return (losses.cross_entropy(apply(params, batch), losses.soft_labels(y, num_classes, 0)) * there).mean()

        gradient = jax.grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def look(params: Any, batch: jax.Array, y: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
        def own(z: jax.Array) -> jax.Array:
            return apply(params, z)

        return augment(own, batch, y, step=size, bounds=bounds), own(batch).argmax(-1)

    def ask(images: jax.Array) -> np.ndarray:
        answers = _arguments.classes("substitute", "the oracle's answers", oracle_fn(images), len(images), num_classes)
        return np.asarray(answers, np.int32)

    def batch(images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Always of one size, so that each program is compiled once: the rows are repeated to fill it up."""
        full = np.resize(rows, batch_size)
        return jnp.asarray(images[full]), jnp.asarray(labels[full])

    def looked(params: Any, images: np.ndarray, labels: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
        """The new image of each, and the substitute's class of each."""
        parts = [
            look(params, *batch(images, labels, rows), size) for rows in _split(np.arange(len(images)), batch_size)
        ]
        new, found = (np.concatenate([np.asarray(part[i]) for part in parts])[: len(images)] for i in range(2))
        return new, found

    images, state = np.asarray(x), tx.init(params)
    labels = ask(x)
    for round in range(rounds):
        for _ in range(epochs):
            for rows in _split(rng.permutation(len(images)), batch_size):
                there = (np.arange(batch_size) < len(rows)) * np.float32(batch_size / len(rows))
                params, state = train_step(params, state, *batch(images, labels, rows), there)
        if round + 1 == rounds:
            break
        chosen = np.arange(len(images))
        if reservoir is not None and reservoir < len(images):
            chosen = np.sort(rng.choice(len(images), reservoir, replace=False))
        new, _ = looked(params, images[chosen], labels[chosen], step * (-1) ** (round // period))
        images, labels = np.concatenate([images, new]), np.concatenate([labels, ask(jnp.asarray(new))])
    _, found = looked(params, images, labels, step)
    return Substitute(params, jnp.asarray(images), jnp.asarray(labels), len(images), float(np.mean(found == labels)))


def _split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts rows into parts of a size; the last may be shorter."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]
