"""One run's settings: each with its meaning and range, checked before anything is loaded."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from flax.core import FrozenDict

from e2sad_jax.data import KNOWN, augmentation
from e2sad_jax.data.augmentation import Augmentation
from e2sad_jax.data.prepared import stem
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.defenses import DEFENSES, PLUGINS, Defense, Setting, readers
from e2sad_jax.errors import ConfigError, close_to, quoted
from e2sad_jax.networks import NETWORKS, has_batch_norm

SCHEDULES = ("constant", "cyclic", "piecewise", "cosine", "onecycle")
OPTIMIZERS = ("adam", "adamw", "sgd")
DATA = f"{', '.join(KNOWN)}, tfds:NAME of tensorflow-datasets, or a file PATH.npz"
DATA_DIR = "folder of data sets, empty: $E2SAD_DATA_DIR, or e2sad_jax in $XDG_CACHE_HOME or ~/.cache"


def setting(
    default: Any,
    help: str,
    *,
    lower: float | None = None,
    upper: float | None = None,
    above: float | None = None,
    choices: Collection[str] | None = None,
    budget: bool = False,
    identity: bool = True,
) -> Any:
    """A field of a dataclass that is a flag, with its range (`defenses.Setting`).

    `identity` says whether runs that differ in it are different runs.
    """
    about = {"lower": lower, "upper": upper, "above": above, "choices": choices, "budget": budget}
    return dataclasses.field(default=default, metadata={"help": help, "about": about, "identity": identity})


def setting_of(field: "dataclasses.Field[Any]") -> Setting:
    """The `defenses.Setting` that describes a field made by `setting`."""
    return Setting(field.name, field.default, field.metadata["help"], **field.metadata["about"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one training run. The defaults are the paper's for MNIST; `runs.recipes` has those of each command.

    `configure` makes one of flat keywords.

    Attributes:
      settings: those that the defense alone reads, by name; what is not given is at the defense's defaults.
    """

    defense: str = setting("e2sad", "defense to train with", choices=DEFENSES)
    settings: Mapping[str, Any] = FrozenDict()
    data: str = setting("mnist", DATA, identity=False)
    model: str = setting("mnist_cnn", "network", choices=NETWORKS)
    width: int = setting(0, "filters of a residual network's first convolution, 0: its own number", lower=0)
    mean: str = setting(
        "",
        "mean of each channel, separated by commas, or one for all, in units of the transformed image: the network takes it "
        "from its images; empty: 0",
    )
    std: str = setting(
        "", "standard deviation of each channel, likewise, by which the network divides its images then; empty: 1"
    )
    init_from: str = setting(
        "",
        "folder of a run, whose last weights training begins with, or safetensors file of an export; empty: random ones",
    )
    transform: str = setting("unit", "input transform; every eps is in its units", choices=("unit", "standardize"))
    steps: int = setting(30_000, "training steps", lower=1, identity=False)
    epochs: float = setting(
        0.0, "passes over the training set instead of --steps, 0: use --steps", lower=0, upper=1e6, identity=False
    )
    batch_size: int = setting(256, "images a step", lower=1)
    optimizer: str = setting("adam", "optimiser; adamw needs --weight_decay", choices=OPTIMIZERS)
    learning_rate: float = setting(1e-3, "learning rate", above=0)
    momentum: float = setting(0.9, "momentum of --optimizer=sgd", lower=0, upper=0.9999)
    nesterov: bool = setting(False, "Nesterov's momentum of --optimizer=sgd")
    weight_decay: float = setting(
        0.0,
        "times the parameters, added to the gradient; with adamw decoupled from it, times the learning rate",
        lower=0,
    )
    decay_kernels_only: bool = setting(False, "no weight decay of biases and of batch normalisation")
    clip_norm: float = setting(0.0, "largest l2 norm of the gradient, which is scaled down to it; 0: none", lower=0)
    awp: float = setting(
        0.0,
        "adversarial weight perturbation: its length, a fraction of each layer's norm; 0: none",
        lower=0,
        upper=1,
    )
    accumulate: int = setting(
        1, "batches, one a step, whose mean gradient makes one update; it must divide --steps", lower=1
    )
    schedule: str = setting(
        "constant",
        "learning rate over all steps: constant; cyclic, up from 0 and down again; piecewise, a tenth of it after each of "
        "--milestones; cosine, down to 0; onecycle, up by a cosine over 0.3 of them and down to 0",
        choices=SCHEDULES,
    )
    milestones: str = setting("0.5,0.75", "of --schedule=piecewise, rising fractions of all steps")
    lr_warmup: float = setting(
        0.0,
        "steps over which the learning rate rises from 0 to the schedule's, below 1: a fraction of all steps",
        lower=0,
    )
    eps1: float = setting(
        0.3,
        "l-infinity budget (l2 with --norm=l2) of the training attack (e2SAD: of its first point), and of the attack that "
        "chooses checkpoints",
        lower=0,
        budget=True,
    )
    eps_warmup: float = setting(
        0.0,
        "steps over which every budget rises from 0 in training, below 1: a fraction of all steps, 0: none",
        lower=0,
    )
    eps_scale: float = setting(
        1.0,
        "every budget of training in multiples of what is given; validation takes eps1 itself",
        above=0,
    )
    soft_label: bool = setting(True, "train on soft labels, 1 - delta for the true class")
    delta: float = setting(0.25, "mass that soft labels give to the wrong classes", above=0, upper=0.999)
    ema: float = setting(
        0.0,
        "decay of averaged weights, min(ema, (1 + t) / (10 + t)) at step t; validated beside the raw ones, and the best "
        "checkpoint has the better of the two; 0: none",
        lower=0,
        upper=0.999999,
    )
    augment: str = setting(
        "none",
        "changes of training images, separated by commas: crop, out of the image padded with zeros; flip, left to right for "
        "half of them; cutout, a square set to 0",
    )
    crop_padding: int = setting(4, "pixels on each side for --augment=crop", lower=1)
    cutout_size: int = setting(8, "side of the square of --augment=cutout", lower=1)
    seed: int = setting(0, "seed of initialisation, order and attacks", lower=0, upper=2**32 - 1)
    attack_statistics: str = setting(
        "batch",
        "what batch normalisation takes in the attacks of training: the statistics of the attacked batch, or the running "
        "averages, as in evaluation",
        choices=("batch", "average"),
    )
    precision: str = setting("float32", "what the layers compute in", choices=("float32", "tf32", "bf16"))
    devices: int = setting(1, "devices to split each batch over, 0: all", lower=0, identity=False)
    resident: str = setting(
        "auto",
        "where the training images lie: on each device, or on the host, which sends each batch; auto: on the device if they "
        "and the memory of perturbations take at most half of its memory",
        choices=("auto", "device", "host"),
        identity=False,
    )
    validation_examples: int = setting(
        0, "training images held out to choose the best checkpoint, 0: use 500 of the training images", lower=0
    )
    eval_examples: int = setting(
        0, "test images to evaluate, a sample stratified by class, 0: all", lower=0, identity=False
    )
    eval_batch_size: int = setting(250, "images a batch in evaluation", lower=1, identity=False)
    checkpoint_every: int = setting(500, "steps between checkpoints", lower=1, identity=False)
    log_every: int = setting(50, "steps between lines of metrics", lower=1, identity=False)
    tracker: str = setting(
        "",
        "experiment tracker that gets the metrics, too: wandb (Weights & Biases) or trackio, if it is installed; empty: none",
        choices=("", "wandb", "trackio"),
        identity=False,
    )
    data_dir: str = setting("", DATA_DIR, identity=False)
    workdir: str = setting("", "folder of the run, empty: runs/DATA-DEFENSE-HASH", identity=False)
    resume: bool = setting(True, "resume from the workdir's last checkpoint", identity=False)

    def __post_init__(self) -> None:
        if isinstance(self.defense, str) and self.defense not in DEFENSES:
            raise ConfigError(
                f"--defense={quoted(self.defense)[1:-1]}: {close_to(self.defense, DEFENSES)}must be one of "
                f"{', '.join(DEFENSES)}; one of your own: import the module that registers it, or name the module in ${PLUGINS}"
            )
        values = {field.name: check(field, getattr(self, field.name)) for field in COMMON}
        entry = DEFENSES[self.defense]
        if taken := values.keys() & entry.defaults().keys():
            raise ConfigError(f"--defense={self.defense}: has a setting {min(taken)!r}, as every run has; rename it")
        for name in self.settings:
            if name not in entry.defaults():
                raise ConfigError(_not_read(name, self.settings[name], self.defense))
        given = {**entry.defaults(), **self.settings}
        values["settings"] = FrozenDict({s.name: s.check(given[s.name]) for s in entry.settings})
        for name, value in values.items():  # numbers as their settings have them, so that equal runs are equal
            object.__setattr__(self, name, value)
        entry.without_effect(self.settings)  # which refuses what does not fit together
        self.falls()
        self.network()
        if self.augmentation.names and entry.learns:
            raise ConfigError(
                f"--augment={self.augment}: --defense={self.defense} learns what a teacher says of the images as they are"
            )
        if self.optimizer == "sgd" and self.nesterov and not self.momentum:
            raise ConfigError("--nesterov: needs --momentum above 0 (0.9 is usual)")
        if self.optimizer == "adamw" and not self.weight_decay:
            raise ConfigError("--optimizer=adamw: needs --weight_decay above 0 (0.01 is usual); without it, it is adam")
        if not self.epochs and self.steps % self.accumulate:
            below = self.steps - self.steps % self.accumulate
            nearest = " or ".join(f"{steps:,}" for steps in (below, below + self.accumulate) if steps)
            raise ConfigError(
                f"--steps={self.steps}: must be a multiple of --accumulate={self.accumulate}, as {nearest} is; or give "
                "--epochs, which are rounded up to whole updates"
            )
        lower, upper = TRANSFORMS[self.transform].bounds
        scale = self.eps_scale if self._has_budget else 1.0
        for one in (*map(setting_of, COMMON), *entry.settings):
            value = {**values, **self.settings}[one.name]
            if one.budget and self.norm == "linf" and value * scale > upper - lower:
                scaled = "" if value > upper - lower else f" times --eps_scale={scale}"
                raise ConfigError(
                    f"--{one.name}={value}{scaled}: must be in [0, {upper - lower}], the width of "
                    f"--transform={self.transform} (24 of 255 grey levels are 24/255 = 0.0941)"
                )

    @property
    def norm(self) -> str:
        """The ball that `eps1` is meant in, "linf" or "l2"."""
        return str(self.settings.get("norm", "linf"))

    @property
    def memory(self) -> str:
        """The type in which a perturbation per training image is kept, or "none"."""
        return str(self.settings.get("memory", "none"))

    @property
    def entry(self) -> Defense:
        """The defense's entry in `DEFENSES`."""
        return DEFENSES[self.defense]

    def replace(self, **changes: Any) -> "Config":
        """A copy of the configuration with some values changed, which are given as to `configure`.

        With another defense those settings are kept that both defenses read.

        Raises:
          ConfigError: as `configure`.
        """
        if (defense := changes.get("defense", self.defense)) not in DEFENSES:
            return configure(defense=defense)  # which refuses it
        kept = {n: v for n, v in self.settings.items() if n in DEFENSES[defense].defaults()}
        return configure(**{**_common(self), **kept, **changes})

    def to_json(self) -> dict[str, Any]:
        """All values by name, common ones and the defense's own, for `from_json`."""
        return {**_common(self), **self.settings}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Config":
        """Builds the configuration from the values that `to_json` returned.

        Raises:
          ConfigError: if a setting is unknown, not the defense's, has another type, or is out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"the settings are {quoted(values)}; they must be given by name")
        return configure(**{name if isinstance(name, str) else quoted(name): value for name, value in values.items()})

    def identity(self) -> dict[str, Any]:
        """The settings by which two runs differ: those in effect, without what runs of before there was a choice did."""
        return {name: value for name, value in self.in_effect().items() if (name, value) not in FIRST.items()}

    def in_effect(self) -> dict[str, Any]:
        """The settings that change this run: not where it lies, nor what its other settings leave without effect."""
        values = {field.name: getattr(self, field.name) for field in COMMON if field.metadata["identity"]}
        if not self.soft_label:
            del values["delta"]
        if not self._has_budget:
            del values["eps_warmup"], values["eps_scale"]
        values |= {  # one text for equal values
            "augment": ",".join(self.augmentation.names) or "none",
            "milestones": _text(self.falls()),
            "mean": _text(_spread(_numbers(self.mean), 0.0)),
            "std": _text(_spread(_numbers(self.std), 1.0)),
        }
        if self.stretches:  # then the run's length is a part of it
            values |= {"epochs": self.epochs} if self.epochs else {"steps": self.steps}
        idle = self.without_effect()
        return {name: value for name, value in {**values, **self.settings}.items() if name not in idle}

    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing beside the others, of which a user who gives them should hear, and why."""
        idle = dict(self.entry.without_effect(self.settings))
        if self.optimizer != "sgd":
            idle |= dict.fromkeys(("momentum", "nesterov"), f"--optimizer={self.optimizer} does not read it")
        if not self.weight_decay:
            idle["decay_kernels_only"] = "--weight_decay is 0"
        if self.schedule != "piecewise":
            idle["milestones"] = f"--schedule={self.schedule} has none"
        if not has_batch_norm(self.model):
            idle["attack_statistics"] = f"--model={self.model} has no batch normalisation"
        elif not self._has_budget:
            idle["attack_statistics"] = f"--defense={self.defense} makes no attack"
        for name, own in (("crop", "crop_padding"), ("cutout", "cutout_size")):
            if name not in self.augmentation.names:
                idle[own] = f"--augment={self.augment} has no {name}"
        return idle

    def digest(self) -> str:
        """The first eight hexadecimal digits of a SHA-256 of the identity, which name the run's folder."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]

    def default_workdir(self) -> str:
        """The run's folder if `workdir` is empty."""
        return f"runs/{stem(self.data)}-{self.defense}-{self.digest()}"

    @property
    def _has_budget(self) -> bool:
        """Whether the defense's loss takes a budget, so that a rise of the budgets changes it."""
        entry = self.entry
        return entry.takes("eps") or entry.takes("eps1") or any(s.budget for s in entry.settings)

    @property
    def stretches(self) -> bool:
        """Whether a schedule of the run depends on its number of steps."""
        rises = 0 < self.lr_warmup < 1 or (self._has_budget and 0 < self.eps_warmup < 1)
        return self.schedule != "constant" or rises

    def warmup_steps(self, total: int) -> float:
        """The number of steps, of `total` ones, over which the budgets rise from 0."""
        return number_of_steps(self.eps_warmup, total)

    def network(self) -> dict[str, Any]:
        """What `networks.create` takes beside the images' shape and the number of classes.

        Raises:
          ConfigError: if `mean` or `std` are not numbers, or a `std` is not above 0.
        """
        found: dict[str, Any] = {"name": self.model, "precision": self.precision, "width": self.width}
        for flag, given in (("mean", self.mean), ("std", self.std)):
            found[flag] = _numbers(given)
            if not all(math.isfinite(one) and (flag == "mean" or one > 0) for one in found[flag]):
                above = " above 0" if flag == "std" else ""
                raise ConfigError(f"--{flag}={quoted(given)[1:-1]}: must be numbers{above}, separated by commas")
        lower, upper = TRANSFORMS[self.transform].bounds
        if not all(lower <= one <= upper for one in found["mean"]):
            raise ConfigError(
                f"--mean={quoted(self.mean)[1:-1]}: must lie in [{lower}, {upper}], the range of --transform={self.transform} "
                "(125 of 255 grey levels are 125/255 = 0.49)"
            )
        return found

    def falls(self) -> tuple[float, ...]:
        """The fractions of all steps after which `--schedule=piecewise` takes a tenth of the learning rate.

        Raises:
          ConfigError: if `milestones` are not such fractions.
        """
        found = _numbers(self.milestones)
        if not found or not all(low < high for low, high in itertools.pairwise((0.0, *found, 1.0))):
            raise ConfigError(
                f"--milestones={quoted(self.milestones)[1:-1]}: must rise between 0 and 1, as in 0.5,0.75"
            )
        return found

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation of training images.

        Raises:
          ConfigError: if `augment` names an unknown one.
        """
        given = [] if self.augment == "none" else self.augment.split(",")
        if unknown := [name for name in given if name not in augmentation.NAMES]:
            raise ConfigError(
                f"--augment={quoted(self.augment)[1:-1]}: {quoted(unknown[0])} must be one of "
                f"{', '.join(augmentation.NAMES)}; or none alone"
            )
        names = tuple(name for name in augmentation.NAMES if name in given)
        return Augmentation(names, self.crop_padding, self.cutout_size)

    @property
    def steps_per_batch(self) -> int:
        """The number of consecutive steps that train on the same batch."""
        return self.settings[self.entry.replays] if self.entry.replays else 1

    def total_steps(self, training_images: int) -> int:
        """The number of steps to train: `steps`, or as many as `epochs` passes over `training_images` take.

        The last batch of the passes and the last update of several batches are whole ones. Free training takes as many and
        so passes over them less often: `epochs / replays` times.
        """
        if not self.epochs:
            return self.steps
        batches = math.ceil(self.epochs * training_images / self.batch_size)
        return math.ceil(batches / self.accumulate) * self.accumulate


# What runs did before there was a choice: left out of their identity, so that their folders are found.
FIRST = {
    "norm": "linf",
    "training_loss": "ce",
    "memory": "none",
    "ema": 0.0,
    "first_step_size": 0.0,
    "first_point": "step",
    "eps_scale": 1.0,
    "hold_reference": False,
    "adversarial_at": "first",
    "optimizer": "adam",
    "weight_decay": 0.0,
    "clip_norm": 0.0,
    "awp": 0.0,
    "attack_statistics": "batch",
    "accumulate": 1,
    "milestones": "0.5,0.75",
    "lr_warmup": 0.0,
    "augment": "none",
    "width": 0,
    "init_from": "",
    "mean": "",
    "std": "",
}
COMMON = tuple(field for field in dataclasses.fields(Config) if field.name != "settings")  # what every run has


def configure(**values: Any) -> Config:
    """Builds a run's configuration from keywords: common settings and those of its defense.

        configure(defense="trades", beta=3.0, steps=100)

    Args:
      values: fields of `Config`, and settings of the defense; the rest is at its defaults.

    Raises:
      ConfigError: if a setting is unknown, not read by the defense, has another type, or is out of range.
    """
    common = {field.name for field in COMMON}
    own = {name: value for name, value in values.items() if name not in common}
    return Config(settings=own, **{name: value for name, value in values.items() if name in common})


def number_of_steps(value: float, total: int) -> float:
    """A number of steps: `value`, or below 1 that fraction of `total`."""
    return value * total if value < 1 else value


def parse_number(text: str) -> float:
    """A number, or a quotient of two, such as 8/255.

    Raises:
      ValueError: if it is neither.
    """
    dividend, slash, divisor = text.partition("/")
    if slash and not float(divisor):
        raise ValueError(f"{quoted(text)}: must not divide by 0")
    return float(dividend) / float(divisor) if slash else float(dividend)


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas, none in an empty text; NaN alone if one of them is no number."""
    try:
        return tuple(parse_number(one) for one in text.split(",")) if text else ()
    except ValueError:
        return (math.nan,)


def _spread(numbers: tuple[float, ...], neutral: float) -> tuple[float, ...]:
    """Numbers of channels: a single one where they are equal, none where they change nothing."""
    if len(set(numbers)) == 1:
        numbers = numbers[:1]
    return () if numbers == (neutral,) else numbers


def _text(numbers: tuple[float, ...]) -> str:
    return ",".join(map(repr, numbers))


def _common(config: Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in COMMON}


def _not_read(name: str, value: object, defense: str) -> str:
    """Why a setting that the defense does not read is refused."""
    if reading := readers(name):
        return (
            f"--{name}={quoted(value)}: --defense={defense} does not read it; leave it out, or train one that does: "
            f"{', '.join(reading)}"
        )
    known = ", ".join([*(field.name for field in COMMON), *DEFENSES[defense].defaults()])
    return f"unknown setting {quoted(name)}; --defense={defense} has {known}"


def check_at_least(request: object, **bounds: int) -> None:
    """Refuses a request if one of the named attributes is below its bound.

    Raises:
      ConfigError: with flag, value and bound.
    """
    for name, lower in bounds.items():
        if (value := getattr(request, name)) < lower:
            raise ConfigError(f"--{name}={value}: must be at least {lower}")


def check(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Checks a value against a field made by `setting` and returns it, as a float if the field is one.

    Raises:
      ConfigError: if its type or range is wrong, with flag, value and range.
    """
    return setting_of(field).check(value)
