"""Mutation testing: adversarial images lie near a boundary, so small changes of image or model change their prediction."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from e2sad_jax import _arguments
from e2sad_jax.attacks import core, eot
from e2sad_jax.attacks.core import Bounds, LogitsFn

OPERATORS = ("gaussian", "shuffle", "switch", "invert")
TRIES = 20  # mutants drawn for each that `mutants` keeps, at most

Perturb = Callable[[jax.Array, jax.Array], jax.Array]  # keys [N] and images [N, ...] to images [N, ...]
Changed = Callable[[jax.Array, jax.Array], jax.Array]  # key and number of a mutation to bool [N]
_State = tuple[jax.Array, jax.Array, jax.Array]  # decisions, steps and changes, [N] each


def noise(keys: jax.Array, x: jax.Array, *, size: float, bounds: Bounds = (0.0, 1.0)) -> jax.Array:
    """Uniform noise on every pixel: the mutation of images.

    Args:
      keys: random keys `[N]`, one per image.
      x: images `[N, ...]`, floating point, inside `bounds`.
      size: largest change of a pixel, at least 0.
      bounds: range of valid images, or None for no clipping.

    Returns:
      Images, same shape and dtype as `x`. A gradient flows through them, for `attacks.eot`.

    Raises:
      TypeError: if `x` is not floating point.
      ValueError: if `size` or `bounds` is out of range.
    """
    x, eps, _, bounds = core.checks.threat_model("noise", x, eps=size, bounds=bounds)
    ball = core.linf_ball(x, eps, bounds)
    wide = core.as_float32(x)
    moved = wide + eps * ball.sample(core.per_image_keys("noise", keys, len(x)), wide)
    return core.cast_inside(ball.project(moved), x.dtype, ball)


def label_change(key: jax.Array, perturb_fn: Perturb, logits_fn: LogitsFn, x: jax.Array, *, samples: int) -> jax.Array:
    """The share of mutations of an image that change its predicted class: a detector's score.

    Args:
      key: one random key.
      perturb_fn: keys `[N]` and images `[N, ...]` to mutated images, as `functools.partial(noise, size=0.1)`.
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      x: images `[N, ...]`.
      samples: mutations of each image, at least 1. All are computed at once.

    Returns:
      `[N]` in [0, 1].

    Reference: Wang et al., 2018, https://arxiv.org/abs/1805.05010
    """
    label = logits_fn(x).argmax(-1)

    def changed(keys: jax.Array, z: jax.Array) -> jax.Array:
        return (logits_fn(perturb_fn(keys, z)).argmax(-1) != label).astype(jnp.float32)

    return eot(key, changed, samples=samples)(x)


def changed_by_noise(perturb_fn: Perturb, logits_fn: LogitsFn, x: jax.Array) -> Changed:
    """The `changed_fn` of `sprt` for mutations of the images `x` `[N, ...]`; arguments are those of `label_change`."""
    label = logits_fn(x).argmax(-1)

    def changed(key: jax.Array, _: jax.Array) -> jax.Array:
        keys = core.per_image_keys("changed_by_noise", key, len(x))
        return logits_fn(perturb_fn(keys, x)).argmax(-1) != label

    return changed


def changed_by_mutants(
    apply: Callable[[Any, jax.Array], jax.Array], params: Any, mutated: Any, x: jax.Array
) -> Changed:
    """The `changed_fn` of `sprt` for mutations of the model.

    Args:
      apply: parameters and images `[N, ...]` to logits `[N, K]`.
      params: of the model.
      mutated: those of M mutants, stacked, as `mutants` returns them. `sprt` refuses a `limit` above M.
      x: images `[N, ...]`.

    Returns:
      A function of a key, which is not used, and the number of a mutant to bool `[N]`.
    """
    label = apply(params, x).argmax(-1)

    def changed(_: jax.Array, i: jax.Array) -> jax.Array:
        return apply(jax.tree.map(lambda leaf: leaf[i], mutated), x).argmax(-1) != label

    return _OfMutants(changed, len(jax.tree.leaves(mutated)[0]))


@dataclasses.dataclass(frozen=True)
class _OfMutants:
    """A `changed_fn` that knows how many mutants it has: JAX would take the last for every number beyond."""

    changed: Changed
    number: int

    def __call__(self, key: jax.Array, i: jax.Array) -> jax.Array:
        return self.changed(key, i)


def sprt(
    key: jax.Array,
    changed_fn: Changed,
    n: int,
    *,
    rate: float,
    margin: float,
    alpha: float = 0.05,
    beta: float = 0.05,
    limit: int = 500,
) -> tuple[jax.Array, jax.Array]:
    """Wald's sequential probability ratio test of how often mutations change each image's prediction.

    It tests H0: the share is at most p0 = rate - margin, against H1: at least p1 = rate + margin. After n mutations of which
    c changed the prediction the log ratio of the likelihoods is

        c ln(p1 / p0) + (n - c) ln((1 - p1) / (1 - p0))

    An image is adversarial once that is at least ln((1 - beta) / alpha), and normal once it is at most ln(beta / (1 - alpha)).

    Args:
      key: one random key.
      changed_fn: a key and the number of the mutation, from 0, to bool `[n]`: whether it changes each image's prediction.
        `changed_by_noise` and `changed_by_mutants` make one.
      n: number of images.
      rate: share of changes that separates normal from adversarial images, some more than that of held-out images.
      margin: half the width of the range in which either answer is right, below `rate` and 1 - `rate`.
      alpha: share of normal images called adversarial, in (0, 0.5).
      beta: share of adversarial images called normal, in (0, 0.5).
      limit: largest number of mutations, at least 1; of mutants, at most as many as there are.

    Returns:
      Decisions int32 `[n]`: 1 adversarial, 0 normal, -1 undecided at the limit (reject these, and say how many there are).
      And the number of mutations that each took, int32 `[n]`.

    Raises:
      ValueError: if an argument is out of range.

    References: Wald, 1945; Wang et al., 2018, https://arxiv.org/abs/1805.05010; Wang et al., 2019,
    https://arxiv.org/abs/1812.05793
    """
    _arguments.count("sprt: n", n)
    _arguments.count("sprt: limit", limit)
    if isinstance(changed_fn, _OfMutants) and limit > changed_fn.number:
        raise ValueError(
            f"sprt: limit={limit}; there are {changed_fn.number} mutants, so pass limit={changed_fn.number}"
        )
    if not 0 < margin < min(rate, 1 - rate):
        raise ValueError(
            f"sprt: rate={rate}, margin={margin}; rate - margin and rate + margin must lie in (0, 1), apart"
        )
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 < value < 0.5:
            raise ValueError(f"sprt: {name}={value}; it must lie in (0, 0.5)")
    p0, p1 = rate - margin, rate + margin
    of_change, of_none = math.log(p1 / p0), math.log((1 - p1) / (1 - p0))
    upper, lower = math.log((1 - beta) / alpha), math.log(beta / (1 - alpha))

    def test(i: int | jax.Array, state: _State) -> _State:
        decision, steps, changes = state
        open_ = decision < 0
        changes = changes + (open_ & changed_fn(jax.random.fold_in(key, i), jnp.asarray(i))).astype(jnp.int32)
        steps = steps + open_.astype(jnp.int32)
        ratio = changes.astype(jnp.float32) * of_change + (steps - changes).astype(jnp.float32) * of_none
        verdict = jnp.where(ratio >= upper, 1, jnp.where(ratio <= lower, 0, -1))
        return jnp.where(open_, verdict, decision), steps, changes

    zeros = jnp.zeros(n, jnp.int32)
    decision, steps, _ = core.repeat_while(lambda s: (s[0] < 0).any(), limit, test, (zeros - 1, zeros, zeros))
    return decision, steps


def mutate(key: jax.Array, params: Any, *, operator: str, rate: jax.typing.ArrayLike) -> Any:
    """Mutates a network's parameters.

    "gaussian" draws weights anew, from the normal distribution of their layer's mean and standard deviation. "shuffle" permutes
    the weights of a neuron, "switch" the neurons of a layer with their biases, and "invert" negates a neuron's weights and
    bias.

    Args:
      key: one random key.
      params: a pytree. A layer is a weight array `[..., out]` of at least two axes and what lies beside it; vectors `[out]`
        there, as its bias, belong to its neurons. What is no such layer stays as it is.
      operator: one of `OPERATORS`.
      rate: share of weights ("gaussian") or neurons that are mutated, each with that probability, in [0, 1].

    Returns:
      The parameters, a pytree as `params`.

    Raises:
      ValueError: if `operator` is unknown, `rate` is out of range, or there is no layer.

    References: Ma et al., 2018, https://arxiv.org/abs/1805.05206; Wang et al., 2019, https://arxiv.org/abs/1812.05793
    """
    if operator not in OPERATORS:
        raise ValueError(f"mutate: operator={operator!r}; it must be one of {', '.join(OPERATORS)}")
    if core.is_number(rate) and not 0 <= float(rate) <= 1:  # type: ignore[arg-type]
        raise ValueError(f"mutate: rate={rate}; it must lie in [0, 1]")
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves, layers = [jnp.asarray(leaf) for _, leaf in paths], dict[Any, list[int]]()
    for place, (path, _) in enumerate(paths):
        layers.setdefault(path[:-1], []).append(place)
    found = False
    for number, places in enumerate(layers.values()):
        kernels = [place for place in places if leaves[place].ndim >= 2]
        if len(kernels) == 1:
            found, own = True, jax.random.fold_in(key, number)
            size = leaves[kernels[0]].shape[-1]
            vectors = [place for place in places if leaves[place].shape == (size,)]
            mutated = _mutate_layer(own, [leaves[place] for place in (kernels[0], *vectors)], operator, rate)
            for place, leaf in zip((kernels[0], *vectors), mutated, strict=True):
                leaves[place] = leaf
    if not found:
        raise ValueError("mutate: params have no layer; it must hold an array [..., out] of at least two axes")
    return jax.tree.unflatten(tree, leaves)


def _mutate_layer(
    key: jax.Array, layer: Sequence[jax.Array], operator: str, rate: jax.typing.ArrayLike
) -> Sequence[jax.Array]:
    """The weights `[..., out]` and the vectors `[out]` of a layer, mutated."""
    chosen, drawn = jax.random.split(key)
    weights, *vectors = layer
    if operator == "gaussian":
        anew = weights.mean() + weights.std() * jax.random.normal(drawn, weights.shape, weights.dtype)
        return [jnp.where(jax.random.bernoulli(chosen, rate, weights.shape), anew, weights), *vectors]
    size = weights.shape[-1]
    neurons = jax.random.bernoulli(chosen, rate, (size,))
    if operator == "invert":
        return [jnp.where(jnp.broadcast_to(neurons, leaf.shape), -leaf, leaf) for leaf in layer]
    if operator == "shuffle":
        shuffled = jax.random.permutation(drawn, weights.reshape(-1, size), axis=0, independent=True)
        return [jnp.where(jnp.broadcast_to(neurons, weights.shape), shuffled.reshape(weights.shape), weights), *vectors]
    places = jnp.arange(size)
    apart = jnp.where(neurons, 0, size) + places  # the chosen ones first, all in their order
    mixed = jnp.where(neurons, jax.random.uniform(drawn, (size,)), size + places.astype(jnp.float32))
    order = places.at[jnp.argsort(apart)].set(jnp.argsort(mixed))
    return [leaf[..., order] for leaf in layer]


def mutants(
    key: jax.Array,
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    x: jax.Array,
    labels: jax.Array,
    *,
    operator: str,
    rate: float,
    count: int,
    least: float = 0.9,
) -> Any:
    """Mutants of a model that are nearly as accurate as it is.

    Args:
      key: one random key.
      apply: parameters and images `[N, ...]` to logits `[N, K]`.
      params: of the model, as `mutate` takes them.
      x: held-out images `[N, ...]`.
      labels: integer classes, `[N]`.
      operator: one of `OPERATORS`.
      rate: as of `mutate`. The authors take 0.05 on MNIST and 0.005 on CIFAR-10.
      count: number of mutants, at least 1.
      least: share of the model's accuracy on `x` that a mutant must have.

    Returns:
      Parameters of `count` mutants, a pytree as `params` with a leading axis `[count, ...]`.

    Raises:
      ValueError: if an argument is out of range, or too few mutants are accurate enough.

    Reference: Wang et al., 2019, https://arxiv.org/abs/1812.05793
    """
    _arguments.count("mutants: count", count)

    def accuracy(params: Any) -> jax.Array:
        return (apply(params, x).argmax(-1) == labels).mean()

    @jax.jit
    def draw(params: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        mutant = mutate(jax.random.fold_in(key, i), params, operator=operator, rate=rate)
        return mutant, accuracy(mutant) >= least * accuracy(params)

    kept: list[Any] = []
    for i in range(TRIES * count):
        mutant, good = draw(params, jnp.int32(i))
        kept += [mutant] if good else []
        if len(kept) == count:
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)
    raise ValueError(
        f"mutants: {len(kept)} of {TRIES * count} mutants have at least {least} of the model's accuracy, {count} are asked "
        f"for; lower rate={rate}"
    )
