"""The errors that a user of this package may see, and how their messages quote what others say.

A message says what is wrong, the value found, the bound, and what to change. The commands print it as one line and exit
with `exit_code`.
"""

import difflib
import pathlib
from collections.abc import Iterable

FULL = "No space left on device"


def printable(text: str) -> str:
    """Returns a text without the control characters by which a file could write to a terminal."""
    return text if text.isprintable() else ascii(text)[1:-1]


def shortened(text: str, limit: int = 120) -> str:
    """Returns a text of about `limit` characters: its two ends if it is longer."""
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def quoted(value: object) -> str:
    """Returns a value as a message quotes it: printable, and of about 120 characters whatever its length."""
    if isinstance(value, int) and abs(value) > 10**40:
        return f"an integer of {value.bit_length():,} bits"
    return shortened(repr(value) if isinstance(value, str) and value.isprintable() else ascii(value))


def similar(name: str, names: Iterable[str]) -> list[str]:
    """Returns those of `names` that a misspelt name may stand for, the likeliest first."""
    by_lower = {one.lower(): one for one in names}
    return [by_lower[one] for one in difflib.get_close_matches(name[:100].lower(), by_lower, cutoff=0.65)]


def close_to(name: str, names: Iterable[str]) -> str:
    """Returns what is `similar`, as the beginning of a remedy; empty if nothing is."""
    close = similar(name, names)
    return f"did you mean {' or '.join(map(quoted, close))}? " if close else ""


def first_line(error: object, limit: int = 300) -> str:
    """Returns the first line of an error of another library, of about `limit` characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shortened(printable(" ".join(lines[0].split())), limit)


def reason(error: BaseException) -> str:
    """Returns `first_line` of an error; only `FULL` for a full disk, which TensorStore names last among its causes."""
    return FULL if FULL in str(error) else first_line(error)


class Error(Exception):
    """Base of every error that the user of this package can mend."""

    exit_code = 1


class ConfigError(Error, ValueError):
    """A setting is invalid: the message names the flag, its value and its range."""

    exit_code = 2


class DataError(Error, ValueError):
    """Images or labels are missing, damaged, or not what they claim to be."""

    exit_code = 2


class WorkdirError(Error):
    """A workdir does not belong to this run, or cannot be read or written."""

    exit_code = 2


class BusyError(WorkdirError):
    """Another process is at work in a workdir."""


class GoneError(WorkdirError):
    """A workdir was deleted or moved while its run was at work."""

    exit_code = 1


class DamagedError(WorkdirError):
    """A checkpoint cannot be read, or does not hold what was saved.

    Attributes:
      folder: folder of the checkpoint.
      why: what is wrong with it.
    """

    def __init__(self, folder: pathlib.Path, why: str):
        super().__init__(
            f"cannot read the checkpoint {folder}: {why}; if no run is at work there, delete that folder to resume from an "
            "earlier checkpoint, or to start again"
        )
        self.folder, self.why = folder, why


class CheckpointError(WorkdirError):
    """A checkpoint cannot be written, as on a full disk; the one before it is kept."""

    exit_code = 1


class NonFiniteError(Error, ArithmeticError):
    """A loss or metric became NaN or infinite: the message names the step and the last good checkpoint.

    Attributes:
      member: which run of a population it was, from 0.
    """

    exit_code = 3

    def __init__(self, message: str, member: int = 0):
        super().__init__(message)
        self.member = member


class OutOfTimeError(Error):
    """The time budget is used up; the message says what is left to do and how to resume."""

    exit_code = 4


class LostProcessError(Error):
    """Another process of the run ended; the message names the checkpoint to resume from."""

    exit_code = 5


class OutOfMemoryError(Error):
    """The device or the host has too little memory; the message names the work and the flag to lower."""

    exit_code = 6


class DeviceError(Error):
    """The device failed; the message names the work and the checkpoint to resume from."""

    exit_code = 7


class Stopped(Error):
    """A signal stopped the run after a checkpoint; the message says how to resume."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


_OF_DEVICES = ("INTERNAL", "UNAVAILABLE", "UNKNOWN", "ABORTED", "DATA_LOSS", "DEADLINE")  # INVALID_ARGUMENT is a bug's
_CUDA = 'pip install -U "jax[cuda13]" (jax[cuda12] where the driver is older than CUDA 13)'
_INSTALL = {
    "cuda": _CUDA,
    "gpu": _CUDA,
    "tpu": 'pip install -U "jax[tpu]"',
    "rocm": 'pip install -U "jax[rocm7-local]"',
}


def backend_error(error: BaseException, platforms: str) -> ConfigError:
    """Returns the error that says why JAX cannot start on the platforms that were asked for, and what to do.

    Args:
      error: what JAX raised.
      platforms: what JAX_PLATFORMS says, "" for nothing.
    """
    missing = [name for name in platforms.lower().split(",") if name in _INSTALL]
    if missing:
        remedy = f"install the JAX of that device with {_INSTALL[missing[0]]}"
    elif platforms:
        remedy = "it must be of cpu, cuda, tpu, rocm, several with commas"
    else:
        remedy = "look at the device (nvidia-smi, dmesg), or install the JAX that is made for it"
    why = (
        first_line(error)
        .removesuffix(" (set JAX_PLATFORMS='' to automatically choose an available backend)")
        .rstrip(".")
    )
    why = why if str(error) else "JAX finds no such device, or is not installed for it"  # a bare AssertionError
    return ConfigError(f"JAX_PLATFORMS={printable(platforms)}: {why}; {remedy}, or take the CPU with JAX_PLATFORMS=cpu")


def as_device_error(error: BaseException, doing: str, kept: str, lower: str) -> Error | None:
    """Returns the error that explains what JAX raised for lack of memory or a failed device; None for any other cause.

    Args:
      error: what was raised.
      doing: what could not be done, in words.
      kept: what is left, and how to resume.
      lower: flags that save memory when lowered.
    """
    words = str(error)
    if FULL in words:
        return None
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in words:
        return OutOfMemoryError(f"out of memory {doing} ({first_line(error)}); {kept}. Try a lower {lower}")
    if isinstance(error, RuntimeError) and words.startswith(_OF_DEVICES):
        return DeviceError(
            f"the device failed {doing} ({first_line(error)}); {kept}. If it fails again look at the device (nvidia-smi, "
            "dmesg), or run elsewhere: JAX_PLATFORMS=cpu takes the CPU"
        )
    return None
