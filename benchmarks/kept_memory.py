"""Freed memory that stays in the process, so that no call pays for fresh pages.

A layer's result is some megabytes. Whether it is fresh memory at each call, whose pages then take their own time, is
otherwise up to what the process allocated before. For us and for the peers alike; for glibc.
"""

import ctypes

_LARGEST = 2**31 - 1
# a new process keeps its memory with these: no block is mapped alone, and nothing goes back to the system
ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(_LARGEST)}


def keep_freed_memory() -> None:
    """Have this process keep what is freed from here on."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # M_MMAP_MAX and M_TRIM_THRESHOLD
        mallopt(-4, 0)
        mallopt(-1, _LARGEST)
