"""Provenance of a number: command, date, hardware, versions, commit."""

import datetime
import functools
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

from e2sad_jax.defenses import PLUGINS


def environment() -> dict[str, Any]:
    """Date, hardware, versions and commit of this process, noted with every result."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": f"{device.device_kind} ({device.platform})"  # its settings say how many
        if device.platform != "cpu"
        else f"CPU, {os.cpu_count()} cores, {_cpu_name()}",
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "commit": commit(),
    }


def sentence(environment: Mapping[str, Any]) -> str:
    """One sentence on an environment: date, hardware, versions, commit."""
    e = environment
    return (
        f"Measured {e['date']} on {e['hardware']}; Python {e['python']}, JAX {e['jax']}, Flax {e['flax']}; "
        f"commit {e['commit']}."
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def commit() -> str | None:
    """The commit of the checkout at the first call, marked where files differ from it; None outside a checkout."""
    return commit_of(pathlib.Path(__file__).parent)


def commit_of(package: pathlib.Path) -> str | None:
    """The commit of the checkout that a package lies in, as `commit`. What commands write into results/ is no change."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "--error-unmatch", "__init__.py"):
            return None
        changed = git("status", "--porcelain", "-uno", "--", ":(top,exclude)results")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command() -> str:
    """The command line of this process as a user types it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if sys.argv[0].startswith(("e2sad ", "python -m e2sad_jax ")):  # `cli.console`'s, with its subcommand
        program = sys.argv[0]
    elif spec is not None and spec.name:
        program = f"python -m {spec.name.removesuffix('.__main__')}"
    else:
        program = f"python {sys.argv[0]}"
    return " ".join([*_own_defenses(), program, *map(shlex.quote, sys.argv[1:])])


def _own_defenses() -> list[str]:
    """The environment variable without which the command would not know the user's own defenses."""
    return [f"{PLUGINS}={shlex.quote(os.environ[PLUGINS])}"] if os.environ.get(PLUGINS) else []


def again() -> str:
    """The command line to run again: `command`, with the interpreter's path if `python` is another one."""
    prefix = " ".join([*_own_defenses(), "python "])
    if not command().startswith(prefix):
        return command()
    own, usual = pathlib.Path(sys.executable), shutil.which("python")
    if usual and pathlib.Path(usual).absolute().parent == own.absolute().parent and os.path.samefile(usual, own):
        return command()
    here = os.path.relpath(own) if own.is_relative_to(pathlib.Path.cwd()) else str(own)
    return prefix.removesuffix("python ") + shlex.quote(here) + " " + command().removeprefix(prefix)
