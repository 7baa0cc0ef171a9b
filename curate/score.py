"""Scoring: read corpora into the store, work out what is missing, compute it chunk by chunk.

A chunk is a slice of a part of examples, sorted by length. Chunks depend only on what is stored, and a chunk is
committed whole, so a killed run goes on with the same chunks and gives the same numbers.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

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
from curate.core.chat import ENCODING, template_gap
from curate.core.documents import EnsembleSpec, ModelIdentity, RunCard
from curate.core.errors import Exit, UserError
from curate.core.identity import check_base, identify, read_run
from curate.core.nll import AnswerNll
from curate.core.refs import ref_from
from curate.core.terminal import Progress, progress, say
from curate.intake import ingest
from curate.job import ScoreJob, Summary
from curate.recheck import recheck
from curate.records import ScoredModel, StoreHeader
from curate.scorers import Scorer
from curate.scorers.choose import Models
from curate.store import Store

MANY_PARTS = 4096
"""Parts of scores from which on it is worth saying that they can be merged."""


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
    if gap := template_gap(tokenizer):
        say(f"This tokenizer merges across the ends of template pieces: {gap} ids of a short conversation differ from "
            "those of its rendered template. All models are given the same ids.")
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
