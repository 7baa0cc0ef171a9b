"""Scoring with transformers on CPU or CUDA: packed sequences, answer rows only through the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from curate.core.adapters import adapter_open
from curate.core.chat import Encoded
from curate.core.model import Loaded
from curate.core.nll import TOLERANCE_NATS, AnswerNll, Budget, answer_nll, check_forward, default_budget


class TransformersScorer:
    """See ``Scorer``."""

    engine = "transformers"

    def __init__(self, loaded: Loaded, budget: Budget | None = None) -> None:
        self.loaded = loaded
        self.dtype = loaded.dtype
        self.budget = budget or default_budget(loaded.device)
        self._model: torch.nn.Module = loaded.model
        self._checked = False

    @contextmanager
    def member(self, adapter: Path | None) -> Iterator[None]:
        """See ``Scorer.member``."""
        if adapter is None:
            yield
            return
        with adapter_open(self.loaded, adapter) as model:
            self._model = model
            try:
                yield
            finally:
                self._model = self.loaded.model
        self._model = self.loaded.model

    def score(self, encoded: Sequence[Encoded],
              notify: Callable[[str], None] = lambda text: None) -> Iterator[list[tuple[int, AnswerNll]]]:
        """See ``Scorer.score``. The first call compares a packed pass with the model's own plain one."""
        if not self._checked:
            check_forward(self._model, encoded, TOLERANCE_NATS[self.dtype])
            self._checked = True
        yield from answer_nll(self._model, encoded, self.budget, notify)
