"""What is asked of `experiments.step_cost`, checked before anything is built."""

import dataclasses
import math
from collections.abc import Sequence

from e2sad_jax import distributed, networks
from e2sad_jax.data import KNOWN
from e2sad_jax.defenses import DEFENSES, readers
from e2sad_jax.errors import ConfigError, DataError, Error
from e2sad_jax.training.config import Config, check_at_least, configure
from e2sad_jax.training.presets import PRESETS, preset
from experiments.step_cost import peers, targets

NUM_CLASSES = 10
DATA = {"mnist_cnn": "mnist", "svhn_cnn": "svhn", "digits_cnn": "digits", "preact_resnet18": "svhn"}  # of each model
CURVE = (1, 2, 5, 10, 20, 30, 40)  # steps of IFGSM's attack where nothing else is asked for
OURS = "e2sad_jax"


def iterated() -> dict[str, tuple[int, ...]]:
    """Defenses whose attack takes a number of steps, and the numbers that are measured by default."""
    return {name: CURVE if name == "ifgsm" else (2, 10) for name in readers("attack_steps")}


class StepsFailedError(Error):
    """Steps could not be measured; their rows say why, the others were written."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One row: whose step of which defense.

    Attributes:
      by: `OURS`, or one of `peers.VARIANTS`.
      defense: a key of `defenses.DEFENSES`.
      attack_steps: of an iterated attack, else 0.
      precision: a key of `networks.PRECISIONS`.
      preset: one of `training.PRESETS`, of e2SAD alone; "paper" for the other defenses.
    """

    by: str
    defense: str
    attack_steps: int
    precision: str
    preset: str = "paper"

    @property
    def name(self) -> str:
        """The defense with its steps or its preset: e2sad, ifgsm-30, e2sad, robust2."""
        if self.preset != "paper":
            return f"{self.defense}, {self.preset}"
        return f"{self.defense}-{self.attack_steps}" if self.attack_steps else self.defense


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure; each field is the flag of that name. No `attack_steps` stand for those of `iterated`.

    Raises:
      ConfigError: if a value is out of range, or a package that a peer needs is missing.
    """

    defense: tuple[str, ...] = tuple(DEFENSES)
    attack_steps: tuple[int, ...] = ()
    batch_size: int = 256
    devices: int = 1
    model: str = "mnist_cnn"
    image_size: int = 0
    precision: tuple[str, ...] = ("float32",)
    rounds: int = 7
    seconds: float = 0.1
    peer: tuple[str, ...] = ()
    compile_seconds: float = 300.0
    steps_per_dispatch: int = 0
    target: tuple[str, ...] = ()
    results: str = "runs/step_cost"

    def __post_init__(self) -> None:
        choices = {"defense": tuple(DEFENSES), "precision": tuple(networks.PRECISIONS), "peer": tuple(peers.VARIANTS)}
        for flag, allowed in choices.items():
            _check_list(flag, getattr(self, flag), allowed, empty=flag == "peer")
        if self.model not in DATA:
            raise ConfigError(f"--model={self.model}: must be one of {', '.join(DATA)}")
        if min(self.attack_steps, default=1) < 1:
            given = ",".join(map(str, self.attack_steps))
            raise ConfigError(f"--attack_steps={given}: must be at least 1 each; several with commas, as 1,10,30")
        check_at_least(self, batch_size=1, rounds=1, devices=0, image_size=0, steps_per_dispatch=0)
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ConfigError(f"--seconds={self.seconds}: must be finite and at least 0; 0 times one dispatch")
        if not (math.isfinite(self.compile_seconds) and self.compile_seconds > 0):
            raise ConfigError(f"--compile_seconds={self.compile_seconds}: must be finite and above 0")
        if self.peer and "float32" not in self.precision:
            raise ConfigError(
                f"--precision={','.join(self.precision)}: must have float32 in it for --peer={','.join(self.peer)}, "
                "whose steps are measured in float32"
            )
        try:
            networks.create(self.model, NUM_CLASSES, self.image_shape)
        except DataError as error:
            raise ConfigError(f"--image_size={self.image_size}: {error}") from error
        distributed.mesh(self.devices, self.batch_size)  # refuses what does not fit
        if self.peer and self.devices != 1:
            raise ConfigError(
                f"--devices={self.devices}: must be 1 for --peer={','.join(self.peer)}, which has but one"
            )
        for name in self.target:
            distributed.check_divides(targets.Target.named(name).count, self.batch_size)
            if self.peer or self.devices != 1:
                raise ConfigError(f"--target={name}: compiles ahead of time; leave out --peer and --devices")
        for name in self.peer:
            peers.check_installed(name)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the model's own data set, or of images of `image_size`."""
        height, width, channels = KNOWN[DATA[self.model]].image_shape
        return (self.image_size or height, self.image_size or width, channels)

    def kinds(self) -> list[Kind]:
        """The rows, in order: the natural step first, for every other is held against it; a peer's rows below ours."""
        found, counted = [], iterated()
        for precision in dict.fromkeys(self.precision):
            for defense in dict.fromkeys(("natural", *self.defense)):
                for steps in sorted(set(self.attack_steps or counted[defense])) if defense in counted else [0]:
                    found.append(Kind(OURS, defense, steps, precision))
                    if precision == "float32":
                        variants = [by for peer in dict.fromkeys(self.peer) for by in peers.VARIANTS[peer]]
                        found += [Kind(by, defense, steps, precision) for by in variants]
                if defense == "e2sad":
                    found += [Kind(OURS, defense, 0, precision, name) for name in PRESETS if name != "paper"]
        return found

    def config(self, kind: Kind) -> Config:
        """The settings of a run that trains with this step; eps and weights, which cost nothing, are the defaults."""
        own = {"attack_steps": kind.attack_steps} if kind.attack_steps else {}
        if kind.preset != "paper":
            own = preset(kind.preset, Config.eps1)
        return configure(
            defense=kind.defense,
            model=self.model,
            batch_size=self.batch_size,
            devices=self.devices,
            precision=kind.precision,
            **own,
        )


def _check_list(flag: str, values: Sequence[str], allowed: Sequence[str], *, empty: bool) -> None:
    if not values and not empty:
        raise ConfigError(f"--{flag}=: must name at least one of {', '.join(allowed)}")
    for value in values:
        if value not in allowed:
            raise ConfigError(f"--{flag}={value:.100}: must be of {', '.join(allowed)}; several with commas")
