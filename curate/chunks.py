"""Chunks: the rows that are computed and committed together, and the engine's work on them.

Chunks depend only on what is stored, so a killed run goes on with the same chunks, and shards, machines and a Ray
cluster compute the same ones.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from curate.core.chat import Encoded, encode
from curate.core.errors import UserError
from curate.core.example import Example, Message
from curate.core.model import pick_device
from curate.core.nll import AnswerNll
from curate.core.terminal import Progress, say
from curate.parts import NLL_SCHEMA
from curate.scorers import Scorer
from curate.scorers.choose import EngineSettings, Models, choose, engine_dtype, open_scorer
from curate.store import Store

CHUNK_ROWS = 512


@dataclass(frozen=True)
class Shard:
    """One of ``n`` shares of the chunks, counted from 1; chunks are dealt out by their content, as by dice.

    Shares are about equal where chunks are many; of a few, a share may be twice another, or empty.
    """

    number: int
    n: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``i/n``."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--shard {text} is not of the form i/n with i from 1 to n.", "For example --shard 1/4.")
        return cls(int(found[1]), int(found[2]))

    def takes(self, model_id: str, ids: Sequence[str]) -> bool:
        """Does the chunk with these examples belong to this shard?"""
        digest = hashlib.sha256("\n".join([model_id, *sorted(ids)]).encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.n == self.number - 1


@dataclass(frozen=True)
class Opening:
    """What it takes to open an engine, on this machine or another."""

    engine: EngineSettings
    models: Models


@dataclass(frozen=True)
class Chunk:
    """Rows that are computed and committed together, the longest first."""

    model_id: str
    ids: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens of each row, prompt and answer."""

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Work:
    """What there is to compute: chunks, model by model, and how to get at what they need."""

    opening: Opening
    names: Mapping[str, str]
    """Model id -> name, in the order of the chunks."""
    adapters: Mapping[str, Path | None]
    """Model id -> adapter; None is the aligned model itself."""
    chunks: Sequence[Chunk]
    encoded: Callable[[Chunk], list[Encoded]]
    bar: Progress
    check: Callable[[Scorer, str], None] = lambda scorer, model_id: None
    """Called with every model that is opened here, before its first chunk."""
    tally: Counter[str] = field(default_factory=Counter)
    """How many ``rows`` are done, counted once for each model, and how many were ``rejected``: no finite number."""

    def finished(self, encoded: Sequence[Encoded], rows: Sequence[AnswerNll], left: int = 0) -> None:
        """Count rows that are done; a server has as many of the ``left`` ones of their chunk in work as it may."""
        at_once = len(rows)
        if left and self.opening.engine.name == "server":
            at_once = min(self.opening.engine.concurrency, left + at_once)
        self.tally["rows"] += len(rows)
        self.tally["rejected"] += sum(row.status != "ok" for row in rows)
        self.bar.advance(sum(len(item.ids) - 1 for item in encoded), f"{self.tally['rows']:,} rows, "
                         f"{self.tally['rejected']:,} rejected, {at_once} at once")


class Compute(Protocol):
    """Where chunks are computed."""

    def settle(self, engine: EngineSettings, dtype: str, device: str,
               adapters: Mapping[str, Path]) -> tuple[EngineSettings, str, str]:
        """Decide what ``auto`` means there; return engine, dtype and device."""

    def results(self, work: Work) -> Iterator[tuple[Chunk, list[AnswerNll]]]:
        """Yield chunks with the evidence about their rows, in whatever order; the caller commits each as it comes."""


Cut = tuple[tuple[str, ...], tuple[int, ...]]
"""Ids and lengths of the rows of a chunk, whichever model it is for."""


def cuts(store: Store, wanted: Set[str] | None = None) -> list[Cut]:
    """Return how the rows that can be scored are cut into chunks; only chunks that hold one of ``wanted``, if given.

    A chunk is a slice of a part sorted by length, so it is the same for everyone who looks, whatever they want of it.
    """
    found = []
    for part in store.example_parts():
        columns = (part[name].to_pylist() for name in ("n_prompt_tokens", "n_answer_tokens", "example_id", "status"))
        rows = sorted((-(n_prompt + n_answer), i) for n_prompt, n_answer, i, status in zip(*columns) if status == "ok")
        for start in range(0, len(rows), CHUNK_ROWS):
            some = rows[start:start + CHUNK_ROWS]
            if wanted is None or not wanted.isdisjoint(i for _, i in some):
                found.append((tuple(i for _, i in some), tuple(-length for length, _ in some)))
    return found


def missing_chunks(store: Store, model_id: str, done: Collection[str] | None = None,
                   among: Sequence[Cut] | None = None) -> list[Chunk]:
    """Return the chunks with rows that this model has not scored (or that are not ``done``), longest first.

    ``among`` is what ``cuts`` has returned, which all models share. Of a chunk that is scored in part, which only an
    older version leaves behind, what is left is a chunk.
    """
    done = store.scored_ids(model_id) if done is None else set(done)
    chunks = []
    for ids, lengths in cuts(store) if among is None else among:
        if done and not done.isdisjoint(ids):
            left = [k for k, example_id in enumerate(ids) if example_id not in done]
            ids, lengths = tuple(ids[k] for k in left), tuple(lengths[k] for k in left)
        if ids:
            chunks.append(Chunk(model_id, ids, lengths))
    return sorted(chunks, key=lambda chunk: (-chunk.lengths[0], chunk.ids[0]))


def failed_chunks(store: Store, model_id: str, among: Sequence[Cut]) -> list[Cut]:
    """Return the chunks in which this model has a row without a finite number."""
    failed = store.failed_ids([model_id])
    return [cut for cut in among if not failed.isdisjoint(cut[0])]


class Here:
    """Computes chunks in this process, one model after another; see ``Compute``."""

    def settle(self, engine: EngineSettings, dtype: str, device: str,
               adapters: Mapping[str, Path]) -> tuple[EngineSettings, str, str]:
        """See ``Compute``."""
        engine = choose(engine, device, adapters)
        return engine, engine_dtype(engine, dtype, device), pick_device(device)

    def results(self, work: Work) -> Iterator[tuple[Chunk, list[AnswerNll]]]:
        """See ``Compute``."""
        with open_scorer(work.opening.engine, work.opening.models) as scorer:
            for model_id, chunks in groupby(work.chunks, key=lambda chunk: chunk.model_id):
                work.bar.label = f"Scoring, {work.names[model_id]}"
                with scorer.member(work.adapters[model_id]):
                    work.check(scorer, model_id)
                    for chunk, encoded in encoded_ahead(work, list(chunks)):
                        yield chunk, score_rows(scorer, encoded, _notify(work.bar), work.finished)


def encoded_ahead(work: Work, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[Encoded]]]:
    """Yield chunks with their token ids, each of which is made while the one before is computed.

    Only within one model, since a tokenizer serves one thread at a time and ``Work.check`` needs it between two.
    """
    with ThreadPoolExecutor(1) as beside:
        upcoming = beside.submit(work.encoded, chunks[0])
        for number, chunk in enumerate(chunks, 1):
            encoded = upcoming.result()
            if number < len(chunks):
                upcoming = beside.submit(work.encoded, chunks[number])
            yield chunk, encoded


def encoded_rows(store: Store, tokenizer: object, ids: Sequence[str]) -> list[Encoded]:
    """Return the token ids of stored examples, in the order of ``ids``."""
    stored = store.read_examples(ids, ["messages"])["messages"].to_pylist()
    return encode(tokenizer, [Example(tuple(Message(**m) for m in json.loads(text))) for text in stored], 2**30)


def score_rows(scorer: Scorer, encoded: Sequence[Encoded], notify: Callable[[str], None] = lambda text: None,
               finished: Callable[[Sequence[Encoded], Sequence[AnswerNll], int], None] = lambda encoded, rows, left:
               None) -> list[AnswerNll]:
    """Return the evidence about every row, in the order given."""
    found: dict[int, AnswerNll] = {}
    for part in scorer.score(encoded, notify):
        found.update(part)
        finished([encoded[index] for index, _ in part], [row for _, row in part], len(encoded) - len(found))
    return [found[index] for index in range(len(encoded))]


def nll_table(chunk: Chunk, rows: Sequence[AnswerNll]) -> pa.Table:
    """Return a chunk's evidence as the store keeps it."""
    return pa.table({"example_id": chunk.ids, "model_id": [chunk.model_id] * len(rows),
                     "nll_sum": [r.nll_sum for r in rows], "n_tokens": [r.n_tokens for r in rows],
                     "eot_nll": [r.eot_nll for r in rows], "status": [r.status for r in rows]}, schema=NLL_SCHEMA)


def _notify(bar: Progress) -> Callable[[str], None]:
    return lambda text: say(f"{bar.label}: {text}")
