"""Scoring end to end on a tiny model: every row accounted for, nothing computed twice, nothing lost to a kill."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

import curate.chunks as chunks
import curate.score as scoring
from curate.chunks import Chunk, Shard, Work, encoded_ahead
from curate.core.chat import Encoded, encode
from curate.core.errors import Exit, UserError
from curate.core.example import pair
from curate.core.identity import identify
from curate.core.model import load
from curate.core.nll import AnswerNll
from curate.core.terminal import Progress
from curate.corpora import open_corpus
from curate.query import connect
from curate.score import Sampling, ScoreJob, ensemble_members, score
from curate.select import Choice, build_manifest
from curate.store import Store
from tests.curate.runs import tiny_ensemble, tiny_run
from tests.fakes import tiny_model, tiny_rows, tiny_tokenizer, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("score") / "tiny")


@pytest.fixture(scope="module")
def ensemble(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ensemble(model, tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 13 rows in chunks of 5, so that every test crosses their borders."""
    monkeypatch.setattr(scoring, "PART_ROWS", 13)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 5)


def job(tmp_path: Path, model: Path, ensemble: Path | None, rows: int = 29, **changes: object) -> ScoreJob:
    path = tmp_path / "pool.jsonl"
    if not path.exists():
        write_rows(path, tiny_rows(rows, "pool"))
    members = ensemble_members(ensemble)[1] if ensemble else []
    fields = {"corpora": [open_corpus(str(path))], "store": tmp_path / "scores", "aligned": str(model),
              "members": members, "dtype": "float32", "device": "cpu", "max_tokens": 400}
    return ScoreJob(**(fields | changes))


def manifest(tmp_path: Path, n: int = 7) -> bytes:
    return build_manifest(Store.open_read(tmp_path / "scores"), Choice(n=n), tmp_path)[0].to_bytes()


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
    counted = connect(Store.open_read(tmp_path / "scores"), 0.1, None).execute(
        "SELECT status, count(*) FROM scores GROUP BY 1").fetchall()
    assert counted == [("nonfinite", 29)]
    summary = score(job(tmp_path, model, None, members=[broken], max_failures=1.0))
    assert +summary.counts == {"nonfinite": 29}


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
    assert build_manifest(Store.open_read(shared_out), Choice(n=7), tmp_path)[0].to_bytes() == kept


def test_every_chunk_is_in_exactly_one_shard() -> None:
    for n in (1, 2, 7):
        takers = [[i for i in range(1, n + 1) if Shard(i, n).takes("m", [f"{k}", "x"])] for k in range(60)]
        assert all(len(found) == 1 for found in takers) and {found[0] for found in takers} == set(range(1, n + 1))
    assert Shard(2, 7).takes("m", ["a", "b"]) == Shard(2, 7).takes("m", ["b", "a"])
    assert Shard.parse("2/7") == Shard(2, 7)


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/", "-1/4", "1/4/2", "a/b"])
def test_a_shard_is_a_number_of_a_number(text: str) -> None:
    with pytest.raises(UserError, match="form i/n"):
        Shard.parse(text)
