"""What the program that is being traced is for: its platform, and whether it is run or only counted."""

import contextlib
import threading
from collections.abc import Iterator

import jax

_state = threading.local()


def platform() -> str:
    """Where the program that is being traced will run: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # a Device, a platform's name, or None
    return getattr(device, "platform", device) or jax.default_backend()


@contextlib.contextmanager
def straight_line() -> Iterator[None]:
    """Programs that are traced and lowered inside have no loops of ours: XLA's counts take a loop's body once."""
    before = straight()
    _state.straight = True
    try:
        yield
    finally:
        _state.straight = before


def straight() -> bool:
    """Whether a program without loops is asked for."""
    return getattr(_state, "straight", False)
