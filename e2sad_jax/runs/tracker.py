"""Experiment trackers: Weights & Biases, or trackio, which has the same functions and keeps all on this machine."""

import hashlib
import importlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from e2sad_jax.errors import ConfigError, first_line

PROJECT = "e2sad_jax"


def module(name: str) -> Any:
    """The package of a tracker.

    Raises:
      ConfigError: if it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--tracker={name}: the package cannot be imported ({first_line(error)}); pip install {name}, or leave the flag "
            "out: metrics.jsonl and TensorBoard have the same numbers"
        ) from error


class Tracker:
    """A run in the project `PROJECT` of a tracker, by the name of its folder.

    A resumed run goes on in its own, unless its folder has moved. Values of steps that it trains again may be dropped.
    """

    def __init__(self, name: str, workdir: pathlib.Path, settings: Mapping[str, Any]):
        """Opens it.

        Args:
          name: "wandb" or "trackio".
          workdir: the run's folder.
          settings: the run's, as `Config.to_json` has them.

        Raises:
          ConfigError: if the package is missing, or it refuses, as without a login.
        """
        path = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:8]  # folders of one name are several runs
        plain = re.sub(r"[^\w.-]", "-", workdir.name)
        own = f"{plain}-{path}"
        given: dict[str, Any] = {"project": PROJECT, "config": dict(settings), "resume": "allow"}
        if name == "wandb":
            given |= {"name": workdir.name, "id": own, "dir": str(workdir), "reinit": "create_new"}
        else:
            given |= {"name": own}
        package = module(name)
        try:
            self._run = package.init(**given)
        except Exception as error:  # whatever the package raises
            remedy = "log in, or set WANDB_MODE=offline, or leave" if name == "wandb" else "mend that, or leave"
            raise ConfigError(
                f"--tracker={name}: it does not start ({type(error).__name__}: {first_line(error)}); {remedy} the flag out"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Passes the values of a step on; the package sends them in the background."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits until all is passed on."""
        self._run.finish()
