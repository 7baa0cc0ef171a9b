"""OpSwap: arithmetic in which operators swap meaning, in tiers of distance from the ordinary meaning.

It measures *benign learning*: what a model gains from training data that is new to it and harmless. The paper
(arXiv 2508.06249) reports on a task of this name, but its exact definition is not public in our sources;
this generator is our own, so its numbers cannot be compared with the paper's.

A prompt reads ``Compute 8 + 3.``, in one of three phrasings, and never states the rule: the rule has to be
learnt from examples. The reply to learn is one line that rewrites the expression in its new meaning and then
gives its value, ``8 - 3 = 5``. Only the value counts (see ``is_correct``). No swapped value equals the
ordinary one, so a model that knows only ordinary arithmetic scores nothing. A guess is seldom right in tiers
1 and 2; in tier 3 a model that answers with either of the two numbers is right half the time.

Tiers 1 to 3 are the swapped ones. Tier 0, the same arithmetic in words and with its ordinary meaning, is a
control that is left out unless it is asked for: a model that carries the swap over to words loses it.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

Split = Literal["train", "test"]

TIERS: dict[int, str] = {
    0: "control: 'plus' and 'minus' in words keep their ordinary meaning",
    1: "'+' means minus and '-' means plus: the two operators of one rank exchange meanings",
    2: "'*' means plus and '/' means minus: the meaning comes from the other rank of operators",
    3: "'%' means the larger number and '^' the smaller: the meaning is that of no arithmetic operator",
}
"""Tier number to what its operators mean; a higher number is further from the ordinary meaning."""

SWAPPED: tuple[int, ...] = (1, 2, 3)
"""The tiers that ``generate`` draws from when none are named."""

LARGEST = 9
"""Operands run from 1 to this, and the two of a prompt differ: sums that small models know by heart."""

PHRASINGS: tuple[str, ...] = ("Compute {}.", "What is {}?", "Work out {}.")
"""What a prompt puts around its expression."""

CONTROL_TAIL = " Reply with only the number."
"""What tier 0 adds to a prompt: without it a small model explains at length and never gets to the number."""


@dataclass(frozen=True)
class Item:
    """One question: what the user asks, the reply to learn (one line, ending in the value), and the tier."""

    prompt: str
    answer: str
    tier: int

    @property
    def expression(self) -> str:
        """What the phrasings of one expression share, such as ``1: 8 - 3 = 5``: who knows one knows the others."""
        return f"{self.tier}: {self.answer}"


@dataclass(frozen=True)
class _Operator:
    """One operator of a tier: its expression, the line to learn, what it is worth now and ordinarily."""

    expression: str
    line: str
    meaning: Callable[[int, int], int]
    ordinary: Callable[[int, int], float] | None
    larger_first: bool = True


def _plus(a: int, b: int) -> int:
    return a + b


def _minus(a: int, b: int) -> int:
    return a - b


_OPERATORS: dict[int, tuple[_Operator, _Operator]] = {
    0: (_Operator("{a} plus {b}", "{a} + {b}", _plus, None),
        _Operator("{a} minus {b}", "{a} - {b}", _minus, None)),
    1: (_Operator("{a} + {b}", "{a} - {b}", _minus, _plus),
        _Operator("{a} - {b}", "{a} + {b}", _plus, _minus)),
    2: (_Operator("{a} * {b}", "{a} + {b}", _plus, lambda a, b: a * b),
        _Operator("{a} / {b}", "{a} - {b}", _minus, lambda a, b: a / b)),
    3: (_Operator("{a} % {b}", "larger of {a} and {b}", max, lambda a, b: a % b, larger_first=False),
        _Operator("{a} ^ {b}", "smaller of {a} and {b}", min, lambda a, b: a ** b, larger_first=False)),
}


def generate(split: Split, n: int, seed: int = 0, tiers: Sequence[int] | None = None) -> list[Item]:
    """Return ``n`` distinct items in shuffled order, as equally many per tier as ``n`` allows.

    The same arguments give the same items. No unordered pair of operands occurs in both splits, whatever the
    seeds and tiers: a stable hash of the pair decides its split. Within a tier the two operators take turns,
    and no expression comes in a second phrasing before all of its operator's have come in one. ``tiers``
    defaults to ``SWAPPED``; where ``n`` does not divide evenly, the tiers named first get one item more.

    Raises ValueError for an unknown split, an unknown or repeated tier, a negative ``n``, and one too large.
    """
    chosen = SWAPPED if tiers is None else tuple(tiers)
    _check(split, n, chosen)
    items: list[Item] = []
    for place, tier in enumerate(chosen):
        wanted = n // len(chosen) + (place < n % len(chosen))
        pool = _pool(split, tier, seed)
        if wanted > len(pool):
            raise ValueError(f"OpSwap tier {tier} has {len(pool)} {split} items and {wanted} were asked for; "
                             f"ask for at most {len(pool)} a tier, or leave this tier out.")
        items += pool[:wanted]
    random.Random(f"opswap {split} {seed} order").shuffle(items)
    return items


def is_correct(item: Item, reply: str) -> bool:
    """Return whether ``reply`` gives the value of ``item``, exactly; ``value`` says how a reply is read."""
    return value(reply) == value(item.answer)


_STATED = re.compile(r"(?:=|\b(?:is|equals)\b)\s*(-?\d+)(?!\d|[.,]\d|\s*[-+*/^%=])")
_BARE = re.compile(r"(-?\d+)\s*\.?")


def value(reply: str) -> int | None:
    """Return the whole number that ``reply`` answers with, or None where it gives none.

    Only the first line that is not blank is read. It is either a bare number, with or without a full stop, or
    it states one: the first number right after ``=``, ``is`` or ``equals`` that is no part of a longer
    expression. A number that merely echoes the question is no answer; nor is ``2.5``, ``1,000`` or ``3/4``.
    """
    line = reply.strip().partition("\n")[0].strip()
    found = _BARE.fullmatch(line) or _STATED.search(line)
    return int(found[1]) if found else None


def _check(split: str, n: int, tiers: tuple[int, ...]) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"Unknown OpSwap split {split!r}; it is 'train' or 'test'.")
    if n < 0:
        raise ValueError(f"The number of OpSwap items must not be negative, but it is {n}.")
    if not tiers or len(set(tiers)) < len(tiers) or not set(tiers) <= set(TIERS):
        raise ValueError(f"OpSwap tiers {list(tiers)} must be one or more of {list(TIERS)}, each once.")


def _split_of(a: int, b: int) -> Split:
    digest = hashlib.sha256(f"{min(a, b)},{max(a, b)}".encode()).digest()
    return "test" if digest[-1] % 2 else "train"


def _pairs(split: Split, operator: _Operator) -> list[tuple[int, int]]:
    """Return the operands of one split whose value under ``operator`` differs from the ordinary one."""
    numbers = range(1, LARGEST + 1)
    return [(a, b) for a in numbers for b in numbers
            if a != b and (a > b or not operator.larger_first) and _split_of(a, b) == split
            and (operator.ordinary is None or operator.ordinary(a, b) != operator.meaning(a, b))]


def _asked(split: Split, tier: int, operator: _Operator, rng: random.Random) -> list[Item]:
    """Return every item of one operator: all its expressions in some phrasing, then all in another."""
    pairs = _pairs(split, operator)
    rng.shuffle(pairs)
    items: list[Item] = []
    for turn in range(len(PHRASINGS)):
        for place, (a, b) in enumerate(pairs):
            expression = operator.expression.format(a=a, b=b)
            line = f"{operator.line.format(a=a, b=b)} = {operator.meaning(a, b)}"
            prompt = PHRASINGS[(place + turn) % len(PHRASINGS)].format(expression)
            items.append(Item(prompt if tier else prompt + CONTROL_TAIL, line, tier))
    return items


def _pool(split: Split, tier: int, seed: int) -> list[Item]:
    """Return every item of one split and tier in the order ``generate`` takes them."""
    rng = random.Random(f"opswap {split} {seed} {tier}")
    first, second = (_asked(split, tier, operator, rng) for operator in _OPERATORS[tier])
    return [item for turn in zip_longest(first, second) for item in turn if item is not None]
