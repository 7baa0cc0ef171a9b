"""Reading corpora into a store: what is new is stored, who belongs to which corpus is noted, every row is counted.

Examples are stored in parts of ``PART_ROWS`` or about ``PART_BYTES`` of text, whichever is reached first, in the order
in which they come.
"""

from __future__ import annotations

import gc
import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from curate.core.chat import encode
from curate.core.errors import Exit, UserError
from curate.core.example import Example
from curate.core.files import sha256
from curate.core.objects import is_url
from curate.core.sources import Reading, Source, local_path, read_source
from curate.core.terminal import Progress, progress
from curate.corpora import Corpus
from curate.job import Sampling, ScoreJob, Summary
from curate.parts import EXAMPLES_SCHEMA, shape
from curate.records import Plan, PlannedCorpus, corpus_key, corpus_place, told_apart
from curate.store import Store
from curate.turns import each_turn

PART_ROWS = 8192
PART_BYTES = 2**28
"""Of prompts and answers in UTF-8, and of meta; a column of a part must stay below 2 GiB even where JSON escapes it."""
META_CHARS = 2**16
"""A column beside the conversation is kept in ``meta`` if its JSON has no more characters than this."""
SHOWN_EVERY = 256
"""Rows between two signs of life while a corpus is read."""


def ingest(job: ScoreJob, store: Store, tokenizer: object, list_rejects: bool = True) -> Summary:
    """Read the corpora, store what is new, and write the plan; every row that comes in is counted once.

    A row that two corpora share belongs to both, and is a duplicate in what is counted. Unreadable rows are listed in
    a file beside the store's, unless ``list_rejects`` says no.
    """
    summary = Summary()
    known = store.planned_corpora()
    planned = named(job, known)
    totals = [_n_rows(corpus, job.sampling.limit) for corpus in job.corpora]
    with progress("Reading", None if None in totals else sum(totals), "rows") as bar, _no_search_for_cycles():
        to = _Intake(store, tokenizer, summary, bar, list_rejects)
        for number, corpus in enumerate(job.corpora):
            ids = _read(job, corpus, planned[number].label, to)
            store.put_membership(planned[number].key, ids)
            planned[number] = planned[number].model_copy(update={"n_rows": len(ids)})
    summary.counts.update(store.statuses(summary.ids))
    summary.counts += Counter()
    kept = [one for one in known if not any(map(one.same, planned))]
    store.put_plan(Plan(corpora=(*kept, *planned), n_rows=summary.n_rows, counts=dict(summary.counts)))
    return summary


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Suspend cyclic garbage collection: rows make no cycles, and every search walks the ids of all rows before."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def named(job: ScoreJob, known: Sequence[PlannedCorpus]) -> list[PlannedCorpus]:
    """Return the corpora of a job with distinct labels: those that they have in the store, or else by their places."""
    found = []
    taken = job.sampling.__dict__ | ({} if job.turns == "last" else {"turns": job.turns})
    for corpus in job.corpora:
        one = PlannedCorpus(label=corpus.label, source=corpus.source, folder=str(corpus.folder), n_rows=0,
                            key=corpus_key(corpus.label, corpus.source, taken))
        before = [k for k in known if k.place == one.place] or [k for k in known if k.key == one.key]
        others = {p for c in job.corpora if (p := corpus_place(c.label, c.source, c.folder)) != one.place}
        others |= {name for k in known if not k.same(one) for name in (k.place, k.label)}
        label = before[0].label if before else corpus.label
        if not before and corpus.source.kind in ("file", "url"):
            label = told_apart(one.place, others)
        found.append(one.model_copy(update={"label": label}))
    return found


def _read(job: ScoreJob, corpus: Corpus, label: str, to: _Intake) -> list[str]:
    """Store the new examples of a corpus and return the ids of all, once each; ``UserError`` when it has none."""
    reading, ids, new, n_bytes, n_taken = Reading(), dict[str, None](), list[_New](), 0, 0
    rejects = _rejects_file(job.store, label) if to.list_rejects else None
    examples = read_source(corpus.source, corpus.folder, reading, job.max_bad, rejects, job.sampling.limit)
    if job.turns == "all":
        examples = each_turn(examples, reading)
    for example in sampled(_watched(examples, reading, to.bar), job.sampling):
        n_taken += 1
        to.summary.counts["duplicate"] += example.id in to.summary.ids
        to.summary.ids.add(example.id)
        if example.id not in ids and not to.store.holds(example.id):
            new.append(_New.of(example))
            n_bytes += new[-1].n_bytes
        ids[example.id] = None
        if len(new) == PART_ROWS or n_bytes >= PART_BYTES:
            to.store.put_examples(_table(new, label, to.tokenizer, job.max_tokens))
            new, n_bytes = [], 0
    if not reading.n_examples:
        raise UserError(f"{label} holds no row to score: of {reading.n_rows} rows read, "
                        f"{sum(reading.filtered.values())} were filtered out and {len(reading.rejects)} rejected.",
                        "Look at the file and at the columns it has (--map names them).", Exit.BAD_DATA)
    if new:
        to.store.put_examples(_table(new, label, to.tokenizer, job.max_tokens))
    to.summary.n_rows += reading.n_rows
    to.summary.counts.update({f"filtered: {k}": v for k, v in reading.filtered.items()})
    to.summary.counts["rejected"] += len(reading.rejects)
    to.summary.counts["not sampled"] += reading.n_examples - n_taken
    return list(ids)


@dataclass(frozen=True)
class _Intake:
    """Where the rows of corpora go, and who is told."""

    store: Store
    tokenizer: object
    summary: Summary
    bar: Progress
    list_rejects: bool


def _n_rows(corpus: Corpus, limit: int | None) -> int | None:
    """Return about how many rows will be read; None where only reading them tells."""
    found = _n_rows_of(corpus.source, corpus.folder)
    if limit is None or corpus.source.where or corpus.source.needs:
        return found if limit is None else None
    return limit if found is None else min(limit, found)


def _n_rows_of(source: Source, folder: Path) -> int | None:
    if source.kind == "hub":
        return None
    path = local_path(source, folder)
    if path.suffix == ".parquet":
        found = shape(path)
        return found and found[1]
    if path.suffix == ".csv":
        return None
    with open(path, "rb") as handle:
        return sum(block.count(b"\n") for block in iter(lambda: handle.read(2**20), b""))


def _watched(examples: Iterator[Example], reading: Reading, bar: Progress) -> Iterator[Example]:
    """Yield the same, showing how many rows were read."""
    shown = 0
    for example in examples:
        if reading.n_rows - shown >= SHOWN_EVERY:
            bar.advance(reading.n_rows - shown)
            shown = reading.n_rows
        yield example
    bar.advance(reading.n_rows - shown)


def _rejects_file(store: Path | str, label: str) -> Path:
    """Return where unreadable rows are listed: in the store, or here if the store is no folder."""
    name = re.sub("[^A-Za-z0-9._-]+", "-", label)
    if name != label:
        name += f"-{sha256(label.encode())[:8]}"  # of another label the same may be left
    return (Path() if is_url(store) else Path(store)) / f"rejects-{name}.jsonl"


def draw_key(example_id: str, seed: int = 0) -> str:
    """Return what a sample takes the smallest of: the SHA-256 of ``seed/example_id``, in hexadecimal digits."""
    return hashlib.sha256(f"{seed}/{example_id}".encode()).hexdigest()


def sampled(examples: Iterator[Example], sampling: Sampling) -> Iterator[Example]:
    """Yield the examples to take of those that were read, all or a sample.

    A sample is decided by content, so order and file layout do not matter.
    """
    if sampling.sample is None:
        yield from examples
        return

    yield from heapq.nsmallest(sampling.sample, examples, key=lambda e: draw_key(e.id, sampling.seed))


@dataclass(frozen=True)
class _New:
    """An example that is not stored yet, its ``meta`` as it will be, and how much text that is."""

    example: Example
    meta: str
    n_bytes: int

    @classmethod
    def of(cls, example: Example) -> Self:
        """Measure an example."""
        meta = meta_json(example.meta)
        return cls(example, meta, len(meta.encode()) + sum(len(m.content.encode()) for m in example.messages))


def meta_json(meta: Mapping[str, Any]) -> str:
    """Return the columns beside a conversation as JSON.

    Bytes become ``<N bytes, sha256 HEX>``, and a value of more than ``META_CHARS`` ``<N characters of JSON, sha256
    HEX>``: pictures and the like stay in the corpus, and can be told apart here. Other values without JSON are written
    as ``str`` does.
    """
    texts = {str(key): _short(_json(value)) for key, value in meta.items()}
    return "{" + ", ".join(f"{_json(key)}: {texts[key]}" for key in sorted(texts)) + "}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=_without_bytes)


def _without_bytes(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(bytes(value))} bytes, sha256 {sha256(bytes(value))}>"
    return str(value)


def _short(text: str) -> str:
    if len(text) <= META_CHARS:
        return text
    return json.dumps(f"<{len(text)} characters of JSON, sha256 {sha256(text.encode())}>")


def _table(new: Sequence[_New], corpus: str, tokenizer: object, max_tokens: int) -> pa.Table:
    examples = [one.example for one in new]
    encoded = encode(tokenizer, examples, max_tokens, strict=False)
    columns = {
        "example_id": [e.id for e in examples], "corpus": [corpus] * len(examples),
        "prompt": [e.prompt for e in examples], "answer": [e.answer for e in examples],
        "messages": [json.dumps(e.to_row()["messages"], ensure_ascii=False) for e in examples],
        "meta": [one.meta for one in new],
        "n_prompt_tokens": [e.n_prompt_tokens for e in encoded],
        "n_answer_tokens": [e.n_answer_tokens for e in encoded], "status": [e.status for e in encoded]}
    return pa.table(columns, schema=EXAMPLES_SCHEMA)
