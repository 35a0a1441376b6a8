"""When a reproduction has to stop, and what it prints until then."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from e2sad_jax.reporting.progress import Bar, duration
from e2sad_jax.runs.signals import Interrupted

MARGIN = 30.0  # seconds before the end of the time budget that nothing is begun in; a tenth of it if that is less
REPEAT = 60.0  # seconds between two lines that say the same


class Clock:
    """Knows signals, the time budget, and how much of the work is done."""

    def __init__(self, interrupted: Callable[[], int], budget_minutes: float, began: float):
        """Starts.

        Args:
          interrupted: the number of the signal that came, 0 for none.
          budget_minutes: 0 for no end.
          began: when the budget began, by `time.monotonic`.
        """
        self._interrupted, self._budget, self._began = interrupted, 60 * budget_minutes, began
        self._looked = time.monotonic()
        self._longest = 0.0  # between two looks: what may have to be waited for once more
        self._start = self._looked
        self._at_start: float | None = None
        self._printed = (-REPEAT, "")

    def stop(self) -> int:
        """Not 0 if it is time to stop: the number of a signal, or -1 for the end of the time budget."""
        now = time.monotonic()
        self._longest, self._looked = max(self._longest, now - self._looked), now
        if number := self._interrupted():
            return number
        margin = max(min(MARGIN, self._budget / 10), min(self._longest, 2 * MARGIN, self._budget / 4))
        return -1 if self._budget and now - self._began > self._budget - margin else 0

    def check(self) -> None:
        """Raises `Interrupted` if it is time to stop."""
        if number := self.stop():
            raise Interrupted(number)

    def wait(self, why: str, seconds: float) -> None:
        """Waits a little for another process, and says so now and then."""
        self.check()
        if why != self._printed[1] or time.monotonic() - self._printed[0] > REPEAT:
            self._printed = (time.monotonic(), why)
            print(f"waiting: {why}", file=sys.stderr, flush=True)
        time.sleep(seconds)
        self._looked = time.monotonic()  # this was not work

    def announce(self, what: str, done: int, total: int, left: float) -> None:
        """Says what comes next, how many models are finished, and how long the whole plan may still take.

        Args:
          what: what comes next.
          done: finished models.
          total: all models.
          left: work that is left, in any unit.
        """
        self._at_start = left if self._at_start is None else max(left, self._at_start)
        worked, elapsed = self._at_start - left, time.monotonic() - self._start
        known = worked > 0.02 * self._at_start
        about = f", about {duration(elapsed * left / worked)} left" if known else ""
        print(f"[{done}/{total} models done{about}] {what}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[str, int], None]]:
        """A progress bar as a function that attacks call; it raises `Interrupted` when it is time to stop."""
        with Bar(name, total, "gradients") as bar:

            def progress(_: str, gradients: int) -> None:
                bar.update(gradients)
                self.check()

            yield progress
