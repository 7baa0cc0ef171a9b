"""Scoring: read corpora into the store, work out what is missing, compute it chunk by chunk.

Examples are stored in parts of ``PART_ROWS`` in the order in which they come; a chunk is a slice of a part sorted by
length. Chunks depend only on what is stored, and a chunk is committed whole, so a killed run goes on with the same
chunks and gives the same numbers.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from curate.chunks import Chunk, Compute, Here, Opening, Shard, Work, cuts, encoded_rows, missing_chunks, nll_table
from curate.core.chat import ENCODING, encode
from curate.core.documents import EnsembleSpec, ModelIdentity, RunCard
from curate.core.errors import Exit, UserError
from curate.core.example import Example
from curate.core.identity import check_base, identify, read_run
from curate.core.objects import is_url
from curate.core.refs import ref_from
from curate.core.sources import Reading, read_source
from curate.core.terminal import Progress, progress, say
from curate.corpora import Corpus
from curate.parts import EXAMPLES_SCHEMA
from curate.recheck import recheck
from curate.records import Plan, PlannedCorpus, ScoredModel, StoreHeader, corpus_key
from curate.scorers import Scorer
from curate.scorers.choose import EngineSettings, Models
from curate.store import Store

PART_ROWS = 8192
MANY_PARTS = 4096
"""Parts of scores from which on it is worth saying that they can be merged."""


@dataclass(frozen=True)
class Sampling:
    """Which rows of a corpus to take: all, the first ``limit``, or ``sample`` rows drawn by content and ``seed``."""

    limit: int | None = None
    sample: int | None = None
    seed: int = 0


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
    Raises ``UserError``; ``failure rate`` when more than ``max_failures`` of the rows gave no finite number.
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
        rows = cuts(store)
        missing = [chunk for model, _ in models for chunk in missing_chunks(store, model.identity.id, among=rows)]
        mine = [chunk for chunk in missing if job.shard is None or job.shard.takes(chunk.model_id, chunk.ids)]
        summary.left = sum(len(chunk.ids) for chunk in missing) - sum(len(chunk.ids) for chunk in mine)
        if mine:
            _compute(store, ready, mine, compute, summary)
        n_parts = sum(entry.kind == "nll" for entry in store.entries())
        if n_parts >= MANY_PARTS:
            say(f"The scores lie in {n_parts:,} parts, one for each chunk; fewer are faster to open: curate compact "
                f"{job.store}")
        _count_failures(store, models, summary, job.max_failures)
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
    """Read the corpora, store what is new, and write the plan; every row that comes in is counted once."""
    seen, summary = set(), Summary()
    planned = []
    for corpus in job.corpora:
        reading, ids, duplicates = Reading(), [], 0
        new: list[Example] = []
        aside = _rejects_file(job.store, corpus.label)
        rows = read_source(corpus.source, corpus.folder, reading, job.max_bad, aside)
        for example in sampled(rows, job.sampling):
            if example.id in seen:
                duplicates += 1
                continue
            seen.add(example.id)
            ids.append(example.id)
            if not store.holds(example.id):
                new.append(example)
            if len(new) == PART_ROWS:
                store.put_examples(_table(new, corpus.label, tokenizer, job.max_tokens))
                new = []
        if new:
            store.put_examples(_table(new, corpus.label, tokenizer, job.max_tokens))
        key = corpus_key(corpus.label, corpus.source, job.sampling.__dict__)
        store.put_membership(key, ids)
        planned.append(PlannedCorpus(label=corpus.label, source=corpus.source, folder=str(corpus.folder), key=key,
                                     n_rows=len(ids)))
        summary.n_rows += reading.n_rows
        summary.counts.update({f"filtered: {k}": v for k, v in reading.filtered.items()})
        summary.counts["rejected"] += len(reading.rejects)
        summary.counts["duplicate"] += duplicates
        summary.counts["not sampled"] += reading.n_examples - len(ids) - duplicates
    statuses = store.statuses(seen)
    summary.counts.update(statuses)
    summary.counts += Counter()
    store.put_plan(Plan(corpora=tuple(planned), n_rows=summary.n_rows, counts=dict(summary.counts)))
    return summary


def _rejects_file(store: Path | str, label: str) -> Path:
    """Return where unreadable rows are listed: in the store, or here if the store is no folder."""
    return (Path() if is_url(store) else Path(store)) / f"rejects-{re.sub('[^A-Za-z0-9._-]+', '-', label)}.jsonl"


def sampled(examples: Iterator[Example], sampling: Sampling) -> Iterator[Example]:
    """Yield the examples to take; a sample is decided by content, so order and file layout do not matter."""
    if sampling.sample is None:
        for number, example in enumerate(examples):
            if sampling.limit is None or number < sampling.limit:
                yield example
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


def _compute(store: Store, ready: Prepared, chunks: Sequence[Chunk], compute: Compute, summary: Summary) -> None:
    with progress("Scoring", sum(chunk.n_tokens for chunk in chunks), "tokens") as bar:
        work = ready.work(store, chunks, bar)
        for chunk, rows in compute.results(work):
            store.put_nll(chunk.model_id, nll_table(chunk, rows))
            name = work.names[chunk.model_id]
            summary.models[name] = summary.models.get(name, 0) + len(rows)


def _count_failures(store: Store, models: Sequence[tuple[ScoredModel, Path | None]], summary: Summary,
                    allowed: float) -> None:
    failed = store.failed_ids([model.identity.id for model, _ in models])
    bad = len(failed)
    if bad:
        summary.counts["ok"] -= bad
        summary.counts["nonfinite"] += bad
    share = bad / max(1, summary.counts["ok"] + bad)
    if share > allowed:
        raise UserError(f"{bad} rows ({share:.1%}) gave no finite number, more than --max-failures {allowed:g}.",
                        "Look at them with: curate sql \"SELECT * FROM nll WHERE status <> 'ok'\"", Exit.FAILURE_RATE)
