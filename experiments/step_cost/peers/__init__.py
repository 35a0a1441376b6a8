"""The same steps by others: plain XLA, other libraries. None of those is imported unless it is asked for."""

import contextlib
import importlib.util
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from e2sad_jax.errors import ConfigError
from e2sad_jax.training.config import Config

# What `--peer` may name, and the rows that each has.
VARIANTS = {"xla": ("xla",), "torch": ("torch", "torch.compile"), "art": ("art",)}
PACKAGES: dict[str, tuple[str, ...]] = {"xla": (), "torch": ("torch",), "art": ("torch", "art")}
SHIPPED_BY = {"torch": "torch", "art": "adversarial-robustness-toolbox"}


class PeerStep(Protocol):
    """Another library's training step, with its state and data.

    Attributes:
      note: what differs from ours, empty for nothing.
      compile_seconds: what its compiler took, None without one.
      at_once: steps in a dispatch.
    """

    note: str
    compile_seconds: float | None
    at_once: int

    def run(self, dispatches: int) -> None:
        """Trains, and waits for the end."""

    def losses(self, steps: int) -> list[float] | None:
        """Trains for so many steps; the loss of each, None where it is not meant to equal ours."""


class NotOfferedError(Exception):
    """The library has no such defense."""


def check_installed(name: str) -> None:
    """Refuses a peer whose packages are not there.

    Raises:
      ConfigError: naming the package and how to install it.
    """
    for package in PACKAGES[name]:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"--peer={name}: needs the package {SHIPPED_BY[package]}, which is not installed; "
                "pip install -e '.[bench]', or leave --peer out"
            )


def build(
    by: str,
    config: Config,
    image_shape: tuple[int, ...],
    num_classes: int,
    parameters: Any,
    steps_per_dispatch: int = 0,
) -> PeerStep:
    """The step of one of `VARIANTS`.

    Args:
      by: whose.
      config: settings of the run; in float32.
      image_shape: (H, W, C).
      num_classes: number of classes K.
      parameters: Flax variables to start from.
      steps_per_dispatch: of plain XLA; 0 for the platform's own.

    Raises:
      NotOfferedError: if the library has no such defense.
    """
    if by == "xla":
        from experiments.step_cost.peers import xla

        return xla.XlaStep(config, image_shape, num_classes, steps_per_dispatch)
    # PyTorch's threads spin while they wait, and where other work wants the cores that slows all down.
    # Read when its OpenMP is loaded, so this is early enough unless someone else imported it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if by == "art":
        from experiments.step_cost.peers import art

        return art.ArtStep(config, image_shape, num_classes, parameters)
    from experiments.step_cost.peers import pytorch

    return pytorch.TorchStep(config, image_shape, num_classes, parameters, compiled=by == "torch.compile")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends what takes longer with a `TimeoutError`, where the system has such an alarm and this is the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
