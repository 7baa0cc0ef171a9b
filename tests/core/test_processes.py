"""Memory that a process frees and keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKS = """
import ctypes, resource, sys
from curate.core.processes import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [c.malloc(12 * 2**20) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 12 * 2**20)
    for block in reversed(blocks):
        c.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults() for _ in range(4)][-1])
"""


def faults(how: str) -> int:
    """Return how many pages a fresh process asks the system for while it makes the same 96 MB for the fourth time."""
    done = subprocess.run([sys.executable, "-c", BLOCKS, how], stdout=subprocess.PIPE, text=True)
    if done.returncode == 3:
        pytest.skip("the C library is not glibc")
    done.check_returncode()
    return int(done.stdout)


def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    pages = 8 * 12 * 2**20 // 4096
    assert faults("keep") < pages // 100
    assert faults("default") > pages // 4        # else there is nothing to gain any more, and the call can go
