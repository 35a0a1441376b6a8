"""What is compared, and with what effort."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from e2sad_jax.defenses import DEFENSES
from e2sad_jax.errors import ConfigError, close_to
from e2sad_jax.evaluation import Attack, Effort
from e2sad_jax.networks import NETWORKS
from e2sad_jax.runs.recipes import RECIPES
from e2sad_jax.training.config import (
    DATA,
    DATA_DIR,
    SCHEDULES,
    Config,
    check,
    configure,
    setting,
)
from e2sad_jax.training.presets import RECIPE, SCHEDULE, preset

# By name in tables and pictures. Budgets are in multiples of eps.
ENTRIES: Mapping[str, Mapping[str, Any]] = {
    "natural": {"defense": "natural"},
    "input gradient": {"defense": "input_gradient"},
    "FGSM (Eq. 3)": {"defense": "fgsm"},
    "distillation": {"defense": "distillation"},
    "strong adversary": {"defense": "strong_adversary"},
    "RS-FGSM": {"defense": "rs_fgsm"},
    "N-FGSM": {"defense": "n_fgsm"},
    "Hamm": {"defense": "hamm"},
    "GradAlign": {"defense": "grad_align"},
    "e2SAD, paper's points": {"defense": "e2sad"},
    "e2SAD, lambda 1": {"defense": "e2sad", "lam": 1.0},
    "e2SAD, robust": {"defense": "e2sad", "preset": "robust"},
    "e2SAD, robust2": {"defense": "e2sad", "preset": "robust2"},
    "e2SAD, two steps": {
        "defense": "e2sad",
        "preset": "robust",
        "first_point": "step",
        "first_step_size": 0.5,
        "adversarial_at": "first",
        "lam": 1.0,
    },
    "PGD-2": {"defense": "pgd", "attack_steps": 2},
    "PGD-2, shorter steps": {"defense": "pgd", "attack_steps": 2, "attack_step_size": 0.8},
    "PGD-3": {"defense": "pgd", "attack_steps": 3},
    "TRADES-2": {"defense": "trades", "attack_steps": 2},
    "Free-4": {"defense": "free", "replays": 4},
    "Free-8": {"defense": "free"},
    "PGD-7": {"defense": "pgd", "attack_steps": 7},
    "PGD-10": {"defense": "pgd", "attack_steps": 10},
    # PGD that starts where the image's last attack ended, and steps of half the budget.
    "ATTA-1": {"defense": "atta", "attack_steps": 1},
    "ATTA-2": {"defense": "atta", "attack_steps": 2},
    "ATTA-3": {"defense": "atta", "attack_steps": 3},
    "ATTA-7": {"defense": "atta", "attack_steps": 7},
    "TRADES-1, remembered": {"defense": "trades", "attack_steps": 1, "attack_step_size": 0.5, "memory": "int8"},
    "FGSM-PGI": {"defense": "pgi"},
    "FGSM-UAP": {"defense": "uap"},
    "GAT": {"defense": "gat"},
    "NuAT": {"defense": "nuat"},
    "N-FGSM, QUB": {"defense": "n_fgsm", "training_loss": "qub"},
    "PGD-2, QUB": {"defense": "pgd", "attack_steps": 2, "training_loss": "qub"},
    "IFGSM-30 (Eq. 3)": {"defense": "ifgsm", "attack_steps": 30},
}
# Clean accuracy and that under AutoAttack, in percent, that FastAT Benchmark has published, by the names of entries:
# CIFAR-10 at 8/255, PreActResNet-18, its table of methods (https://arxiv.org/abs/2604.22853).
FASTAT: Mapping[str, tuple[float, float]] = {
    "PGD-10": (82.4, 50.49),
    "NuAT": (81.0, 50.10),
    "FGSM-PGI": (79.7, 49.89),
    "FGSM-UAP": (80.6, 49.44),
    "GAT": (85.1, 49.15),
    "GradAlign": (79.4, 47.99),
    "N-FGSM": (78.6, 47.77),
    "Free-4": (75.2, 44.34),
    "RS-FGSM": (77.7, 43.09),
}
# Its recipe, and the attacks of AutoAttack that are ours, for the fields of a request.
_FIELD = RECIPES["cifar10"].settings
_FASTAT: Mapping[str, Any] = {
    **{name: _FIELD[name] for name in ("data", "model", "augment", "batch_size", "learning_rate", "schedule")},
    **{name: _FIELD[name] for name in ("delta", "ema", "validation_examples")},
    **{"eps": _FIELD["eps1"], "eps_warmup": 0.0, "eps_scale": 1.0, "steps": 38_282},  # 100 epochs of 49,000 images
    **{"examples": 10_000, "apgd_steps": 100, "targets": 9, "queries": 5000},
}
# The robust preset with one thing changed: what each part of it does.
_PARTS: Mapping[str, Mapping[str, Any]] = {
    "no memory": {"memory": "none"},
    "no memory, longer step": {"memory": "none", "eps2": 1.25},  # Fast AT's
    "memory in bfloat16": {"memory": "bf16"},
    "no dissimilarity": {"lam": 0.0},
    "trained at the first point": {"adversarial_at": "first", "lam": 1.0},
    "first point by a step": {"first_point": "step", "first_step_size": 0.5},
    "second point at random": {"second_step": "random"},
    "second point up the entropy": {"second_step": "total"},
    "gradient through both predictions": {"hold_reference": False},
    "second step a third": {"eps2": 1 / 3},  # the paper's ratio
    "second step of eps": {"eps2": 1.0},
    "second point outside the ball": {"ball_second": False},
    "clean images too": {"alpha": 0.6},
    "lambda 1": {"lam": 1.0},
    "lambda 3": {"lam": 3.0},
    "hard labels": {"soft_label": False},
    "budget as tested": {"eps_scale": 1.0},
    "full eps from the start": {"eps_warmup": 0.0},
    "constant learning rate": {"schedule": "constant", "learning_rate": 1e-3},  # the paper's
    "perturbed weights": {"awp": 0.005},
}
REFERENCE = "e2SAD, robust"  # its steps are the budget where all spend the same FLOPs
PARTS = {f"{REFERENCE}, {name}": {"defense": "e2sad", "preset": "robust", **own} for name, own in _PARTS.items()}
JUDGES = {"test": "test images", "held_out": "images held out of the training set"}

# Of fields that are younger than a compare.json or cited.json.
YOUNGER: Mapping[str, Any] = {
    "delta": 0.0,
    "eps_scale": 1.0,
    "ema": 0.0,
    "last_only": False,
    "judge": "test",
    "cited": False,
    "recipe": "",
    "width": 0,
    "augment": "none",
    "init_from": "",
}


def entries() -> dict[str, Mapping[str, Any]]:
    """What is compared unless asked otherwise: `ENTRIES`, and by its name each registered defense that none of them has."""
    there = {entry["defense"] for entry in ENTRIES.values()}
    return {**ENTRIES, **{name: {"defense": name} for name in DEFENSES if name not in there}}


def known() -> dict[str, Mapping[str, Any]]:
    """All that can be compared, by name: the entries, e2SAD's parts, and each registered defense at its defaults."""
    return {**entries(), **PARTS, **{name: {"defense": name} for name in DEFENSES}}


CHECKPOINTS = ("last", "average", "best")


def checkpoints(request: Mapping[str, Any]) -> tuple[str, ...]:
    """What is attacked of each run: its last weights, their average where there is one, and the best checkpoint.

    Args:
      request: the fields of a `Request`, as compare.json has them.
    """
    if request.get("last_only"):
        return ("last",)
    return tuple(which for which in CHECKPOINTS if which != "average" or request.get("ema"))


def checkpoint_every(steps: int) -> int:
    """Steps between checkpoints: the best is one of at least four, and validation costs little of a long run."""
    return max(min(500, steps // 4), steps // 8, 1)


def position(name: str) -> int:
    """Place of an entry among all that are known, for tables; behind them where it is not."""
    return list(known()).index(name) if name in known() else len(known())


def _quoted() -> str:
    return ", ".join(f'"{name}"' for name in known())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to compare; each field is the flag of that name.

    Raises:
      ConfigError: if a value is out of range, or the flags do not fit together.
    """

    entry: tuple[str, ...] = setting((), f"what to compare, may be given several times; none: all; of {_quoted()}")
    recipe: str = setting(
        "",
        "fastat: the settings of FastAT Benchmark, whose published numbers stand beside; flags that are given have precedence",
        choices=("", "fastat"),
    )
    data: str = setting("mnist", DATA)
    data_dir: str = setting("", DATA_DIR)
    model: str = setting("digits_cnn", "network; mnist_cnn is the paper's", choices=NETWORKS)
    width: int = setting(0, "filters of a residual network's first convolution, 0: its own number", lower=0)
    augment: str = setting("none", "changes of training images: crop, flip, cutout, separated by commas")
    init_from: str = setting(
        "", "folder of a run, whose last weights each training begins with, or safetensors file; empty: random ones"
    )
    steps: int = setting(2000, "training steps of each", lower=1)
    batch_size: int = setting(128, "images a step", lower=1)
    eps: float = setting(0.3, "l-infinity budget of training and attack", above=0, upper=1)
    eps_warmup: float = setting(
        SCHEDULE["eps_warmup"], "steps over which eps rises, below 1: a fraction of all steps", lower=0
    )
    schedule: str = setting(SCHEDULE["schedule"], "learning rate over all steps", choices=SCHEDULES)
    learning_rate: float = setting(SCHEDULE["learning_rate"], "peak learning rate of Adam", above=0)
    eps_scale: float = setting(RECIPE["eps_scale"], "budget of training in multiples of eps", above=0)
    delta: float = setting(
        Config.delta, "mass that the labels of training give to the wrong classes, 0: hard labels", lower=0, upper=0.999
    )
    ema: float = setting(
        0.0, "decay of averaged weights, evaluated beside the raw ones; 0: none", lower=0, upper=0.999999
    )
    equal_flops: bool = setting(
        False, f"train each as many steps as cost what --steps of {REFERENCE} do, instead of the same number"
    )
    parts: bool = setting(False, "compare what each part of e2SAD's robust preset does, instead of every defense")
    cited: bool = setting(
        False,
        "compare the systems that the paper cites, each under the attack that it was published with and one made for it, "
        "instead of every defense",
    )
    seeds: int = setting(1, "number of seeds per entry", lower=1)
    validation_examples: int = setting(
        1000, "training images held out to choose the best checkpoint, 0: use 500 of the training images", lower=0
    )
    judge: str = setting(
        "test",
        "images to attack: the test set, or, to choose settings, those held out of the training set",
        choices=tuple(JUDGES),
    )
    last_only: bool = setting(False, "attack the last weights alone: no best checkpoint, no average")
    examples: int = setting(500, "images to attack, a sample stratified by class, or all if there are fewer", lower=1)
    queries: int = setting(1000, "queries of Square, 0: leave it out", lower=0)
    apgd_steps: int = setting(50, "steps of APGD-CE and of APGD-T", lower=1)
    targets: int = setting(9, "wrong classes that the targeted APGD tries", lower=1)
    workdir: str = setting("runs/compare", "folder of the runs")
    results: str = setting("", "folder for compare.md, .json and .png, empty: --workdir")
    show: bool = setting(
        False, "train nothing: count the costs of the rows in --results again and write its files again"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        for name in () if self.cited else self.entry:  # those of --cited are other systems
            if name not in known():
                raise ConfigError(f"--entry={name:.100}: {close_to(name, known())}must be of {_quoted()}")
        if self.parts and self.entry:
            raise ConfigError(f"--parts: chooses what is compared; leave out --entry={self.entry[0]}, or --parts")
        if self.cited and (self.parts or self.equal_flops or self.show or self.judge != "test" or self.recipe):
            raise ConfigError(
                "--cited: chooses what is compared and how; leave out --parts, --equal_flops, --show, --judge and --recipe"
            )
        if self.recipe and self.parts:
            raise ConfigError(f"--parts: chooses what is compared; leave it out, or --recipe={self.recipe}")
        if self.judge == "held_out" and self.examples > self.validation_examples:
            raise ConfigError(
                f"--examples={self.examples}: must be at most --validation_examples={self.validation_examples} "
                "for --judge=held_out"
            )

    @classmethod
    def of(cls, **given: Any) -> "Request":
        """The request of the given fields; the others are at the recipe's values where it has some, else at their defaults."""
        return cls(**{**(_FASTAT if given.get("recipe") == "fastat" else {}), **given})

    def entries(self) -> tuple[str, ...]:
        """What is compared, by its name in tables, each once."""
        if self.entry:
            return tuple(dict.fromkeys(self.entry))
        if self.recipe:
            return ("natural", REFERENCE, "e2SAD, robust2", "ATTA-1", *FASTAT)
        return ("natural", REFERENCE, *PARTS) if self.parts else tuple(entries())

    def question(self) -> dict[str, Any]:
        """What rows must have in common to share a table: all but the entries, their seeds and where things lie."""
        values = dataclasses.asdict(self)
        return {
            k: v for k, v in values.items() if k not in ("entry", "seeds", "data_dir", "workdir", "results", "show")
        }

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """What is attacked of each run."""
        return checkpoints(dataclasses.asdict(self))

    def stages(self, num_classes: int) -> list[Attack]:
        """The attacks; robust accuracy counts the images that all of them leave correct."""
        return Effort(apgd_steps=self.apgd_steps, queries=self.queries, targets=self.targets).stages(num_classes)

    def configs(self, name: str) -> list[Config]:
        """The runs of an entry, one for each seed, under the request's schedule unless the entry sets its own.

        A preset brings its points.
        """
        entry = dict(known()[name])
        points = preset(entry.pop("preset", "paper"), self.eps)
        for budget in {"eps2", "attack_step_size", "first_step_size"} & entry.keys():
            entry[budget] *= self.eps
        if entry["defense"] == "e2sad":
            points = {"eps2": self.eps / 3, **points}  # the paper's ratio
        shared = (
            "data",
            "data_dir",
            "model",
            "width",
            "augment",
            "init_from",
            "steps",
            "batch_size",
            "validation_examples",
            "ema",
            "eps_scale",
            *SCHEDULE,
        )
        common: dict[str, Any] = {key: getattr(self, key) for key in shared}
        common |= {"soft_label": self.delta > 0, "delta": self.delta or Config.delta}
        if self.recipe:
            others: tuple[str, ...] = ("optimizer", "weight_decay")
            if self.data == _FIELD["data"]:  # of its images
                others += ("mean", "std")
            common |= {name: _FIELD[name] for name in others}
        common["checkpoint_every"] = checkpoint_every(self.steps)
        found = []
        for seed in range(self.seeds):
            config = configure(**{**points, **common, "eps1": self.eps, **entry, "seed": seed})
            folder = pathlib.Path(self.workdir).expanduser() / pathlib.Path(config.default_workdir()).name
            found.append(config.replace(workdir=str(folder)))
        return found
