"""One of the two processes of `test_hosts.py`, which live through its scenarios in turn.

python -m tests.slow.hosts_child FOLDER FILE.npz

Each scenario is one run of the same command in both processes. What came of it stands in FOLDER/NAME-PROCESS.json.
"""

import json
import os
import pathlib
import re
import sys
import traceback
from typing import Any

import jax

from e2sad_jax import distributed
from e2sad_jax.errors import Error
from e2sad_jax.evaluation import SUITES, Attack
from e2sad_jax.runs.run import train_and_report
from e2sad_jax.training.config import Config

SUITES["clean"] = (Attack("clean", "clean"),)
SETTINGS: dict[str, Any] = {
    **{"model": "digits_cnn", "batch_size": 16, "defense": "atta", "eps1": 0.05, "eval_batch_size": 50},
    **{"log_every": 1, "checkpoint_every": 300},
}


def train(data: pathlib.Path, workdir: pathlib.Path, **settings: Any) -> dict[str, Any]:
    """Trains, evaluates and reports one run; returns its results, or the error that ended it."""
    try:
        results = train_and_report(Config(data=str(data), workdir=str(workdir), **{**SETTINGS, **settings}), "clean")
    except Error as error:
        return {"code": error.exit_code, "message": str(error)}
    return {"code": 0, "reports": bool(results)}


def main(folder: pathlib.Path, data: pathlib.Path) -> None:
    distributed.HEARTBEAT = 10
    distributed.connect("auto")  # Slurm's variables say who is there and where
    number = jax.process_index()

    def scenario(name: str, workdir: str = "", **settings: Any) -> dict[str, Any]:
        outcome = train(data, folder / (workdir or name), devices=0, **settings)
        (folder / f"{name}-{number}.json").write_text(json.dumps(outcome))
        return outcome

    scenario("settings", steps=3, seed=number)
    scenario("loss", steps=60, learning_rate=1e30)
    stopped = scenario("stopped", steps=600)  # by Ctrl-C in the second process, which the test sends
    step = int(re.search(r"Stopped at step ([\d,]+)", stopped["message"])[1].replace(",", ""))  # type: ignore[index]
    scenario("resumed", "stopped", steps=step + 30, resident="host")  # each process sends its own part of each batch
    ended = scenario("foreign", steps=3)  # the first process alone finds the folder unusable; the second waits for it
    print(ended, flush=True)
    os._exit(ended["code"])


if __name__ == "__main__":
    try:
        main(*map(pathlib.Path, sys.argv[1:]))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly end would wait for the other process, which waits for this one
