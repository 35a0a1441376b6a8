"""The registry `DEFENSES`: each defense's loss, own settings and label."""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from e2sad_jax.attacks import core
from e2sad_jax.defenses._types import TRAINING_LOSSES, Bounds, LogitsFn, Parts
from e2sad_jax.errors import ConfigError, close_to, quoted

LARGEST = 2**53  # of any number of things: what a float64 still counts


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value that can be set, with its meaning and range; its default says its type.

    Attributes:
      name: of the setting and its flag.
      default: the value where none is given, a bool, int, float or str.
      help: what it means.
      lower: least number, None for no bound.
      upper: greatest number, None for no bound.
      above: the number must be greater, None for no bound.
      choices: the values allowed, None for any; a mapping allows its keys, those that are added later too.
      argument: keyword of the defense's loss; empty for `name`, None for a setting that the loss does not take.
      budget: whether it is a length in the images' units. It rises with `eps_warmup`, and may be at most as large as the
        range of the images is wide.
      varies: whether runs that train together may differ in it: the loss takes a traced one at no cost.
      zero_is_none: whether the loss takes None for 0 and chooses by itself.
    """

    name: str
    default: Any
    help: str
    _: dataclasses.KW_ONLY
    lower: float | None = None
    upper: float | None = None
    above: float | None = None
    choices: Collection[str] | None = None
    argument: str | None = ""
    budget: bool = False
    varies: bool = False
    zero_is_none: bool = False

    @property
    def range(self) -> str:
        """The values allowed in words, empty where there is no bound."""
        if self.choices is not None:
            return f"{'empty or ' if '' in self.choices else ''}one of {', '.join(filter(None, self.choices))}"
        if self.above is not None:
            return f"above {self.above}" + (f", at most {self.upper}" if self.upper is not None else "")
        if self.lower is not None and self.upper is not None:
            return f"in [{self.lower}, {self.upper}]"
        return f"at least {self.lower}" if self.lower is not None else ""

    def check(self, value: Any) -> Any:
        """The value, as a float where the default is one.

        Raises:
          ConfigError: if its type or range is wrong, with flag, value and range.
        """
        kind: type[Any] = type(self.default)
        if kind in (int, float) and type(value) is int and not -LARGEST <= value <= LARGEST:  # Python's own have no end
            raise ConfigError(f"--{self.name}={quoted(value)}: must be {self.range or 'finite'}, at most {LARGEST:,}")
        if kind is float and type(value) in (int, float):
            value = float(value) + 0.0  # one zero
        if type(value) is not kind:
            raise ConfigError(f"--{self.name}={quoted(value)}: must be of type {kind.__name__}")
        if kind is str and not value.isprintable():
            raise ConfigError(f"--{self.name}={quoted(value)}: must be printable text")
        right = self.choices is None or value in self.choices
        if kind in (int, float):
            right &= math.isfinite(value)
            right &= self.lower is None or value >= self.lower
            right &= self.above is None or value > self.above
            right &= self.upper is None or value <= self.upper
        if not right:
            shown = value if kind in (int, float) else quoted(value)[1:-1]
            close = close_to(value, self.choices) if self.choices and kind is str else ""
            raise ConfigError(f"--{self.name}={shown}: {close}must be {self.range or 'finite'}")
        return value

    def means_as(self, other: "Setting") -> bool:
        """Whether both have the same type and range, so that one flag can set both."""
        ranges = ("lower", "upper", "above", "choices", "budget", "zero_is_none")
        return type(self.default) is type(other.default) and all(getattr(self, r) == getattr(other, r) for r in ranges)


OFFERED = ("eps", "eps1", "bounds", "key", "delta", "teacher_fn")  # what training passes to a loss that names it


@dataclasses.dataclass(frozen=True)
class Defense:
    """A defense as training, flags and tables know it.

    The loss is called as `loss(logits_fn, x, y, **arguments)` and returns the loss, a scalar, and its parts by name. Its
    arguments are the settings, and those of the following that its signature names: `eps` or `eps1`, the
    budget; `bounds`, the range of the images; `key`, a random key of the step; `delta`, a perturbation `[N, ...]`
    (or as `carried` says) that is kept from step to step; `teacher_fn`, images to the logits of a teacher; with the setting
    `memory` also `start`, the perturbation `[N, ...]` with which each image's attack ended last time. A loss that is given
    `start` returns the new one among its parts, as `delta`.

    Attributes:
      loss: the function.
      label: its name in tables and pictures.
      settings: those that it alone reads, in addition to those of every run.
      ascent: `(delta, gradient, *, eps) -> delta`, the perturbation of the next step from that of this one and from the
        loss's gradient in it; of a loss that takes `delta`, else None.
      carried: how many arrays of one image's shape `delta` holds, `[carried, ...]`; 0: one for each image of the batch.
      remembers: of a loss with the setting `memory`, the names of what is kept of each image, `[N, ...]` each. The loss
        returns it among its parts and takes it the next time: "delta" as `start`, in the images' units; any other, with
        entries in [-1, 1], under its own name.
      replays: name of the setting that says how many steps in a row train on the same batch; empty: one.
      idle: from the values of all its settings to those that have no effect beside the others, with the reason. It raises
        `ConfigError` where they do not fit together. None: each has an effect.
      broken: reference of the attack that breaks it, for model cards; empty: none is known.

    Raises:
      ValueError: if the loss does not take what the settings are for, or what is said of `delta` does not fit it.
    """

    loss: Callable[..., tuple[jax.Array, Parts]]
    label: str
    settings: tuple[Setting, ...] = ()
    _: dataclasses.KW_ONLY
    ascent: Callable[..., jax.Array] | None = None
    carried: int = 0
    remembers: tuple[str, ...] = ("delta",)
    replays: str = ""
    idle: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None
    broken: str = ""

    def __post_init__(self) -> None:
        for setting in self.settings:
            if setting.argument is not None and not self.takes(setting.argument or setting.name):
                raise ValueError(
                    f"{self.label}: its loss takes no {setting.argument or setting.name!r}, for which --{setting.name} is; "
                    "say argument= (None: training alone reads it)"
                )
            setting.check(setting.default)
        given = {setting.argument or setting.name for setting in self.settings} | set(OFFERED)
        missing = [_argument(name) for name in self.remembers if not self.takes(_argument(name))]
        if MEMORY.name in self.defaults() and missing:
            raise ValueError(f"{self.label}: has the setting memory, and its loss takes no {missing[0]!r}")
        for parameter in list(inspect.signature(self.loss).parameters.values())[3:]:
            needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            if needed and parameter.name not in given:
                raise ValueError(
                    f"{self.label}: its loss needs {parameter.name!r}, which is neither a setting nor one of "
                    f"{', '.join(OFFERED)}; give it a default or a setting"
                )
        if self.carries != (self.ascent is not None):
            raise ValueError(f"{self.label}: a loss that takes delta needs ascent=, and no other does")
        if self.carried and not self.carries:
            raise ValueError(f"{self.label}: carried={self.carried} is of a loss that takes delta")
        if self.replays and self.replays not in self.defaults():
            raise ValueError(f"{self.label}: replays={self.replays!r} must name one of its settings")

    def takes(self, argument: str) -> bool:
        """Whether the loss has a parameter of that name."""
        return argument in inspect.signature(self.loss).parameters

    @property
    def attacks(self) -> bool:
        """Whether the loss has a budget, in which it looks for adversarial images."""
        return self.takes("eps") or self.takes("eps1")

    @property
    def carries(self) -> bool:
        """Whether a perturbation is kept from step to step, of the batch or as `carried` says."""
        return self.takes("delta")

    @property
    def learns(self) -> bool:
        """Whether it learns from a teacher's logits."""
        return self.takes("teacher_fn")

    def without_effect(self, settings: Mapping[str, Any]) -> Mapping[str, str]:
        """Which settings have no effect beside the others, and why.

        Args:
          settings: values by name; others are at their defaults.

        Raises:
          ConfigError: if they do not fit together.
        """
        return {} if self.idle is None else self.idle({**self.defaults(), **settings})

    def defaults(self) -> dict[str, Any]:
        """The defaults of its settings, by name."""
        return {setting.name: setting.default for setting in self.settings}

    def __call__(
        self,
        logits_fn: LogitsFn,
        x: jax.Array,
        y: jax.Array,
        *,
        settings: Mapping[str, Any],
        eps: jax.typing.ArrayLike,
        bounds: Bounds,
        key: jax.Array,
        delta: jax.Array | None = None,
        memory: Mapping[str, jax.Array] | None = None,
        taught: jax.Array | None = None,
    ) -> tuple[jax.Array, Parts]:
        """The loss of one batch, as training computes it.

        Args:
          logits_fn: images `[N, ...]` to logits `[N, K]`.
          x: clean images `[N, ...]`.
          y: target distributions `[N, K]`.
          settings: values of all its settings by name; budgets may be traced.
          eps: budget, in the images' own units.
          bounds: range of the images, or None.
          key: random key of the step.
          delta: the perturbation kept so far, of a defense that `carries` one.
          memory: what is remembered of the images, by the names in `remembers`; None where nothing is.
          taught: the teacher's logits of the images, `[N, K]`, of a defense that `learns` from one.

        Returns:
          The loss, a scalar, and its parts by name; with a memory the new one is among them.
        """
        if self.learns and taught is None:
            raise ValueError(f"{self.label}: needs the logits of a teacher; training takes them as teacher=")
        offered = {
            "eps": eps,
            "eps1": eps,
            "bounds": bounds,
            "key": key,
            "delta": delta,
            "teacher_fn": lambda _: taught,
        }
        offered |= {_argument(name): value for name, value in (memory or {}).items()}
        arguments = {name: value for name, value in offered.items() if self.takes(name)}
        for setting in self.settings:
            if setting.argument is not None:
                value = settings[setting.name]
                unset = setting.zero_is_none and isinstance(value, (int, float)) and value == 0
                arguments[setting.argument or setting.name] = None if unset else value
        loss, parts = self.loss(logits_fn, x, y, **arguments)
        if missing := [name for name in memory or () if name not in parts]:
            raise ValueError(
                f"{self.label}: its loss was given {_argument(missing[0])} and returns no part {missing[0]!r}"
            )
        return loss, parts


def _argument(remembered: str) -> str:
    """The loss's keyword for what is remembered under a name."""
    return "start" if remembered == "delta" else remembered


DEFENSES: dict[str, Defense] = {}
PLUGINS = "E2SAD_JAX_DEFENSES"  # environment variable: modules that register defenses of the user's own


def register(name: str, defense: Defense) -> None:
    """Adds a defense to `DEFENSES`; commands then train, compare and evaluate it by name.

    Raises:
      ValueError: if the name is taken or not of lower-case letters, digits and underscores, or another defense has a
        setting of the same name and of another range.
    """
    if not re.fullmatch("[a-z0-9_]+", name):  # a part of folder names and flags
        raise ValueError(f"the defense {name!r} needs a name of lower-case letters, digits and underscores")
    if name in DEFENSES:
        raise ValueError(f"the defense {name!r} is registered already, as {DEFENSES[name].label}; choose another name")
    for setting in defense.settings:
        for other, entry in DEFENSES.items():
            if any(s.name == setting.name and not s.means_as(setting) for s in entry.settings):
                raise ValueError(
                    f"{name}: its setting {setting.name!r} has another type or range than {other}'s; choose another name"
                )
    DEFENSES[name] = defense


def readers(setting: str) -> tuple[str, ...]:
    """The names of the defenses that read a setting."""
    return tuple(name for name, defense in DEFENSES.items() if setting in defense.defaults())


# What several defenses read.
MEMORY = Setting(
    "memory",
    "none",
    "start each image's attack where its last one ended: the type in which a perturbation per training image is kept",
    choices=("none", "int8", "bf16"),
    argument=None,
)
ALPHA = Setting("alpha", 0.6, "weight of the clean loss", lower=0, upper=1)
NORM = Setting("norm", "linf", "ball of the training attack, in which eps1 is meant", choices=core.NORMS)
ATTACK_STEPS = Setting("attack_steps", 30, "gradient steps of the training attack", lower=1, argument="steps")
ATTACK_STEP_SIZE = Setting(
    "attack_step_size",
    0.0,
    "step of the training attack, 0: eps1 / attack_steps (ifgsm), 2.5 eps1 / attack_steps (pgd, trades; atta at most "
    "eps1 / 2), 1.25 eps1 (rs_fgsm), eps1 (n_fgsm, pgi, uap, gat, nuat)",
    lower=0,
    argument="step_size",
    budget=True,
    zero_is_none=True,
)
TRAINING_LOSS = Setting(
    "training_loss",
    "ce",
    "loss at adversarial images: cross-entropy, or qub, its quadratic upper bound from the clean images",
    choices=TRAINING_LOSSES,
)
SIGNS = Setting(
    "signs",
    0.5,
    "magnitude of the random signs that the attack of gat and nuat starts from, in multiples of eps1",
    lower=0,
    upper=1,
)
