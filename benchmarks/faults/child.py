"""One command in a process of its own."""

import atexit
import os
import runpy
import sys
import traceback
from collections.abc import Sequence

from benchmarks.faults.phases import END, note_phases


def command(argv: Sequence[str], patch: str, out: str, err: str, phases: str, limit: int) -> None:
    """`python -m MODULE FLAGS ...` or `python -c PROGRAM ...`, in a process of its own.

    Args:
      argv: "-m" or "-c" and what follows it.
      patch: a program to be run before.
      out: file for standard output.
      err: file for standard error.
      phases: file for the phases that it enters.
      limit: bytes of address space, 0 for no limit.
    """
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    enter = note_phases(phases)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = ["-c", *argv[2:]]
    code: object = 0
    try:
        exec(patch, {"__name__": "patch"})
        if argv[0] == "-m":
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            exec(argv[1], {"__name__": "__main__"})
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    enter(END)
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)
