"""Engines that turn token ids into answer NLLs; the protocol they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from curate.core.chat import Encoded
from curate.core.nll import AnswerNll


class Scorer(Protocol):
    """One engine with the aligned model open.

    It receives token ids, never text, so that engines cannot disagree about what is scored.
    """

    engine: str
    dtype: str

    def member(self, adapter: Path | None) -> AbstractContextManager[None]:
        """Score with this adapter for the length of a ``with`` block; None is the aligned model itself."""

    def score(self, encoded: Sequence[Encoded],
              notify: Callable[[str], None]) -> Iterator[list[tuple[int, AnswerNll]]]:
        """Yield ``(index into encoded, evidence)`` in batches; every index once. All inputs have status ``ok``."""
