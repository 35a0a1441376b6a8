"""What a step frees is not mapped anew for the next one."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import pytest

LIBRARY, VERSION = platform.libc_ver()
ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """
import json, resource, sys, threading
from e2sad_jax.runs import _malloc

def work():
    for _ in range(20):
        b"1" * (64 * 2**20)  # as large as the buffers of a step, in a thread, as JAX's are

taken = _malloc.keep_freed() if sys.argv[1] == "kept" else None
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps([taken, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def faults(how: str) -> tuple[bool, int]:
    """Whether the setting was taken, and the page faults of twenty times 64 MiB."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, check=True)
    taken, count = json.loads(done.stdout)
    return taken, count


@pytest.mark.skipif(LIBRARY != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_kept():
    taken, kept = faults("kept")
    _, mapped_anew = faults("plain")
    assert mapped_anew >= 20 * 32  # each of them, each time, even if a page has 2 MiB
    if tuple(map(int, VERSION.split("."))) >= (2, 36):
        assert taken
    assert kept < mapped_anew / (5 if taken else 0.9), "never worse than nothing"
