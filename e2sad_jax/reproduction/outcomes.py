"""What attacks did to a run, kept in its workdir, so that no attack is made twice."""

import dataclasses
import hashlib
import json
import pathlib
import re
from typing import Any

import numpy as np

from e2sad_jax.evaluate import Attack, Outcome
from e2sad_jax.workdir import write_json

FOLDER = "evaluations"


@dataclasses.dataclass(frozen=True)
class Tested:
    """What was attacked: with it an outcome is only found again for the same question.

    Attributes:
      step: training steps of the attacked run.
      sha256: of the data set.
      examples: test images, the first ones.
      seed: of the random starts.
    """

    step: int
    sha256: str
    examples: int
    seed: int


def path_of(workdir: pathlib.Path, attack: Attack, tested: Tested, **more: Any) -> pathlib.Path:
    """Where an outcome is kept: the attack's name for people, a digest of everything for the program."""
    question = {**dataclasses.asdict(attack), **dataclasses.asdict(tested), **more}
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]
    return workdir / FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', attack.name.lower())}-{digest}.json"


def read(path: pathlib.Path, labels: np.ndarray) -> list[Outcome] | None:
    """The outcomes in a file, one for each model that was asked; None if there is none that can be read."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["predictions"]
        predictions = [np.array(row, np.int32) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    if not predictions or any(p.shape != labels.shape for p in predictions):
        return None
    return [Outcome(p == labels, p) for p in predictions]


def write(path: pathlib.Path, attack: Attack, tested: Tested, outcomes: list[Outcome]) -> None:
    """Keeps outcomes, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    values = {"attack": dataclasses.asdict(attack), "tested": dataclasses.asdict(tested)}
    write_json(path, {**values, "predictions": [o.prediction.tolist() for o in outcomes]})
