"""Ctrl-C and SIGTERM as an exception: a measurement has no step after which it could be asked, and one may take minutes."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any


class Interrupt(KeyboardInterrupt):
    """A signal that ends the measurement.

    Attributes:
      number: which.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Raises the first Ctrl-C or SIGTERM as an `Interrupt`, so that what is there can be written; a second ends all."""
    caught = 0.0
    previous: dict[int, Any] = {}

    def catch(number: int, frame: Any) -> None:
        nonlocal caught
        if not caught:
            caught = time.monotonic()
            raise Interrupt(number)
        if time.monotonic() - caught >= 1:  # who signals a process and its group means it once
            restore()
            os.kill(os.getpid(), number)

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, catch)
    try:
        yield
    finally:
        restore()
