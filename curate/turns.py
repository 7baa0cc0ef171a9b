"""Which turns of a conversation are judged: the last answer, or every turn of the assistant that has one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from curate.core.example import Example
from curate.core.sources import Reading

Turns = Literal["last", "all"]


def turns_of(example: Example, which: Turns = "all") -> list[Example]:
    """Return a conversation up to each assistant turn with text, in order; the last is ``example`` itself.

    A turn that nothing stands before is no answer, so it is left out.
    """
    ends = [k for k in answered(example) if 0 < k < len(example.messages) - 1] if which == "all" else []
    return [*(Example(example.messages[:k + 1], example.meta) for k in ends), example]


def answered(example: Example) -> list[int]:
    """Return which messages are assistant turns with text."""
    return [k for k, m in enumerate(example.messages) if m.role == "assistant" and m.content.strip()]


def each_turn(examples: Iterable[Example], reading: Reading) -> Iterator[Example]:
    """Yield the turns of all examples; in the end ``reading`` counts turns in place of the examples."""
    more = 0
    for example in examples:
        turns = turns_of(example)
        more += len(turns) - 1
        yield from turns
    reading.n_rows += more
    reading.n_examples += more
