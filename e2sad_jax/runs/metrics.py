"""Metrics of a run: to the progress bar, `metrics.jsonl`, TensorBoard and a tracker, without waiting for the device."""

import collections
import contextlib
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TextIO

import jax
import numpy as np

from e2sad_jax._compile import platform
from e2sad_jax._io import parse_json, write_bytes
from e2sad_jax.errors import NonFiniteError, first_line
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs.tracker import Tracker

METRICS = "metrics.jsonl"
LINE_BYTES = 2**16
MEASURED = 0.2  # seconds: what is shorter may be a burst of steps that were ready together


class Recorder:
    """Takes each step's metrics from the device when they are ready, never before.

    They go to the bar, every `log_every` steps to `metrics.jsonl`, TensorBoard and a tracker. A value that is not finite
    ends the run. The device may run ahead of the host by `lag` steps, or by one dispatch if that has more.
    """

    def __init__(
        self,
        workdirs: Sequence[pathlib.Path],
        bar: Bar,
        *,
        start: int,
        log_every: int,
        batch_size: int,
        silent: bool = False,
        trackers: Sequence[Tracker] = (),
    ):
        """Opens the files of one run, or of the P runs of a population; a silent one writes none.

        `trackers` are none, or one for each run, and are closed with the files.
        """
        # Far enough that an accelerator never waits; on the CPU steps are long, and who stops a run would wait for all.
        self.lag = 2 if platform() == "cpu" else 64
        self._workdirs = workdirs
        self._files: list[TextIO] = []
        self._boards: list[list[_Board | Tracker]] = [[tracker] for tracker in trackers] or [[] for _ in workdirs]
        boards = not silent and has_tensorboard()
        for workdir, own in () if silent else zip(workdirs, self._boards, strict=True):
            _drop_lines_after(workdir / METRICS, start)
            self._files.append((workdir / METRICS).open("a", encoding="utf-8"))
            if boards:
                own.append(_Board(workdir, start + 1))
        self._bar, self._log_every, self._images = bar, log_every, batch_size * len(workdirs)
        self._pending: collections.deque[tuple[int, dict[str, jax.Array], int]] = collections.deque()
        self._mark: tuple[int, float] | None = None  # where the clock of images/s started; the first step compiles
        self._rate = 0.0

    def __call__(self, step: int, metrics: dict[str, jax.Array], count: int = 1) -> None:
        """Notes the metrics of `count` steps up to `step`: scalars, `[P]`, `[S]` or `[S, P]`, with count <= S."""
        self._pending.append((step, metrics, count))
        # Several processes must find the same at the same step, so none looks at what is ready here only.
        alone = jax.process_count() == 1
        while self._pending and (self._too_far() or (alone and _ready(self._pending[0][1]["loss"]))):
            self._take()

    def flush(self) -> None:
        """Waits for all metrics so far.

        Raises:
          NonFiniteError: if one of them is NaN or infinite.
        """
        while self._pending:
            self._take()
        for file in self._files:
            file.flush()

    def write(self, step: int, values: dict[str, float], member: int = 0) -> None:
        """Writes one line of values, numbers on the host, for a step of one run."""
        if not self._files:
            return
        self._files[member].write(json.dumps({"step": step, **values}) + "\n")
        self._files[member].flush()
        tags = {n: n.replace("_", "/", 1) if n.startswith("validation_") else f"train/{n}" for n in values}
        for board in self._boards[member]:
            board.write(step, {tags[name]: value for name, value in values.items()})

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of images/s: a checkpoint's, for example."""
        self._mark = None

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # all, even if one of them cannot be written to its end
            for file in self._files:
                stack.callback(file.close)
            for own in self._boards:
                for board in own:
                    stack.callback(board.close)

    def _too_far(self) -> bool:
        return len(self._pending) > 1 and sum(count for _, _, count in self._pending) > self.lag

    def _take(self) -> None:
        last, on_device, count = self._pending.popleft()
        members = len(self._workdirs)
        # [count, P] each, whatever was counted at once.
        metrics = {k: np.asarray(v).reshape(-1, members)[:count] for k, v in jax.device_get(on_device).items()}
        for i in range(count):
            step = last - count + 1 + i
            for member in range(members):
                values = {name: float(value[i, member]) for name, value in metrics.items()}
                wrong = [f"{name}={value}" for name, value in values.items() if not math.isfinite(value)]
                if wrong:
                    where = f" of {self._workdirs[member].name}" if members > 1 else ""
                    raise NonFiniteError(f"step {step}{where}: {', '.join(wrong)}", member)
        now = time.monotonic()
        if self._mark is None:
            self._mark = (last, now)
        elif (seconds := now - self._mark[1]) >= MEASURED:
            self._rate = (last - self._mark[0]) * self._images / seconds
        loss = metrics["loss"][-1].mean()
        self._bar.update(count, f"loss {loss:.4f}" + (f", {self._rate:,.0f} images/s" if self._rate else ""))
        if last // self._log_every > (last - count) // self._log_every and now - self._mark[1] >= MEASURED:
            self._mark = (last, now)
        for i in range(count):
            step = last - count + 1 + i
            if step % self._log_every == 0:
                for member in range(members):
                    values = {name: float(value[i, member]) for name, value in metrics.items()}
                    self.write(step, {**values, **({"images_per_second": self._rate} if self._rate else {})}, member)


class _Board:
    """A file for TensorBoard. Not a `SummaryWriter`: its thread ends when the disk is full, and then the run hangs."""

    def __init__(self, workdir: pathlib.Path, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._event = event_pb2.Event
        self._writer = EventsWriter(str(workdir / "events"))
        self._flushed = time.monotonic()
        start = event_pb2.SessionLog(
            status=event_pb2.SessionLog.START
        )  # what a killed process wrote from here on is void
        self._writer.write_event(self._event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        for tag, value in values.items():
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=scalar(tag, value)))
        if time.monotonic() - self._flushed >= 30:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


@functools.cache
def has_tensorboard() -> bool:
    """Whether tensorboardX can be imported; if not, prints a warning once."""
    try:
        import tensorboardX.event_file_writer  # noqa: F401
    except ImportError as error:
        print(
            f"warning: no files for TensorBoard are written, because the package tensorboardX cannot be imported "
            f"({first_line(error)}); metrics go to {METRICS} alone. For both: pip install tensorboardX",
            file=sys.stderr,
            flush=True,
        )
        return False
    return True


def _ready(array: jax.Array) -> bool:
    return array.is_ready()  # type: ignore[attr-defined]


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    """Drops what a killed run wrote beyond the checkpoint that it resumes from, torn last line included."""
    if not path.exists():
        return
    kept, damaged, number = [], [], 0
    with path.open("rb") as file:
        while line := file.readline(LINE_BYTES):
            number += 1
            try:
                if parse_json(line)["step"] <= step:
                    kept.append(line.rstrip() + b"\n")
            except (ValueError, KeyError, TypeError):
                damaged.append(number)
    if damaged and damaged != [number]:
        which = ", ".join(map(str, damaged))
        print(f"warning: {path}: damaged lines are dropped ({which} of {number})", file=sys.stderr)
    write_bytes(path, b"".join(kept))
