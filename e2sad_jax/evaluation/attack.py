"""One row of a suite of attacks, and the suites that training commands evaluate with."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import _arguments, _streams, attacks
from e2sad_jax.evaluation._entrance import Bounds, as_budget, classes_in
from e2sad_jax.losses import cross_entropy, dlr, margin, soft_labels, targeted_dlr

CLEAN = "clean"  # the kind of a row that attacks nothing
LOSSES = ("ce", "margin", "dlr", "targeted_dlr")  # cross-entropy, Carlini-Wagner's margin, difference of logits ratio
MIN_CLASSES = {"dlr": 3, "targeted_dlr": 4}  # of other losses 2
QUERIES_PER_GRADIENT = 3  # what a query of a score-based attack costs, for progress bars


@dataclasses.dataclass(frozen=True)
class Attack:
    """One row of a suite: an attack of `attacks.ATTACKS` with its settings.

    Attributes:
      name: the row's name, unique in its suite.
      kind: "clean" for no attack, or a key of `attacks.ATTACKS`, to which `attacks.register` adds attacks of your own.
      eps: budget in the units of the network's input, at least 0; in the l0 ball the number of pixels.
      steps: gradient steps, or queries of a score-based attack; 0 for the attack's default, if it has one. An attack without
        a number of steps takes 0 or 1.
      step_size: length of a step; None for the attack's default.
      restarts: number of random restarts.
      loss: what the attack raises, "ce", "margin", "dlr" or "targeted_dlr". A score-based attack always lowers the margin.
        A minimum-norm attack reads only whether the loss is targeted.
      norm: of the ball, "linf", "l2" or "l0".
      targets: with a targeted loss, the number of wrong classes that are tried in turn, the likeliest first.

    Raises:
      ValueError: if `eps` or `step_size` is no number or out of range; a traced one is not checked.
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

    def __post_init__(self) -> None:
        name = f"attack {self.name!r}"  # NumPy's and JAX's numbers become Python's, which can be hashed and stored
        for count in ("steps", "restarts", "targets"):
            if isinstance(value := getattr(self, count), np.integer):
                object.__setattr__(self, count, int(value))
        if not isinstance(self.eps, jax.core.Tracer):
            object.__setattr__(self, "eps", as_budget(name, self.eps))
        if self.step_size is not None and not isinstance(self.step_size, jax.core.Tracer):
            size = as_budget(name, self.step_size, argument="step_size", positive=True)
            object.__setattr__(self, "step_size", size)

    @property
    def targeted(self) -> bool:
        """Whether the attack tries several wrong classes, one after the other."""
        return self.kind != CLEAN and self.loss == "targeted_dlr"

    def ranks(self, num_classes: int) -> range:
        """The ranks of the wrong classes to try, 1 for the likeliest; 1 alone for an untargeted loss."""
        return range(1, 1 + (min(self.targets, num_classes - 1) if self.targeted else 1))

    def gradients(self, num_classes: int | None = None) -> int:
        """The number of gradients that the attack takes per image, for progress bars.

        A clean pass counts as one gradient, and so do three queries.

        Args:
          num_classes: of the model; None if it has more than `targets`.
        """
        ranks = len(self.ranks(self.targets + 1 if num_classes is None else num_classes))
        method = attacks.ATTACKS.get(self.kind)
        queries = QUERIES_PER_GRADIENT if method is not None and method.family == "score-based" else 1
        return max(1, self._of_a_restart // queries) * self.restarts * ranks

    @property
    def passes(self) -> int:
        """How often the model is asked about an image, of a targeted attack for each target: gradient steps or queries."""
        return max(1, self._of_a_restart) * self.restarts

    @property
    def _of_a_restart(self) -> int:
        method = attacks.ATTACKS.get(self.kind)
        return self.steps if method is None else method.passes(self.steps)

    def check(self, num_classes: int, ndim: int) -> None:
        """Raises an error if the attack cannot run on such images and classes.

        Args:
          num_classes: of the model.
          ndim: number of axes of a batch of images.

        Raises:
          ValueError: with the attack's name, the value and what to change.
        """
        name = f"attack {self.name!r}"
        if self.kind == CLEAN:
            return
        if self.kind not in attacks.ATTACKS:
            raise ValueError(f"{name}: kind={self.kind!r}; it must be one of {', '.join((CLEAN, *attacks.ATTACKS))}")
        if self.loss not in LOSSES:
            raise ValueError(f"{name}: loss={self.loss!r}; it must be one of {', '.join(LOSSES)}")
        method = attacks.ATTACKS[self.kind]
        if self.targeted:
            _arguments.count(f"{name}: targets", self.targets)
        _arguments.count(f"{name}: restarts", self.restarts)
        _arguments.count(f"{name}: steps", self.steps, least=1 if _needs_steps(method) else 0)
        if self.steps > 1 and not method.counts:
            raise ValueError(f"{name}: steps={self.steps}; {self.kind} has no number of steps to choose, leave it out")
        method.check(name, norm=self.norm, restarts=self.restarts, step_size=self.step_size, ndim=ndim)
        if self.targeted and method.family != "gradient" and "targets" not in method.parameters:
            raise ValueError(f"{name}: loss={self.loss!r}; {self.kind} has no targets to walk to, leave the loss out")
        least = 2 if method.family == "minimum-norm" else MIN_CLASSES.get(self.loss, 2)
        if num_classes < least:
            raise ValueError(
                f"{name}: its loss {self.loss} needs at least {least} classes; the model has {num_classes}: leave it out "
                "(auto: stages=)"
            )

    def perturb(
        self,
        logits_fn: Callable[[jax.Array], jax.Array],
        x: jax.Array,
        labels: jax.Array,
        *,
        bounds: Bounds,
        index: jax.Array,
        seed: jax.typing.ArrayLike = 0,
        rank: jax.typing.ArrayLike = 1,
        constraint_fn: Callable[[jax.Array], jax.Array] | None = None,
    ) -> jax.Array:
        """Attacks `x` and returns adversarial images; for use inside `jit`.

        Args:
          logits_fn: images `[N, ...]` to logits `[N, K]`.
          x: images `[N, ...]` inside `bounds`.
          labels: integer classes, `[N]`.
          bounds: range of valid images: two numbers, or arrays that broadcast against one image.
          index: `[N]`, each image's place in the data set: its random numbers depend on nothing else but the seed.
          seed: seed of the random numbers.
          rank: with a targeted loss, the wrong class to walk to, 1 for the likeliest. `evaluate` tries all in turn.
          constraint_fn: images to `[N]`, above 0 where the model rejects an image, as `attacks.Method.run` takes it.

        Returns:
          `[N, ...]`, as `x`. A minimum-norm attack that finds nothing within `eps` leaves the image as it is.

        Raises:
          ValueError: as `check`.
        """
        num_classes = classes_in(jax.eval_shape(lambda z: logits_fn(z), x), len(x))
        self.check(num_classes, x.ndim)
        if self.kind == CLEAN:
            return x
        targets = None
        of_logits: Callable[[jax.Array], jax.Array]
        if self.targeted:
            true = jax.nn.one_hot(labels, num_classes, dtype=bool)
            logits = logits_fn(x)
            masked = jnp.maximum(logits, jnp.finfo(logits.dtype).min)  # classes that cannot be, still after the label
            order = jnp.argsort(jnp.where(true, -jnp.inf, masked), axis=-1)  # the label first, the likeliest last
            targets = chosen = jnp.take(order, -jnp.asarray(rank), axis=-1)

            def of_logits(logits: jax.Array) -> jax.Array:
                return targeted_dlr(logits, labels, chosen)

        else:
            of_logits = {
                "ce": lambda logits: cross_entropy(logits, soft_labels(labels, num_classes, 0)),
                "margin": lambda logits: margin(logits, labels),
                "dlr": lambda logits: dlr(logits, labels),
            }[self.loss]
        return attacks.ATTACKS[self.kind].run(
            logits_fn,
            x,
            labels,
            key=_streams_of(seed, index),
            eps=self.eps,
            steps=self.steps or None,
            loss_fn=lambda z: of_logits(logits_fn(z)),
            targets=targets,
            constraint_fn=constraint_fn,
            step_size=self.step_size,
            restarts=self.restarts,
            norm=self.norm,
            bounds=bounds,
        )


def _streams_of(seed: jax.typing.ArrayLike, index: jax.Array) -> jax.Array:
    """A key for each image, from its place in the data set."""
    return jax.vmap(jax.random.fold_in, (None, 0))(_streams.key(seed, _streams.EVALUATION), index)


def _needs_steps(method: attacks.Method) -> bool:
    parameters: Mapping[str, Any] = inspect.signature(method.function).parameters
    return bool(method.counts) and parameters[method.counts].default is inspect.Parameter.empty


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
    "cifar10": (
        Attack("clean", "clean"),
        Attack("FGSM 8/255", "fgsm", 8 / 255, 1),
        Attack("IFGSM-10", "ifgsm", 8 / 255, 10),
        Attack("PGD-10", "pgd", 8 / 255, 10, 2 / 255),
        Attack("PGD-50", "pgd", 8 / 255, 50, 2 / 255),
    ),
}
