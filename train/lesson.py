"""What an RL run learns from and in which order: which step is of which kind, on which prompts or rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from curate.core.chat import Encoded
from train.prompts import Asked, endless
from train.recipe import Recipe, RlKnobs
from train.rewards import Reward

if TYPE_CHECKING:
    from train.defenses import Defense


@dataclass(frozen=True)
class Lesson:
    """Everything that a run learns from after its warm-up."""

    recipe: Recipe
    knobs: RlKnobs
    asked: Sequence[Asked]
    rows: Sequence[Encoded]
    """Rows of SFT steps, in order; they begin anew when they are through."""
    reward: Reward
    defenses: Sequence[Defense] = ()

    @property
    def n_prompts(self) -> int:
        """Prompts in one RL step."""
        return self.recipe.batch_size * self.recipe.accumulation // self.knobs.generations

    @property
    def n_steps(self) -> int:
        """Steps of the run: as given, or as many as one pass over the prompts takes with the SFT steps between."""
        n_rl = math.ceil(len(self.asked) / self.n_prompts)
        every = self.knobs.sft_every
        return self.knobs.steps or n_rl + ((n_rl - 1) // (every - 1) if every else 0)

    def kinds(self) -> list[str]:
        """Return the kind of every step."""
        return [self.knobs.kind(step) for step in range(1, self.n_steps + 1)]

    def prompts(self) -> list[list[int]]:
        """Return the prompts of every step, as indices; SFT steps have none."""
        order = endless(self.asked, self.recipe.seed)
        return [list(islice(order, self.n_prompts)) if kind == "rl" else [] for kind in self.kinds()]

    def sft_rows(self, step: int) -> list[Encoded]:
        """Return the rows of an SFT step, counted from 1 with the RL steps."""
        size = self.recipe.batch_size * self.recipe.accumulation
        first = self.knobs.sft_before(step) * size
        return [self.rows[k % len(self.rows)] for k in range(first, first + size)]
