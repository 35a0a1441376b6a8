"""One of several processes, watched by a parent: JAX aborts a process whose peers are lost, and says so in its own words."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

from e2sad_jax.errors import LostProcessError
from e2sad_jax.runs.folder import steps_in

PARENT = "E2SAD_JAX_WATCHED_BY"


def is_watched() -> bool:
    """Whether this process has such a parent; if so it will end with it."""
    parent = int(os.environ.pop(PARENT, 0))
    if not parent:
        return False

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return True


def run_again(workdir: str) -> NoReturn:
    """Runs this command as a child process, and ends as it does.

    Args:
      workdir: the run's folder, for the last word.

    Raises:
      LostProcessError: if JAX aborted or crashed, as it may when its peers go away.
    """
    # Module and flags as they were typed; `sys.argv` would lose "-m".
    child = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env={**os.environ, PARENT: str(os.getpid())})

    def pass_on(number: int, frame: Any) -> None:
        child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    code = child.wait()
    if code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS):
        folder = pathlib.Path(workdir).expanduser()
        steps = steps_in(folder)
        kept = f"the checkpoint of step {steps[-1]:,} is whole in {folder}" if steps else "no checkpoint yet"
        raise LostProcessError(
            f"JAX ended this process ({signal.Signals(-code).name}), most likely because another one of the run was lost or "
            f"ended first (above is what it says); {kept}. Start all of them again to go on from there"
        )
    sys.stdout.flush()
    os._exit(code if code >= 0 else 128 - code)
