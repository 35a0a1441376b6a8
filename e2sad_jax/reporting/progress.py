"""A progress bar at a terminal, plain lines in a log."""

import os
import sys
import time
from types import TracebackType

import tqdm

SHOWN = (
    "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # tqdm's rate would leave no room for the note
)


class Bar:
    """A progress bar at a terminal; elsewhere a plain line now and then, at least `interval` seconds apart."""

    def __init__(
        self,
        title: str,
        total: int,
        unit: str,
        *,
        initial: int = 0,
        interval: float = 30.0,
        silent: bool = False,
    ):
        self._silent = silent
        self.title, self.total, self.unit, self.done = title, total, unit, initial
        self._initial, self._start, self._interval = initial, time.monotonic(), interval
        self._last_line = self._start - interval + 2  # the first line comes soon
        self._bar = None
        if sys.stderr.isatty() and not silent:
            known = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # some pseudo terminals have no size
            width = {"dynamic_ncols": True} if known else {"ncols": 100, "nrows": 24}
            self._bar = tqdm.tqdm(desc=title, total=total, initial=initial, smoothing=0.1, bar_format=SHOWN, **width)

    def update(self, amount: int, note: str = "") -> None:
        """Moves on by `amount`; `note` is shown behind the count."""
        self.done += amount
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
        elif self._silent:
            return
        elif time.monotonic() - self._last_line >= self._interval or self.done >= self.total:
            self._last_line = time.monotonic()
            elapsed = self._last_line - self._start
            left = (self.total - self.done) * elapsed / max(self.done - self._initial, 1)
            print(
                f"{self.title}: {self.done:,}/{self.total:,} {self.unit}"
                + (f", {note}" if note else "")
                + (f", {duration(left)} left" if self.done < self.total else f", took {duration(elapsed)}"),
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds as people write them: 42s, 3m05s, 2h07m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
