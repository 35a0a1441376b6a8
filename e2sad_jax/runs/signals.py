"""Ctrl-C and SIGTERM: the first one asks the program to stop, a second one ends it."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

REPEAT = 1.0  # seconds within which a second signal is the first once more: sent to a process and to its group


class Interrupted(KeyboardInterrupt):
    """Ends work in the middle, because the program was asked to stop.

    Attributes:
      number: of the signal; -1 for the end of a time budget.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stopping(*, at_once: bool = False) -> Iterator[Callable[[], int]]:
    """Catches the first Ctrl-C or SIGTERM; a second one does what it would have done without this.

    Args:
      at_once: whether to raise `Interrupted` where the program is, instead of waiting to be asked.

    Yields:
      A function that returns the number of the signal that came, 0 if none did.
    """
    caught, since = 0, 0.0
    previous: dict[int, Any] = {}

    def catch(number: int, frame: Any) -> None:
        nonlocal caught, since
        if caught:
            if time.monotonic() - since >= REPEAT:
                restore()
                os.kill(os.getpid(), number)
            return
        caught, since = number, time.monotonic()
        if at_once:
            raise Interrupted(number)
        # Not print: the signal may come while the same stream is being written.
        os.write(2, b"\nStopping after this step; once more to stop at once.\n")

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    try:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, catch)
        yield lambda: caught
    finally:
        restore()
