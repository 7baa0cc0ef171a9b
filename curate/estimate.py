"""What scoring would take, before it is begun: rows, tokens, memory, disk, hours and cost.

The corpora are read and encoded as they would be, into a store that is thrown away, so rows, tokens and the disk that
examples need are exact. Time comes from a short calibration: rows of four bands of length go through the real engine,
and the speed at other lengths is interpolated.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from curate.chunks import Chunk, Cut, Here, Work, cuts, failed_chunks, missing_chunks, nll_table
from curate.core.nll import AnswerNll
from curate.core.terminal import Progress, say
from curate.intake import ingest
from curate.job import ScoreJob
from curate.ledger import Entry, Ledger
from curate.parts import part_bytes
from curate.records import StoreHeader, matching
from curate.score import prepared
from curate.storage import storage_at
from curate.store import Store

BANDS = 4
CALIBRATION_TOKENS = {"cpu": 6_000, "cuda": 150_000}
"""Tokens of each band that go through the engine."""
FILLS = 3
"""Rows of each band for a server, at least, in multiples of the requests at the same time."""
UNSEEN = {"server": ("memory", "GPU memory"), "vllm": ("memory", "GPU memory")}
"""What engines need outside this process, where it cannot be measured."""


@dataclass(frozen=True)
class Speed:
    """How fast rows of about this length are computed."""

    length: float
    tokens_per_s: float


@dataclass(frozen=True)
class Timing:
    """What a calibration has measured; ``slowdown`` is a member's time over the aligned model's, for the same rows.

    ``reading_s`` is that of everything before the model is loaded, ``check_s`` that of what ends each chunk.
    """

    speeds: tuple[Speed, ...]
    reading_s: float
    load_s: float
    open_s: float
    slowdown: float
    ram_bytes: int | None
    gpu_bytes: int | None
    check_s: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """What scoring would take; ``rows`` counts all that come in, by status."""

    n_rows: int
    rows: dict[str, int]
    to_compute: dict[str, int]
    """Rows that are not scored yet, by model."""
    tokens: dict[str, float]
    """Of the rows that can be scored: sum, median, p99 and longest; prompt and answer."""
    disk_bytes: dict[str, int]
    ram_bytes: int | None
    gpu_bytes: int | None
    unseen: tuple[str, ...]
    """What of these is needed elsewhere than in this process, and was not measured."""
    tokens_per_s: list[tuple[float, float]]
    """Length and speed, as measured."""
    hours: float
    cost: float | None

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def estimate(job: ScoreJob, gpu_hour: float | None = None) -> Estimate:
    """Work out what ``score`` would take; nothing is written to its store. Raises what ``score`` would raise."""
    begun = time.monotonic()
    settled = prepared(job, Here())
    header, models, device = settled.header, settled.models, settled.opening.models.device
    before = _store_before(job.store, header)
    with tempfile.TemporaryDirectory() as folder, Store.create_or_open(Path(folder) / "s", header) as store:
        summary = ingest(replace(job, store=Path(folder)), store, settled.tokenizer, list_rejects=False)
        reading_s = time.monotonic() - begun
        old = cuts(before, summary.ids) if before else []
        todo = {m.identity.id: _to_do(store, before, m.identity.id, old, job.retry_failed) for m, _ in models}
        if job.shard is not None:
            todo = {i: [c for c in chunks if job.shard.takes(i, c.ids)] for i, chunks in todo.items()}
        sizes = disk(store, before, [chunk for chunks in todo.values() for chunk in chunks])
        names = {m.identity.id: m.name for m, _ in models}
        ready = missing_chunks(store, header.aligned.id)
        timing = None
        if ready and any(todo.values()):
            limit = CALIBRATION_TOKENS["cuda" if device.startswith("cuda") else "cpu"]
            engine = settled.opening.engine
            chosen = samples(ready, list(names), limit, FILLS * engine.concurrency if engine.name == "server" else 1)
            timing = calibrate(settled.work(store, chosen, Progress("Calibrating", 1, "tokens")), reading_s)
    lengths = sorted(length for chunk in ready for length in chunk.lengths)
    hours = (reading_s if timing is None else seconds(timing, list(todo.values()))) / 3600
    return Estimate(summary.n_rows, dict(summary.counts),
                    {names[i]: sum(len(c.ids) for c in chunks) for i, chunks in todo.items()}, spread(lengths), sizes,
                    timing and timing.ram_bytes, timing and timing.gpu_bytes,
                    UNSEEN.get(header.engine, ()) if timing else (),
                    [(s.length, s.tokens_per_s) for s in timing.speeds] if timing else [], hours,
                    None if gpu_hour is None else hours * gpu_hour)


def _store_before(place: Path | str, header: StoreHeader) -> Store | None:
    """Return the store that scoring would go on with, if it is there, without what is damaged.

    ``UserError`` if it could not go on with it.
    """
    storage = storage_at(place)
    storage.check_new()
    if "store.json" not in storage.listed():
        return None
    ledger = Ledger.load(storage)
    damaged = ledger.disregard_damage()
    if damaged:
        say(f"{len(damaged)} damaged files would be put aside and their rows scored again.")
    return Store(storage, matching(storage, header), ledger)


def _to_do(store: Store, before: Store | None, model_id: str, old: Sequence[Cut], retry: bool) -> list[Chunk]:
    """Return what is missing of the chunks ``old`` of the store before, and the chunks of rows that it lacks."""
    if before is None:
        return missing_chunks(store, model_id)
    done = before.scored_ids(model_id)
    if retry:
        done -= {i for ids, _ in failed_chunks(before, model_id, old) for i in ids}
    return missing_chunks(before, model_id, done, old) + missing_chunks(store, model_id, before.example_ids())


def spread(lengths: Sequence[int]) -> dict[str, float]:
    """Return sum, median, p99 (the smallest length that 99% do not exceed) and longest of sorted lengths."""
    if not lengths:
        return {"sum": 0, "median": 0, "p99": 0, "longest": 0}
    n = len(lengths)
    median = (lengths[(n - 1) // 2] + lengths[n // 2]) / 2
    return {"sum": sum(lengths), "median": median, "p99": lengths[-(-99 * n // 100) - 1], "longest": lengths[-1]}


def disk(store: Store, before: Store | None, todo: Sequence[Chunk]) -> dict[str, int]:
    """Return the bytes of examples (exact for a new store) and of scores (by up to 16 parts of invented numbers)."""
    known = before.example_ids() if before else set()
    new = len(store.example_ids() - known)
    share = new / max(1, len(store.example_ids()))
    examples = sum(e.bytes + len(e.to_bytes()) for e in store.entries() if e.kind != "nll")
    dice = random.Random(0)
    chosen = todo if len(todo) <= 16 else dice.sample(list(todo), 16)
    made = sum(_scores_bytes(chunk, dice) for chunk in chosen)
    rows = sum(len(chunk.ids) for chunk in chosen)
    return {"examples": round(examples * share),
            "scores": round(made * sum(len(chunk.ids) for chunk in todo) / rows) if rows else 0}


def _scores_bytes(chunk: Chunk, dice: random.Random) -> int:
    rows = [AnswerNll(dice.uniform(1, 500), max(1, length // 2), dice.uniform(0, 9), "ok") for length in chunk.lengths]
    data = part_bytes(nll_table(chunk, rows))
    return len(data) + len(Entry.of(f"nll-{'0' * 24}", data, len(rows), chunk.model_id).to_bytes())


def samples(chunks: Sequence[Chunk], model_ids: Sequence[str], limit: int, fewest: int = 1) -> list[Chunk]:
    """Return the chunks to calibrate with: rows of ``BANDS`` bands of length, evenly taken, ``limit`` tokens of each.

    Of each band ``fewest`` rows at least, as far as it has them.
    The first band comes twice, to warm up; under the first member the band before the last comes twice.
    """
    rows = sorted(((length, i) for chunk in chunks for length, i in zip(chunk.lengths, chunk.ids, strict=True)),
                  reverse=True)
    bands = [band for k in range(BANDS) if (band := rows[len(rows) * k // BANDS:len(rows) * (k + 1) // BANDS])]
    taken = []
    for band in bands:
        n = max(1, min(len(band), max(fewest, round(limit * len(band) / sum(length for length, _ in band)))))
        some = [band[k * len(band) // n] for k in range(n)]
        taken.append((tuple(i for _, i in some), tuple(length for length, _ in some)))
    found = [Chunk(model_ids[0], *rows) for rows in [taken[0], *taken]]
    return found + [Chunk(model_ids[1], *taken[-2:][0])] * 2 if len(model_ids) > 1 else found


def calibrate(work: Work, reading_s: float) -> Timing:
    """Put the samples through the real engine and return what that took.

    A server looks after every chunk whether its model is still there, which is counted apart: the samples are smaller.
    """
    scorers: list[Any] = []

    def checked() -> float:
        return getattr(scorers[-1], "checked_s", 0.0) if scorers else 0.0

    marks = [(time.monotonic(), 0.0)]
    for _ in Here().results(replace(work, check=lambda scorer, model_id: scorers.append(scorer))):
        marks.append((time.monotonic(), checked()))
    spans = [max(later - earlier - (after - before), 1e-9) for (earlier, before), (later, after) in pairwise(marks)]
    own = [c for c in work.chunks if c.model_id == work.chunks[0].model_id]
    bands, times = own[1:], spans[1:len(own)]
    speeds = {sum(c.lengths) / len(c.ids): c.n_tokens / span for c, span in zip(bands, times, strict=True)}
    member = spans[len(own):]
    slowdown = member[1] / times[-2:][0] if member else 1.0
    engine, unit = work.opening.engine.name, 1 if sys.platform == "darwin" else 1024
    ram = None if engine in UNSEEN else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Timing(tuple(Speed(*pair) for pair in sorted(speeds.items())), reading_s,
                  max(spans[0] - times[0], 0.0), max(member[0] - member[1], 0.0) if member else 0.0, slowdown, ram,
                  None if engine in UNSEEN else _gpu_bytes(work.opening.models.device),
                  check_s=marks[-1][1] / len(spans))


def _gpu_bytes(device: str) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else None


def speed_at(speeds: Sequence[Speed], length: float) -> float:
    """Return tokens per second at a length: linear between what was measured, constant beyond it."""
    k = bisect_left([speed.length for speed in speeds], length)
    if k == 0:
        return speeds[0].tokens_per_s
    if k == len(speeds):
        return speeds[-1].tokens_per_s
    one, other = speeds[k - 1], speeds[k]
    share = (length - one.length) / (other.length - one.length)
    return one.tokens_per_s + share * (other.tokens_per_s - one.tokens_per_s)


def seconds(timing: Timing, by_model: Sequence[Sequence[Chunk]]) -> float:
    """Return how long scoring takes: reading, loading, then model after model, the aligned one first."""
    total = timing.reading_s + timing.load_s
    for number, chunks in enumerate(by_model):
        lengths = Counter(chain.from_iterable(c.lengths for c in chunks))
        pure = sum(n * length / speed_at(timing.speeds, length) for length, n in lengths.items())
        total += len(chunks) * timing.check_s
        total += pure if number == 0 else pure * timing.slowdown + (timing.open_s if chunks else 0.0)
    return total


def lines(found: Estimate) -> list[list[str]]:
    """Return an estimate as rows of a table, for people."""
    tokens, disk = found.tokens, found.disk_bytes
    rows = [[status, f"{n:,}"] for status, n in sorted(found.rows.items())] + [["rows in", f"{found.n_rows:,}"]]
    rows += [[f"to compute, {name}", f"{n:,}"] for name, n in found.to_compute.items()]
    rows += [[f"tokens, {name}", f"{tokens[name]:,.0f}"] for name in ("sum", "median", "p99", "longest")]
    rows += [[f"tokens/s at {length:,.0f} tokens", f"{speed:,.0f}"] for length, speed in found.tokens_per_s]
    rows += [[f"disk MiB, {name}", f"{size / 2**20:,.1f}"] for name, size in disk.items()]
    rows += [[f"{name} GiB", "not measured" if size is None else f"{size / 2**30:,.1f}"] for name, size in
             (("memory", found.ram_bytes), ("GPU memory", found.gpu_bytes)) if size is not None or name in found.unseen]
    rows += [["hours", f"{found.hours:,.2f}"]] + ([["cost", f"{found.cost:,.2f}"]] if found.cost is not None else [])
    return rows
