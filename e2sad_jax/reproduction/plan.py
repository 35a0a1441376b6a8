"""What is to be reproduced: scales, and the models behind each table, figure and study."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from e2sad_jax import paper
from e2sad_jax.attacks import OBJECTIVES
from e2sad_jax.config import Config
from e2sad_jax.evaluate import SUITES, Attack

TABLES = ("1", "2", "3")
FIGURES = ("2", "3", "4")
STUDIES = ("second_step", "lam", "alpha", "labels")
LAMBDAS = (0.03, 0.1, 0.3, 1.0, 3.0)
ALPHAS = (0.2, 0.4, 0.6, 0.8)
STUDY_SEEDS = 3
TRANSFER = Attack("IFGSM-30", "ifgsm", 0.3, 30)  # Table 2
SURFACE_SPAN = 0.4  # t1 and t2 of Figures 3 and 4 end here
FIGURE_3_IMAGES = 128


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is spent on each model.

    Attributes:
      name: of the folder under results.
      mnist: settings that replace the paper's on MNIST; empty for the paper's setting to the letter.
      svhn: the same on SVHN.
      restarts: random restarts of PGD-40 in the tables.
      grid: points along each axis of a loss surface.
      surface_images: test images of Figure 4, 0: all.
    """

    name: str
    mnist: Mapping[str, Any]
    svhn: Mapping[str, Any]
    restarts: int
    grid: int
    surface_images: int

    def describe(self, config: Config, dataset_name: str, tests: int) -> str:
        """The setting in words, for every heading: what was done, and how it differs from the paper's."""
        trained = f"{config.epochs:g} epochs" if config.epochs else f"{config.steps:,} steps"
        examples = min(config.eval_examples, tests) or tests
        part = f"the first {examples:,} of {tests:,}" if examples < tests else f"all {tests:,}"
        text = (
            f"{self.name} scale: {dataset_name}, {config.model}, {trained} of {config.batch_size}, {part} test images"
        )
        if config.precision != "float32":
            text += f", layers in {config.precision}"
        own = self.svhn if config.transform == "standardize" else self.mnist
        if own:
            whole = "20 epochs" if own is self.svhn else "30,000 steps"
            width = ", twice the width" if config.model == "digits_cnn" else ""
            text += f" (the paper: {whole} of 256{width}, all test images)"
        return text


SCALES: Mapping[str, Scale] = {
    "full": Scale("full", {}, {"epochs": 20.0}, restarts=10, grid=41, surface_images=0),
    "small": Scale(
        "small",
        {"model": "digits_cnn", "steps": 2_000, "batch_size": 64, "eval_examples": 1_000},
        {"steps": 600, "batch_size": 64, "eval_examples": 500, "checkpoint_every": 200},
        restarts=3,
        grid=21,
        surface_images=256,
    ),
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of a table: its name there, its settings, and the paper's accuracies by the name of the attack.

    Attributes:
      name: the defense, with what tells it from others of its table.
      label: "hard" or "soft", what it was trained on.
      config: its settings, seed 0.
      paper: accuracies in the paper, empty if it has none.
    """

    name: str
    label: str
    config: Config
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the other models of a table."""
        return self.name, self.label

    def seeds(self, count: int) -> list[Config]:
        """Its settings with seeds 0 to count - 1."""
        return [dataclasses.replace(self.config, seed=seed) for seed in range(count)]


def _entry(name: str, setting: Mapping[str, Any], scale: Scale, common: Mapping[str, Any], **kwargs: Any) -> Entry:
    on_svhn = setting["model"] == "svhn_cnn"
    config = Config(
        **{**setting, "data": "svhn" if on_svhn else "mnist", **(scale.svhn if on_svhn else scale.mnist), **common}
    )
    return Entry(name, "soft" if config.soft_label else "hard", config, **kwargs)


def _of_table(table: str, scale: Scale, common: Mapping[str, Any]) -> list[Entry]:
    columns = [c for c in paper.COLUMNS if c.table == table]
    return [_entry(c.name, c.setting, scale, common, paper=c.accuracy) for c in columns]


def table_1(scale: Scale, common: Mapping[str, Any]) -> list[Entry]:
    """The nine models of Table 1, and Hamm's minimax, of which the paper tells in words."""
    entries = _of_table("Table 1", scale, common)
    hamm = {**_e2sad_setting(), "defense": "hamm", "soft_label": False}
    return [*entries, _entry("Hamm 0.3", hamm, scale, common)]


def table_2(scale: Scale, common: Mapping[str, Any]) -> list[Entry]:
    """Substitutes and targets of Table 2: the nine models of Table 1, each as both."""
    return _of_table("Table 1", scale, common)


def table_3(scale: Scale, common: Mapping[str, Any]) -> list[Entry]:
    """The four models of Table 3."""
    return _of_table("Table 3", scale, common)


def figure_4(scale: Scale, common: Mapping[str, Any]) -> list[Entry]:
    """Natural, FGSM 0.3, IFGSM 0.3 and e2SAD, all on soft labels, so that their losses share one floor."""
    wanted = ("natural", "FGSM 0.3", "IFGSM 0.3", "e2SAD")
    return [e for e in table_2(scale, common) if e.name in wanted and e.label == "soft"]


def figure_3(scale: Scale, common: Mapping[str, Any]) -> list[Entry]:
    """The e2SAD model."""
    return figure_4(scale, common)[-1:]


def study(name: str, scale: Scale, common: Mapping[str, Any]) -> list[Entry]:
    """The models of one study: e2SAD with all but one setting as in Table 1, and what it is to be held against.

    Raises:
      KeyError: if there is no such study.
    """
    base = _e2sad_setting()

    def e2sad(name: str, **changes: Any) -> Entry:
        return _entry(name, {**base, **changes}, scale, common)

    beside = {e.key: e for e in table_2(scale, common)}
    return {
        "second_step": [
            *(e2sad(f"e2SAD, {objective}", second_step=objective) for objective in OBJECTIVES),
            dataclasses.replace(beside["FGSM 0.3", "soft"], paper={}),
        ],
        "lam": [e2sad(f"lambda {lam:g}", lam=lam) for lam in LAMBDAS],
        "alpha": [e2sad(f"alpha {alpha:g}", alpha=alpha) for alpha in ALPHAS],
        "labels": [e2sad("e2SAD", soft_label=soft) for soft in (False, True)],
    }[name]


def _e2sad_setting() -> Mapping[str, Any]:
    return next(c.setting for c in paper.COLUMNS if (c.table, c.name) == ("Table 1", "e2SAD"))


def suite(item: str, scale: Scale) -> tuple[Attack, ...]:
    """The attacks of a table ("1", "3") or of a study: the paper's, then PGD with random starts."""
    attacks = SUITES["svhn" if item == "3" else "mnist"]
    if item not in TABLES:
        return attacks
    *own, pgd = attacks
    return *own, dataclasses.replace(pgd, name=f"PGD-40, {scale.restarts} restarts", restarts=scale.restarts)


def unique(configs: Iterable[Config]) -> list[Config]:
    """Without repetitions, in order: a run's identity is its configuration."""
    return list({(c.data, c.digest()): c for c in configs}.values())


def work(config: Config, training_images: int) -> float:
    """Estimated cost of training, in images through a natural step of Table 4's network: for the time left."""
    gradients = {"natural": 1.0, "fgsm": 2.0, "hamm": 3.0, "e2sad": 3.35}.get(
        config.defense, 2 + 0.7 * config.attack_steps
    )
    return config.total_steps(training_images) * config.batch_size * gradients * _width(config)


def attack_work(config: Config, attacks: Sequence[Attack], images: int) -> float:
    """The same for attacks; a gradient with respect to the image is about two thirds of a step."""
    return sum(attack.gradients() for attack in attacks) * images * 0.66 * _width(config)


def _width(config: Config) -> float:
    return {"digits_cnn": 0.3, "svhn_cnn": 2.5}.get(config.model, 1.0)


def without_run(config: Config) -> Config:
    """The settings without what only says which run it is: programs that are compiled for one serve all alike."""
    return dataclasses.replace(config, seed=0, data="mnist", data_dir="", workdir="", defense="natural")
