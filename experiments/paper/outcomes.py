"""What attacks did to a run, kept in its workdir, so that no attack is made twice."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from e2sad_jax._io import read_sealed, sealed, write_json
from e2sad_jax.evaluation import Attack, Outcome
from e2sad_jax.reporting import provenance

FOLDER = "evaluations"
BYTES = 256 * 2**20  # a row of predictions for every model that was asked
VERSION = 2  # of the attacks: to be raised when a change of the code changes what they do


@dataclasses.dataclass(frozen=True)
class Tested:
    """What was attacked: with it an outcome is only found again for the same question.

    Attributes:
      weights: digest of the attacked run's state (`checkpoint.state_digest`).
      sha256: of the data set.
      examples: test images, the first ones.
      seed: of the random starts.
      targets: digests of the states of those that the images were shown to, if not to the attacked run itself.
    """

    weights: str
    sha256: str
    examples: int
    seed: int
    targets: tuple[str, ...] = ()


class Known(NamedTuple):
    """Outcomes, one for each model that was asked, and on what, when and by which command they were made."""

    outcomes: list[Outcome]
    provenance: Mapping[str, Any]


def path_of(workdir: pathlib.Path, attack: Attack, tested: Tested) -> pathlib.Path:
    """Where an outcome is kept: the attack's name for people, a digest of everything for the program."""
    question = {"version": VERSION, **dataclasses.asdict(attack), **dataclasses.asdict(tested)}
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]
    return workdir / FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', attack.name.lower())}-{digest}.json"


def read(path: pathlib.Path, labels: np.ndarray) -> Known | None:
    """What a file holds; None if there is none that can be read."""
    try:
        values = read_sealed(path, BYTES)
        predictions = [np.array(row, np.int32) for row in values["predictions"]]
        provenance = dict(values["provenance"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    if not predictions or any(p.shape != labels.shape for p in predictions):
        return None
    return Known([Outcome(p == labels, p) for p in predictions], provenance)


def write(path: pathlib.Path, attack: Attack, tested: Tested, outcomes: list[Outcome]) -> None:
    """Keeps outcomes, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    values = {"attack": dataclasses.asdict(attack), "tested": dataclasses.asdict(tested)}
    about = {"command": provenance.command(), **provenance.environment()}
    predictions = [o.prediction.tolist() for o in outcomes]
    write_json(path, sealed({**values, "provenance": about, "predictions": predictions}))
