"""KL divergence between the model and what it was before training.

    penalty = weight * sum over target tokens t of KL_t

    direction=model      KL_t = sum over tokens y of p(y | t) (log p(y | t) - log q(y | t))
    direction=reference  KL_t = sum over tokens y of q(y | t) (log q(y | t) - log p(y | t))

p is the model, q the model with its adapter switched off; t runs over the tokens of answers and their ends of turn.
The trainer divides by the number of those tokens, so ``weight`` is the paper's lambda for a mean over tokens.

Weight: arXiv 2508.06249 (lambda_KL = 0.1). Direction: ``model``, the one of the authors' training code and of the usual
penalty in reinforcement learning. It weighs each token by the model's own probability, so it acts on what the model has
begun to say and the reference would not; ``reference`` acts on what the reference would say and the model forgets.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from curate.core.decoder import head, without_adapter
from curate.core.errors import unknown
from curate.core.pack import Packed
from train.defenses.moments import Defense, RowPenalty, at_least_zero, setting
from train.hooks import Reference

if TYPE_CHECKING:
    from peft import PeftModel

DIRECTIONS = ("model", "reference")


@dataclass
class Kl(Defense):
    """KL divergence to the model without its adapter, on answer tokens."""

    PAPER: ClassVar[str] = "arXiv 2508.06249"

    weight: float = setting(0.1, "Weight of the mean over target tokens (the paper's).")
    direction: str = setting("model", "model: KL(model || reference); reference: KL(reference || model).")
    reference: Reference = field(default_factory=Reference, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        at_least_zero("kl: weight", self.weight)
        if self.direction not in DIRECTIONS:
            raise unknown("direction of the defence 'kl'", self.direction, DIRECTIONS)

    def around_forward(self, model: PeftModel) -> AbstractContextManager[None]:
        """Keep the reference's pass for the length of a micro batch."""
        return self.reference.during()

    def row_penalty(self, model: PeftModel, batch: Packed) -> RowPenalty:
        """Have the reference run on ``batch``; return what adds ``weight`` times the divergence: 0 for a fresh adapter.

        The reference's logits exist for a piece at a time, as the model's do, and carry no gradient.
        """
        before, _ = self.reference(model, batch)
        frozen = without_adapter(head(model))

        def add(log_p: torch.Tensor, piece: slice) -> torch.Tensor:
            with torch.no_grad():
                log_q = frozen(before[piece]).float().log_softmax(-1)
            return self.weight * divergence(log_p, log_q, self.direction)
        return add


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, direction: str) -> torch.Tensor:
    """Return the sum over N rows of the divergence in nats between model p and reference q, log-probabilities [N, V].

    ``direction`` ``model``: KL(p || q); ``reference``: KL(q || p).
    """
    one, other = (log_p, log_q) if direction == "model" else (log_q, log_p)
    return (one.exp() * (one - other)).sum()
