"""One run's settings: each with its meaning and range, checked before anything is loaded."""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from e2sad_jax.attacks import OBJECTIVES
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.errors import ConfigError

DEFENSES = (
    *("natural", "fgsm", "ifgsm", "pgd", "hamm", "e2sad"),
    *("rs_fgsm", "n_fgsm", "free", "trades", "grad_align", "input_gradient"),
)
SCHEDULES = ("constant", "cyclic", "piecewise", "cosine")
PRESETS = ("paper", "robust")
LARGEST = 2**53  # of any number of things: what a float64 still counts


def preset(name: str, eps1: float) -> dict[str, Any]:
    """e2SAD's settings by name: "paper", the defaults, or "robust", found by search (docs/e2sad.md).

    Args:
      name: one of `PRESETS`.
      eps1: the budget to defend against; the second step of "robust" is two thirds of it.

    Raises:
      ConfigError: if the name is unknown.
    """
    if name not in PRESETS:
        raise ConfigError(f"--preset={name}: must be one of {', '.join(PRESETS)}")
    if name == "paper":
        return {}
    points = {
        "alpha": 0.0,
        "lam": 1.0,
        "eps2": eps1 * 2 / 3,
        "random_start": True,
        "ball_second": True,
        "soft_label": False,
    }
    return {**points, **SCHEDULE}


# Under which cheap defenses hold MNIST's budget of 0.3 (docs/e2sad.md).
SCHEDULE: Mapping[str, Any] = {"eps_warmup": 0.5, "schedule": "cyclic", "learning_rate": 5e-3}


def setting(
    default: Any,
    help: str,
    *,
    lower: float | None = None,
    upper: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    identity: bool = True,
    later: bool = False,
) -> Any:
    """A field that is a flag, with its range.

    `identity` says whether runs that differ in it are different runs, `later` that there were runs before there was this
    setting: at its default, which is what they did, it is left out of the identity, and their workdirs keep their names.
    """
    metadata = {"help": help, "lower": lower, "upper": upper, "above": above, "choices": choices, "identity": identity}
    return dataclasses.field(default=default, metadata={**metadata, "later": later})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one training run. The defaults are the paper's for MNIST; `experiments/` holds those for each data set."""

    defense: str = setting("e2sad", "how to train", choices=DEFENSES)
    data: str = setting("mnist", "mnist, svhn, digits, or a file PATH.npz", identity=False)
    model: str = setting("mnist_cnn", "network", choices=("mnist_cnn", "svhn_cnn", "digits_cnn", "preact_resnet18"))
    transform: str = setting("unit", "input transform; every eps is in its units", choices=("unit", "standardize"))
    steps: int = setting(30_000, "training steps", lower=1, identity=False)
    epochs: float = setting(
        0.0, "passes over the training set instead of --steps, 0: use --steps", lower=0, upper=1e6, identity=False
    )
    batch_size: int = setting(256, "images a step", lower=1)
    learning_rate: float = setting(1e-3, "Adam's learning rate", above=0)
    schedule: str = setting(
        "constant",
        "learning rate over all steps: constant; cyclic, up from 0 and down again; piecewise, a tenth of it after each of "
        "1/2 and 3/4; cosine, down to 0",
        choices=SCHEDULES,
        later=True,
    )
    alpha: float = setting(0.6, "weight of the clean loss", lower=0, upper=1)
    lam: float = setting(0.1, "weight lambda of e2SAD's dissimilarity", lower=0)
    eps1: float = setting(0.3, "l-infinity budget of the training attack (e2SAD: of its first step)", lower=0)
    eps2: float = setting(0.1, "budget of e2SAD's second step", lower=0)
    eps_warmup: float = setting(
        0.0,
        "steps over which eps1, eps2 and attack_step_size rise from 0 in training, below 1: so much of all steps, 0: none",
        lower=0,
        later=True,
    )
    attack_steps: int = setting(30, "gradient steps of the training attack (ifgsm, pgd, trades)", lower=1)
    attack_step_size: float = setting(
        0.0,
        "step of the training attack, 0: eps1 / attack_steps (ifgsm), 2.5 eps1 / attack_steps (pgd, trades), "
        "1.25 eps1 (rs_fgsm), eps1 (n_fgsm)",
        lower=0,
    )
    noise: float = setting(2.0, "N-FGSM's noise, in multiples of eps1", lower=0, later=True)
    replays: int = setting(8, "steps that free training takes on each batch", lower=1, later=True)
    beta: float = setting(6.0, "weight of TRADES' divergence", lower=0, later=True)
    align_weight: float = setting(0.2, "weight of GradAlign's misalignment", lower=0, later=True)
    gradient_weight: float = setting(1.0, "weight of input_gradient's squared norm", lower=0, later=True)
    second_step: str = setting("total", "what e2SAD's second step differentiates", choices=OBJECTIVES)
    clip_second: bool = setting(False, "clip e2SAD's second point to the image range")
    random_start: bool = setting(False, "e2SAD's first step starts at a random point of the ball", later=True)
    ball_second: bool = setting(False, "keep e2SAD's second point in the ball of eps1", later=True)
    soft_label: bool = setting(True, "train on soft labels, 1 - delta for the true class")
    delta: float = setting(0.25, "mass that soft labels give to the wrong classes", above=0, upper=0.999)
    seed: int = setting(0, "seed of initialisation, order and attacks", lower=0, upper=2**32 - 1)
    precision: str = setting("float32", "what the layers compute in", choices=("float32", "tf32", "bf16"))
    devices: int = setting(1, "devices to split each batch over, 0: all", lower=0, identity=False)
    validation_examples: int = setting(
        0, "training images held out to choose the best checkpoint, 0: watch 500 of the training images", lower=0
    )
    eval_examples: int = setting(0, "test images to evaluate, the first ones, 0: all", lower=0, identity=False)
    eval_batch_size: int = setting(250, "images a batch in evaluation", lower=1, identity=False)
    checkpoint_every: int = setting(500, "steps between checkpoints", lower=1, identity=False)
    log_every: int = setting(50, "steps between lines of metrics", lower=1, identity=False)
    data_dir: str = setting("", "where data sets lie, empty: $E2SAD_DATA_DIR or ~/.cache/e2sad_jax", identity=False)
    workdir: str = setting("", "where the run is kept, empty: runs/DATA-DEFENSE-HASH", identity=False)
    resume: bool = setting(True, "go on from the workdir's last checkpoint", identity=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        lower, upper = TRANSFORMS[self.transform].bounds
        for name in ("eps1", "eps2"):
            if getattr(self, name) > upper - lower:
                raise ConfigError(
                    f"--{name}={getattr(self, name)}: must be in [0, {upper - lower}], the width of "
                    f"--transform={self.transform} (24 of 255 grey levels are 24/255 = 0.0941)"
                )

    def identity(self) -> dict[str, Any]:
        """The settings that make two runs different runs."""
        fields = {f.name: f for f in dataclasses.fields(self) if f.metadata["identity"]}
        values = {name: getattr(self, name) for name in fields}
        values = {n: v for n, v in values.items() if not fields[n].metadata["later"] or v != fields[n].default}
        if self.eps_warmup >= 1 and float(self.eps_warmup).is_integer():
            values["eps_warmup"] = int(self.eps_warmup)  # as it was written when it was a number of steps only
        if self.stretches:  # then the run's length is a part of it
            values |= {"epochs": self.epochs} if self.epochs else {"steps": self.steps}
        return values

    def digest(self) -> str:
        """Eight hexadecimal digits of the identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]

    def default_workdir(self) -> str:
        """Where the run is kept if `workdir` is empty."""
        return f"runs/{pathlib.PurePath(self.data).stem}-{self.defense}-{self.digest()}"

    @property
    def stretches(self) -> bool:
        """Whether something in the run depends on how long it is: the learning rate's schedule, a share of all steps."""
        return self.schedule != "constant" or 0 < self.eps_warmup < 1

    def warmup_steps(self, total: int) -> float:
        """Steps over which the budgets rise, of `total` ones."""
        return self.eps_warmup * total if self.eps_warmup < 1 else self.eps_warmup

    @property
    def steps_per_batch(self) -> int:
        """Steps in a row that train on the same batch."""
        return self.replays if self.defense == "free" else 1

    def total_steps(self, training_images: int) -> int:
        """Steps to train: `steps`, or as many as `epochs` passes over `training_images` take.

        Free training takes as many and so passes over them less often: `epochs / replays` times.
        """
        return math.ceil(self.epochs * training_images / self.batch_size) if self.epochs else self.steps

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration that `dataclasses.asdict` wrote.

        Raises:
          ConfigError: if a setting is unknown, has another type, or is out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"the settings are {_short(values)}; they must be given by name")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ConfigError(f"unknown setting {_short(name)}; this version knows {', '.join(fields)}")
        return cls(**values)


def check_at_least(request: object, **bounds: int) -> None:
    """Refuses a request whose attribute of such a name lies below the bound.

    Raises:
      ConfigError: with flag, value and bound.
    """
    for name, lower in bounds.items():
        if (value := getattr(request, name)) < lower:
            raise ConfigError(f"--{name}={value}: must be at least {lower}")


def range_of(field: "dataclasses.Field[Any]") -> str:
    """The range of a setting in words, empty where there is none."""
    m = field.metadata
    if m["choices"]:
        return "one of " + ", ".join(m["choices"])
    if m["above"] is not None:
        return f"above {m['above']}" + (f", at most {m['upper']}" if m["upper"] is not None else "")
    if m["lower"] is not None and m["upper"] is not None:
        return f"in [{m['lower']}, {m['upper']}]"
    if m["lower"] is not None:
        return f"at least {m['lower']}"
    return ""


def _short(value: object) -> str:
    """A value in a message, whatever its length."""
    if isinstance(value, int) and abs(value) > 10**40:
        return f"an integer of {value.bit_length():,} bits"
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 120 else f"{text[:60]} ... {text[-60:]}"


def check(field: "dataclasses.Field[Any]", value: Any) -> None:
    """Refuses a value of the wrong type or out of range.

    Raises:
      ConfigError: with flag, value and range.
    """
    m: Mapping[str, Any] = field.metadata
    kind: type[Any] = type(field.default)
    if kind in (int, float) and type(value) is int and not -LARGEST <= value <= LARGEST:  # Python's own have no end
        raise ConfigError(f"--{field.name}={_short(value)}: must be {range_of(field) or 'finite'}, at most {LARGEST:,}")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"--{field.name}={_short(value)}: must be of type {kind.__name__}")
    if kind is str and not value.isprintable():
        raise ConfigError(f"--{field.name}={_short(value)}: must be printable text")
    right = not m["choices"] or value in m["choices"]
    if kind in (int, float):
        right &= math.isfinite(value)
        right &= m["lower"] is None or value >= m["lower"]
        right &= m["above"] is None or value > m["above"]
        right &= m["upper"] is None or value <= m["upper"]
    if not right:
        shown = value if kind in (int, float) else _short(value)[1:-1]
        raise ConfigError(f"--{field.name}={shown}: must be {range_of(field) or 'finite'}")
