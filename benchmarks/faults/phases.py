"""In which phase a command is: written by itself into a file, which a kill leaves whole."""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from e2sad_jax.comparison import evaluate_model
from e2sad_jax.comparison import run as comparison
from e2sad_jax.data import tfds
from e2sad_jax.reporting import plots, results
from e2sad_jax.runs import evaluate, run, trainer
from e2sad_jax.runs.checkpoint import Checkpoints
from e2sad_jax.runs.metrics import Recorder

START, END = "start", "end"
FIRST, STEP, VALIDATION = "first step", "training step", "validation"
CHECKPOINT, EVALUATION, RESULTS = "checkpoint write", "evaluation", "writing results"
DOWNLOAD, DECODING, COPY = "data preparation: records", "data preparation: decoding", "data preparation: copy"
ENTRIES: tuple[tuple[Any, str, str], ...] = (
    *((trainer, "fit", FIRST), (Recorder, "__call__", STEP), (trainer, "validate", VALIDATION)),
    *((Checkpoints, "save", CHECKPOINT), (run, "_evaluate", EVALUATION), (results, "write", RESULTS)),
    *((evaluate_model, "_attacked", EVALUATION), (comparison, "plot", RESULTS), (evaluate, "diagnose", EVALUATION)),
    *((plots, "examples", RESULTS), (tfds, "_prepare", DOWNLOAD), (tfds, "_decode", DECODING)),
    (tfds, "write_npz", COPY),
)


def note_phases(path: str) -> Callable[[str], None]:
    """Lets this process note from now on when it enters a phase, in seconds of computing; returns what notes one more."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    now = ""

    def enter(phase: str) -> None:
        nonlocal now
        if phase != now:
            os.write(file, f"{time.process_time():.4f} {phase}\n".encode())
            now = phase

    def telling(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            enter(phase)
            return function(*args, **kwargs)

        return called

    enter(START)
    for owner, name, phase in ENTRIES:
        setattr(owner, name, telling(getattr(owner, name), phase))
    return enter
