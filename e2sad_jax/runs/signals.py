"""Ctrl-C and SIGTERM, whom they are given to."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def first_to(told: Callable[[int], None]) -> Iterator[None]:
    """Gives the first Ctrl-C or SIGTERM to `told`; a second one does what it would have done without us."""
    first = 0.0
    previous: dict[int, Any] = {}

    def catch(number: int, frame: Any) -> None:
        nonlocal first
        if not first:
            first = time.monotonic()
            told(number)
        elif time.monotonic() - first >= 1:  # who signals a process and its group means it once
            restore()
            os.kill(os.getpid(), number)

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    try:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, catch)
        yield
    finally:
        restore()
