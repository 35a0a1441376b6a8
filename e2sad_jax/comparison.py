"""Every defense at the same number of updates: robust accuracy in the worst case against what training cost."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from e2sad_jax import data, jobs, plots, report
from e2sad_jax._bounded import read_json
from e2sad_jax.auto import auto
from e2sad_jax.checkpoint import load
from e2sad_jax.config import SCHEDULE, SCHEDULES, Config, check, preset, setting
from e2sad_jax.data import Dataset
from e2sad_jax.diagnosis import Effort, of_classifier
from e2sad_jax.errors import ConfigError, NonFiniteError, Stopped, first_line
from e2sad_jax.evaluate import Attack
from e2sad_jax.step_cost.counts import counts
from e2sad_jax.workdir import read_sealed, sealed, write_config, write_json, write_text

# By name in tables and pictures; the price of each in gradient steps grows downwards. eps2 and steps are in multiples of eps.
ENTRIES: Mapping[str, Mapping[str, Any]] = {
    "natural": {"defense": "natural"},
    "input gradient": {"defense": "input_gradient"},
    "FGSM (Eq. 3)": {"defense": "fgsm"},
    "RS-FGSM": {"defense": "rs_fgsm"},
    "N-FGSM": {"defense": "n_fgsm"},
    "Hamm": {"defense": "hamm"},
    "GradAlign": {"defense": "grad_align"},
    "e2SAD, paper's points": {"defense": "e2sad"},
    "e2SAD, lambda 1": {"defense": "e2sad", "lam": 1.0},
    "e2SAD, robust": {"defense": "e2sad", "preset": "robust"},
    "PGD-2": {"defense": "pgd", "attack_steps": 2},
    "PGD-2, shorter steps": {"defense": "pgd", "attack_steps": 2, "attack_step_size": 0.8},
    "PGD-3": {"defense": "pgd", "attack_steps": 3},
    "TRADES-2": {"defense": "trades", "attack_steps": 2},
    "Free-8": {"defense": "free"},
    "PGD-10": {"defense": "pgd", "attack_steps": 10},
    "IFGSM-30 (Eq. 3)": {"defense": "ifgsm", "attack_steps": 30},
}
# What each part of it does: all else as in "e2SAD, robust".
_PARTS: Mapping[str, Mapping[str, Any]] = {
    "no second point": {"lam": 0.0},
    "second point at random": {"second_step": "random"},
    "second point up the loss": {"second_step": "loss"},
    "second step a third": {"eps2": 1 / 3},  # the paper's ratio
    "second step of eps": {"eps2": 1.0},
    "second point outside the ball": {"ball_second": False},
    "no random start": {"random_start": False},
    "clean images too": {"alpha": 0.6},
    "lambda 3": {"lam": 3.0},
}
PARTS = {f"e2SAD, robust, {n}": {"defense": "e2sad", "preset": "robust", **c} for n, c in _PARTS.items()}
_ORDER = {name: i for i, name in enumerate([*ENTRIES, *PARTS])}
REFERENCE = "e2SAD, robust"  # whose steps are counted where all spend the same FLOPs
_KNOWN = ", ".join(f'"{name}"' for name in _ORDER)
CHECKPOINTS = ("last", "best")
_JUDGES = {"test": "test images", "held_out": "images held out of the training set"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to compare; each field is the flag of that name.

    Raises:
      ConfigError: if a value is out of range.
    """

    entry: tuple[str, ...] = setting((), f"one to compare, may be given several times; none: all; of {_KNOWN}")
    data: str = setting("mnist", "mnist, digits, or a file PATH.npz of images in [0, 1]")
    data_dir: str = setting("", "where data sets lie, empty: $E2SAD_DATA_DIR or ~/.cache/e2sad_jax")
    model: str = setting("digits_cnn", "network; mnist_cnn is the paper's")
    steps: int = setting(2000, "training steps of each", lower=1)
    batch_size: int = setting(128, "images a step", lower=1)
    eps: float = setting(0.3, "l-infinity budget of training and attack", above=0, upper=1)
    eps_warmup: float = setting(
        SCHEDULE["eps_warmup"], "steps over which eps rises, below 1: so much of all steps", lower=0
    )
    schedule: str = setting(SCHEDULE["schedule"], "learning rate over all steps", choices=SCHEDULES)
    learning_rate: float = setting(SCHEDULE["learning_rate"], "Adam's, at its highest", above=0)
    equal_flops: bool = setting(
        False, f"train each as many steps as cost what --steps of {REFERENCE} do, instead of the same number"
    )
    parts: bool = setting(False, "compare what each part of e2SAD's robust preset does, instead of every defense")
    seeds: int = setting(1, "seeds of each", lower=1)
    validation_examples: int = setting(
        1000, "training images held out to choose the best checkpoint, 0: watch 500 of the training images", lower=0
    )
    judge: str = setting(
        "test",
        "images to attack: of the test set, or, to choose settings by, those held out of the training set",
        choices=tuple(_JUDGES),
    )
    examples: int = setting(500, "images to attack, the first ones, or all if there are fewer", lower=1)
    queries: int = setting(1000, "queries of Square, 0: leave it out", lower=0)
    apgd_steps: int = setting(50, "steps of both APGD", lower=1)
    targets: int = setting(9, "wrong classes that the targeted APGD tries", lower=1)
    workdir: str = setting("runs/compare", "where the runs are kept")
    results: str = setting("", "folder for compare.md, .json and .png, empty: --workdir")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        for name in self.entry:
            if name not in _ORDER:
                raise ConfigError(f"--entry={name:.100}: must be of {_KNOWN}")
        if self.parts and self.entry:
            raise ConfigError(f"--parts: chooses what is compared; leave out --entry={self.entry[0]}, or --parts")
        if self.judge == "held_out" and self.examples > self.validation_examples:
            raise ConfigError(
                f"--examples={self.examples}: must be at most --validation_examples={self.validation_examples} "
                "for --judge=held_out"
            )

    def entries(self) -> tuple[str, ...]:
        """What is compared, by name."""
        return self.entry or (("natural", REFERENCE, *PARTS) if self.parts else tuple(ENTRIES))

    def configs(self, name: str) -> list[Config]:
        """The runs of an entry, one for each seed, all under the same schedule; a preset brings its own points."""
        shared = ("data", "data_dir", "model", "steps", "batch_size", "validation_examples", *SCHEDULE)
        common: dict[str, Any] = {key: getattr(self, key) for key in shared}
        common["checkpoint_every"] = min(500, max(1, self.steps // 4))  # the best is one of at least four
        budgets = {"eps1": self.eps, "eps2": self.eps / 3}  # the paper's ratio
        entry = dict({**ENTRIES, **PARTS}[name])
        own = {**preset(entry.pop("preset", "paper"), self.eps), **entry, "soft_label": False}
        own |= {key: entry[key] * self.eps for key in ("eps2", "attack_step_size") if key in entry}
        found = []
        for seed in range(self.seeds):
            config = Config(**{**budgets, **own, **common, "seed": seed})
            folder = pathlib.Path(self.workdir).expanduser() / pathlib.Path(config.default_workdir()).name
            found.append(dataclasses.replace(config, workdir=str(folder)))
        return found


def run(request: Request, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains, attacks, and writes compare.json, .md and .png after each model; goes on where it was stopped.

    Hard labels everywhere, so that only the defense differs. Both the last checkpoint and the best, chosen by PGD-10 on
    images that no run trains on, are attacked. What training costs are FLOPs by XLA's count for the CPU
    (`step_cost.counts`) times the steps. What a compare.json of the same question has of other entries is kept.

    Returns:
      What compare.json holds.

    Raises:
      ConfigError: if the data is too small for the request.
      NonFiniteError: if every run diverged.
      Stopped: after Ctrl-C; what is finished stays.
    """
    report.commit()  # before the results that are written make it one with changes
    dataset = data.load(request.data, request.data_dir or None)
    folder = pathlib.Path(request.results or request.workdir).expanduser()
    entries = sorted(set(request.entries()), key=lambda name: _ORDER[name])
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    earlier = _earlier(folder / "compare.json", request)
    for name in entries:
        runs = []
        for config in request.configs(name):
            try:
                runs.append(_judged(request, _affordable(request, config, dataset), dataset))
            except NonFiniteError as error:
                say(f"{name}, seed {config.seed}: {error}")
        if not runs:
            continue
        rows.append(_row(name, runs))
        if len(rows) == 1:
            earlier = _kept(earlier, rows[0], say)
        result = {
            "format": 3,
            "request": dataclasses.asdict(request),
            "attacks": [dataclasses.asdict(stage) for stage in _effort(request).stages(dataset.num_classes)],
            "eps": runs[0]["eps"],
            "images": runs[0]["images"],
            "chosen_on": runs[0]["chosen_on"],
            "rows": sorted([*rows, *earlier], key=lambda row: _ORDER[row["name"]]),
            "command": report.command(),
            "environment": report.environment(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "compare.json", result)
        write_text(folder / "compare.md", markdown(result))
        write_text(folder / "compare_card.md", card(result))
        plot(folder / "compare.png", result)
        last, best = (f"clean {rows[-1][c]['clean']:.3f}, robust {rows[-1][c]['robust']:.3f}" for c in CHECKPOINTS)
        apart = rows[-1]["best"]["steps"] != rows[-1]["last"]["steps"]
        say(f"{name}: {last}{f' (best checkpoint: {best})' if apart else ''}, {rows[-1]['flops']:.3g} FLOPs")
    if not rows:
        raise NonFiniteError("every run diverged; nothing was compared")
    return result


def _earlier(path: pathlib.Path, request: Request) -> list[dict[str, Any]]:
    """Rows that a run before, for the same request, wrote of entries that are not asked for now, with their origin."""
    asked = {**dataclasses.asdict(request), "entry": []}
    try:
        before = read_json(path)
        here = {key: before["request"][key] for key in ("data_dir", "workdir", "results")}
        if {**before["request"], "entry": []} != {**asked, **here}:
            return []
        origin = {"command": before["command"], "environment": before["environment"]}
        rows = {row["name"]: {"origin": origin, **row} for row in before["rows"]}
        card({**before, "rows": list(rows.values())})  # has all that is shown
        markdown({**before, "rows": list(rows.values())})
        return [
            row
            for name, row in rows.items()
            if name in _ORDER and name not in request.entries() and _same(request, row)
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        print(f"warning: {path} is of no use ({first_line(error)}); written anew", file=sys.stderr, flush=True)
        return []


def _same(request: Request, row: Mapping[str, Any]) -> bool:
    """Whether the runs of an earlier row are those that this request would make: their folders' names are of their settings."""
    ours = {pathlib.Path(config.workdir).name for config in request.configs(row["name"])}
    return all(any(pathlib.Path(run["workdir"]).name.startswith(name) for name in ours) for run in row["runs"])


def _kept(
    earlier: Sequence[dict[str, Any]], row: Mapping[str, Any], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Those earlier rows whose models faced the same attacks on the same images as this one's; the others are forgotten."""
    kept = [other for other in earlier if other["runs"][0]["asked"] == row["runs"][0]["asked"]]
    for other in earlier:
        if other not in kept:
            say(f"{other['name']}: an earlier row, of other images or attacks; left out")
    return kept


def _affordable(request: Request, config: Config, dataset: Dataset) -> Config:
    """With `equal_flops` as many steps as `request.steps` of e2SAD cost."""
    if not request.equal_flops:
        return config
    (other,) = dataclasses.replace(request, seeds=1).configs(REFERENCE)
    steps = max(1, round(request.steps * _step_flops(other, dataset) / _step_flops(config, dataset)))
    if steps == config.steps:
        return config
    folder = pathlib.Path(config.workdir)
    config = dataclasses.replace(config, steps=steps, checkpoint_every=min(500, max(1, steps // 4)))
    return dataclasses.replace(config, workdir=str(folder.with_name(f"{folder.name}-{steps}")))


def _step_flops(config: Config, dataset: Dataset) -> float:
    """XLA's count of one training step, compiled for the CPU once for all seeds."""
    any_run = {f: getattr(Config, f) for f in ("seed", "steps", "checkpoint_every", "workdir", "data_dir")}
    counted = _counts(dataclasses.replace(config, **any_run), dataset.image_shape, dataset.num_classes)
    if counted is None:
        raise ConfigError("JAX_PLATFORMS leaves out the CPU, for which FLOPs are counted: add cpu, as in cuda,cpu")
    return counted["flops"]


_counts = functools.cache(counts)


def _effort(request: Request) -> Effort:
    return Effort(apgd_steps=request.apgd_steps, queries=request.queries, targets=request.targets)


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name}
    for which in CHECKPOINTS:
        clean, robust = ([run[which][key] for run in runs] for key in ("clean", "robust"))
        spread = {"lowest": min(robust), "highest": max(robust), "steps": [run[which]["step"] for run in runs]}
        row[which] = {"clean": float(np.mean(clean)), "robust": float(np.mean(robust)), **spread}
    return (
        row | {key: float(np.mean([r[key] for r in runs])) for key in ("flops", "train_seconds")} | {"runs": list(runs)}
    )


def _judged(request: Request, config: Config, dataset: Dataset) -> dict[str, Any]:
    """One model, trained, its last and its best checkpoint attacked; what was done before is not done again."""
    stages = _effort(request).stages(dataset.num_classes)
    asked = {
        "data": dataset.sha256,
        "judge": request.judge,
        "checkpoints": list(CHECKPOINTS),
        "examples": request.examples,
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }
    path = pathlib.Path(config.workdir) / ("auto.json" if request.judge == "test" else f"auto_{request.judge}.json")
    known = _known(path, asked, config.steps)
    if "best" in known:
        return known
    with jobs.open_job(config, dataset) as job, jobs.interruptible() as interrupted:
        write_config(job.workdir, job.config, dataset)
        _, seconds = jobs.train(job, interrupted)
        if told := interrupted():
            raise Stopped(f"stopped in {job.workdir}; the same command goes on from there", told)
        best = jobs.best(job)
        judged_on = dataset if request.judge == "test" else job.watched
    images, labels = judged_on.x_test[: request.examples], judged_on.y_test[: request.examples]
    last = known.get("last") or _attacked(config, "last", images, labels, stages)
    write_json(path, sealed({"asked": asked, "last": last}))  # attacks take long
    judged = {
        "asked": asked,
        "seed": config.seed,
        "eps": config.eps1,
        "images": len(images),
        "last": last,
        "best": _attacked(config, "best", images, labels, stages) if best and best[0] != last["step"] else last,
        "chosen_on": best[1] if best else "no images, for training was stopped before any check",
        "flops": config.steps * _step_flops(config, dataset),
        "train_seconds": round(seconds, 1),
        "workdir": config.workdir,
    }
    write_json(path, sealed(judged))
    return judged


def _known(path: pathlib.Path, asked: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What `_judged` has written of a run for the same question; empty where nothing readable says so."""

    def number(value: Any) -> bool:
        return type(value) in (int, float)

    try:
        known = read_sealed(path)
        right = known["asked"] == asked and known["last"]["step"] == steps
        for which in CHECKPOINTS if "best" in known else ("last",):
            right &= type(known[which]["step"]) is int and all(number(known[which][k]) for k in ("clean", "robust"))
        if "best" in known:
            right &= all(number(known[key]) for key in ("flops", "train_seconds", "eps", "images", "seed"))
            right &= isinstance(known["chosen_on"], str)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(
            f"warning: {path} is of no use ({first_line(error)}); its attacks are made again",
            file=sys.stderr,
            flush=True,
        )
        return {}
    return known if right else {}


def _attacked(
    config: Config, which: str, images: np.ndarray, labels: np.ndarray, stages: Sequence[Attack]
) -> dict[str, Any]:
    """What strong attacks leave of one checkpoint of a run."""
    classifier = load(config.workdir, which)
    subject = of_classifier(classifier, images, labels)
    outcome = auto(
        subject.apply,
        subject.params,
        subject.x,
        subject.labels,
        eps=config.eps1,
        bounds=subject.bounds,
        stages=stages,
    )
    robust = float(outcome.robust.mean())
    return {"step": classifier.step, "clean": outcome.accuracy["clean"], "after": outcome.accuracy, "robust": robust}


def _about(result: Mapping[str, Any]) -> str:
    r = result["request"]
    attacks = ", ".join(
        f"{a['name']} {a['steps']:,} {'queries' if a['kind'] == 'square' else 'steps'}"
        + (f" towards each of {a['targets']} targets" if a["loss"] == "targeted_dlr" else "")
        for a in result["attacks"]
    )
    return (
        f"{r['data']}, {r['model']}, {_length(r)}, {r['seeds']} seed(s), hard labels, learning rate {r['learning_rate']:g} "
        f"{r['schedule']}, eps rises over {_share(r['eps_warmup'])}; robust: "
        f"what stands {attacks}, one restart each, eps {result['eps']:.4g}, {result['images']:,} {_JUDGES[r['judge']]}; "
        f"best: the checkpoint that stood PGD-10 best on {result['chosen_on']}"
    )


def _length(r: Mapping[str, Any]) -> str:
    steps = f"{r['steps']:,} steps of {r['batch_size']}"
    return (
        f"as many steps of {r['batch_size']} as cost what {r['steps']:,} of {REFERENCE} do"
        if r["equal_flops"]
        else steps
    )


def _share(warmup: float) -> str:
    return f"{warmup:g} of all steps" if warmup < 1 else f"{warmup:,.0f} steps"


def _natural(result: Mapping[str, Any]) -> float | None:
    """What natural training cost, where it is among the rows."""
    return next((row["flops"] for row in result["rows"] if row["name"] == "natural"), None)


def markdown(result: Mapping[str, Any]) -> str:
    """The table."""
    lines = [
        "| defense | last: clean | last: robust (lowest .. highest) | last: step | best: clean "
        "| best: robust (lowest .. highest) | best: step | training, FLOPs | natural = 1 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    natural = _natural(result)
    for row in result["rows"]:
        lost = result["request"]["seeds"] - len(row["runs"])
        cells = [row["name"] + (f" ({lost} of the seeds diverged)" if lost else "")]
        for which in CHECKPOINTS:
            own = row[which]
            cells += [f"{own['clean']:.3f}", f"{own['robust']:.3f} ({own['lowest']:.3f} .. {own['highest']:.3f})"]
            cells.append(", ".join(f"{step:,}" for step in sorted(set(own["steps"]))))
        cells.append(f"{row['flops']:.3g}")
        lines.append("| " + " | ".join([*cells, f"{row['flops'] / natural:.2f}" if natural else ""]) + " |")
    return "\n".join(
        [
            "# Robust accuracy against the price of training",
            "",
            f"{_about(result)}.",
            "",
            *lines,
            "",
            "![Robust accuracy against training FLOPs](compare.png)",
            "",
            "\n\n".join(_origins(result)),
            "",
        ]
    )


def _origins(result: Mapping[str, Any]) -> list[str]:
    """What printed the rows; of which it did, where there are several."""
    origins: dict[str, list[str]] = {}
    for row in result["rows"]:
        origin = row.get("origin", result)
        e = origin["environment"]
        made = f"`{origin['command']}`, {e['hardware']}, {e['date']}, commit {e['commit']}"
        origins.setdefault(made, []).append(row["name"])
    return list(origins) if len(origins) == 1 else [f"{made}: {'; '.join(of)}" for made, of in origins.items()]


def card(result: Mapping[str, Any]) -> str:
    """compare_card.md: of all models of the comparison, what `report.model_card` says of one."""
    r, rows = result["request"], result["rows"]
    robust = sorted(rows, key=lambda row: float(row["last"]["robust"]))
    best, clean = robust[-1], sorted(float(row["last"]["clean"]) for row in rows)
    runs = sum(len(row["runs"]) for row in rows)
    digest = rows[0]["runs"][0]["asked"]["data"][:16]
    lines = [
        "# Model card: all models of [the comparison](compare.md)",
        "",
        f"- **Models:** `{r['model']}`, {runs} of them: {'; '.join(row['name'] for row in rows)}.",
        report.PURPOSE,
        f"- **Data:** {r['data']} (content SHA-256 `{digest}...`). Whatever these images leave out or get wrong, the models do "
        "too.",
        f"- **Training and evaluation:** {_about(result)}.",
        *(f"- **Command:** {origin}." for origin in _origins(result)),
        "",
        "## Evaluation",
        "",
        f"Each model's accuracies are in [compare.md](compare.md). Clean from {clean[0]:.3f} to {clean[-1]:.3f}; in the "
        f"worst case, at the last checkpoint, from {robust[0]['last']['robust']:.3f} to {best['last']['robust']:.3f} "
        f"({best['name']}).",
        "",
        "## Limits",
        "",
        *report.limits(r["seeds"], result["images"]),
    ]
    return "\n".join(lines) + "\n"


def plot(path: pathlib.Path, result: Mapping[str, Any]) -> None:
    """Robust accuracy against training FLOPs, a point for each defense; hollow above it the best checkpoint, where apart."""
    import textwrap

    from matplotlib.figure import Figure

    by_name = result["request"]["equal_flops"] or result["request"]["parts"]  # too many that cost the same
    natural = _natural(result)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    labels = {"last": "last checkpoint", "best": f"best on {result['chosen_on']}, where another"}

    def draw(row: Mapping[str, Any], robust: Sequence[float], *args: Any, **style: Any) -> None:
        name = f"{row['name']} ({row['flops'] / natural:.2f})" if natural else row["name"]
        at = [name if by_name else row["flops"] / (natural or 1)] * len(robust)
        axes.plot(*((robust, at) if by_name else (at, robust)), *args, **style)

    for row in result["rows"]:
        last, best = row["last"]["robust"], row["best"]["robust"]
        ours = row["name"].startswith("e2SAD") and not by_name
        style: dict[str, Any] = {"color": "C3" if ours else "C0"}
        marker = {"marker": "*" if ours else "o", "ms": 14 if ours else 7, "ls": "", **style}
        if best != last:
            draw(row, [last, best], ":", lw=1, **style)
            draw(row, [best], mfc="none", **marker)
        draw(row, [last], **marker)
    for which, fill in (("last", "0.4"), ("best", "none")):
        axes.plot([], [], "o", color="0.4", mfc=fill, label=labels[which])
    axes.legend(loc="best" if by_name else (0.55, 0.15), fontsize=8, frameon=False)
    axes.grid(color="0.92")
    if by_name:
        axes.set(xlabel="robust accuracy (in parentheses: FLOPs of training, natural = 1)", xlim=(-0.03, 1.0))
        axes.invert_yaxis()
    else:
        unit = f", natural training = 1 ({natural:.3g})" if natural else ""
        axes.set(xlabel=f"FLOPs of training{unit}", ylabel="robust accuracy", xscale="log", ylim=(-0.03, 1.0))
        axes.margins(x=0.06)
        if natural:
            ticks = (1, 2, 3, 5, 10, 20, 50)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.set_xlim(0.9, 1.15 * max(row["flops"] for row in result["rows"]) / natural)
        _name_points(
            axes, [(row["name"], row["flops"] / (natural or 1), row["last"]["robust"]) for row in result["rows"]]
        )
    axes.set_title(textwrap.fill(_about(result), 110), fontsize=8)
    plots.save(path, figure, dpi=120)


def _name_points(axes: Any, points: Sequence[tuple[str, float, float]], gap: float = 0.047) -> None:
    """Each point's name in a column to the right of the axes, with a line to it: many lie close together."""
    named = sorted(points, key=lambda point: (-point[2], -point[1]))
    heights: list[float] = []
    for _, _, y in named:
        heights.append(min(y, heights[-1] - gap) if heights else y)
    for i in reversed(range(len(heights))):  # none below the lowest
        heights[i] = max(heights[i], gap * (len(heights) - 1 - i))
    for (name, x, y), height in zip(named, heights, strict=True):
        axes.annotate(
            name,
            (x, y),
            (1.03, height),
            textcoords=("axes fraction", "data"),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.75", "lw": 0.6, "shrinkB": 4, "relpos": (0, 0.5)},
        )
