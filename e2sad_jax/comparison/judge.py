"""One model of a comparison: trained, attacked, and noted beside its run."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from e2sad_jax._io import read_sealed, sealed, write_json
from e2sad_jax.comparison.price import step_flops
from e2sad_jax.comparison.request import CHECKPOINTS, Request
from e2sad_jax.data import Dataset
from e2sad_jax.errors import Stopped, first_line
from e2sad_jax.evaluation import Attack, auto
from e2sad_jax.runs.classifier import load
from e2sad_jax.runs.signals import stopping
from e2sad_jax.runs.trainer import open_run, train
from e2sad_jax.training.config import Config


def judge(request: Request, config: Config, dataset: Dataset) -> dict[str, Any]:
    """One model, trained, its last and its best checkpoint attacked; what was done before is not done again.

    Returns:
      What auto.json in its workdir holds: accuracies in [0, 1] of both checkpoints, and the FLOPs of training.

    Raises:
      ConfigError, WorkdirError, NonFiniteError: as training does.
      Stopped: after Ctrl-C; the same call goes on.
    """
    stages = request.stages(dataset.num_classes)
    asked = {
        "data": dataset.sha256,
        "judge": request.judge,
        "checkpoints": list(CHECKPOINTS),
        "examples": request.examples,
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }
    path = pathlib.Path(config.workdir) / ("auto.json" if request.judge == "test" else f"auto_{request.judge}.json")
    known = known_of(path, asked, config.steps)
    if "best" in known:
        return known
    with open_run(config, dataset) as run, stopping() as stop:
        _, seconds = train(run, stop)
        if number := stop():
            raise Stopped(f"stopped in {run.workdir}; the same command resumes from there", number)
        best = run.best()
        judged_on = dataset if request.judge == "test" else run.validation_set
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
        "flops": config.steps * step_flops(config, dataset),
        "train_seconds": round(seconds, 1),
        "workdir": config.workdir,
    }
    write_json(path, sealed(judged))
    return judged


def known_of(path: pathlib.Path, asked: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What `judge` has written of a run for the same question; empty where nothing readable says so."""

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
    outcome = auto(
        classifier.apply,
        classifier.params,
        images,
        labels,
        eps=config.eps1,
        transform=classifier.transform.apply,
        bounds=classifier.transform.bounds,
        stages=stages,
    )
    robust = float(outcome.robust.mean())
    return {"step": classifier.step, "clean": outcome.accuracy["clean"], "after": outcome.accuracy, "robust": robust}
