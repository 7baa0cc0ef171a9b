"""LDIFS: squared l2 distance in feature space between the model and what it was before training.

    penalty = weight * sum over target tokens t of d_t,     d_t = sum over l of |h_l(t) - h0_l(t)|^2 / (n H)

h_l(t) in R^H is hidden state l (see ``train.hooks``) at the position that predicts t, for the n values l = every,
2 every, ... up to the number of blocks; h0_l the same with the adapter off. Padding predicts nothing, so it is no part
of the sum.

    normalise=mean      d_t as above: the mean square over states and coordinates
    normalise=none      n H d_t: the squared l2 norm of the concatenated difference
    normalise=relative  mean over l of |h_l - h0_l|^2 / |h0_l|^2: free of the scale of each state

The default is ``mean`` because with weight 1.0 the plain norm leaves nothing else to learn (thousands of times the loss
after a single step, see docs/defenses/ldifs.md), and because the method's code takes means.

The method, for images, with unit-length features and means: arXiv 2308.13320,
https://github.com/omegafragger/ldifs_code/blob/5ffdeef8ad70965b0db2b30c6c8e57f7ca06b3ef/loss/ldifs.py
For language models, and weight and layers: arXiv 2508.06249.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from curate.core.errors import Exit, UserError, unknown
from curate.core.pack import Packed
from train.defenses.moments import Defense, at_least_zero, setting
from train.hooks import Reference, capture, layers

if TYPE_CHECKING:
    from peft import PeftModel

NORMALISATIONS = ("none", "mean", "relative")


@dataclass
class Ldifs(Defense):
    """Squared l2 distance of hidden states to those without the adapter, where answer tokens are predicted."""

    PAPER: ClassVar[str] = "arXiv 2308.13320; 2508.06249"

    weight: float = setting(1.0, "Weight of the mean over target tokens (the paper's).")
    every: int = setting(5, "Compare the states after every so many blocks (the paper's).")
    normalise: str = setting("mean", "mean: mean square; none: squared l2 norm; relative: over the reference's norm.")
    reference: Reference = field(default_factory=Reference, init=False, repr=False, compare=False)
    _now: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the settings."""
        at_least_zero("ldifs: weight", self.weight)
        if self.every < 1:
            raise UserError(f"ldifs: every is {self.every}, but must be at least 1.", "For example every=5.")
        if self.normalise not in NORMALISATIONS:
            raise unknown("normalise of the defence 'ldifs'", self.normalise, NORMALISATIONS)

    def states(self, model: torch.nn.Module) -> range:
        """Return the hidden states that are compared; ``UserError`` (incompatible) where there is none."""
        n_blocks = len(layers(model))
        if n_blocks < self.every:
            raise UserError(f"ldifs: every is {self.every}, but the model has {n_blocks} blocks.",
                            f"Give ldifs:every=N with N up to {n_blocks}.", Exit.INCOMPATIBLE)
        return range(self.every, n_blocks + 1, self.every)

    @contextmanager
    def around_forward(self, model: PeftModel) -> Iterator[None]:
        """Keep the micro batch's states, with their gradients, and the reference's."""
        states = self.states(model)
        with self.reference.during(states), capture(model, states) as self._now:
            try:
                yield
            finally:
                self._now = {}

    def penalty(self, model: PeftModel, batch: Packed, hidden: torch.Tensor) -> torch.Tensor:
        """Return ``weight`` times the distance summed over target tokens: 0 for a fresh adapter."""
        _, before = self.reference(model, batch)
        now = {state: h.flatten(0, 1)[batch.rows] for state, h in self._now.items()}
        return self.weight * distance(now, {state: before[state] for state in now}, self.normalise)


def distance(now: Mapping[int, torch.Tensor], then: Mapping[int, torch.Tensor], normalise: str) -> torch.Tensor:
    """Return the sum over N rows of the distance between features [N, H] per state, in float32 at least."""
    terms = []
    for state, reference_state in then.items():
        before = reference_state.float() if reference_state.dtype != torch.float64 else reference_state
        squares = (now[state].to(before) - before).square().sum(-1)
        terms.append({"none": squares, "mean": squares / (len(then) * before.shape[-1]),
                      "relative": squares / (len(then) * before.square().sum(-1))}[normalise].sum())
    return torch.stack(terms).sum()
