"""Real commands as real processes: started, watched, struck at a moment, and what they leave told in a few values."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import re
import signal
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any

import jax
import numpy as np

import e2sad_jax
from e2sad_jax import jobs
from tests.torture import child

TRAIN = (
    *("-m", "experiments.digits", "--baseline=", "--steps=40", "--batch_size=16", "--checkpoint_every=10"),
    *("--log_every=2", "--validation_examples=30", "--eval_examples=30", "--eval_batch_size=30"),
)
COMPARE = (
    *("-m", "experiments.compare", "--data=digits", "--steps=8", "--batch_size=16", "--validation_examples=30"),
    *("--examples=30", "--queries=30", "--apgd_steps=4", "--targets=2", "--entry=natural", "--entry=PGD-2"),
)
EVALUATE = ("-m", "experiments.evaluate", "--examples=12", "--batch_size=12", "--queries=20", "--targets=1")


@dataclasses.dataclass
class Ended:
    """How a process ended.

    Attributes:
      code: exit code, negative for a signal.
      out: standard output.
      err: standard error.
      seconds: from the blow, or from the start, to the end.
    """

    code: int
    out: str
    err: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line that it said."""
        return (self.err.strip().splitlines() or [""])[-1]

    @property
    def clear(self) -> bool:
        """Whether it ended with a word of ours: a documented code, one line of reason and no traceback."""
        return self.code in (1, 2, 3, 5, 6, 7, 130, 143) and "Traceback" not in self.err and bool(self.last)


class Started:
    """A command under way."""

    def __init__(self, process: ForkServerProcess, out: pathlib.Path, err: pathlib.Path):
        self._process, self._files = process, (out, err)
        process.start()
        self.pid = process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it is at work."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self, timeout: float = 600) -> Ended:
        """Waits for it to end; one that hangs is killed, and says so."""
        began = time.monotonic()
        self._process.join(timeout)
        hung = self._process.exitcode is None
        if hung:
            self._process.kill()
            self._process.join()
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in self._files)
        err += f"\nkilled, because it had not ended after {timeout:.0f} s" * hung
        return Ended(self._process.exitcode, out, err, time.monotonic() - began)


class Runs:
    """Starts commands in one environment, with one cache of compiled programs for all."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        (folder / "said").mkdir()
        self._count = 0
        before = dict(os.environ)
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.torture.preload"])
        forkserver.ensure_running()
        os.environ.clear()
        os.environ |= before

    def start(self, *command: str, patch: str = "", limit: int = 0) -> Started:
        """Starts Python with these arguments, after the program `patch`, with at most `limit` bytes of address space."""
        self._count += 1
        out, err = (self.folder / "said" / f"{self._count}.{name}" for name in ("out", "err"))
        arguments = (command, patch, str(out), str(err), limit)
        return Started(self._context.Process(target=child.command, args=arguments), out, err)

    def call(self, *command: str, timeout: float = 600, **kwargs: Any) -> Ended:
        """Runs Python with these arguments to its end."""
        return self.start(*command, **kwargs).end(timeout)


def strike(process: Started, number: int, moment: Callable[[], bool], delay: float) -> Ended:
    """Sends a signal `delay` seconds after the moment has come, if the process has not ended before."""
    deadline = time.monotonic() + 200
    while process.poll() is None and not moment() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    if process.poll() is None:
        process.send_signal(number)
    return process.end(60)


def moments(workdir: pathlib.Path) -> dict[str, Callable[[], bool]]:
    """Phases of a training run by what its workdir shows."""
    kept = workdir / "checkpoints"

    def step() -> int:
        lines = (workdir / "metrics.jsonl").read_text().splitlines() if (workdir / "metrics.jsonl").exists() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0

    return {
        "start": lambda: True,
        "compile": lambda: (workdir / "metrics.jsonl").exists(),
        "step": lambda: step() % 10 > 2 and step() > 10,
        "validation": lambda: step() in (20, 30) and not (kept / str(step())).exists(),
        "checkpoint": lambda: any(kept.glob("*orbax-checkpoint-tmp*")),
        "second checkpoint": lambda: (kept / "20").exists() and any(kept.glob("*orbax-checkpoint-tmp*")),
        "evaluation": lambda: (kept / "40").exists() and not (workdir / "results.json").exists(),
        "results": lambda: (workdir / "outcomes.npz").exists() or any(workdir.glob(".outcomes*")),
    }


def phase(workdir: pathlib.Path, before: set[pathlib.Path]) -> str:
    """In which phase a training run was when it was killed, by what it left beside the temporary files of `before`."""
    kept = workdir / "checkpoints"
    if (workdir / "results.md").exists():
        return "after the results"
    if {*workdir.glob(".*.tmp")} - before or (workdir / "outcomes.npz").exists():
        return "writing a file"
    if any(kept.glob("*orbax-checkpoint-tmp*")):
        return "writing a checkpoint"
    if (kept / "40").exists():
        return "evaluation"
    if not (workdir / "metrics.jsonl").exists():
        return "before training"
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    if not lines:
        return "compiling the first step"
    last = json.loads(lines[-1])["step"] if lines[-1].endswith("}") else -1
    return "judging a checkpoint" if last % 10 == 0 and not (kept / str(last)).exists() else "a step"


def left(workdir: pathlib.Path, judged: bool = True) -> dict[str, Any]:
    """All that must be the same after any interruption: everything but times; not `judged`: nor what judges checkpoints."""
    last = e2sad_jax.load(workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((workdir / "results.json").read_text())
    outcomes = np.load(workdir / "outcomes.npz")
    (state,) = re.findall(
        r'"state_sha256": ?"(\w+)"', (workdir / f"checkpoints/{last.step}/metrics/metrics").read_text()
    )
    metrics = [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]
    return {
        "step": last.step,
        "parameters": jobs.digest(last.params),
        "state": state,
        "metrics": [line for line in metrics if judged or "validation_score" not in line],
        "results": {k: results[k] for k in ("dataset", "examples", "steps", "attacks", "worst_case_accuracy")},
        "outcomes": {k: v.tolist() for k, v in outcomes.items() if judged or not k.startswith("best")},
        "best": judged and (results["best"], jobs.digest(e2sad_jax.load(workdir, "best").params)),
    }


def compared(folder: pathlib.Path) -> Any:
    """`left` of a comparison."""
    rows = json.loads((folder / "compare.json").read_text())["rows"]
    for row in rows:
        for one in (row, *row["runs"]):
            one.pop("train_seconds")
            one.pop("workdir", None)
    return rows


def evaluated(folder: pathlib.Path) -> Any:
    """`left` of an evaluation."""
    content = json.loads((folder / "evaluation.json").read_text())
    return {k: v for k, v in content.items() if k not in ("command", "environment", "seconds")}


def differing(there: Any, here: Any) -> str:
    """Names of what differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        return ", ".join(k for k in {**there, **here} if there.get(k) != here.get(k))
    return "" if there == here else "all"


KILLED = -signal.SIGKILL

jax.config.update("jax_platforms", "cpu")
