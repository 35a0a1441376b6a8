"""Trains and attacks one model of a comparison, and notes the outcome in its workdir."""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from e2sad_jax._io import read_sealed, sealed, write_json
from e2sad_jax.comparison.request import CHECKPOINTS, Request
from e2sad_jax.data import Dataset, sample_tests
from e2sad_jax.errors import Stopped, first_line
from e2sad_jax.evaluation import Attack, auto, nan_logits
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs import opening, signals, trainer
from e2sad_jax.runs.checkpoint import state_digest
from e2sad_jax.runs.classifier import load
from e2sad_jax.runs.weights import begun_with, check_source
from e2sad_jax.training import Config


def evaluate_model(request: Request, config: Config, dataset: Dataset) -> dict[str, Any]:
    """Trains one model and attacks the checkpoints that are asked for; what is done is not done again.

    Args:
      request: the comparison.
      config: settings of the run, its workdir among them.
      dataset: the data.

    Returns:
      What the file of `outcome_path` holds: accuracies in [0, 1] of each checkpoint.

    Raises:
      ConfigError, WorkdirError, NonFiniteError: as training does.
      Stopped: after Ctrl-C; the same call resumes.
    """
    stages, asked = request.stages(dataset.num_classes), question(request, dataset)
    path = outcome_path(config.workdir, asked)
    known = known_outcome(path, asked, config.steps)
    if "train_seconds" in known and all(which in known for which in request.checkpoints):
        if config.init_from:
            check_source(config, pathlib.Path(config.workdir))
        return known
    with opening.open_run(config, dataset) as run, signals.stopping() as stop:
        _, seconds = trainer.train(run, stop)
        if number := stop():
            raise Stopped(f"stopped in {run.workdir}; the same command resumes", number)
        best = run.best()
        images_of = dataset if request.judge == "test" else run.validation_set
    there = len(images_of.x_test)
    images_of = sample_tests(images_of, request.examples)
    images, labels = images_of.x_test, images_of.y_test
    done = {which: known[which] for which in CHECKPOINTS if which in known}
    for which in request.checkpoints:
        if which in done:
            continue
        if which == "best" and (twin := _twin(run, best, request.ema)):
            done[which] = done[twin]
        else:
            done[which] = _attacked(config, which, images, labels, stages)
        write_json(path, sealed({"asked": asked, **done}))  # attacks take long
    outcome = {
        "asked": asked,
        "seed": config.seed,
        "eps": config.eps1,
        "images": len(images),
        "of": there,
        "classes": len(np.unique(labels)),
        **done,
        "chosen_on": best[1] if best else "no images, for training was stopped before any validation",
        "train_seconds": round(seconds, 1),
        "workdir": config.workdir,
        **({"begun_with": begun_with(pathlib.Path(config.workdir))} if config.init_from else {}),
    }
    write_json(path, sealed(outcome))
    return outcome


def _twin(run: opening.Run, best: tuple[int, str] | None, ema: float) -> str:
    """Which of the last checkpoint's weights the best ones are; empty if neither."""
    if best is None:
        return "last"
    if best[0] != run.steps:
        return ""
    return "average" if ema and run.checkpoints.averaged(best[0]) else "last"


def question(request: Request, dataset: Dataset) -> dict[str, Any]:
    """What a model is asked: data, images, checkpoints and attacks; outcomes of other questions do not compare."""
    there = len(dataset.x_test) if request.judge == "test" else request.validation_examples
    drawn = {"drawn": "stratified"} if request.examples < there else {}  # once the first ones were taken
    return {
        **drawn,
        "data": dataset.sha256,
        "judge": request.judge,
        "checkpoints": list(request.checkpoints),
        "examples": request.examples,
        "stages": [dataclasses.asdict(stage) for stage in request.stages(dataset.num_classes)],
    }


def outcome_path(workdir: str | os.PathLike[str], asked: Mapping[str, Any]) -> pathlib.Path:
    """The file of a question's outcome in a run's folder; the same whichever checkpoints are asked."""
    text = json.dumps({key: value for key, value in asked.items() if key != "checkpoints"}, sort_keys=True)
    return pathlib.Path(workdir) / f"auto-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"


def known_outcome(path: pathlib.Path, asked: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What `evaluate_model` wrote of a run for the same images and attacks; empty where there is nothing readable.

    It may have other checkpoints than those asked for.

    Args:
      path: `outcome_path` of the run.
      asked: data, images and attacks.
      steps: training steps of the run.
    """

    def number(value: Any) -> bool:
        return type(value) in (int, float)

    try:
        known = read_sealed(path)
        known["asked"] = {**known["asked"], "checkpoints": asked["checkpoints"]}
        right = known["asked"] == asked and known["last"]["step"] == steps
        for which in set(CHECKPOINTS) & known.keys():
            right &= type(known[which]["step"]) is int and all(number(known[which][k]) for k in ("clean", "robust"))
            # Of these very weights: the run may have been trained again since.
            right &= known[which].get("state") == state_digest(path.parent, known[which]["step"])
        if "train_seconds" in known:
            right &= all(number(known[key]) for key in ("train_seconds", "eps", "images", "seed"))
            right &= isinstance(known["chosen_on"], str)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"warning: {path} is unusable ({first_line(error)}); its attacks run again", file=sys.stderr, flush=True)
        return {}
    return known if right else {}


def _attacked(
    config: Config, which: str, images: np.ndarray, labels: np.ndarray, stages: Sequence[Attack]
) -> dict[str, Any]:
    """Clean and robust accuracy of one checkpoint of a run."""
    classifier = load(config.workdir, which)
    transform = classifier.transform
    per_image = 1 + sum(stage.gradients(classifier.dataset["num_classes"]) for stage in stages)  # 1: the clean pass
    with Bar(f"attack {config.defense}, {which} checkpoint", len(images) * per_image, "gradients") as bar:
        outcome = auto(
            classifier.apply,
            classifier.params,
            images,
            labels,
            eps=config.eps1,
            norm=config.norm,
            transform=transform.apply,
            bounds=transform.bounds,
            stages=stages,
            progress=lambda name, gradients: bar.update(gradients, name),
        )
    robust = float(outcome.robust.mean())
    return {
        "step": classifier.step,
        "state": state_digest(pathlib.Path(config.workdir), classifier.step),
        "clean": outcome.accuracy["clean"],
        "after": outcome.accuracy,
        "robust": robust,
        "nan": nan_logits(outcome.nan, len(images)),
        "commit": provenance.commit(),
    }
