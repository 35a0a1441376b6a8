"""Where the seconds of `make train`'s command go: imports, tracing, compiling, training, attacks; at first and again.

python -m benchmarks.startup [--results=results/startup]

Runs `python -m experiments.digits` in a process of its own, with an empty cache of compiled programs, and again with what that
has left there. The command's own lines tell when its first step is done. JAX's log tells what it traced and compiled. Prints a
Markdown page, and writes startup.md and .json.
"""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from e2sad_jax import cli
from e2sad_jax._io import check_folder, write_json, write_text
from e2sad_jax.errors import ConfigError
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.table import Table
from e2sad_jax.training.config import check, setting

IMPORTS = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
MODULES = {"JAX": "jax, jax.numpy", "the command": "e2sad_jax.cli, e2sad_jax.runs.run"}
LOGGED = {  # by what JAX's log calls it
    "tracing": re.compile(r"Finished tracing .* for jit in ([\d.]+) sec"),
    "lowering": re.compile(r"Finished jaxpr to MLIR module conversion .* in ([\d.]+) sec"),
    "XLA": re.compile(r"Finished XLA compilation of .* in ([\d.]+) sec"),
}
STEP = re.compile(r"train .*: [\d,]+/[\d,]+ steps")
DONE = re.compile(r"train .*: .* took ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure; each field is the flag of that name.

    Raises:
      ConfigError: if a value is out of range.
    """

    steps: int = setting(0, "training steps; 0: those of the command", lower=0)
    results: str = setting("", "folder for startup.md and .json, empty: none")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))


def imports() -> dict[str, float]:
    """Seconds that importing takes, in a process of its own each."""
    return {name: float(_python("-c", IMPORTS.format(modules)).stdout) for name, modules in MODULES.items()}


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


def timed(arguments: Sequence[str], folder: pathlib.Path) -> dict[str, Any]:
    """Seconds of a training command and of its parts.

    Args:
      arguments: the command's, after `python`.
      folder: for data sets and compiled programs.

    Raises:
      ConfigError: if it fails, with its last line.
    """
    environment = {**os.environ, "E2SAD_DATA_DIR": str(folder), "JAX_LOG_COMPILES": "1", "PYTHONUNBUFFERED": "1"}
    logged: dict[str, list[float]] = {name: [] for name in LOGGED}
    first: dict[str, Any] = {}
    trained, line, began = 0.0, "", time.perf_counter()
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for name, pattern in LOGGED.items():
                if found := pattern.search(line):
                    logged[name].append(float(found[1]))
            if STEP.search(line) and not first:
                first = {"first step": time.perf_counter() - began, **{k: sum(v) for k, v in logged.items()}}
            if DONE.search(line):
                trained = time.perf_counter() - began
    if process.returncode or not first:
        raise ConfigError(f"{' '.join(arguments)}: ended with exit code {process.returncode}: {line.strip()}")
    return {
        "first": first,
        "trained": trained,
        "whole": time.perf_counter() - began,
        **{name: sum(seconds) for name, seconds in logged.items()},
        "programs": len(logged["XLA"]),
    }


def run(asked: Request) -> None:
    """Measures, prints the page and writes it.

    Raises:
      ConfigError: if the command fails.
    """
    provenance.commit()  # before the results that are written make it one with changes
    if asked.results:
        check_folder(folder := pathlib.Path(asked.results).expanduser(), f"--results={folder}", make=True)
    runs = {}
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place)
        steps = [f"--steps={asked.steps}"] if asked.steps else []
        for name in ("at first", "again"):
            arguments = ["-m", "experiments.digits", f"--workdir={root / name}", *steps]
            runs[name] = timed(arguments, root / "data")
    result = {
        "command": provenance.command(),
        "environment": provenance.environment(),
        "imports": imports(),
        "runs": runs,
    }
    print(page(result))
    if asked.results:
        write_json(folder / "startup.json", result)
        write_text(folder / "startup.md", page(result))


def page(result: Mapping[str, Any]) -> str:
    """startup.md: a row for each run."""
    rows = [
        [
            name,
            *(f"{run['first'][key]:.1f}" for key in ("first step", *LOGGED)),
            *(f"{run[key]:.1f}" for key in ("trained", "whole", *LOGGED)),
            run["programs"],
        ]
        for name, run in result["runs"].items()
    ]
    table = Table(
        title="Seconds from the command to its first step, and to its end",
        columns=[
            "`python -m experiments.digits`",
            *("first step", "of them tracing", "lowering", "XLA"),
            *("trained", "whole", "of them tracing", "lowering", "XLA", "programs"),
        ],
        rows=rows,
        notes=[
            "At first: the cache of compiled programs is empty. Again: it has what the run before left there, and XLA's "
            "seconds are those of reading it and of programs too small to keep.",
            "Trained: e2SAD and the natural model are trained, and their checkpoints chosen.",
            "Imports: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["imports"].items()) + ".",
            f"`{result['command']}`. {provenance.sentence(result['environment'])}",
        ],
    )
    return table.markdown()


if __name__ == "__main__":
    for flag in dataclasses.fields(Request):
        cli.define_flag(flag)
    cli.launch(lambda: run(cli.from_flags(Request)), "nothing is kept")
