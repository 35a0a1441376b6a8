"""glibc's settings for memory: what a training step frees is kept for the next one."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of <malloc.h>
_LIMIT = 2**30  # bytes


def keep_freed() -> bool:
    """Lets glibc keep freed memory, up to a gibibyte in one piece, instead of giving it back to the system at once.

    On the CPU the buffers of a step are one large piece, which glibc maps anew for each step: thousands of page faults.
    This is for the whole process, so programs call it, not the library, and before JAX computes. Settings of the user's
    own in the environment have precedence.

    Returns:
      Whether glibc took it; elsewhere nothing changes, nor with a glibc (before about 2.35) that allows 32 MiB at most.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    # The threshold of mapping first: where it is refused, that of trimming alone would do harm.
    settings = {_MMAP_THRESHOLD: _LIMIT, _TRIM_THRESHOLD: _LIMIT, _ARENA_MAX: 1}
    return all(mallopt(option, value) == 1 for option, value in settings.items())
