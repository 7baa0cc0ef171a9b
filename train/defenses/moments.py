"""What a defence is: a small dataclass whose fields are its settings, called at some moments of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from curate.core.errors import UserError
from train.data import MixRow

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from curate.core.documents import ModelIdentity
    from curate.core.pack import Packed


RowPenalty = Callable[["torch.Tensor", slice], "torch.Tensor"]
"""Given log-probabilities [n, V] of some targets of a batch and which ones; returns what they add to the loss."""


def setting(default: Any, about: str) -> Any:
    """Return a dataclass field with its default and the line that ``train list`` says about it."""
    return field(default=default, metadata={"about": about})


def at_least_zero(name: str, value: float) -> None:
    """Raise a ``UserError`` for a number that is negative or not finite."""
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name} is {value}, but must be a number of at least 0.", "`train list` shows every setting.")


@dataclass
class Defense:
    """A defence overrides some of these moments of a run; here, each of them does nothing."""

    PAPER: ClassVar[str] = ""
    """Where it is from."""

    def check(self, base: ModelIdentity) -> dict[str, str]:
        """Check what the settings name against the base, before its weights are loaded; ``UserError`` if it won't do.

        Returns the digest of every file or model that decides the run, by setting, for the run card.
        """
        return {}

    def examples(self, rows: Sequence[MixRow]) -> Sequence[MixRow]:
        """Return the rows to train on, one for each of ``rows`` and in their order; called before encoding."""
        return rows

    def around_forward(self, model: PeftModel) -> AbstractContextManager[None]:
        """Return a context that is open during a micro batch, from before its forward pass to after its backward pass.

        The backward pass is inside because with gradient checkpointing it runs the layers again. ``penalty`` runs
        inside too: hooks set here see the passes that a penalty makes of its own.
        """
        return nullcontext()

    def penalty(self, model: PeftModel, batch: Packed, hidden: torch.Tensor) -> torch.Tensor | None:
        """Return what to add to the loss: a scalar, the *sum* over the N target tokens of ``batch``, weight included.

        ``hidden`` [N, H] are the last hidden states that predict the targets, with their gradient; intermediate
        layers, captured in ``around_forward`` as [S, T, H], are picked by ``flatten(0, 1)[batch.rows]``. The reference
        is ``hooks.reference(model)``. A sum, because the trainer divides it, like the loss, by the number of target
        tokens of the whole step. Only positions in ``batch.rows`` count once per example however rows are packed.
        """
        return None

    def row_penalty(self, model: PeftModel, batch: Packed) -> RowPenalty | None:
        """Return what adds a penalty that needs logits over the vocabulary, or None.

        It is called for a piece of the N targets at a time, with the log-probabilities that the loss needs anyway, so
        the model's head runs once for both (again in the backward pass where it learns). What it returns is like
        ``penalty``'s.
        """
        return None

    def after(self, model: PeftModel) -> None:
        """Change the trained adapter in place, before it is saved."""
