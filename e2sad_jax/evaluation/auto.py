"""The strongest attacks here one after the other, each on what the ones before left standing: AutoAttack's protocol."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax._compile import jit
from e2sad_jax.evaluation.evaluator import TARGETED, Attack, batches, check_attack, perturb

Apply = Callable[[Any, jax.Array], jax.Array]  # (params, images [N, ...]) -> logits [N, K]

# Croce & Hein's standard version but for FAB, which in their Table 2 hardly ever lowers what the other three leave.
STAGES = (
    Attack("APGD-CE", "apgd", steps=100),
    Attack("APGD-T", "apgd", steps=100, loss="targeted_dlr", targets=9),
    Attack("Square", "square", steps=5000),
)
FAB = Attack("FAB-T", "fab", steps=100, loss="targeted_dlr", targets=9)  # to be added to them


@dataclasses.dataclass(frozen=True)
class AutoResult:
    """What became of each image.

    Attributes:
      standing: by stage, "clean" first: bool `[N]`, whether the prediction is right after it and all before it.
      alone: by stage: how many of the images that it was shown it fooled.
      adversarial: `[N, ...]`, the image that fools the model; where none was found, the clean one. None unless kept.
    """

    standing: Mapping[str, np.ndarray]
    alone: Mapping[str, int]
    adversarial: np.ndarray | None

    @property
    def robust(self) -> np.ndarray:
        """Whether no attack changed the prediction, bool `[N]`."""
        return list(self.standing.values())[-1]

    @property
    def accuracy(self) -> dict[str, float]:
        """Accuracy after each stage; the last is the robust accuracy."""
        return {name: float(correct.mean()) for name, correct in self.standing.items()}


def auto(
    apply: Apply,
    params: Any,
    x: np.ndarray,
    labels: np.ndarray,
    *,
    eps: float,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    stages: Sequence[Attack] = STAGES,
    batch_size: int = 250,
    seed: int = 0,
    keep: bool = False,
    progress: Callable[[str, int], None] = lambda name, images: None,
) -> AutoResult:
    """The worst case per image over several strong attacks (AutoAttack).

    APGD on the cross-entropy, APGD on the targeted DLR loss towards the nine likeliest wrong classes in turn, and Square,
    which sees no gradient. What has fallen is not attacked again: the images that stand are gathered into full batches,
    so each stage is compiled once and its cost falls with them. `FAB` is the one of AutoAttack's that is left out.

    Args:
      apply: parameters and images `[N, ...]` to logits `[N, K]`.
      params: passed on to `apply`.
      x: images as `apply` takes them, `[N, ...]`, float32, inside `bounds`.
      labels: `[N]`, integers in `[0, K)`.
      eps: budget in the images' own units, at least 0.
      norm: "linf" or "l2".
      bounds: range of valid images.
      stages: attacks in their order; their own `eps` and `norm` are not looked at.
      batch_size: images at once.
      seed: seed of the random numbers, which belong to the image's place in `x`.
      keep: whether to return the adversarial images.
      progress: called with a stage's name and how many images it has dealt with since the last call.

    Returns:
      An `AutoResult`.

    Raises:
      ValueError: if the shapes do not fit, or a stage is not possible (its loss needs more classes, Square
        images `[N, H, W, C]`); before anything is attacked.

    Reference: Croce & Hein, 2020, https://arxiv.org/abs/2003.01690
    """
    n = len(x)
    if labels.shape != (n,) or n == 0:
        raise ValueError(f"auto: labels {labels.shape} must be one for each of {n} images, of which there must be some")
    classes = jax.eval_shape(apply, params, jax.ShapeDtypeStruct((1, *x.shape[1:]), jnp.float32)).shape[-1]
    for stage in stages:
        check_attack(dataclasses.replace(stage, norm=norm), classes, x.ndim)
    names = ["clean", *(stage.name for stage in stages)]
    if len(set(names)) < len(names):
        raise ValueError(
            f"auto: stages are named {', '.join(names[1:])}; each needs a name of its own, none of them clean"
        )
    batch_size = min(batch_size, n)
    standing = predict(apply, params, x, batch_size) == labels
    history, alone = {"clean": standing.copy()}, {}
    found = np.array(x) if keep else None
    for stage in stages:
        run = attack_fn(apply, dataclasses.replace(stage, norm=norm), bounds)
        before = int(standing.sum())
        ranks = range(1, min(stage.targets, classes - 1) + 1) if stage.loss in TARGETED else (0,)
        for rank in ranks:
            rows = np.flatnonzero(standing)
            for first in range(0, len(rows), batch_size):
                some = rows[first : first + batch_size]
                full = np.resize(some, batch_size)  # a last batch is filled up with its own images
                made, prediction = run(params, x[full], labels[full], full, np.uint32(seed), np.float32(eps), rank)
                fallen = np.asarray(prediction)[: len(some)] != labels[some]
                standing[some[fallen]] = False
                if found is not None:
                    found[some[fallen]] = np.asarray(made)[: len(some)][fallen]
                progress(stage.name, len(some) if rank == ranks[-1] else int(fallen.sum()))
        history[stage.name], alone[stage.name] = standing.copy(), before - int(standing.sum())
    return AutoResult(history, alone, found)


def predict(apply: Apply, params: Any, x: np.ndarray, batch_size: int) -> np.ndarray:
    """Predicted classes, int `[N]`."""
    of_batch = _predict(apply)
    parts = [np.asarray(of_batch(params, x[rows])) for _, rows in batches(len(x), batch_size)]
    return np.concatenate(parts)[: len(x)]


@functools.lru_cache(maxsize=32)
def _predict(apply: Apply) -> Callable[..., jax.Array]:
    return jit(lambda params, x: classes_of(apply(params, x)))  # type: ignore[no-any-return]


def classes_of(logits: jax.Array) -> jax.Array:
    """The predicted classes `[N]`; -1, which is never right, where a logit is NaN."""
    return jnp.where(jnp.isnan(logits).any(-1), -1, logits.argmax(-1))


def attack_fn(apply: Apply, attack: Attack, bounds: tuple[float, float]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The jitted `(params, x, labels, index, seed, eps, rank) -> (images, predicted classes)`.

    Budgets are arguments, so one program serves all of them; `rank` is that of a targeted loss, or None (`perturb`).
    """
    return _attack_fn(apply, dataclasses.replace(attack, name="", eps=0.0), bounds)


@functools.lru_cache(maxsize=64)
def _attack_fn(apply: Apply, attack: Attack, bounds: tuple[float, float]) -> Callable[..., Any]:
    @jit
    def run(
        params: Any,
        x: jax.Array,
        labels: jax.Array,
        index: jax.Array,
        seed: jax.Array,
        eps: jax.Array,
        rank: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        def logits_fn(z: jax.Array) -> jax.Array:
            return apply(params, z)

        y = jax.nn.one_hot(labels, jax.eval_shape(logits_fn, x).shape[-1])
        budget: Any = dataclasses.replace(attack, eps=eps)  # type: ignore[arg-type]  # traced
        made = perturb(budget, logits_fn, x, y, bounds=bounds, index=index, seed=seed, rank=rank)
        return made, classes_of(logits_fn(made))

    return run  # type: ignore[no-any-return]
