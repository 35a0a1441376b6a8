"""Ctrl-C and SIGTERM as an exception: a measurement has no step after which it could be asked, and one may take minutes."""

import contextlib
from collections.abc import Iterator

from e2sad_jax.runs.signals import first_to


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

    def told(number: int) -> None:
        raise Interrupt(number)

    with first_to(told):
        yield
