"""Progress: a bar at a terminal, plain lines in a log."""

import os
import sys
import time
from types import TracebackType
from typing import Self

import tqdm

SHOWN = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Bar:
    """Shows progress: a tqdm bar at a terminal, elsewhere a line at intervals.

    The first update starts the clock of the time left: what comes before it is mostly the compiler, which is no step.
    """

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
        """Starts at `initial` of `total`.

        Args:
          title: what is done.
          total: units of work.
          unit: their name, in the plural.
          initial: units done before.
          interval: seconds between lines in a log.
          silent: whether nothing is shown.
        """
        self.title, self.total, self.unit, self.done = title, total, unit, initial
        self._silent, self._interval = silent, interval
        self._start = time.monotonic()
        self._next_line = self._start + 2  # the first line comes soon
        self._clock: tuple[float, int] | None = None  # time and units done after the first update
        self._bar = None
        if sys.stderr.isatty() and not silent:
            known = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # some pseudo terminals have no size
            width = {"dynamic_ncols": True} if known else {"ncols": 100, "nrows": 24}
            self._bar = tqdm.tqdm(desc=title, total=total, initial=initial, bar_format=SHOWN, **width)

    def update(self, amount: int, note: str = "") -> None:
        """Adds `amount` units; `note` is shown behind the count."""
        now = time.monotonic()
        self.done += amount
        if self._clock is None and amount:  # an empty update names what is about to be compiled
            self._clock = now, self.done
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(filter(None, (self._left(now), note))), refresh=False)
            self._bar.update(amount)
        elif not self._silent and (now >= self._next_line or self.done >= self.total):
            self._next_line = now + self._interval
            end = self._left(now) if self.done < self.total else f"took {duration(now - self._start)}"
            parts = [f"{self.title}: {self.done:,}/{self.total:,} {self.unit}", note, end]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def skip(self, amount: int, note: str = "") -> None:
        """Adds `amount` units that took no time: the time left does not depend on them."""
        if self._clock is not None:
            self._clock = self._clock[0], self._clock[1] + amount
            self.update(amount, note)
        else:
            self.update(amount, note)
            self._clock = None

    def say(self, text: str) -> None:
        """Prints a line above the bar, or among the lines of a log."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self._silent:
            print(text, file=sys.stderr, flush=True)

    def _left(self, now: float) -> str:
        """The time left, from the speed since the first update; empty before there is one."""
        if self._clock is None:
            return ""
        since, done = self._clock
        if self.done <= done or self.done >= self.total:
            return ""
        return f"{duration((self.total - self.done) * (now - since) / (self.done - done))} left"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Formats seconds as 42s, 3m05s or 2h07m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
