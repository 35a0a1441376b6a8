"""The systems that the paper cites: under the attack that each was published with, and under one that is made for it."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import attacks, data, inference
from e2sad_jax._compile import jit
from e2sad_jax._io import check_folder, read_json, write_json, write_text
from e2sad_jax.comparison.around import AROUND, COUNTED, FALSE_POSITIVES, Around, Base, Function, inputs
from e2sad_jax.comparison.flops import step_flops
from e2sad_jax.comparison.request import JUDGES, YOUNGER, Request
from e2sad_jax.comparison.show import begun
from e2sad_jax.data import Dataset
from e2sad_jax.data.dataset import in_words
from e2sad_jax.errors import ConfigError, Stopped, close_to
from e2sad_jax.evaluation import ORTHOGONAL, Attack, Detector, Model, distances
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.table import Table
from e2sad_jax.runs import opening, signals, trainer
from e2sad_jax.runs.classifier import Classifier, load
from e2sad_jax.training import Config

NETWORK = "natural"  # what the defenses at inference stand around
# Entries of the comparison, and the attack that they were published with: of one step or of several.
TRAINED = {
    NETWORK: "FGSM",
    "distillation": "PGD-40",
    "FGSM (Eq. 3)": "FGSM",
    "strong adversary": "FGSM",
    "PGD-3": "PGD-40",
    "e2SAD, robust": "PGD-40",
}
# Of a detector's score, in 1 / (standard deviation of clean scores). With a high one an attack does not cross a region of high
# scores, such as that around the boundary where mutations change the prediction.
WEIGHTS = (0.01, 1.0, 100.0)
NEAREST = 100  # test images whose nearest adversarial image is sought
SEARCH: Mapping[str, Any] = {
    "steps": 200,
    "binary_steps": 5,
    "learning_rate": 0.05,
    "initial_c": 0.1,
}  # of Carlini and Wagner's attack
TITLE = "Systems that the paper cites, under claimed and adaptive attacks"

Row = dict[str, Any]


def run(request: Request, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains or builds each system, attacks it, and writes cited.json and .md after each; resumes where it was stopped.

    Args:
      request: data, length, budget and effort. Its entries are the systems to attack again, of `TRAINED` and `AROUND`; the
        rows of the others stay, whatever commit they are of. None: all that have no row of this commit.
      say: takes a line of progress.

    Returns:
      What cited.json holds.

    Raises:
      ConfigError: if the data is too small for the request, or the folder of the results cannot be written.
      Stopped: after Ctrl-C; what is finished stays.
    """
    if unknown := [name for name in request.entry if name not in (*TRAINED, *AROUND)]:
        close = close_to(unknown[0], (*TRAINED, *AROUND))
        raise ConfigError(f"--entry={unknown[0]:.100}: {close}must be of {', '.join((*TRAINED, *AROUND))} with --cited")
    commit = provenance.commit()  # before the results that are written make it one with changes
    folder = pathlib.Path(request.results or request.workdir).expanduser()
    check_folder(folder, f"--results={folder}")
    dataset = data.load(request.data, request.data_dir or None)
    tests = data.sample_tests(dataset, request.examples)
    there = len(dataset.x_test), len(np.unique(tests.y_test)), dataset.num_classes
    result: dict[str, Any] = {
        "asked": {
            "question": request.question(),
            "data": dataset.sha256,
            "detectors": dataclasses.asdict(ORTHOGONAL),
            "commit": commit,
        },
        "request": dataclasses.asdict(request),
        "images": in_words(len(tests.x_test), *there, JUDGES["test"]),
        "command": provenance.command(),
        "environment": provenance.environment(),
        "rows": {},
    }
    rows = result["rows"] = _earlier(folder / "cited.json", result["asked"], request.entry)
    origin = {
        "command": result["command"],
        "commit": commit,
        **{k: result["environment"][k] for k in ("hardware", "date")},
    }
    order = [*TRAINED, *AROUND]

    def finish(name: str, row: Row) -> None:
        rows.update(_earlier(folder / "cited.json", result["asked"], request.entry))  # of another process, too
        rows[name] = {**row, "origin": origin}
        result["rows"] = {known: rows[known] for known in order if known in rows}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "cited.json", result)
        write_text(folder / "cited.md", table(result).markdown())
        claimed, adaptive = row["claimed"]["robust"], row["adaptive"]["robust"]
        say(f"{name}: clean {row['clean']:.3f}, claimed attack {claimed:.3f}, adaptive attack {adaptive:.3f}")

    asked = request.entry or order
    natural, network = _trained(request, NETWORK, dataset)
    price = step_flops(natural, dataset.image_shape, dataset.num_classes)
    for name in TRAINED:
        if name in asked and name not in rows:
            config, classifier = (natural, network) if name == NETWORK else _trained(request, name, dataset)
            own = step_flops(config, dataset.image_shape, dataset.num_classes) / price
            finish(name, _of_trained(request, name, classifier, tests, own))
    base = Base.of(request, network, dataset)
    for name, make in AROUND.items():
        if name in asked and name not in rows:
            finish(name, _of_around(base, name, make(base), tests, price * request.steps))
    return result


def _trained(request: Request, name: str, dataset: Dataset) -> tuple[Config, Classifier]:
    """An entry's run, and the classifier that it has trained."""
    (config,) = dataclasses.replace(request, seeds=1).configs(name)
    with opening.open_run(config, dataset) as opened, signals.stopping() as stop:
        trainer.train(opened, stop)
        if number := stop():
            raise Stopped(f"stopped in {opened.workdir}; the same command resumes", number)
    return config, load(config.workdir)


def _model(name: str, network: Classifier, tests: Dataset, **settings: Any) -> Model:
    """The network, or what `settings` put around it, and the test images."""
    own = {"apply": network.apply, "bounds": network.transform.bounds, **settings}
    return Model(name, params=network.params, images=inputs(network, tests.x_test), labels=tests.y_test, **own)


def _claimed(kind: str, eps: float) -> Attack:
    return Attack(kind, "fgsm", eps, 1) if kind == "FGSM" else Attack(kind, "pgd", eps, int(kind.removeprefix("PGD-")))


def _of_trained(request: Request, name: str, network: Classifier, tests: Dataset, price: float) -> Row:
    """A trained network; the attack made for it is the whole protocol, which has losses of logits and one without gradients."""
    model, attack = _model(name, network, tests), _claimed(TRAINED[name], request.eps)
    stages = request.stages(tests.num_classes)
    worst = model.auto(stages, eps=request.eps)
    return {
        "clean": worst.accuracy["clean"],
        "claimed": {"attack": attack.name, "robust": model.evaluate([attack])[attack.name].accuracy},
        "adaptive": {"attack": ", ".join(stage.name for stage in stages), "robust": float(worst.robust.mean())},
        "training": price + (name == "distillation"),  # its teacher is a natural training more
        "inference": 1.0,
        "nearest": _nearest(model, network.apply, None) if name == NETWORK else None,
    }


def _of_around(base: Base, name: str, around: Around, tests: Dataset, spent: float) -> Row:
    """A defense around the network: shown images that were made for the network alone, then images made for both."""
    claimed, eps = _claimed("PGD-40", base.request.eps), base.request.eps
    _, images = _model(NETWORK, base.network, tests).under(claimed)
    detectors: list[Detector | None] = [None]
    if around.score_fn is not None:
        scores = base.on_held_out(around.score_fn)
        limit, spread = inference.threshold(scores, FALSE_POSITIVES), float(scores.std())
        detectors = [Detector(around.score_fn, limit, weight / max(spread, 1e-6)) for weight in WEIGHTS]
    models = [
        _model(name, base.network, tests, apply=around.apply, detector=detector, draws=around.draws)
        for detector in detectors
    ]
    shown, stages = models[0].right_on(images), list(around.stages)
    if around.score_fn is not None:
        stages.append(ORTHOGONAL)  # once, for it takes no weight
    worst = [models[0].auto(stages, eps=eps), *(model.auto(around.stages, eps=eps) for model in models[1:])]
    for apply, others in around.more:
        worst.append(dataclasses.replace(models[0], apply=apply).auto(others, eps=eps))
        stages += others
    stood = np.all([shown, *(result.robust for result in worst)], axis=0)
    return {
        "clean": float(models[0].clean().mean()),
        "claimed": {"attack": f"{claimed.name} on the network", "robust": float(shown.mean())},
        "adaptive": {"attack": ", ".join(stage.name for stage in stages), "robust": float(stood.mean())},
        "training": 1 + around.made / spent,
        "inference": around.inference / base.flops(base.apply),
        "nearest": _nearest(models[0], around.apply, detectors[0]) if around.nearest else None,
    }


def _nearest(model: Model, apply: Function, detector: Detector | None) -> dict[str, float]:
    """The nearest images that are misclassified and accepted: the share of images that have one, and the median l2 distance.

    Those are by Carlini and Wagner's attack, of the first images that are classified correctly and accepted.
    """
    right = np.flatnonzero(model.clean())[:NEAREST]
    x, y = jnp.asarray(model.images[right]), jnp.asarray(model.labels[right])

    @jit
    def attack(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        def constraint(z: jax.Array) -> jax.Array:
            assert detector is not None
            return detector.weight * (detector.score_fn(params, z) - detector.threshold)

        constraint_fn = None if detector is None else constraint
        return attacks.carlini_wagner(
            lambda z: apply(params, z), x, y, constraint_fn=constraint_fn, bounds=model.bounds, **SEARCH
        )

    made = np.array(model.images)
    made[right] = np.asarray(attack(model.params, x, y))
    fooled = ~model.right_on(made)[right]
    lengths = distances(model.images[right], made[right], fooled, norm="l2")[fooled]
    return {"fooled": len(lengths) / max(len(right), 1), "l2": float(np.median(lengths)) if len(lengths) else 0.0}


def _earlier(path: pathlib.Path, asked: Mapping[str, Any], again: Sequence[str]) -> dict[str, Row]:
    """Rows of the same question: those of this commit, and with `again` all but the named ones of other commits."""
    try:
        before = read_json(path)
        then = {key: value for key, value in before["asked"].items() if key != "commit"}
        then["question"] = {**YOUNGER, **then["question"]}
        if then != {key: value for key, value in asked.items() if key != "commit"}:
            return {}
        environment, rows = before["environment"], dict[str, Row]()
        for name, row in before["rows"].items():
            origin = row.get("origin") or {k: environment[k] for k in ("hardware", "date", "commit")}
            same = origin["commit"] == asked["commit"] and "with changes" not in (asked["commit"] or "")
            if same or (again and name not in again):
                rows[name] = {**row, "origin": {"command": before["command"], **origin}}
        return rows
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _origins(rows: Mapping[str, Row]) -> list[str]:
    """Commands, hardware, dates and commits, each with its rows if there are several."""
    by: dict[str, list[str]] = {}
    for name, row in rows.items():
        o = row["origin"]
        by.setdefault(f"`{o['command']}`, {o['hardware']}, {o['date']}, commit {o['commit']}", []).append(name)
    return [f"{origin}." if len(by) == 1 else f"{origin}: {'; '.join(names)}." for origin, names in by.items()]


def table(result: Mapping[str, Any]) -> Table:
    """A row for each system: accuracies without attack, under the claimed and under the adaptive attack, and prices.

    Args:
      result: what cited.json holds.
    """
    r = result["request"]
    weights = ", ".join(f"{weight:g}" for weight in WEIGHTS)
    return Table(
        title=TITLE,
        columns=[
            "system",
            "clean",
            "claimed attack",
            "robust",
            "adaptive attack",
            "robust",
            "training, natural = 1",
            "inference, network = 1",
            "at any l2",
        ],
        rows=[
            [
                name,
                f"{row['clean']:.3f}",
                row["claimed"]["attack"],
                f"{row['claimed']['robust']:.3f}",
                row["adaptive"]["attack"],
                f"{row['adaptive']['robust']:.3f}",
                f"{row['training']:.2f}",
                f"{row['inference']:.1f}",
                "-" if row["nearest"] is None else f"{row['nearest']['fooled']:.2f} ({row['nearest']['l2']:.2f})",
            ]
            for name, row in result["rows"].items()
        ],
        notes=[
            f"Trained on {r['data']}: network `{r['model']}`, {r['steps']:,} steps of {r['batch_size']}, one seed{begun(r)}. "
            f"{'; '.join(AROUND)}: around the natural network.",
            f"Robust: the share of {result['images']}, eps {r['eps']:.4g}.",
            f"Detectors reject {FALSE_POSITIVES:.0%} of the held-out training images. A rejected clean image counts as an "
            f"error, a rejected adversarial one as robust. Adaptive attacks on them: the worst case over weights {weights} of "
            f"the score, in 1 / (standard deviation of clean scores), over orthogonal PGD ({ORTHOGONAL.steps} steps), which "
            "has no weight, and over the images of the claimed attack.",
            f"At any l2: the share of {NEAREST} images for which Carlini and Wagner's attack ({SEARCH['binary_steps']} times "
            f"{SEARCH['steps']} steps) finds one that is misclassified and accepted, and the median distance.",
            f"Training, inference: XLA's count of FLOPs for the CPU; predictions of {COUNTED} images.",
            *_origins(result["rows"]),
        ],
    )
