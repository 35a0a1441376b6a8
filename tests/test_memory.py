"""What a step frees is not mapped anew for the next one."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]

PROGRAM = """
import json, resource, sys, threading
from e2sad_jax import _memory

def work():
    for _ in range(20):
        b"1" * (64 * 2**20)  # as large as the buffers of a step, in a thread, as JAX's are

taken = _memory.keep_freed() if sys.argv[1] == "kept" else None
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps([taken, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before]))
"""


def faults(how: str, **environment: str) -> tuple[bool, int]:
    """Whether the setting was taken, and the page faults of twenty times 64 MiB."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env={**own, **environment}, cwd=ROOT, capture_output=True, check=True)
    taken, count = json.loads(done.stdout)
    return taken, count


def test_freed_memory_is_kept():
    taken, kept = faults("kept")
    assert taken, "tests run where glibc is"
    _, mapped_anew = faults("plain")
    assert mapped_anew >= 20 * 32  # each of them, each time, even if a page has 2 MiB
    assert kept < mapped_anew / 5


def test_settings_of_the_user_have_precedence():
    taken, count = faults("kept", MALLOC_MMAP_THRESHOLD_="65536")
    assert not taken
    assert count >= 20 * 32
