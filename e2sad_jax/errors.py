"""The errors that a user of this package may see.

Each message stands on its own: what is wrong, the value found, the bound, and what to change. The experiments print
it as one line and exit with `exit_code`, so no traceback hides it.
"""

import pathlib


def printable(text: str) -> str:
    """A text that may come from a file, without what would reach into a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 300 characters."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0][:300])


FULL = "No space left on device"


def reason(error: BaseException) -> str:
    """`first_line`; of a full disk only that, which TensorStore says last, as one of several resources that are exhausted."""
    return FULL if FULL in str(error) else first_line(error)


def of_device(error: BaseException, doing: str, kept: str, lower: str) -> "Error | None":
    """The error that names what JAX raised, None if it is neither memory nor device: then it is a fault of a program.

    Args:
      error: what was raised.
      doing: what could not be done.
      kept: what is left, and how to go on.
      lower: flags that take less memory when lowered.
    """
    words = str(error)
    if FULL in words:
        return None
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in words:
        return OutOfMemoryError(f"out of memory {doing} ({first_line(error)}); {kept}. Try a lower {lower}")
    if isinstance(error, RuntimeError) and (words.startswith(_OF_DEVICES) or _NO_BACKEND in words):
        return DeviceError(
            f"the device failed {doing} ({first_line(error)}); {kept}. If it fails again look at the device (nvidia-smi, "
            "dmesg), or run elsewhere: JAX_PLATFORMS=cpu takes the CPU"
        )
    return None


# Of what XLA and JAX say; others, such as INVALID_ARGUMENT, are no device's fault.
_OF_DEVICES = ("INTERNAL", "UNAVAILABLE", "UNKNOWN", "ABORTED", "DATA_LOSS", "DEADLINE")
_NO_BACKEND = "Unable to initialize backend"


class Error(Exception):
    """Base of every error that this package raises for a reason its user can mend."""

    exit_code = 1


class ConfigError(Error, ValueError):
    """A setting that cannot be right: names the flag, its value and its range."""

    exit_code = 2


class DataError(Error, ValueError):
    """Images or labels that are missing, damaged, or not what they claim to be."""

    exit_code = 2


class WorkdirError(Error):
    """A workdir that does not fit this run, or that cannot be read."""

    exit_code = 2


class BusyError(WorkdirError):
    """A workdir in which another process is at work."""


class GoneError(WorkdirError):
    """A workdir that was deleted or moved under its run."""

    exit_code = 1


class DamagedError(WorkdirError):
    """A checkpoint that cannot be read, or does not hold what was saved.

    Attributes:
      folder: of the checkpoint.
      why: what is wrong with it.
    """

    def __init__(self, folder: pathlib.Path, why: str):
        super().__init__(
            f"cannot read the checkpoint {folder}: {why}; if no run is at work there, delete that folder to go on from an "
            "earlier one or from the start"
        )
        self.folder, self.why = folder, why


class CheckpointError(WorkdirError):
    """A checkpoint that cannot be written: a full disk, say. The one before it stays."""

    exit_code = 1


class NonFiniteError(Error, ArithmeticError):
    """A loss or metric became NaN or infinite: names the step and the last good checkpoint.

    Attributes:
      member: which run of a population it was, from 0.
    """

    exit_code = 3

    def __init__(self, message: str, member: int = 0):
        super().__init__(message)
        self.member = member


class LostProcessError(Error):
    """Another process of the run is gone; its message names the checkpoint to go on from."""

    exit_code = 5


class OutOfMemoryError(Error):
    """The device, or the host, has not enough memory: names what was being done and the flag to lower."""

    exit_code = 6


class DeviceError(Error):
    """The device, or the program on it, failed: names what was being done and what is left to go on from."""

    exit_code = 7


class Stopped(Error):
    """The run was interrupted after a checkpoint; its message says how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class OutOfTimeError(Error):
    """The time budget was used up; its message says what is left and how to go on."""

    exit_code = 4
