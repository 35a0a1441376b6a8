"""Real commands as real processes: started, watched, struck at a moment, and what they leave, in a few values."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import re
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any

import jax
import numpy as np

import e2sad_jax
from benchmarks.faults import child
from e2sad_jax.runs.checkpoint import digest

TRAIN = (
    *("-m", "experiments.digits", "--baseline=", "--steps=40", "--batch_size=16", "--checkpoint_every=10"),
    *("--log_every=2", "--validation_examples=30", "--eval_examples=30", "--eval_batch_size=30"),
)
COMPARE = (
    *("-m", "experiments.compare", "--data=digits", "--steps=8", "--batch_size=16", "--validation_examples=30"),
    *("--examples=30", "--queries=10", "--apgd_steps=4", "--targets=1", "--entry=natural", "--entry=PGD-2"),
)
EVALUATE = ("-m", "experiments.evaluate", "--examples=12", "--batch_size=12", "--queries=20", "--targets=1")


@dataclasses.dataclass
class Ended:
    """How a process ended.

    Attributes:
      code: exit code, negative for a signal.
      out: standard output.
      err: standard error.
      phases: that it entered, and the seconds of computing until then.
      seconds: waited for the end.
    """

    code: int
    out: str
    err: str
    phases: list[tuple[str, float]]
    seconds: float

    @property
    def last(self) -> str:
        """The last line that it said."""
        return (self.err.strip().splitlines() or [""])[-1]

    @property
    def clear(self) -> bool:
        """Whether it ended with a word of ours: a documented code, one line of reason and no traceback."""
        return self.code in (1, 2, 3, 5, 6, 7, 130, 143) and "Traceback" not in self.err and bool(self.last)

    def lasted(self, phase: str) -> list[float]:
        """Seconds of computing in each of its times in a phase, but for the very last one."""
        following = zip(self.phases, self.phases[1:], strict=False)
        return [then - since for (name, since), (_, then) in following if name == phase]


def waiting(seconds: float, step: float = 0.005) -> Iterator[float]:
    """The turns of a wait, each with the seconds waited; a time in which this process itself was stopped counts as one."""
    waited = 0.0
    while waited < seconds:
        yield waited
        before = time.monotonic()
        time.sleep(step)
        waited += min(time.monotonic() - before, 1.0)


class Started:
    """A command under way."""

    def __init__(self, process: ForkServerProcess, out: pathlib.Path, err: pathlib.Path, phases: pathlib.Path):
        self._process, self._files, self._phases = process, (out, err), phases
        process.start()
        assert process.pid is not None, "it was started"
        self.pid = process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it is at work."""
        return self._process.exitcode

    def computed(self) -> float:
        """Seconds of computing so far, whatever else the machine has to do; 0 once it has ended."""
        try:
            return time.clock_gettime((~self.pid << 3) | 2)  # Linux's clock of a process
        except OSError:
            return 0.0

    def phases(self) -> list[tuple[str, float]]:
        """Those that it entered, and the seconds of computing until then."""
        lines = self._phases.read_text().splitlines() if self._phases.exists() else []
        return [(phase, float(seconds)) for seconds, _, phase in (line.partition(" ") for line in lines)]

    def reach(self, phase: str, times: int = 1, seconds: float = 0.0) -> bool:
        """Waits until it has entered a phase so many times, and computed for so long since; whether it still lives."""
        for _ in waiting(600, 0.001):
            if self.poll() is not None:
                break
            since = [then for name, then in self.phases() if name == phase]
            if len(since) >= times and self.computed() >= since[times - 1] + seconds:
                return True
        return False

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it has not ended before."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self, timeout: float = 600) -> Ended:
        """Waits for it to end; one that hangs is killed, and says so."""
        for seconds in waiting(timeout):  # noqa: B007
            if self.poll() is not None:
                break
        hung = self.poll() is None
        if hung:
            self.kill()
            self._process.join()
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in self._files)
        err += f"\nkilled, because it had not ended after {timeout:.0f} s" * hung
        code = self._process.exitcode
        assert code is not None, "it has ended"
        return Ended(code, out, err, self.phases(), seconds)


class Runs:
    """Starts commands in one environment, with one cache of compiled programs for all."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        (folder / "said").mkdir()
        self._started: list[Started] = []
        before = dict(os.environ)
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=1",  # less for the compiler to do
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.faults.preload"])
        forkserver.ensure_running()
        os.environ.clear()
        os.environ |= before

    def start(self, *command: str, patch: str = "", limit: int = 0) -> Started:
        """Starts Python with these arguments, after the program `patch`, with at most `limit` bytes of address space."""
        files = [self.folder / "said" / f"{len(self._started)}.{name}" for name in ("out", "err", "phases")]
        arguments = (command, patch, *map(str, files), limit)
        self._started.append(Started(self._context.Process(target=child.command, args=arguments), *files))
        return self._started[-1]

    def call(self, *command: str, timeout: float = 600, **kwargs: Any) -> Ended:
        """Runs Python with these arguments to its end."""
        return self.start(*command, **kwargs).end(timeout)

    def kill(self) -> None:
        """Ends what is still at work."""
        for process in self._started:
            if process.poll() is None:
                process.kill()


def writing(command: Sequence[str]) -> bool:
    """Whether a command that was killed left a checkpoint in the middle."""
    (workdir,) = (pathlib.Path(word.removeprefix("--workdir=")) for word in command if word.startswith("--workdir="))
    return any(workdir.rglob("checkpoints/*orbax-checkpoint-tmp*"))


def left(workdir: pathlib.Path, validated: bool = True) -> dict[str, Any]:
    """All that must be the same after any interruption: everything but times; unless `validated`, validation is left out."""
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
        "parameters": digest(last.params),
        "state": state,
        "metrics": [line for line in metrics if validated or "validation_score" not in line],
        "results": {k: results[k] for k in ("dataset", "examples", "steps", "attacks", "worst_case_accuracy")},
        "outcomes": {k: v.tolist() for k, v in outcomes.items() if validated or not k.startswith("best")},
        "best": validated and (results["best"], digest(e2sad_jax.load(workdir, "best").params)),
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
