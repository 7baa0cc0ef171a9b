"""Scoring end to end on a tiny model: every row accounted for, nothing computed twice, nothing lost to a kill."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import curate.chunks as chunks
import curate.compact as compaction
import curate.intake as intake
import curate.score as scoring
from curate.chunks import Chunk, Here, Shard, Work, cuts, encoded_ahead
from curate.cli import main
from curate.core.chat import Encoded, encode
from curate.core.errors import Exit, UserError
from curate.core.example import Example, Message, pair
from curate.core.files import sha256
from curate.core.identity import identify
from curate.core.model import load
from curate.core.nll import AnswerNll
from curate.core.rows import MAX_LINE_BYTES
from curate.core.terminal import Progress
from curate.corpora import open_corpus
from curate.estimate import estimate
from curate.job import Sampling, ScoreJob
from curate.query import connect
from curate.records import told_apart
from curate.score import ensemble_members, score
from curate.select import Choice, build_manifest, planned_corpus
from curate.status import status
from curate.store import Store
from curate.verify import verify_store
from tests.curate.runs import tiny_ensemble, tiny_run
from tests.fakes import CHATML, tiny_model, tiny_rows, tiny_tokenizer, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("score") / "tiny")


@pytest.fixture(scope="module")
def ensemble(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ensemble(model, tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 13 rows in chunks of 5, so that every test crosses their borders."""
    monkeypatch.setattr(intake, "PART_ROWS", 13)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 5)


def job(tmp_path: Path, model: Path, ensemble: Path | None, rows: int = 29, **changes: object) -> ScoreJob:
    path = tmp_path / "pool.jsonl"
    if not path.exists():
        write_rows(path, tiny_rows(rows, "pool"))
    members = ensemble_members(ensemble)[1] if ensemble else []
    fields = {"corpora": [open_corpus(str(path))], "store": tmp_path / "scores", "aligned": str(model),
              "members": members, "dtype": "float32", "device": "cpu", "max_tokens": 400}
    return ScoreJob(**(fields | changes))


class Fake(Here):
    """Gives each row 1 nat a token and those of ``bad`` no number, without a model; keeps what it was asked for."""

    def __init__(self, *bad: str) -> None:
        self.bad, self.chunks = bad, list[Chunk]()

    def results(self, work: Work) -> Iterator[tuple[Chunk, list[AnswerNll]]]:
        for chunk in work.chunks:
            self.chunks.append(chunk)
            yield chunk, [AnswerNll(math.nan, n, None, "nonfinite") if i in self.bad else
                          AnswerNll(float(n), n, None, "ok") for i, n in zip(chunk.ids, chunk.lengths)]


def manifest(tmp_path: Path, n: int = 7) -> bytes:
    choice = Choice(n=n, min_answer_tokens=1)
    return build_manifest(Store.open_read(tmp_path / "scores"), choice, tmp_path)[0].to_bytes()


def test_scores_equal_plain_forward_passes(tmp_path: Path, model: Path, ensemble: Path) -> None:
    summary = score(job(tmp_path, model, ensemble))
    assert summary.counts == {"ok": 29} and summary.models == {"tiny": 29, "m0": 29, "m1": 29}
    loaded = load(str(model), "float32", "cpu")
    found = dict(connect(Store.open_read(tmp_path / "scores"), 0.1, None).execute(
        "SELECT example_id, nll_aligned FROM scores WHERE status = 'ok'").fetchall())
    for example in tiny_rows(29, "pool"):
        item = encode(loaded.tokenizer, [example], 400)[0]
        logits = loaded.model(input_ids=torch.tensor([item.ids])).logits[0].double().log_softmax(-1)
        span = range(item.answer_start, item.answer_end)
        plain = -sum(logits[t - 1, item.ids[t]].item() for t in span) / len(span)
        assert found[example.id] == pytest.approx(plain, abs=1e-5)


def test_parts_close_by_bytes_too_wherever_a_run_was_killed(tmp_path: Path, model: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 20, 21, ... bytes of text and 2 of meta; a part closes at 100 bytes."""
    monkeypatch.setattr(intake, "PART_BYTES", 100)
    write_rows(tmp_path / "pool.jsonl", [pair("q" * 10, "a" * (10 + k)) for k in range(12)])
    score(job(tmp_path, model, None), Fake())
    whole = Store.open_read(tmp_path / "scores")
    assert sorted(part.num_rows for part in whole.example_parts()) == [3, 4, 5], "120, 114 and 96 bytes"
    put, n_put = Store.put_examples, []

    def killed(self: Store, table: object) -> None:
        if len(n_put) == 1:
            raise KeyboardInterrupt
        n_put.append(True)
        put(self, table)

    again = job(tmp_path, model, None, store=tmp_path / "again")
    monkeypatch.setattr(Store, "put_examples", killed)
    with pytest.raises(KeyboardInterrupt):
        score(again, Fake())
    monkeypatch.setattr(Store, "put_examples", put)
    score(again, Fake())
    assert Store.open_read(tmp_path / "again").evidence_digest() == whole.evidence_digest()


def test_no_column_of_a_part_reaches_what_it_cannot_hold() -> None:
    """JSON writes a control character in six bytes; the last row of a part comes on top."""
    text = "\x01" * 100
    assert len(json.dumps(text)) - 2 == 6 * len(text) and 6 * (intake.PART_BYTES + MAX_LINE_BYTES) < 2**31


def test_bytes_and_long_values_are_named_in_meta_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = {"b": {"bytes": b"\x89PNG", "path": None}, "a": [1, "é"], "day": date(2024, 2, 3), "long": "x" * 2**16}
    assert json.loads(intake.meta_json(meta)) == {
        "a": [1, "é"], "day": "2024-02-03",
        "b": {"bytes": f"<4 bytes, sha256 {sha256(bytes([0x89]) + b'PNG')}>", "path": None},
        "long": f"<65538 characters of JSON, sha256 {sha256(json.dumps('x' * 2**16).encode())}>"}
    plain = {"b": 1, "a": {"d": 2, "c": [None, True, 0.5]}, "é": "x"}
    assert intake.meta_json(plain) == json.dumps(plain, ensure_ascii=False, sort_keys=True)
    assert intake.meta_json({}) == "{}"


def test_typed_again_computes_nothing_and_more_rows_or_members_only_those(
        tmp_path: Path, model: Path, ensemble: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    first = job(tmp_path, model, ensemble)
    monkeypatch.setattr(scoring, "MANY_PARTS", 21)
    score(first)
    assert "The scores lie in 21 parts" in capsys.readouterr().err
    assert score(first).models == {}
    write_rows(tmp_path / "pool.jsonl", [*tiny_rows(29, "pool"), *tiny_rows(4, "more")])
    assert score(job(tmp_path, model, ensemble)).models == {"tiny": 4, "m0": 4, "m1": 4}
    third = tiny_run(model, tmp_path / "m2", "m2", seed=9)
    grown = job(tmp_path, model, ensemble)
    grown = job(tmp_path, model, ensemble, members=[*grown.members, third])
    assert score(grown).models == {"m2": 33}


def test_the_ensemble_that_is_found_is_for_those_who_name_no_member(tmp_path: Path, model: Path, ensemble: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pool.jsonl", tiny_rows(3, "pool"))
    (tmp_path / "ensemble").symlink_to(ensemble.parent)
    asked: list[ScoreJob] = []
    monkeypatch.setattr(scoring, "score", lambda job, compute: asked.append(job) or SimpleNamespace(
        counts={"ok": 3}, n_rows=3, left=len(asked) - 1))

    def members(*words: str) -> list[str]:
        done = CliRunner().invoke(main, ["score", "--corpus", "pool.jsonl", "--store", "my scores", *words])
        if done.exit_code:
            raise UserError(done.stderr)
        assert ("Next: curate select --store 'my scores' --frac" if len(asked) == 1 else
                "Look with: curate status 'my scores'\n") in done.stderr
        return [Path(m).parent.name for m in asked[-1].members]

    assert members() == ["m0", "m1"]
    own = ("--member", str(tiny_run(model, tmp_path / "own", "own", seed=5)))
    assert members("--aligned", str(model), *own) == ["own"]
    assert members("--ensemble", "ensemble/ensemble.json", *own) == ["m0", "m1", "own"]
    with pytest.raises(UserError, match="Members were given, but no aligned model"):
        members(*own)


def test_rows_are_encoded_while_the_chunk_before_is_computed() -> None:
    asked = [threading.Event() for _ in range(3)]

    def encoded(chunk: Chunk) -> list[object]:
        asked[int(chunk.ids[0])].set()
        return [chunk.ids[0]]

    work = Work(None, {}, {}, [Chunk("m", (str(k),), (1,)) for k in range(3)], encoded, Progress("s", 1, "tokens"))
    for number, (chunk, rows) in enumerate(encoded_ahead(work, work.chunks)):
        assert rows == [str(number)] == list(chunk.ids)
        assert number == 2 or asked[number + 1].wait(20)
        assert number or not asked[2].is_set(), "one chunk ahead, not more"


def test_progress_names_rows_rejects_and_the_batch() -> None:
    bar = Progress("Scoring, m0", 40, "tokens")
    work = Work(None, {}, {}, [], lambda chunk: [], bar)
    good, bad = AnswerNll(1.0, 2, None, "ok"), AnswerNll(float("nan"), 2, None, "nonfinite")
    work.finished([Encoded((1, 2, 3), 1, 3)] * 3, [good, bad, good])
    work.finished([Encoded((1, 2, 3), 1, 3)] * 2, [bad, good])
    assert bar.done == 10 and bar.line().startswith("Scoring, m0: 25% of 40 tokens, ")
    assert bar.line().endswith(" s left 5 rows, 2 rejected, 2 at once")


def test_every_row_has_one_status(tmp_path: Path, model: Path) -> None:
    rows = [*tiny_rows(6, "pool"), tiny_rows(1, "pool")[0], pair("empty?", ""), pair("long?", "and so on " * 200)]
    write_rows(tmp_path / "pool.jsonl", rows)
    summary = score(job(tmp_path, model, None))
    assert summary.counts == {"ok": 6, "duplicate": 1, "empty_answer": 1, "too_long": 1}
    assert sum(summary.counts.values()) == summary.n_rows == 9


def test_rows_that_the_template_does_not_know_are_counted(tmp_path: Path) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    other = tiny_model(tmp_path / "no-system", tokenizer=tiny_tokenizer(template=template))
    rows = tiny_rows(6, "pool")
    system = Example((Message("system", "Be kind."), *rows[0].messages))
    write_rows(tmp_path / "pool.jsonl", [*rows, system])
    assert score(job(tmp_path, other, None)).counts == {"ok": 6, "unrenderable": 1}
    alone = tmp_path / "alone"
    alone.mkdir()
    write_rows(alone / "pool.jsonl", [system])
    assert score(job(alone, other, None)).counts == {"unrenderable": 1}


def test_sample_depends_on_content_and_seed_only(tmp_path: Path, model: Path) -> None:
    chosen = []
    for number, rows in enumerate((tiny_rows(29, "pool"), tiny_rows(29, "pool")[::-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_rows(folder / "pool.jsonl", rows)
        summary = score(job(folder, model, None, sampling=Sampling(sample=8, seed=3)))
        assert summary.counts == {"ok": 8, "not sampled": 21}
        chosen.append(Store.open_read(folder / "scores").example_ids())
    assert chosen[0] == chosen[1]


def test_bad_rows_stop_unless_allowed(tmp_path: Path, model: Path) -> None:
    path = write_rows(tmp_path / "pool.jsonl", tiny_rows(9, "pool"))
    path.write_bytes(path.read_bytes() + b'{"prompt": 7, "response": "x"}\n')
    with pytest.raises(UserError, match=r"line 10 \(byte \d+\)") as err:
        score(job(tmp_path, model, None))
    assert err.value.exit_code == Exit.BAD_DATA
    summary = score(job(tmp_path, model, None, max_bad=0.2))
    assert summary.counts == {"ok": 9, "rejected": 1} and summary.n_rows == 10
    aside = json.loads((tmp_path / "scores" / "rejects-pool.jsonl.jsonl").read_text())
    assert aside["place"].startswith("line 10")


def test_corpora_in_another_script_each_list_their_bad_rows(tmp_path: Path, model: Path) -> None:
    bad = b'{"prompt": 7, "response": "x"}\n'
    names = ["训练.jsonl", "测试.jsonl"]
    for name, n in zip(names, (1, 2), strict=True):
        path = write_rows(tmp_path / name, tiny_rows(9, name))
        path.write_bytes(path.read_bytes() + bad * n)
    read = [open_corpus(str(tmp_path / name)) for name in names]
    assert score(job(tmp_path, model, None, corpora=read, max_bad=0.5), Fake()).counts["rejected"] == 3
    lists = sorted(len(path.read_text().splitlines()) for path in (tmp_path / "scores").glob("rejects-*"))
    assert lists == [1, 2]


def test_a_link_is_its_file_and_a_name_that_no_document_can_hold_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "blobs").mkdir()
    real = write_rows(tmp_path / "blobs" / "rows.jsonl", tiny_rows(9, "pool"))
    (tmp_path / "linked.jsonl").symlink_to(real)
    linked = open_corpus(str(tmp_path / "linked.jsonl"))
    assert linked.label == "linked.jsonl" and linked.folder / linked.source.name == real
    assert score(job(tmp_path, model, None, corpora=[linked]), Fake()).counts == {"ok": 9}
    real.rename(tmp_path / "blobs" / "abc")
    (tmp_path / "other.jsonl").symlink_to(tmp_path / "blobs" / "abc")
    with pytest.raises(UserError, match=r"other.jsonl is a link to .*abc, whose name does not say its format"):
        open_corpus(str(tmp_path / "other.jsonl"))
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    Path(strange).write_bytes(b"")
    with pytest.raises(UserError, match=r"caf\\udce9.jsonl' is no valid UTF-8") as caught:
        open_corpus(strange)
    caught.value.message.encode()


def test_nonfinite_numbers_are_a_status_and_too_many_stop(tmp_path: Path, model: Path) -> None:
    broken = tiny_run(model, tmp_path / "nan", "nan", seed=1)
    weights = tmp_path / "nan" / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    save_file({k: v * float("inf") if "lora_B" in k else v for k, v in tensors.items()}, weights)
    from curate.core.documents import RunCard
    from curate.core.identity import with_adapter

    card = RunCard.read(broken)
    card.model_copy(update={"model": with_adapter(card.base, "nan", weights.parent)}).write(broken)
    with pytest.raises(UserError, match="gave no finite number") as err:
        score(job(tmp_path, model, None, members=[broken]))
    assert err.value.exit_code == Exit.FAILURE_RATE
    assert f"curate sql --store {tmp_path / 'scores'} " in err.value.hint and "--retry-failed" in err.value.hint
    counted = connect(Store.open_read(tmp_path / "scores"), 0.1, None).execute(
        "SELECT status, count(*) FROM scores GROUP BY 1 ORDER BY 1").fetchall()
    assert counted == [("missing", 24), ("nonfinite", 5)], "it stopped after a chunk"
    summary = score(job(tmp_path, model, None, members=[broken], max_failures=1.0, store=tmp_path / "lenient"))
    assert summary.counts == {"nonfinite": 29} and summary.models == {"tiny": 29, "nan": 29}


def test_another_base_or_tokenizer_is_refused_before_any_model_is_loaded(
        tmp_path: Path, model: Path, ensemble: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "open_scorer", lambda *_: pytest.fail("a model was loaded"))
    other = tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="is an adapter of 'tiny'") as err:
        score(job(tmp_path, other, ensemble))
    assert err.value.exit_code == Exit.INCOMPATIBLE
    talking = tiny_model(tmp_path / "talking", tokenizer=tiny_tokenizer(system="Be brief."))
    with pytest.raises(UserError, match="chat templates differ"):
        score(job(tmp_path, talking, ensemble))
    silent = tiny_model(tmp_path / "silent", tokenizer=tiny_tokenizer(template=None))
    with pytest.raises(UserError, match="no chat template"):
        score(job(tmp_path, silent, None))
    assert not (tmp_path / "scores").exists()


def test_a_store_of_another_model_is_refused(tmp_path: Path, model: Path) -> None:
    score(job(tmp_path, model, None))
    with pytest.raises(UserError, match="aligned") as err:
        score(job(tmp_path, tiny_model(tmp_path / "other", seed=5), None))
    assert err.value.exit_code == Exit.INCOMPATIBLE


def test_out_of_memory_halves_the_batch_and_changes_nothing(tmp_path: Path, model: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    score(job(tmp_path, model, None))
    query = "SELECT example_id, nll_sum FROM nll ORDER BY 1"
    calm = connect(Store.open_read(tmp_path / "scores"), 0.1, None).execute(query).fetchall()
    import curate.core.nll as nll

    plain = nll.token_nll

    def tight(body: torch.nn.Module, batch: object) -> torch.Tensor:
        if batch.targets.numel() > 30:
            raise torch.OutOfMemoryError("not enough memory")
        return plain(body, batch)

    monkeypatch.setattr(nll, "token_nll", tight)
    (tmp_path / "again").mkdir()
    write_rows(tmp_path / "again" / "pool.jsonl", tiny_rows(29, "pool"))
    score(job(tmp_path / "again", model, None))
    pressed = connect(Store.open_read(tmp_path / "again" / "scores"), 0.1, None).execute(query).fetchall()
    assert [i for i, _ in calm] == [i for i, _ in pressed]
    assert [v for _, v in calm] == pytest.approx([v for _, v in pressed], abs=1e-4)


def test_damage_is_put_aside_and_scored_again(tmp_path: Path, model: Path) -> None:
    score(job(tmp_path, model, None))
    part = next((tmp_path / "scores" / "parts").glob("nll-*"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 16
    part.write_bytes(data)
    with pytest.raises(UserError) as err:
        Store.open_read(tmp_path / "scores").part_files("nll")
    assert err.value.exit_code == Exit.INTEGRITY
    summary = score(job(tmp_path, model, None))
    assert summary.quarantined > 0 and 0 < sum(summary.models.values()) < 29
    assert identify(str(model))[0] == Store.open_read(tmp_path / "scores").header.aligned


def test_shards_together_are_the_whole_run_in_any_order(tmp_path: Path, model: Path, ensemble: Path) -> None:
    score(job(tmp_path, model, ensemble))
    whole = Store.open_read(tmp_path / "scores").evidence_digest()
    kept = manifest(tmp_path)
    shared_out = tmp_path / "sharded"
    lefts = []
    for number in (3, 1, 2):
        summary = score(job(tmp_path, model, ensemble, store=shared_out, shard=Shard(number, 3)))
        computed = sum(summary.models.values())
        assert 0 < computed < 3 * 29
        lefts.append((summary.left, computed))
    assert [left for left, _ in lefts] == [3 * 29 - lefts[0][1], lefts[2][1], 0]
    assert sum(computed for _, computed in lefts) == 3 * 29
    assert Store.open_read(shared_out).evidence_digest() == whole
    assert build_manifest(Store.open_read(shared_out), Choice(n=7, min_answer_tokens=1), tmp_path)[0].to_bytes() == kept


def test_shards_of_folders_that_were_copied_together_are_the_whole_run(tmp_path: Path, model: Path,
                                                                       ensemble: Path) -> None:
    score(job(tmp_path, model, ensemble))
    kept = manifest(tmp_path)
    for number in (1, 2):
        score(job(tmp_path, model, ensemble, store=tmp_path / f"s{number}", shard=Shard(number, 2)))
    for name in ("parts", "ledger", "models"):
        shutil.copytree(tmp_path / "s2" / name, tmp_path / "s1" / name, dirs_exist_ok=True)
    assert not verify_store(tmp_path / "s1").problems
    merged, whole = (Store.open_read(tmp_path / name) for name in ("s1", "scores"))
    assert merged.evidence_digest() == whole.evidence_digest()
    assert build_manifest(merged, Choice(n=7, min_answer_tokens=1), tmp_path)[0].to_bytes() == kept
    assert score(job(tmp_path, model, ensemble, store=tmp_path / "s1")).models == {}


def test_every_chunk_is_in_exactly_one_shard() -> None:
    for n in (1, 2, 7):
        takers = [[i for i in range(1, n + 1) if Shard(i, n).takes("m", [f"{k}", "x"])] for k in range(60)]
        assert all(len(found) == 1 for found in takers) and {found[0] for found in takers} == set(range(1, n + 1))
    assert Shard(2, 7).takes("m", ["a", "b"]) == Shard(2, 7).takes("m", ["b", "a"])
    assert Shard.parse("2/7") == Shard(2, 7)


def test_a_share_may_be_empty_and_that_is_said(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        score(job(tmp_path, model, None, rows=3, store=tmp_path / f"s{number}", shard=Shard(number, 2)), Fake())
    assert capsys.readouterr().err.count("Nothing falls to shard") == 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/", "-1/4", "1/4/2", "a/b"])
def test_a_shard_is_a_number_of_a_number(text: str) -> None:
    with pytest.raises(UserError, match="form i/n"):
        Shard.parse(text)


# Several corpora in one store


def corpora(tmp_path: Path, **rows: list) -> dict[str, object]:
    for name, some in rows.items():
        (tmp_path / name).mkdir(exist_ok=True)
        write_rows(tmp_path / name / "pool.jsonl", some)
    return {name: open_corpus(str(tmp_path / name / "pool.jsonl")) for name in rows}


@pytest.mark.parametrize("order", ["xy", "yx"])
def test_corpora_of_one_name_that_share_rows_are_each_whole(tmp_path: Path, model: Path, order: str) -> None:
    shared = tiny_rows(7, "x")
    read = corpora(tmp_path, x=shared, y=[*tiny_rows(5, "y"), *shared[:3]])
    asked = job(tmp_path, model, None, corpora=[read[name] for name in order])
    summary = score(asked, Fake())
    assert summary.counts == {"ok": 12, "duplicate": 3} and summary.n_rows == 15
    score(asked, Fake())
    store = Store.open_read(tmp_path / "scores")
    assert [c.label for c in store.plan.corpora] == [f"{name}/pool.jsonl" for name in order]
    for name, n in (("x", 7), ("y", 8)):
        planned = planned_corpus(store, f"{name}/pool.jsonl")
        found = connect(store, 0.1, None).execute("SELECT count(*) FROM corpora WHERE key = ?", [planned.key])
        assert planned.n_rows == n and found.fetchone() == (n,)
    with pytest.raises(UserError, match=r"several corpora: ./pool\.jsonl .*; ./pool\.jsonl "):
        planned_corpus(store, None)


def test_a_corpus_scored_again_from_another_place_is_named_there_and_computes_nothing(tmp_path: Path,
                                                                                      model: Path) -> None:
    score(job(tmp_path, model, None))
    before = Store.open_read(tmp_path / "scores").evidence_digest()
    (tmp_path / "elsewhere").mkdir()
    path = (tmp_path / "pool.jsonl").rename(tmp_path / "elsewhere" / "pool.jsonl")
    asked = {"choice": Choice("interleaving", n=2, min_answer_tokens=1), "root": tmp_path}
    with pytest.raises(UserError, match="is not there any more"):
        build_manifest(Store.open_read(tmp_path / "scores"), **asked)
    assert score(job(tmp_path, model, None, corpora=[open_corpus(str(path))])).models == {}
    store = Store.open_read(tmp_path / "scores")
    assert len(store.plan.corpora) == 1 and store.evidence_digest() == before
    assert build_manifest(store, **asked)[0].sources["safe"].name == "elsewhere/pool.jsonl"


def test_corpora_that_come_later_leave_earlier_ones_and_their_failures_alone(tmp_path: Path, model: Path) -> None:
    read = corpora(tmp_path, x=tiny_rows(7, "x"), y=tiny_rows(5, "y"))
    bad = [row.id for row in tiny_rows(7, "x")[:6]]
    score(job(tmp_path, model, None, corpora=[read["x"]], max_failures=1.0), Fake(*bad))
    summary = score(job(tmp_path, model, None, corpora=[read["y"]]), Fake())
    assert summary.counts == {"ok": 5} and summary.models == {"tiny": 5}
    read = corpora(tmp_path, y=tiny_rows(6, "y"))
    score(job(tmp_path, model, None, corpora=[read["y"]]), Fake())
    store = Store.open_read(tmp_path / "scores")
    assert [(c.label, c.n_rows) for c in store.plan.corpora] == [("pool.jsonl", 7), ("y/pool.jsonl", 6)]
    assert planned_corpus(store, "pool.jsonl") == planned_corpus(store, "x/pool.jsonl") == store.plan.corpora[0]
    assert planned_corpus(store, str(tmp_path / "y" / "pool.jsonl")) == store.plan.corpora[1]


@pytest.mark.parametrize(("place", "others", "label"), [
    ("/a/x/pool.jsonl", [], "pool.jsonl"), ("/a/x/pool.jsonl", ["/a/y/pool.jsonl"], "x/pool.jsonl"),
    ("/a/x/pool.jsonl", ["/b/x/pool.jsonl", "pool.jsonl"], "a/x/pool.jsonl"), ("/p", ["/p", "/a/p"], "/p"),
    ("s3://b/pool.jsonl", ["/c/pool.jsonl"], "b/pool.jsonl"), ("/a/pool.jsonl", ["/a/whirlpool.jsonl"], "pool.jsonl")])
def test_the_shortest_tail_tells_places_apart(place: str, others: list[str], label: str) -> None:
    assert told_apart(place, others) == label


@pytest.mark.parametrize(("data", "said"), [
    (b"", "of 0 rows read, 0 were filtered out and 0 rejected"), (b'{"prompt": 7}\n', "of 1 rows read, .* and 1 rej")])
def test_a_corpus_without_a_row_is_bad_data(tmp_path: Path, model: Path, data: bytes, said: str) -> None:
    (tmp_path / "pool.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=f"pool.jsonl holds no row to score: {said}") as err:
        score(job(tmp_path, model, None, max_bad=1.0), Fake())
    assert err.value.exit_code == Exit.BAD_DATA


# Less than everything, and again


def test_a_limit_bounds_reading_and_computing(tmp_path: Path, model: Path, ensemble: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    class Stopped(Here):
        def results(self, work: Work) -> Iterator[tuple[Chunk, list[AnswerNll]]]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(job(tmp_path, model, ensemble), Stopped())
    assert [m.left for m in status(tmp_path / "scores").models] == [29] * 3
    path = tmp_path / "pool.jsonl"
    path.write_bytes(path.read_bytes() + b"no JSON")
    few, fake = job(tmp_path, model, None, sampling=Sampling(limit=2)), Fake()
    wanted = {row.id for row in tiny_rows(29, "pool")[:2]}
    whole = [ids for ids, _ in cuts(Store.open_read(tmp_path / "scores"))]
    n_whole = sum(len(ids) for ids in whole if wanted & {*ids})
    assert estimate(few).to_compute == {"tiny": n_whole}
    summary = score(few, fake)
    assert {chunk.ids for chunk in fake.chunks} == {ids for ids in whole if wanted & {*ids}} and n_whole <= 10
    assert summary.counts == {"ok": 2} and summary.n_rows == 2 and summary.models == {"tiny": n_whole}
    assert f"{n_whole - 2} more rows of the store come along" in capsys.readouterr().err
    assert [(m.name, m.left) for m in status(tmp_path / "scores").models] == [("tiny", 0), ("m0", None), ("m1", None)]


def test_limit_and_sample_are_two_ways() -> None:
    with pytest.raises(UserError, match="--limit and --sample were both given"):
        Sampling(limit=3, sample=8)


def test_scoring_stops_as_soon_as_too_many_rows_have_failed(tmp_path: Path, model: Path) -> None:
    whole = score(job(tmp_path, model, None, store=tmp_path / "all"), fake := Fake())
    assert whole.counts == {"ok": 29}
    bad = [chunk.ids[0] for chunk in fake.chunks]
    with pytest.raises(UserError, match=r"3 rows \(10.3%\) gave no finite number") as err:
        score(job(tmp_path, model, None, max_failures=0.1), fake := Fake(*bad))
    assert err.value.exit_code == Exit.FAILURE_RATE and len(fake.chunks) == 3
    with pytest.raises(UserError, match="3 rows"):
        score(job(tmp_path, model, None, max_failures=0.1), fake := Fake())
    assert fake.chunks == []
    assert score(job(tmp_path, model, None, max_failures=0.11), Fake()).counts == {"ok": 26, "nonfinite": 3}


@pytest.mark.parametrize("compacted", [False, True])
def test_what_failed_once_can_be_scored_again(tmp_path: Path, model: Path, compacted: bool,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    score(job(tmp_path, model, None, store=tmp_path / "clean"), clean := Fake())
    score(job(tmp_path, model, None, max_failures=1.0), Fake(clean.chunks[1].ids[2], clean.chunks[4].ids[0]))
    if compacted:
        monkeypatch.setattr(compaction, "FEWEST", 2)
        compaction.compact(tmp_path / "scores")
    fake = Fake()
    assert score(job(tmp_path, model, None, max_failures=1.0), fake).counts["nonfinite"] == 2
    assert fake.chunks == [] and estimate(job(tmp_path, model, None, retry_failed=True)).to_compute == {"tiny": 10}
    summary = score(job(tmp_path, model, None, retry_failed=True), fake)
    assert fake.chunks == [clean.chunks[1], clean.chunks[4]] and summary.counts == {"ok": 29}
    store, undisturbed = (Store.open_read(tmp_path / name) for name in ("scores", "clean"))
    assert Store.audit(tmp_path / "scores")[0] == [] and store.n_scored(store.header.aligned.id) == 29
    assert compacted or store.evidence_digest() == undisturbed.evidence_digest()
    assert len(list((tmp_path / "scores" / "quarantine").glob("nll-*.parquet"))) == (1 if compacted else 2)


def test_reading_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "SHOWN_EVERY", 4)
    corpus = open_corpus(str(write_rows(tmp_path / "pool.jsonl", tiny_rows(29, "pool"))))
    assert [intake._n_rows(corpus, limit) for limit in (None, 7, 99)] == [29, 7, 29]
    reading, bar, seen = intake.Reading(), Progress("Reading", None, "rows"), []
    for _ in intake._watched(intake.read_source(corpus.source, corpus.folder, reading), reading, bar):
        seen.append(bar.done)
    assert sorted({*seen}) == [0, 4, 8, 12, 16, 20, 24, 28] and bar.done == 29
    assert bar.line().startswith("Reading: 29 rows, ")
