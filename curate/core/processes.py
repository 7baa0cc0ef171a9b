"""Which of several processes that were started together this one is; one process alone is the first of one.

``accelerate launch`` and ``torchrun`` say so in ``RANK`` and ``WORLD_SIZE``.
"""

from __future__ import annotations

import os


def count() -> int:
    """Return how many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0
