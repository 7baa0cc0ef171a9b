"""A dry run says what scoring will take: rows, tokens and disk as they come out, time by plain arithmetic."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import curate.chunks as chunks
import curate.estimate as estimating
import curate.intake as intake
from curate.chunks import Chunk, Here, Opening, Shard, Work
from curate.cli import main
from curate.core.errors import Exit, UserError
from curate.core.example import pair
from curate.core.refs import load_tokenizer
from curate.core.terminal import Progress
from curate.corpora import open_corpus
from curate.estimate import (
    Estimate,
    Speed,
    Timing,
    calibrate,
    estimate,
    lines,
    samples,
    seconds,
    speed_at,
    spread,
)
from curate.job import ScoreJob
from curate.score import ensemble_members, score
from curate.scorers.choose import EngineSettings, Models
from curate.store import Store
from tests.curate.runs import tiny_ensemble
from tests.curate.stub_server import Stub
from tests.fakes import tiny_model, tiny_rows, write_rows

SPEEDS = (Speed(10.0, 100.0), Speed(20.0, 200.0), Speed(60.0, 40.0))


def chunk(*lengths: int, model_id: str = "m") -> Chunk:
    return Chunk(model_id, tuple(f"{model_id}{k}" for k in range(len(lengths))), lengths)


def test_speed_is_interpolated_between_what_was_measured() -> None:
    assert [speed_at(SPEEDS, length) for length in (3, 10, 15, 20, 50, 60, 99)] == [100, 100, 150, 200, 80, 40, 40]


def test_time_adds_up() -> None:
    timing = Timing(SPEEDS, reading_s=7.0, load_s=5.0, open_s=3.0, slowdown=1.5, ram_bytes=0, gpu_bytes=None)
    aligned = [chunk(20, 10), chunk(30, 15, 10)]  # 200 tokens a second, twice 100, 160 and 150
    member = [chunk(60, 60, 60)]  # 180 tokens at 40 a second
    pure = 20 / 200 + 2 * 10 / 100 + 30 / 160 + 15 / 150
    assert seconds(timing, [aligned, member, []]) == pytest.approx(7 + 5 + pure + (4.5 * 1.5 + 3))
    assert seconds(timing, [[], []]) == 12
    checked = replace(timing, check_s=0.25)
    assert seconds(checked, [aligned, member, []]) == pytest.approx(seconds(timing, [aligned, member, []]) + 3 * 0.25)


def test_what_ends_a_chunk_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    scorer = SimpleNamespace(checked_s=0.0)

    def results(self: Here, work: Work) -> Iterator[tuple[Chunk, list[Any]]]:
        clock[0] += 7.0  # loads
        work.check(scorer, "m")
        for one in work.chunks:
            clock[0] += one.n_tokens / 100 + 2.0
            scorer.checked_s += 2.0
            yield one, []

    monkeypatch.setattr(Here, "results", results)
    monkeypatch.setattr(estimating, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    opening = Opening(EngineSettings("server"), Models("base", "base", {}, "served", "cpu", 99))
    chosen = samples([chunk(*range(80, 0, -1))], ["m", "n"], 100)
    work = Work(opening, {"m": "base"}, {"m": None}, chosen, lambda one: [], Progress("Calibrating", 1, "tokens"))
    timing = calibrate(work, 1.0)
    assert timing.check_s == pytest.approx(2.0) and timing.load_s == pytest.approx(7.0)
    assert timing.slowdown == pytest.approx(1.0) and (timing.ram_bytes, timing.gpu_bytes) == (None, None)
    assert all(speed.tokens_per_s == pytest.approx(100) for speed in timing.speeds)
    shown = Estimate(1, {}, {}, spread([]), {}, None, None, ("memory", "GPU memory"), [], 0.0, None)
    assert [row[1] for row in lines(shown) if "memory" in row[0]] == ["not measured"] * 2
    assert not any("memory" in row[0] for row in lines(replace(shown, unseen=())))


def test_a_dry_run_of_a_damaged_store_counts_what_would_be_scored_again(
        tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 3)
    write_rows(tmp_path / "pool.jsonl", tiny_rows(7, "pool"))
    alone = ScoreJob(corpora=[open_corpus(str(tmp_path / "pool.jsonl"))], store=tmp_path / "scores",
                     aligned=str(model), dtype="float32", device="cpu", max_tokens=60)
    score(alone)
    part = min((tmp_path / "scores" / "parts").glob("nll-*"))
    lost = pq.read_metadata(part).num_rows
    part.write_bytes(part.read_bytes()[:-1])
    said = estimate(alone)
    assert said.to_compute == {"tiny": lost} and "1 damaged files would be put aside" in capsys.readouterr().err
    assert score(alone).models == said.to_compute


def test_a_dry_run_is_not_for_a_cluster(tmp_path: Path, model: Path) -> None:
    write_rows(tmp_path / "pool.jsonl", tiny_rows(2, "pool"))
    done = CliRunner().invoke(main, ["score", "--corpus", str(tmp_path / "pool.jsonl"), "--aligned", str(model),
                                     "--dry-run", "--ray", "auto"])
    assert done.exit_code == Exit.USAGE and "without --ray on a machine like the workers" in done.stderr


def test_lengths_are_summed_up() -> None:
    assert spread([]) == {"sum": 0, "median": 0, "p99": 0, "longest": 0}
    assert spread([1, 2, 9]) == {"sum": 12, "median": 2, "p99": 9, "longest": 9}
    assert spread(list(range(1, 201))) == {"sum": 20100, "median": 100.5, "p99": 198, "longest": 200}


def test_samples_are_spread_over_lengths_and_small() -> None:
    found = samples([chunk(*range(80, 40, -1)), chunk(*range(40, 0, -1))], ["m", "n"], limit=100)
    assert [c.model_id for c in found] == ["m"] * 5 + ["n"] * 2 and found[0] == found[1]
    bands = found[1:5]
    assert [c.lengths for c in bands] == [(80,), (60, 50), (40, 34, 27), tuple(range(20, 0, -2))]
    assert found[5].lengths == bands[2].lengths == found[6].lengths
    assert len(samples([chunk(5, 4)], ["m"], 100)) == 3
    many = samples([chunk(*range(80, 0, -1))], ["m"], limit=100, fewest=6)
    assert [len(c.ids) for c in many[1:]] == [6, 6, 6, 10]
    assert [len(c.ids) for c in samples([chunk(*range(12, 0, -1))], ["m"], 1, fewest=6)] == [3] * 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("estimate") / "tiny")


@pytest.fixture(scope="module")
def ensemble(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ensemble(model, tmp_path_factory.mktemp("ensemble"), n=1)


def job(tmp_path: Path, model: Path, ensemble: Path, **changes: object) -> ScoreJob:
    fields = {"corpora": [open_corpus(str(tmp_path / "pool.jsonl"))], "store": tmp_path / "scores",
              "aligned": str(model), "members": ensemble_members(ensemble)[1], "dtype": "float32", "device": "cpu",
              "max_tokens": 60}
    return ScoreJob(**(fields | changes))


def test_a_dry_run_knows_rows_tokens_and_disk_and_writes_nothing(tmp_path: Path, model: Path, ensemble: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "PART_ROWS", 29)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 11)
    rows = [*tiny_rows(67, "pool"), tiny_rows(1, "pool")[0], *tiny_rows(2, "and a much longer question " * 9)]
    write_rows(tmp_path / "pool.jsonl", rows)
    said = estimate(job(tmp_path, model, ensemble), gpu_hour=3600.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool.jsonl"]
    assert said.rows == {"ok": 67, "duplicate": 1, "too_long": 2} and said.n_rows == 70
    assert said.to_compute == {"tiny": 67, "m0": 67}
    halves = [estimate(job(tmp_path, model, ensemble, shard=Shard(k, 2))).to_compute for k in (1, 2)]
    assert {name: halves[0][name] + halves[1][name] for name in halves[0]} == said.to_compute

    summary = score(job(tmp_path, model, ensemble))
    assert summary.counts == said.rows and summary.models == said.to_compute
    store = Store.open_read(tmp_path / "scores")
    index = store.example_index().filter(status="ok")
    lengths = sorted(index["n_prompt_tokens"] + index["n_answer_tokens"])
    assert said.tokens == spread(lengths)
    took = {kind: sum(e.bytes + len(e.to_bytes()) for e in store.entries() if (e.kind == "nll") == kind)
            for kind in (False, True)}
    assert said.disk_bytes["examples"] == took[False]
    assert said.disk_bytes["scores"] == pytest.approx(took[True], rel=0.05)
    assert said.cost == pytest.approx(said.hours * 3600.0) and said.hours > 0 and said.ram_bytes > 2**20
    assert len(said.tokens_per_s) == 4 and all(speed > 0 for _, speed in said.tokens_per_s)

    again = estimate(job(tmp_path, model, ensemble))
    assert again.to_compute == {"tiny": 0, "m0": 0} and again.disk_bytes == {"examples": 0, "scores": 0}
    assert again.tokens_per_s == [] and again.cost is None
    with pytest.raises(UserError, match="max_tokens 60, but now it would be 61"):
        estimate(job(tmp_path, model, ensemble, max_tokens=61))


def test_a_dry_run_lists_no_bad_rows_where_nobody_finds_them(tmp_path: Path, model: Path, ensemble: Path) -> None:
    path = write_rows(tmp_path / "pool.jsonl", tiny_rows(3, "pool"))
    path.write_bytes(path.read_bytes() + b"no row\n")
    with pytest.raises(UserError, match=r"1 of 4 rows of .* are bad") as caught:
        estimate(job(tmp_path, model, ensemble, max_bad=0.01))
    assert caught.value.hint == "Mend the rows."
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool.jsonl"]


def test_the_command_line_prints_a_table_or_json(tmp_path: Path, model: Path) -> None:
    write_rows(tmp_path / "pool.jsonl", tiny_rows(9, "pool"))
    line = ["score", "--corpus", str(tmp_path / "pool.jsonl"), "--aligned", str(model), "--store",
            str(tmp_path / "scores"), "--dtype", "float32", "--dry-run", "--gpu-hour", "2.5"]
    out = json.loads(CliRunner().invoke(main, [*line, "--json"], catch_exceptions=False).stdout)
    assert out["to_compute"] == {"tiny": 9} and out["cost"] == pytest.approx(out["hours"] * 2.5)
    table = CliRunner().invoke(main, line, catch_exceptions=False)
    assert "to compute, tiny" in table.stdout and "cost" in table.stdout and "Nothing was scored" in table.stderr
    assert not (tmp_path / "scores").exists()


@pytest.mark.slow
def test_a_dry_run_on_a_server_is_within_a_quarter_of_the_real_one(
        tmp_path: Path, model: Path, ensemble: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server takes 50 ms for a request and 2 ms for a token, up to four requests at a time."""
    rows = [pair(f"{k}: what comes next?", "and so on " * (1 + k * k % 13)) for k in range(400)]
    write_rows(tmp_path / "pool.jsonl", rows)
    tokenizer = load_tokenizer(str(model))
    stub = Stub(tokenizer, {"tiny": 3, "m0": 7}, tokenizer.convert_tokens_to_ids("<|im_start|>"), delay_s=0.05,
                entries={"m0": {"parent": "tiny"}},
                twist=lambda choice, body: time.sleep(0.002 * len(body["prompt"]))).start()
    wanted = job(tmp_path, model, ensemble, dtype="auto", max_tokens=400,
                 engine=EngineSettings("server", base_urls=(stub.url,), concurrency=4))
    try:
        said = estimate(wanted)
        begun = time.monotonic()
        summary = score(wanted)
        took_s = time.monotonic() - begun
    finally:
        stub.stop()
    with capsys.disabled():
        print(f"\nestimated {3600 * said.hours:.1f} s, took {took_s:.1f} s")
    assert summary.models == said.to_compute == {"tiny": 400, "m0": 400}
    assert 0.75 <= 3600 * said.hours / took_s <= 1.25
