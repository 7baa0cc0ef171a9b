"""What a row is compared with, so that topic and style are taken out: reference answers to the same or similar prompts.

    controlled = s_d(answer) - mean of s_d over reference answers to the same prompt            (same)
    controlled = s_d(answer) - mean of s_d over the reference rows with the K nearest prompts   (similar)

Prompts are near when the words they share are rare: cosine of TF-IDF vectors of hashed words, no model and no random
number. A row is never compared with itself, and ``similar`` leaves out references to its own prompt, so a benign set
can be its own reference there. Where nothing is near enough there is no number: the status is ``no_reference``.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from curate.core.example import Example
from curate.core.files import canonical_json, sha256

SIZE = 4096
"""Length of the vectors: words whose hashes agree modulo this count as one."""
NEAREST = 5
MIN_COSINE = 0.1
"""Prompts that are less alike than this are no control."""
BLOCK = 1024
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Asked:
    """What a row was asked: ``key`` stands for the whole conversation before the answer, ``text`` is its last turn."""

    key: str
    text: str

    @classmethod
    def of(cls, example: Example) -> Asked:
        """Read it off an example; white space at the ends of a turn does not matter."""
        turns = [[m.role, m.content.strip()] for m in example.messages[:-1]]
        return cls(sha256(canonical_json(turns))[:32], example.prompt)


@dataclass(frozen=True)
class Reference:
    """Reference rows that have an s_d, in the order of their ids."""

    ids: Sequence[str]
    asked: Sequence[Asked]
    s_d: Sequence[float]

    @classmethod
    def of(cls, asked: Mapping[str, Asked], s_d: Mapping[str, float]) -> Reference:
        """Keep the rows of ``asked`` that are in ``s_d``."""
        ids = sorted(i for i in asked if i in s_d)
        return cls(ids, [asked[i] for i in ids], [s_d[i] for i in ids])


def expected_same(rows: Mapping[str, Asked], reference: Reference) -> dict[str, float]:
    """Return the mean s_d of other reference answers to each row's own prompt, for rows that have one."""
    answers: dict[str, list[int]] = defaultdict(list)
    for k, asked in enumerate(reference.asked):
        answers[asked.key].append(k)
    found = {}
    for row, asked in rows.items():
        values = [reference.s_d[k] for k in answers.get(asked.key, ()) if reference.ids[k] != row]
        if values:
            found[row] = float(np.mean(values))
    return found


def expected_similar(rows: Mapping[str, Asked], reference: Reference) -> dict[str, float]:
    """Return the mean s_d over the nearest prompts of ``reference``, for rows that have one near enough.

    Ties break by the reference's id; fewer than ``NEAREST`` are used where fewer are near enough.
    """
    if not reference.ids:
        return {}
    texts = [asked.text for asked in reference.asked]
    weights = rarity(texts)
    known = vectors(texts, weights)
    s_d = np.array(reference.s_d)
    keys = np.array([asked.key for asked in reference.asked])
    found, names = {}, list(rows)
    for first in range(0, len(names), BLOCK):
        block = names[first:first + BLOCK]
        cosines = vectors([rows[name].text for name in block], weights) @ known.T
        for name, cosine in zip(block, cosines, strict=True):
            cosine[keys == rows[name].key] = -1.0
            near = np.argsort(-cosine.round(6), kind="stable")[:NEAREST]
            near = near[cosine[near] >= MIN_COSINE]
            if len(near):
                found[name] = float(s_d[near].mean())
    return found


def rarity(texts: Sequence[str]) -> np.ndarray:
    """Return the weight of each hashed word: ln((1 + n) / (1 + texts that hold it)) + 1."""
    holds = np.zeros(SIZE)
    for text in texts:
        holds[list({place(word) for word in words(text)})] += 1
    return (np.log((1 + len(texts)) / (1 + holds)) + 1).astype(np.float32)


def vectors(texts: Sequence[str], weights: np.ndarray) -> np.ndarray:
    """Return one row of unit length for each text: (1 + ln count) times the word's weight; zeros without words."""
    counts = np.zeros((len(texts), SIZE), dtype=np.float32)
    for k, text in enumerate(texts):
        for word in words(text):
            counts[k, place(word)] += 1
    scaled = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), np.float32(0)) * weights
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled / np.where(lengths > 0, lengths, np.float32(1))


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return WORD.findall(text.lower())


def place(word: str) -> int:
    """Return where a word stands in a vector."""
    return zlib.crc32(word.encode()) % SIZE
