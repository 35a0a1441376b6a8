"""How robust e2SAD is after how many training steps: the paper's setting beside `--preset=robust2`.

python -m benchmarks.lengths --data_dir=data   # 2,000, 8,000 and 16,000 steps of 128: for an accelerator, or hours

The paper's network (Table 4) on MNIST at 0.3, attacked by the paper's strongest attack, IFGSM-30 (its Table 1), then by APGD. A
setting whose learning rate is constant goes on from its shorter run; one with a schedule trains anew. Writes lengths.md, .json
and .png after each length; the same command goes on from there.
"""

import dataclasses
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from e2sad_jax import cli, data, training
from e2sad_jax._io import check_folder, read_json, write_json, write_text
from e2sad_jax.comparison.evaluate_model import evaluate_model
from e2sad_jax.comparison.request import Request as Comparison
from e2sad_jax.comparison.run import settings_of
from e2sad_jax.errors import ConfigError, first_line
from e2sad_jax.evaluation import Attack
from e2sad_jax.reporting import paper_numbers, plots, provenance
from e2sad_jax.reporting.table import Table
from e2sad_jax.training import Config
from e2sad_jax.training.config import DATA_DIR, check, configure, setting
from e2sad_jax.training.presets import preset

IFGSM = "IFGSM-30"
COLORS = {"robust2": "#c1272d", "paper": "#3b6ea5"}  # of the presets that are compared
TITLE = "Robust accuracy against training steps"


@dataclasses.dataclass(frozen=True)
class Attacked(Comparison):
    """A comparison whose models face the paper's strongest attack first."""

    def stages(self, num_classes: int) -> list[Attack]:
        """IFGSM-30, then the attacks of every comparison."""
        return [Attack(IFGSM, "ifgsm", self.eps, 30), *super().stages(num_classes)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to train and how to attack it; each field is the flag of that name.

    Raises:
      ConfigError: if a value is out of range.
    """

    preset: tuple[str, ...] = setting(tuple(COLORS), "settings of e2SAD, may be given several times")
    steps: tuple[str, ...] = setting(("2000", "8000", "16000"), "lengths of training, may be given several times")
    model: str = setting("mnist_cnn", "network; mnist_cnn is the paper's")
    data: str = setting("mnist", "mnist, or a file PATH.npz")
    data_dir: str = setting("", DATA_DIR)
    batch_size: int = setting(128, "images a step", lower=1)
    eps: float = setting(0.3, "l-infinity budget of training and attack", above=0, upper=1)
    validation_examples: int = setting(1000, "training images that are held out", lower=1)
    examples: int = setting(1000, "test images to attack, a sample stratified by class", lower=1)
    apgd_steps: int = setting(30, "steps of APGD-CE and of APGD-T", lower=1)
    targets: int = setting(3, "wrong classes that the targeted APGD tries", lower=1)
    queries: int = setting(200, "queries of Square, 0: leave it out", lower=0)
    workdir: str = setting("runs/lengths", "folder of the runs")
    results: str = setting("", "folder for lengths.md, .json and .png, empty: --workdir")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        for length in self.steps:
            if not (length.isdecimal() and int(length)):
                raise ConfigError(f"--steps={length:.100}: must be a whole number, at least 1")
        for name in self.preset:
            if name not in COLORS:
                raise ConfigError(f"--preset={name:.100}: must be one of {', '.join(COLORS)}")

    def config(self, name: str, steps: int) -> Config:
        """e2SAD by a preset at one length, in a folder of its own."""
        own = preset(name, self.eps)
        shared = {key: getattr(self, key) for key in ("model", "data", "data_dir", "batch_size", "validation_examples")}
        config = configure(
            **{"eps2": self.eps / 3, **own, **shared, "defense": "e2sad", "eps1": self.eps, "steps": steps},
            checkpoint_every=min(1000, steps),
        )
        return config.replace(workdir=str(pathlib.Path(self.workdir).expanduser() / f"{name}-{steps}"))

    def comparison(self) -> Attacked:
        """The attacks on the last weights."""
        shared = ("data", "examples", "apgd_steps", "targets", "queries", "eps", "validation_examples")
        return Attacked(last_only=True, **{key: getattr(self, key) for key in shared})


def run(asked: Request) -> None:
    """Trains, attacks and writes, from the shortest run to the longest.

    Raises:
      ConfigError, DataError, WorkdirError: before or as training does.
    """
    provenance.commit()  # before the results that are written make it one with changes
    folder = pathlib.Path(asked.results or asked.workdir).expanduser()
    check_folder(folder, f"--results={folder}", make=True)
    dataset = data.load(asked.data, asked.data_dir or None)
    comparison, rows = asked.comparison(), _earlier(folder / "lengths.json", asked)
    for steps in sorted(set(map(int, asked.steps))):
        for name in dict.fromkeys(asked.preset):
            if any(row["preset"] == name and row["steps"] == steps for row in rows):
                continue
            config = asked.config(name, steps)
            _go_on(config, name)
            outcome = evaluate_model(comparison, config, dataset)
            last = outcome["last"]
            rows.append(
                {
                    "preset": name,
                    "steps": steps,
                    "clean": last["clean"],
                    "ifgsm": last["after"][IFGSM],
                    "robust": last["robust"],
                    "flops": steps * training.step_flops(config, dataset.image_shape, dataset.num_classes),
                    "images": outcome["images"],
                    "settings": settings_of(config),
                    "origin": {"command": provenance.command(), **provenance.environment()},
                }
            )
            rows.sort(key=lambda row: (list(COLORS).index(row["preset"]), row["steps"]))
            _write(folder, {"request": dataclasses.asdict(asked), "rows": rows})
            print(
                f"{name}, {steps:,} steps: clean {last['clean']:.3f}, {IFGSM} {last['after'][IFGSM]:.3f}, "
                f"worst case {last['robust']:.3f}",
                flush=True,
            )


def _go_on(config: Config, name: str) -> None:
    """Begins a run whose schedule has no end with the longest shorter one that is there."""
    folder = pathlib.Path(config.workdir)
    there = {int(path.name.rpartition("-")[2]): path for path in folder.parent.glob(f"{name}-[0-9]*")}
    shorter = [steps for steps in there if steps < config.steps and (there[steps] / "checkpoints").is_dir()]
    if shorter and not folder.exists() and not config.stretches:
        partial = folder.with_name(f"{folder.name}.partial")  # a kill leaves no half of a folder
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(there[max(shorter)], partial)
        partial.rename(folder)


def _earlier(path: pathlib.Path, asked: Request) -> list[dict[str, Any]]:
    """The rows of an earlier run under the same attacks, of any length, whose settings the presets still have."""
    attacks = ("eps", "examples", "apgd_steps", "targets", "queries")
    try:
        before = read_json(path)
        if any(before["request"][key] != getattr(asked, key) for key in attacks):
            return []
        return [
            row
            for row in before["rows"]
            if settings_of(Config.from_json(row["settings"]))  # which adds what there was no choice of then
            == settings_of(asked.config(row["preset"], row["steps"]))
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"warning: {path} is unusable ({first_line(error)}); it is written again", file=sys.stderr, flush=True)
        return []


def _write(folder: pathlib.Path, result: Mapping[str, Any]) -> None:
    write_json(folder / "lengths.json", result)
    write_text(folder / "lengths.md", page(result))
    plot(folder / "lengths.png", result)


def page(result: Mapping[str, Any]) -> str:
    """lengths.md: a row for each setting and length."""
    asked, rows = result["request"], result["rows"]
    origins = dict.fromkeys(
        f"`{o['command']}`, {o['hardware']}, {o['date'][:10]}, commit {o['commit']}"
        for o in (row["origin"] for row in rows)
    )
    table = Table(
        title=TITLE,
        columns=["preset", "steps", "clean", IFGSM, "worst case", "training FLOPs"],
        rows=[
            [
                row["preset"],
                f"{row['steps']:,}",
                *(f"{row[key]:.3f}" for key in ("clean", "ifgsm", "robust")),
                f"{row['flops']:.3g}",
            ]
            for row in rows
        ],
        notes=[
            f"Trained on {asked['data']}: network `{asked['model']}`, steps of {asked['batch_size']} images, one seed.",
            f"Attacked at {asked['eps']:g}: {rows[0]['images']:,} test images. Worst case: of {IFGSM}, APGD-CE and APGD-T "
            f"({asked['apgd_steps']} steps, {asked['targets']} targets) and Square ({asked['queries']} queries).",
            f"The paper has {_paper():.4f} under {IFGSM}, after 30,000 steps of 256.",
            *(f"Trained and attacked: {origin}." for origin in origins),
        ],
    )
    return f"{table.markdown()}\n![{TITLE}](lengths.png)\n"


def _paper() -> float:
    """The paper's accuracy of e2SAD under IFGSM-30 (Table 1)."""
    (column,) = (c for c in paper_numbers.COLUMNS if (c.table, c.name) == ("Table 1", "e2SAD"))
    return next(value for name, value in column.accuracy.items() if name.startswith(IFGSM))


def plot(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Draws accuracy under IFGSM-30 and in the worst case over the steps.

    Args:
      path: PNG to write.
      result: what lengths.json holds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    rows = result["rows"]
    for name, color in COLORS.items():
        own = [row for row in rows if row["preset"] == name]
        for key, style in (("ifgsm", "--o"), ("robust", "-o")):
            label = f"{name}, {IFGSM if key == 'ifgsm' else 'worst case'}"
            axes.plot([row["steps"] for row in own], [row[key] for row in own], style, color=color, label=label)
    axes.axhline(_paper(), color="0.5", lw=1, ls=":", label=f"the paper, {IFGSM}")
    axes.set(xscale="log", ylim=(-0.03, 1), xlabel="training steps", ylabel="accuracy")
    lengths = sorted({row["steps"] for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xticks([], minor=True)
    axes.grid(color="0.93")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    plots.save(path, figure, dpi=150)


if __name__ == "__main__":
    for flag in dataclasses.fields(Request):
        cli.define_flag(flag)
    cli.launch(lambda: run(cli.from_flags(Request)), "finished lengths and the others' last checkpoints are safe")
