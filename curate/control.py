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

    Cosines are compared to 6 decimals and ties break by the reference's id; fewer than ``NEAREST`` are used where
    fewer are near enough. Memory is that of the words of the reference prompts; a row's time is that of its words'
    postings.
    """
    if not reference.ids:
        return {}
    weights = rarity([asked.text for asked in reference.asked])
    known = Postings.of([asked.text for asked in reference.asked], weights)
    s_d = np.array(reference.s_d)
    own: dict[str, list[int]] = defaultdict(list)
    for k, asked in enumerate(reference.asked):
        own[asked.key].append(k)
    found = {}
    for row, asked in rows.items():
        cosines = known.cosines(asked.text, weights)
        cosines[own.get(asked.key, [])] = -1.0
        near = nearest(cosines)
        if len(near):
            found[row] = float(s_d[near].mean())
    return found


@dataclass(frozen=True)
class Postings:
    """The vectors of many texts without their zeros, by place: which texts have something there, and how much."""

    n: int
    starts: np.ndarray
    """Where each place's postings begin; one more than places."""
    texts: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str], weights: np.ndarray) -> Postings:
        """Return the postings of ``texts``, in their order at each place."""
        made = [vector(text, weights) for text in texts]
        places = np.concatenate([one for one, _ in made])
        owners = np.repeat(np.arange(len(texts), dtype=np.int32), [len(one) for one, _ in made])
        order = np.argsort(places, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(places, minlength=SIZE))])
        return cls(len(texts), starts, owners[order], np.concatenate([value for _, value in made])[order])

    def cosines(self, text: str, weights: np.ndarray) -> np.ndarray:
        """Return the cosine of ``text`` with each of the texts, to 6 decimals."""
        found = np.zeros(self.n)
        for at, value in zip(*vector(text, weights), strict=True):
            here = slice(self.starts[at], self.starts[at + 1])
            found[self.texts[here]] += value * self.values[here]  # a text is at most once at a place
        return found.round(6)


def nearest(cosines: np.ndarray) -> np.ndarray:
    """Return where the ``NEAREST`` largest of the cosines from ``MIN_COSINE`` on stand, ties by place."""
    near = np.flatnonzero(cosines >= MIN_COSINE)
    if len(near) > NEAREST:
        least = np.partition(cosines[near], -NEAREST)[-NEAREST]
        near = near[cosines[near] >= least]
    return near[np.argsort(-cosines[near], kind="stable")[:NEAREST]]


def rarity(texts: Sequence[str]) -> np.ndarray:
    """Return the weight of each hashed word: ln((1 + n) / (1 + texts that hold it)) + 1."""
    holds = np.zeros(SIZE)
    for text in texts:
        holds[list({place(word) for word in words(text)})] += 1
    return (np.log((1 + len(texts)) / (1 + holds)) + 1).astype(np.float32)


def vector(text: str, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of a text's vector that are not 0, ascending, and what stands there; its length is 1.

    A place's value is (1 + ln count) times its weight, before the whole is scaled.
    """
    places, counts = np.unique(np.array([place(word) for word in words(text)], dtype=np.int32), return_counts=True)
    scaled = ((1 + np.log(counts)) * weights[places]).astype(np.float32)
    return places, scaled / (np.linalg.norm(scaled) if len(scaled) else np.float32(1))


def words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return WORD.findall(text.lower())


def place(word: str) -> int:
    """Return where a word stands in a vector."""
    return zlib.crc32(word.encode()) % SIZE
