"""This process: which of several that were started together it is, and what it does with memory that it frees.

One process alone is the first of one; ``accelerate launch`` and ``torchrun`` say so in ``RANK`` and ``WORLD_SIZE``.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # of glibc's malloc.h


def count() -> int:
    """Return how many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, and return whether its C library can be told to (glibc's can).

    A pass on a CPU makes and drops the same few tensors of some 10 MB in every layer. By default their memory goes back
    to the system time and again, which then has to clear it anew: some percent of a pass (docs/benchmarks.md). The
    process then stays near its peak. Tensors above 32 MB, the most that glibc takes for a limit, still go back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, 32 << 20) and mallopt(M_TRIM_THRESHOLD, 1 << 30))
