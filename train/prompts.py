"""Prompts of reinforcement learning: rows like any others, whose answer may be missing.

An answer, where a row has one, is never learnt from. It is kept as the reference that a verifiable reward compares
with. What the model is asked may differ from what the reward is told: a defence such as inoculation changes the former.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.chat import encode
from curate.core.errors import Exit, UserError
from curate.core.example import ANSWERS, ROLE_NAMES, Example, Message, RowError, from_row
from curate.core.sources import Source, raw_rows
from train.data import MixRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from train.defenses import Defense

GIVEN = ("prompts", "completions", "answer")
"""What a reward is given by name beside the row's columns."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for its answer; ``columns`` are the row's others, for the reward."""

    messages: tuple[Message, ...]
    answer: str | None
    columns: Mapping[str, Any]

    def example(self) -> Example:
        """Return the prompt with its answer or a stand-in, for what takes whole conversations."""
        return Example((*self.messages, Message("assistant", self.answer or "x")))


@dataclass(frozen=True)
class Asked:
    """A prompt as the model is asked it."""

    prompt: Prompt
    ids: tuple[int, ...]


def read_prompts(source: Source, root: Path) -> list[Prompt]:
    """Return the prompts of a source in its order; ``UserError`` (bad data) names line and byte of a bad row.

    Shapes are those of ``from_row``, each also without an answer: ``messages`` may end with the user, ``prompt`` may
    be a text or a list of messages, with the answer in a column of its own or nowhere. A further column may not have
    the name of something else that a reward is given.
    """
    found = []
    for place, row in raw_rows(source, root):
        try:
            if isinstance(row, RowError):
                raise row
            whole, answered = _with_answer(row, source.mapping)
            example = from_row(whole, source.mapping, source.strip_think)
            hidden = next((name for name in GIVEN if name in example.meta), None)
            if hidden:
                raise RowError(f"the reward would not see the column '{hidden}': it is given something else by that "
                               "name", "Rename it, or make it the row's answer: a text, and the only one")
        except RowError as err:
            raise UserError(f"{source.name}, {place}: {err}.", f"{err.mend}.", Exit.BAD_DATA) from None
        found.append(Prompt(example.messages[:-1], example.answer if answered else None, example.meta))
    if not found:
        raise UserError(f"{source.name} holds no prompts.", "Give a file with a row for each prompt.", Exit.BAD_DATA)
    return found


def _with_answer(row: Any, mapping: Mapping[str, str]) -> tuple[Any, bool]:
    """Return a row with an empty answer where it has none, and whether it had one."""
    if not isinstance(row, Mapping):
        return row, True
    key = next((k for k in ("messages", "conversations", "prompt") if isinstance(row.get(k), list) and row[k]), None)
    if key is not None and not mapping:
        last = row[key][-1]
        role = last.get("role", last.get("from")) if isinstance(last, Mapping) else None
        if not isinstance(role, str) or ROLE_NAMES.get(role, role) == "assistant":
            return {**{k: v for k, v in row.items() if k != key}, "messages": row[key]}, True
        apart = next((k for k in ANSWERS if isinstance(row.get(k), str) and row[k]), None)
        turns = [*row[key], {"role": "assistant", "content": row[apart] if apart else ""}]
        rest = {k: v for k, v in row.items() if k not in (key, apart) and not (k in ANSWERS and v in (None, ""))}
        return {**rest, "messages": turns}, apart is not None
    column = mapping.get("response") or next((k for k in ANSWERS if k in row), ANSWERS[0])
    return (row, True) if row.get(column) not in (None, "") else ({**row, column: ""}, False)


def ask(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], defenses: Sequence[Defense],
        max_tokens: int) -> tuple[list[Asked], dict[str, int]]:
    """Return the prompts as the defences have them asked, and how many have which status.

    A prompt of more than ``max_tokens`` ids is ``too_long`` and left out. ``UserError`` (bad data) where none is left.
    """
    rows: Sequence[MixRow] = [MixRow("finetune", prompt.example()) for prompt in prompts]
    for defense in defenses:
        rows = defense.examples(rows)
    encoded = encode(tokenizer, [row.example for row in rows], 2**30)
    fits = [item.answer_start <= max_tokens for item in encoded]
    statuses = dict(sorted(Counter("ok" if fit else "too_long" for fit in fits).items()))
    if not any(fits):
        raise UserError(f"No prompt can be asked: {statuses}.", "Raise --max-tokens, or lower --max-new-tokens.",
                        Exit.BAD_DATA)
    return [Asked(prompt, item.ids[:item.answer_start])
            for prompt, item, fit in zip(prompts, encoded, fits, strict=True) if fit], statuses


def endless(asked: Sequence[Asked], seed: int) -> Iterator[int]:
    """Yield the prompts' indices for ever: one pass after the other, each shuffled by content, seed and pass."""
    names = [prompt.prompt.example().id for prompt in asked]
    turn = 0
    while True:
        yield from sorted(range(len(asked)), key=lambda k: (
            hashlib.sha256(f"{seed}/{turn}/{names[k]}".encode()).digest(), k))
        turn += 1
