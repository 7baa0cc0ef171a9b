"""How rows become micro batches: which rows make an optimiser step, which process gets them, how they are packed.

A step takes the next ``batch_size * accumulation`` rows. Its pass p takes the p-th ``batch_size`` of them; with n
processes, process r takes the passes r, r + n, r + 2 n, ... So the passes are the same, however many processes share
them; where the last step of an epoch has too few rows for all, a process works on nothing beside the others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Sampler

from curate.core.chat import Encoded
from curate.core.pack import Packed, pack, plan
from train.recipe import Recipe
from train.world import World

Batch = dict[str, Packed]


@dataclass(frozen=True)
class Schedule:
    """How many steps a run takes, and how many tokens each step of an epoch works through."""

    n_steps: int
    tokens: tuple[int, ...]
    """All tokens, prompts included, per step of one epoch."""
    targets: tuple[int, ...]
    """Target tokens per step of one epoch."""

    def upto(self, per_step: Sequence[int], step: int) -> int:
        """Return the sum of ``per_step`` over the first ``step`` steps."""
        epochs, rest = divmod(step, len(per_step))
        return epochs * sum(per_step) + sum(per_step[:rest])


def schedule(rows: Sequence[Encoded], recipe: Recipe) -> Schedule:
    """Return the steps of a run over ``rows``; the last step of an epoch may be smaller."""
    size = recipe.batch_size * recipe.accumulation
    steps = [rows[k:k + size] for k in range(0, len(rows), size)]
    n_steps = len(steps) * recipe.epochs
    return Schedule(min(n_steps, recipe.limit_steps or n_steps),
                    tuple(sum(len(row.ids) for row in step) for step in steps),
                    tuple(sum(len(row.ids) - row.answer_start for row in step) for step in steps))


class Shares(Sampler[list[int]]):
    """The row numbers of each pass of one process over an epoch; every process has equally many passes."""

    def __init__(self, n_rows: int, recipe: Recipe, world: World) -> None:
        self.n_rows, self.size, self.world = n_rows, recipe.batch_size, world
        self.step = recipe.batch_size * recipe.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """Yield one list per pass; the last may be empty."""
        for start in range(0, self.n_rows, self.step):
            end = min(start + self.step, self.n_rows)
            for first in range(start, end, self.size * self.world.size):
                begin = first + self.world.rank * self.size
                yield list(range(begin, min(begin + self.size, end)))

    def __len__(self) -> int:
        """Return how many passes an epoch takes."""
        together = self.size * self.world.size
        whole, rest = divmod(self.n_rows, self.step)
        return whole * -(-self.step // together) + -(-rest // together)


def collate(rows: Sequence[Encoded], capacity: int, window: int = sys.maxsize, along_paths: bool = False) -> Batch:
    """Return one micro batch, packed; what all its rows begin with is in it once per sequence.

    With ``along_paths`` it is one sequence. Otherwise, of the layouts with sequences of up to about ``capacity``
    tokens, it is the one with the fewest positions, padding included. If a row is longer than the model's ``window``,
    which a mask of ours would not keep to, every row is a sequence of its own, without a mask.
    """
    if any(len(row.ids) > window for row in rows):
        return {"packed": pack(rows, [[number] for number in range(len(rows))])}
    if along_paths:
        return {"packed": pack(rows, [range(len(rows))], along_paths=True)}
    capacity = min(capacity, window)
    layouts = [pack(rows, plan(rows, size)) for size in range(capacity // 2, capacity + 1, max(1, capacity // 16))]
    return {"packed": min(layouts, key=lambda layout: layout.input_ids.numel())}


def without_targets(row: Encoded) -> Batch:
    """Return a micro batch that adds nothing to the loss, for a process that has no rows while others do."""
    packed = pack([row], [[0]])
    return {"packed": replace(packed, **{name: getattr(packed, name)[:0]
                                         for name in ("rows", "targets", "owner", "is_eot")})}
