"""Scoring: read corpora into the store, work out what is missing, compute it chunk by chunk.

Examples are stored in parts of ``PART_ROWS`` in the order in which they come; a chunk is a slice of a part sorted by
length. Chunks depend only on what is stored, and a chunk is committed whole, so a killed run goes on with the same
chunks and gives the same numbers.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from curate.chunks import (
    Chunk,
    Compute,
    Cut,
    Here,
    Opening,
    Shard,
    Work,
    cuts,
    encoded_rows,
    failed_chunks,
    missing_chunks,
    nll_table,
)
from curate.core.chat import ENCODING, encode
from curate.core.documents import EnsembleSpec, ModelIdentity, RunCard
from curate.core.errors import Exit, UserError
from curate.core.example import Example
from curate.core.identity import check_base, identify, read_run
from curate.core.nll import AnswerNll
from curate.core.objects import is_url
from curate.core.refs import ref_from
from curate.core.sources import Reading, Source, local_path, read_source
from curate.core.terminal import Progress, progress, say
from curate.corpora import Corpus
from curate.parts import EXAMPLES_SCHEMA, shape
from curate.recheck import recheck
from curate.records import Plan, PlannedCorpus, ScoredModel, StoreHeader, corpus_key, corpus_place, told_apart
from curate.scorers import Scorer
from curate.scorers.choose import EngineSettings, Models
from curate.store import Store

PART_ROWS = 8192
MANY_PARTS = 4096
"""Parts of scores from which on it is worth saying that they can be merged."""
SHOWN_EVERY = 256
"""Rows between two signs of life while a corpus is read."""


@dataclass(frozen=True)
class Sampling:
    """Which rows of a corpus to take: all, the first ``limit``, or ``sample`` rows drawn by content and ``seed``."""

    limit: int | None = None
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.sample is not None:
            raise UserError("--limit and --sample were both given.",
                            "Take the first rows with --limit, or rows at random with --sample.")


@dataclass(frozen=True)
class ScoreJob:
    """What ``curate score`` sets out to do."""

    corpora: Sequence[Corpus]
    store: Path | str
    aligned: str
    members: Sequence[Path] = ()
    """Run cards, or their folders."""
    dtype: str = "auto"
    device: str = "auto"
    max_tokens: int = 4096
    max_bad: float = 0.0
    max_failures: float = 0.01
    sampling: Sampling = Sampling()
    shard: Shard | None = None
    retry_failed: bool = False
    """Put chunks with rows without a finite number aside and score them again."""
    engine: EngineSettings = field(default_factory=EngineSettings)


@dataclass(frozen=True)
class Prepared:
    """A job that was checked: what its numbers have in common, its models with their adapters, and the engine."""

    header: StoreHeader
    tokenizer: object
    models: Sequence[tuple[ScoredModel, Path | None]]
    opening: Opening

    def work(self, store: Store, chunks: Sequence[Chunk], bar: Progress) -> Work:
        """Return the work on ``chunks``, whose rows are in ``store``."""
        by_id = {model.identity.id: model for model, _ in self.models}

        def check(scorer: Scorer, model_id: str) -> None:
            recheck(scorer, self.tokenizer, store, by_id[model_id])

        return Work(self.opening, {i: model.name for i, model in by_id.items()},
                    {model.identity.id: adapter for model, adapter in self.models}, chunks,
                    lambda chunk: encoded_rows(store, self.tokenizer, chunk.ids), bar, check)


@dataclass
class Summary:
    """What became of the rows: ``n_rows`` is the sum of ``counts``."""

    n_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)
    """The distinct examples that were taken."""
    models: dict[str, int] = field(default_factory=dict)
    """Newly computed rows by model name."""
    quarantined: int = 0
    left: int = 0
    """Rows, counted once for each model, that are not scored yet: they belong to other shards."""

    def as_json(self) -> dict[str, object]:
        """Return plain values."""
        return {"rows": self.n_rows, "counts": dict(self.counts), "computed": self.models,
                "quarantined": self.quarantined, "left": self.left}


def ensemble_members(path: Path) -> tuple[str, list[Path]]:
    """Return an ensemble's base and its run cards, each checked against the digest in the spec."""
    spec = EnsembleSpec.read(path)
    runs = []
    for member in spec.members:
        run = path.parent / member.run
        if RunCard.read(run).digest != member.digest:
            raise UserError(f"The run card {run} is not the one that {path} names.",
                            "Make the ensemble again: train ensemble ...", Exit.INTEGRITY)
        runs.append(run)
    return ref_from(spec.base, path.parent), runs


def score(job: ScoreJob, compute: Compute | None = None) -> Summary:
    """Score every example of the corpora under the aligned model and every member; what is stored is not recomputed.

    Compatibility of members is checked before any model is loaded. ``compute`` does the work elsewhere than here.
    Raises ``UserError``; ``failure rate`` as soon as more than ``max_failures`` of the rows gave no finite number.
    """
    compute = compute or Here()
    ready = prepared(job, compute)
    models = ready.models
    with Store.create_or_open(job.store, ready.header) as store:
        if store.quarantined:
            say(f"{len(store.quarantined)} damaged files were put aside; their rows are scored again.")
        summary = ingest(job, store, ready.tokenizer)
        summary.quarantined = len(store.quarantined)
        for model, _ in models:
            store.put_model(model)
        rows = cuts(store, summary.ids)
        if job.retry_failed:
            _put_failed_aside(store, ready, rows, job.shard)
        missing = {model.identity.id: missing_chunks(store, model.identity.id, among=rows) for model, _ in models}
        due = {i: store.n_scored(i) + sum(len(chunk.ids) for chunk in chunks) for i, chunks in missing.items()}
        store.put_plan(store.plan.model_copy(update={"models": due}))
        mine = [chunk for chunks in missing.values() for chunk in chunks
                if job.shard is None or job.shard.takes(chunk.model_id, chunk.ids)]
        summary.left = sum(due.values()) - sum(map(store.n_scored, due)) - sum(len(chunk.ids) for chunk in mine)
        _say_what_is_unusual(job.shard, mine, summary)
        failures = Failures(job, summary.ids, summary.counts["ok"], store.failed_ids(due) & summary.ids)
        failures.judge()
        if mine:
            _compute(store, ready, mine, compute, summary, failures)
        n_parts = sum(entry.kind == "nll" for entry in store.entries())
        if n_parts >= MANY_PARTS:
            say(f"The scores lie in {n_parts:,} parts, one for each chunk; fewer are faster to open: curate compact "
                f"{job.store}")
        summary.counts += Counter(ok=-len(failures.failed), nonfinite=len(failures.failed))
    return summary


def prepared(job: ScoreJob, compute: Compute) -> Prepared:
    """Check the models of a job against each other and settle the engine; nothing is loaded yet."""
    identity, tokenizer = identify(job.aligned)
    models = models_of(job, identity, tokenizer)
    adapters = {model.name: adapter for model, adapter in models if adapter is not None}
    engine, dtype, device = compute.settle(job.engine, job.dtype, job.device, adapters)
    header = StoreHeader(aligned=identity, engine=engine.name, dtype=dtype, encoding=ENCODING,
                         tokenizer=identity.tokenizer, max_tokens=job.max_tokens)
    opening = Opening(engine, Models(job.aligned, identity.name, adapters, dtype, device, job.max_tokens))
    return Prepared(header, tokenizer, models, opening)


def models_of(job: ScoreJob, identity: ModelIdentity, tokenizer: object) -> list[tuple[ScoredModel, Path | None]]:
    """Return the aligned model and the members, each of which must fit it, with their adapters."""
    models = [(ScoredModel(role="aligned", name=identity.name, identity=identity), None)]
    for path in job.members:
        card, adapter = read_run(path)
        check_base(card, identity, tokenizer, path if path.is_dir() else path.parent)
        if card.name in [m.name for m, _ in models]:
            raise UserError(f"Two models of the ensemble are called '{card.name}'.", "Give each run a name of its own.")
        models.append((ScoredModel(role="member", name=card.name, identity=card.model), adapter))
    return models


def ingest(job: ScoreJob, store: Store, tokenizer: object) -> Summary:
    """Read the corpora, store what is new, and write the plan; every row that comes in is counted once.

    A row that two corpora share belongs to both, and is a duplicate in what is counted.
    """
    summary = Summary()
    known = store.planned_corpora()
    planned = named(job, known)
    totals = [_n_rows(corpus, job.sampling.limit) for corpus in job.corpora]
    with progress("Reading", None if None in totals else sum(totals), "rows") as bar:
        to = _Intake(store, tokenizer, summary, bar)
        for number, corpus in enumerate(job.corpora):
            ids = _read(job, corpus, planned[number].label, to)
            store.put_membership(planned[number].key, ids)
            planned[number] = planned[number].model_copy(update={"n_rows": len(ids)})
    summary.counts.update(store.statuses(summary.ids))
    summary.counts += Counter()
    kept = [one for one in known if not any(map(one.same, planned))]
    store.put_plan(Plan(corpora=(*kept, *planned), n_rows=summary.n_rows, counts=dict(summary.counts)))
    return summary


def named(job: ScoreJob, known: Sequence[PlannedCorpus]) -> list[PlannedCorpus]:
    """Return the corpora of a job with distinct labels: those that they have in the store, or else by their places."""
    found = []
    for corpus in job.corpora:
        one = PlannedCorpus(label=corpus.label, source=corpus.source, folder=str(corpus.folder), n_rows=0,
                            key=corpus_key(corpus.label, corpus.source, job.sampling.__dict__))
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
    reading, ids, new, n_taken = Reading(), dict[str, None](), list[Example](), 0
    examples = read_source(corpus.source, corpus.folder, reading, job.max_bad, _rejects_file(job.store, label),
                           job.sampling.limit)
    for example in sampled(_watched(examples, reading, to.bar), job.sampling):
        n_taken += 1
        to.summary.counts["duplicate"] += example.id in to.summary.ids
        to.summary.ids.add(example.id)
        if example.id not in ids and not to.store.holds(example.id):
            new.append(example)
        ids[example.id] = None
        if len(new) == PART_ROWS:
            to.store.put_examples(_table(new, label, to.tokenizer, job.max_tokens))
            new = []
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
    return (Path() if is_url(store) else Path(store)) / f"rejects-{re.sub('[^A-Za-z0-9._-]+', '-', label)}.jsonl"


def sampled(examples: Iterator[Example], sampling: Sampling) -> Iterator[Example]:
    """Yield the examples to take of those that were read, all or a sample.

    A sample is decided by content, so order and file layout do not matter.
    """
    if sampling.sample is None:
        yield from examples
        return

    def rank(example: Example) -> str:
        return hashlib.sha256(f"{sampling.seed}/{example.id}".encode()).hexdigest()

    yield from heapq.nsmallest(sampling.sample, examples, key=rank)


def _table(examples: Sequence[Example], corpus: str, tokenizer: object, max_tokens: int) -> pa.Table:
    encoded = encode(tokenizer, examples, max_tokens)
    columns = {
        "example_id": [e.id for e in examples], "corpus": [corpus] * len(examples),
        "prompt": [e.prompt for e in examples], "answer": [e.answer for e in examples],
        "messages": [json.dumps(e.to_row()["messages"], ensure_ascii=False) for e in examples],
        "meta": [json.dumps(dict(e.meta), ensure_ascii=False, sort_keys=True, default=str) for e in examples],
        "n_prompt_tokens": [e.n_prompt_tokens for e in encoded],
        "n_answer_tokens": [e.n_answer_tokens for e in encoded], "status": [e.status for e in encoded]}
    return pa.table(columns, schema=EXAMPLES_SCHEMA)


@dataclass
class Failures:
    """The rows of a job without a finite number, held against the share that is allowed."""

    job: ScoreJob
    ids: Set[str]
    n_rows: int
    """How many of ``ids`` can be scored."""
    failed: set[str]

    def add(self, chunk: Chunk, rows: Sequence[AnswerNll]) -> None:
        """Count what has come in; raises what ``judge`` raises."""
        bad = [not (row.status == "ok" and math.isfinite(row.nll_sum) and row.n_tokens > 0) for row in rows]
        self.failed |= self.ids & {example_id for example_id, failed in zip(chunk.ids, bad, strict=True) if failed}
        self.judge()

    def judge(self) -> None:
        """Raise ``UserError`` (failure rate) once the share is exceeded, whatever is still to come."""
        share = len(self.failed) / max(1, self.n_rows)
        if share > self.job.max_failures:
            where = f"--store {shlex.quote(str(self.job.store))}"
            raise UserError(
                f"{len(self.failed)} rows ({share:.1%}) gave no finite number, more than --max-failures "
                f"{self.job.max_failures:g}; scoring stops, and what was finished is kept.",
                f"Look at them with: curate sql {where} \"SELECT * FROM nll WHERE status <> 'ok'\"\nOnce the cause is "
                "mended, score them again with --retry-failed; or allow more.", Exit.FAILURE_RATE)


def _put_failed_aside(store: Store, ready: Prepared, rows: Sequence[Cut], shard: Shard | None) -> None:
    """Let the chunks of this shard that hold rows without a finite number be missing again."""
    n = 0
    for model, _ in ready.models:
        model_id = model.identity.id
        failed = [ids for ids, _ in failed_chunks(store, model_id, rows) if shard is None or shard.takes(model_id, ids)]
        if failed:
            store.withdraw_nll(model_id, {i for ids in failed for i in ids})
        n += len(failed)
    say(f"{n} chunks with rows that gave no finite number were put aside; they are scored again." if n else
        "There is nothing to retry: no chunk of this run holds a row that gave no finite number.")


def _say_what_is_unusual(shard: Shard | None, mine: Sequence[Chunk], summary: Summary) -> None:
    """Say that more is computed than was asked for, or nothing although something is missing."""
    beside = len({i for chunk in mine for i in chunk.ids} - summary.ids)
    if beside:
        say(f"A chunk is scored as a whole: {beside:,} more rows of the store come along with those of this run.")
    if shard is not None and summary.left and not mine:
        say(f"Nothing falls to shard {shard.number}/{shard.n}: chunks are dealt out by chance, and there are few.")


def _compute(store: Store, ready: Prepared, chunks: Sequence[Chunk], compute: Compute, summary: Summary,
             failures: Failures) -> None:
    with progress("Scoring", sum(chunk.n_tokens for chunk in chunks), "tokens") as bar:
        work = ready.work(store, chunks, bar)
        for chunk, rows in compute.results(work):
            store.put_nll(chunk.model_id, nll_table(chunk, rows))
            name = work.names[chunk.model_id]
            summary.models[name] = summary.models.get(name, 0) + len(rows)
            failures.add(chunk, rows)
