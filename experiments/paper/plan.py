"""What is to be reproduced: scales, and the models behind each table, figure and study."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from e2sad_jax.attacks import OBJECTIVES
from e2sad_jax.evaluation import SUITES, Attack
from e2sad_jax.reporting import paper_numbers
from e2sad_jax.training import Config, configure

NAMES: Mapping[str, tuple[str, ...]] = {
    "table": ("1", "2", "3"),
    "figure": ("2", "3", "4"),
    "study": ("second_step", "lam", "alpha", "labels"),
}
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
        if self.name != "full":
            whole = "20 epochs" if config.data == "svhn" else "30,000 steps"
            width = ", twice the width" if config.model == "digits_cnn" else ""
            text += f" (the paper: {whole} of 256{width}, all test images)"
        return text


SCALES: Mapping[str, Scale] = {
    # Checkpoints further apart: at an accelerator's speed 500 steps are a second.
    "full": Scale("full", {"checkpoint_every": 2_000}, {"epochs": 20.0}, restarts=10, grid=41, surface_images=0),
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
class Item:
    """One table, figure or study.

    Attributes:
      kind: a key of `NAMES`.
      name: one of its names.
    """

    kind: str
    name: str

    @property
    def file(self) -> str:
        """The name of its files, without an ending."""
        return f"{self.kind}_{self.name}" if self.kind == "study" else f"{self.kind}{self.name}"

    def entries(self, scale: Scale, common: Mapping[str, Any]) -> list["Entry"]:
        """Its models; `common` are settings of them all."""
        if self.kind == "study":
            return study(self.name, scale, common)
        return _ENTRIES[self.kind, self.name](scale, common)

    def suite(self, scale: Scale) -> tuple[Attack, ...]:
        """The attacks of a white-box table or of a study: the paper's, then PGD with random starts. Else none."""
        if self.kind == "figure" or self == TABLE_2:
            return ()
        attacks = SUITES["svhn" if self == TABLE_3 else "mnist"]
        if self.kind == "study":
            return attacks
        *own, pgd = attacks
        return *own, dataclasses.replace(pgd, name=f"PGD-40, {scale.restarts} restarts", restarts=scale.restarts)

    def seeds(self, asked: int) -> int:
        """How many seeds of each model it shows, if `asked` for that many (0: as many as usual)."""
        return 1 if self.kind == "figure" else asked or (STUDY_SEEDS if self.kind == "study" else 1)


TABLE_1, TABLE_2, TABLE_3 = (Item("table", name) for name in NAMES["table"])
FIGURE_2, FIGURE_3, FIGURE_4 = (Item("figure", name) for name in NAMES["figure"])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of a table: its name there, its settings, and the paper's accuracies by the name of the attack.

    Attributes:
      name: the defense, with what distinguishes it within its table.
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
        """What distinguishes it from the other models of a table."""
        return self.name, self.label

    def seeds(self, count: int) -> list[Config]:
        """Its settings with seeds 0 to count - 1."""
        return [dataclasses.replace(self.config, seed=seed) for seed in range(count)]


def _entry(name: str, setting: Mapping[str, Any], scale: Scale, common: Mapping[str, Any], **kwargs: Any) -> Entry:
    on_svhn = setting["model"] == "svhn_cnn"
    config = configure(
        **{**setting, "data": "svhn" if on_svhn else "mnist", **(scale.svhn if on_svhn else scale.mnist), **common}
    )
    return Entry(name, "soft" if config.soft_label else "hard", config, **kwargs)


def _of_table(table: str, scale: Scale, common: Mapping[str, Any]) -> list[Entry]:
    columns = [c for c in paper_numbers.COLUMNS if c.table == table]
    return [_entry(c.name, c.setting, scale, common, paper=c.accuracy) for c in columns]


def table_1(scale: Scale, common: Mapping[str, Any]) -> list[Entry]:
    """The nine models of Table 1, and Hamm's minimax, which the paper describes in words."""
    entries = _of_table("Table 1", scale, common)
    e2sad = _entry("e2SAD", _e2sad_setting(), scale, common).config
    return [*entries, Entry("Hamm 0.3", "hard", e2sad.replace(defense="hamm", soft_label=False))]


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

    table2 = {e.key: e for e in table_2(scale, common)}
    return {
        "second_step": [
            *(e2sad(f"e2SAD, {objective}", second_step=objective) for objective in OBJECTIVES),
            dataclasses.replace(table2["FGSM 0.3", "soft"], paper={}),
        ],
        "lam": [e2sad(f"lambda {lam:g}", lam=lam) for lam in LAMBDAS],
        "alpha": [e2sad(f"alpha {alpha:g}", alpha=alpha) for alpha in ALPHAS],
        "labels": [e2sad("e2SAD", soft_label=soft) for soft in (False, True)],
    }[name]


def _e2sad_setting() -> Mapping[str, Any]:
    return next(c.setting for c in paper_numbers.COLUMNS if (c.table, c.name) == ("Table 1", "e2SAD"))


_ENTRIES: Mapping[tuple[str, str], Callable[[Scale, Mapping[str, Any]], list[Entry]]] = {
    ("table", "1"): table_1,
    ("table", "2"): table_2,
    ("table", "3"): table_3,
    ("figure", "2"): lambda scale, common: [],
    ("figure", "3"): figure_3,
    ("figure", "4"): figure_4,
}


def all_entries(data: str, scale: Scale, common: Mapping[str, Any]) -> list[Entry]:
    """Every model on "mnist" or "svhn" that anything may ask for."""
    items = [TABLE_3] if data == "svhn" else [TABLE_1, *(Item("study", name) for name in NAMES["study"])]
    return [entry for item in items for entry in item.entries(scale, common)]


def work(config: Config, steps: int) -> float:
    """Estimated cost of training steps, in images through a natural step of Table 4's network: for the time left."""
    gradients = {"natural": 1.0, "fgsm": 2.0, "hamm": 3.0, "e2sad": 3.35}.get(
        config.defense, 1.4 + 0.7 * config.settings.get("attack_steps", 1)
    )
    return steps * config.batch_size * gradients * _width(config)


def attack_work(config: Config, attacks: Sequence[Attack], images: int) -> float:
    """The same for attacks; a gradient with respect to the image is about two thirds of a step."""
    return sum(attack.gradients() for attack in attacks) * images * 0.66 * _width(config)


def _width(config: Config) -> float:
    return {"digits_cnn": 0.3, "svhn_cnn": 2.5}.get(config.model, 1.0)
