"""An entry of `ATTACKS`: an attack and what a suite needs to run it."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from e2sad_jax import losses
from e2sad_jax.attacks import _checks
from e2sad_jax.attacks._ball import NORMS, L0Ball, ball
from e2sad_jax.attacks._numerics import as_float32, select
from e2sad_jax.attacks._types import Bounds, LogitsFn, LossFn
from e2sad_jax.attacks.adaptive import evading

BALLS = (*NORMS, "l0")
FAMILIES = ("gradient", "score-based", "minimum-norm")
SCORE = ("score_fn", "threshold")  # of a detector, for attacks that take the former
GIVEN = (
    *("key", "loss_fn", "margin_fn", "misclassified_fn", "logits_fn", "x", "labels", "targets"),
    *("constraint_fn", *SCORE, "any_wrong", "eps", "pixels"),
    *("steps", "queries", "step_size", "restarts", "norm", "bounds"),
)


@dataclasses.dataclass(frozen=True)
class Method:
    """An attack that a suite runs by name.

    `run` passes to `function` those of the following that its signature names, by keyword: `key` (keys `[N]`), `loss_fn`,
    `margin_fn`, `misclassified_fn` (images to values `[N]`), `logits_fn`, `x`, `labels`, `targets`, `constraint_fn`,
    `score_fn` with its `threshold` (the constraint and 0; `loss_fn` and `misclassified_fn` are then without it),
    `any_wrong` (True: a suite counts every wrong class), `eps` or its whole part as `pixels`, `steps` or `queries`,
    `step_size`, `restarts`, `norm`, `bounds`. A parameter of another name needs a default.

    Attributes:
      function: returns images of the shape and dtype of `x`.
      family: "gradient", "score-based" (it needs no gradient), or "minimum-norm" (it looks for the smallest change; `run`
        keeps what lies within `eps`).
      norms: the balls that it supports, of "linf", "l2" and "l0", in which `eps` is a number of pixels.
      ndim: number of axes that a batch of images must have; None for any.

    Raises:
      ValueError: if `family` or `norms` is unknown, or `function` needs an argument of another name.
    """

    function: Callable[..., jax.Array]
    family: str
    norms: tuple[str, ...] = ("linf",)
    ndim: int | None = None

    def __post_init__(self) -> None:
        name = getattr(self.function, "__name__", repr(self.function))
        if self.family not in FAMILIES:
            raise ValueError(f"{name}: family={self.family!r}; it must be one of {', '.join(FAMILIES)}")
        if not self.norms or not set(self.norms) <= set(BALLS):
            raise ValueError(f"{name}: norms={self.norms}; it must be some of {', '.join(BALLS)}")
        for parameter in inspect.signature(self.function).parameters.values():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if not variadic and parameter.default is parameter.empty and parameter.name not in GIVEN:
                raise ValueError(
                    f"{name}: its argument {parameter.name!r} is none that a suite can give ({', '.join(GIVEN)}); "
                    f"give it a default"
                )

    @property
    def parameters(self) -> frozenset[str]:
        """The names of `function`'s parameters that `run` passes."""
        named = frozenset(inspect.signature(self.function).parameters)
        return named & frozenset(GIVEN) - (frozenset() if "score_fn" in named else frozenset(SCORE))

    @property
    def counts(self) -> str:
        """The name of its number of steps, "steps" or "queries"; empty if there is none to choose."""
        return next(iter({"steps", "queries"} & self.parameters), "")

    def passes(self, steps: int = 0) -> int:
        """How often the model is asked about an image, for progress bars; a step of each candidate or search counts once.

        Args:
          steps: gradient steps, queries or generations; 0 for the attack's default.
        """
        parameters = inspect.signature(self.function).parameters
        counted = {name: p.default for name, p in parameters.items() if isinstance(p.default, int)}
        each = [counted.get(name, 1) for name in ("population", "binary_steps")]
        return math.prod([max(1, steps or counted.get(self.counts, 1)), *each])

    @property
    def random(self) -> bool:
        """Whether the attack draws random numbers."""
        return "key" in self.parameters

    def check(
        self,
        name: str,
        *,
        norm: str = "linf",
        restarts: int = 1,
        step_size: object | None = None,
        ndim: int | None = None,
    ) -> None:
        """Refuses settings that the attack does not support.

        Args:
          name: the attack's name in the messages.
          norm: of the ball.
          restarts: number of random starts.
          step_size: length of a step, or None.
          ndim: number of axes of a batch of images, or None if it is not known.

        Raises:
          ValueError: with the attack's name, the value, and what to change.
        """
        if norm not in self.norms:
            raise ValueError(f"{name}: norm={norm!r}; it must be {' or '.join(self.norms)}")
        if restarts != 1 and "restarts" not in self.parameters:
            raise ValueError(f"{name}: restarts={restarts}; it has no random restarts, leave them out")
        if step_size is not None and "step_size" not in self.parameters:
            raise ValueError(f"{name}: step_size={step_size}; it has no step size to choose, leave it out")
        if ndim is not None and self.ndim not in (None, ndim):
            raise ValueError(f"{name}: images have {ndim} axes; it needs {self.ndim}: leave it out (auto: stages=)")

    def run(
        self,
        logits_fn: LogitsFn,
        x: jax.Array,
        labels: jax.Array,
        *,
        key: jax.Array,
        eps: jax.typing.ArrayLike,
        steps: int | None = None,
        loss_fn: LossFn | None = None,
        targets: jax.Array | None = None,
        constraint_fn: LossFn | None = None,
        step_size: jax.typing.ArrayLike | None = None,
        restarts: int = 1,
        norm: str = "linf",
        bounds: Bounds = (0.0, 1.0),
    ) -> jax.Array:
        """Attacks `x` within `eps`, with the arguments that the attack's signature names.

        Args:
          logits_fn: images `[N, ...]` to logits `[N, K]`.
          x: images `[N, ...]`, floating point, inside `bounds`.
          labels: integer classes, `[N]`. Where they are traced, one out of range makes its image NaN.
          key: one random key, or keys `[N]`, one per image.
          eps: budget in `norm`, at least 0; it may be traced, unless the attack needs `pixels`.
          steps: number of gradient steps, or queries of a score-based attack; None for the attack's default.
          loss_fn: images to losses `[N]`, to be maximised; None for `losses.margin`. Score-based attacks see the margin.
          targets: integer classes to walk to, `[N]`, for minimum-norm attacks that take them; or None.
          constraint_fn: images to `[N]`, above 0 where the model rejects an image; None if it rejects none. Then
            `misclassified_fn` is True, and `margin_fn` above 0, only for images that are not rejected, and `loss_fn` is
            lower by what the constraint has above 0. An attack that takes `score_fn` is given `loss_fn` and
            `misclassified_fn` without it. Of the minimum-norm attacks `carlini_wagner` alone knows it.
          step_size: length of a step; None for the attack's default.
          restarts: number of random starts, at least 1.
          norm: one of `norms`.
          bounds: image range, or None.

        Returns:
          Images, same shape and dtype as `x`, within `eps` of it. A minimum-norm attack that finds nothing within `eps`
          leaves the image as it is.

        Raises:
          ValueError: if the attack does not support a setting, or refuses it.
        """
        name = getattr(self.function, "__name__", repr(self.function))
        x, shape = _checks.images(name, x), jax.eval_shape(lambda z: logits_fn(z), x)
        num_classes = _checks.logits(name, shape, len(x)).shape[1]
        leave, targets = _checks.aims(name, labels, targets, len(x), num_classes)
        assert leave is not None
        labels = leave
        self.check(name, norm=norm, restarts=restarts, step_size=step_size, ndim=x.ndim)

        # An attack that asks for the detector's score weighs it by itself.
        constraint = None if "score_fn" in self.parameters else constraint_fn

        def margin(z: jax.Array) -> jax.Array:
            lead = losses.margin(logits_fn(z), labels)
            return lead if constraint is None else jnp.minimum(lead, -as_float32(constraint(z)))

        def misclassified(z: jax.Array) -> jax.Array:  # NaN is no right answer
            logits = logits_fn(z)
            wrong = (logits.argmax(-1) != labels) | jnp.isnan(logits).any(-1)
            return wrong if constraint is None else wrong & ~(constraint(z) > 0)

        def accepted(z: jax.Array) -> jax.Array:
            return jnp.full(len(z), -1.0)

        if constraint is not None and loss_fn is not None:
            loss_fn = evading(loss_fn, constraint, 0.0, weight=1.0)

        given: dict[str, Any] = {
            "key": key,
            "loss_fn": margin if loss_fn is None or self.family == "score-based" else loss_fn,
            "margin_fn": margin,
            "misclassified_fn": misclassified,
            "logits_fn": logits_fn,
            "x": x,
            "labels": labels,
            "targets": targets,
            "constraint_fn": constraint_fn,
            "score_fn": accepted if constraint_fn is None else constraint_fn,
            "threshold": 0.0,
            "any_wrong": True,
            "eps": eps,
            "pixels": self._pixels(name, eps),
            "steps": steps,
            "queries": steps,
            "step_size": step_size,
            "restarts": restarts,
            "norm": norm,
        }
        arguments = {name: given[name] for name in self.parameters & set(given) if given[name] is not None}
        if "bounds" in self.parameters:  # where None is a value
            arguments["bounds"] = bounds
        found = self.function(**arguments)
        if self.family != "minimum-norm":
            return _checks.nan_without_class(found, num_classes, labels, targets)
        x, eps, _, bounds = _checks.threat_model(name, x, eps=eps, norm=norm, norms=BALLS, bounds=bounds)
        limits = L0Ball(as_float32(x), eps, bounds) if norm == "l0" else ball(norm, x, eps, bounds)
        inside = limits.contains(as_float32(found))
        kept = _checks.nan_without_class(select(inside, found, x), num_classes, labels, targets)
        return jax.lax.stop_gradient(kept)

    def _pixels(self, name: str, eps: jax.typing.ArrayLike) -> int | None:
        """The number of pixels within `eps`; None for the attack's default, where all that is found is measured anyway."""
        if "pixels" not in self.parameters:
            return None
        if _checks.is_number(eps):
            _checks.number(name, "eps", eps)
            return int(_checks.read(eps))
        if self.family != "minimum-norm":
            raise ValueError(f"{name}: eps={eps}; its number of pixels is a shape: it must be a number, and not traced")
        return None
