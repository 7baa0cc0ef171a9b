"""Merging parts changes how many files there are, and nothing that can be read from them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import curate.compact as compaction
from curate.chunks import missing_chunks
from curate.cli import main
from curate.compact import Compaction, compact, merges
from curate.core.errors import Exit, UserError
from curate.ledger import Entry, Ledger
from curate.query import connect
from curate.select import Choice, build_manifest
from curate.storage import LocalStorage
from curate.store import Store
from tests.curate.evidence import BASE, MEDICAL, SCORED, WANTED, examples, header, nll, scatter

ROWS = "SELECT example_id, model_id, nll_sum, n_tokens FROM nll ORDER BY ALL"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge two or three parts of one row, of which a store of five rows has five for each model."""
    monkeypatch.setattr(compaction, "FEWEST", 2)
    monkeypatch.setattr(compaction, "PART_ROWS", 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    scatter(tmp_path / "s")
    return tmp_path / "s"


def names(path: Path, folder: str) -> set[str]:
    return {p.name for p in (path / folder).glob("nll-*")}


def rows(place: Path | str) -> list[tuple[object, ...]]:
    return connect(Store.open_read(place), 0.1, None).execute(ROWS).fetchall()


def entry(model: str, number: int, n_rows: int, replaces: Collection[tuple[str, str]] = ()) -> Entry:
    slot = "nll-merged-000001" if replaces else f"nll-{number:024x}"
    return Entry.of(slot, f"{model} {number}".encode(), n_rows, model, tuple(replaces))


def test_nothing_but_the_number_of_parts_changes(path: Path, tmp_path: Path) -> None:
    before, digest = rows(path), Store.open_read(path).evidence_digest()
    manifest = build_manifest(Store.open_read(path), Choice(n=2, min_answer_tokens=1), tmp_path)[0].to_bytes()
    plain = names(path, "parts")
    assert len(before) == len(plain) == 10
    assert compact(path) == Compaction(10, 4, 0)
    store = Store.open_read(path)
    assert rows(path) == before and store.evidence_digest() == digest
    assert build_manifest(store, Choice(n=2, min_answer_tokens=1), tmp_path)[0].to_bytes() == manifest
    assert all(store.scored_ids(who.id) == WANTED and store.n_scored(who.id) == 5 for who in SCORED)
    assert [missing_chunks(store, who.id) for who in SCORED] == [[], []]
    assert store.writes() == [w for w in store.writes() if w[2] != "nll"], "merging is no scoring: it has no rate"
    assert Store.audit(path)[0] == [] and plain < names(path, "parts")
    assert compact(path) == Compaction(4, 4, 10)
    assert len(names(path, "parts") | plain) == 14 and len(names(path, "ledger")) == len(names(path, "parts")) == 4
    scatter(path)
    assert rows(path) == before and Store.audit(path)[0] == [] and not list((path / "quarantine").iterdir())


def test_the_next_writer_clears_away_what_was_replaced(path: Path) -> None:
    compact(path)
    scatter(path)
    assert len(names(path, "parts")) == len(names(path, "ledger")) == 4


def test_a_reader_that_began_before_goes_on(path: Path) -> None:
    before = rows(path)
    early, late = Store.open_read(path), Store.open_read(path)
    connection = connect(early, 0.1, None)
    compact(path)
    assert connection.execute(ROWS).fetchall() == before
    compact(path)
    assert connect(late, 0.1, None).execute(ROWS).fetchall() == before
    assert late.evidence_digest() == Store.open_read(path).evidence_digest()


def test_entries_that_vanish_while_they_are_read_are_found_merged(path: Path) -> None:
    class Compacted(LocalStorage):
        """Is compacted between its listing and the reading of what was listed."""

        def get_many(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
            if len(names) > 4:
                compact(path)
                compact(path)
            return super().get_many(names)

    ledger = Ledger.load(Compacted(path))
    assert sum(e.rows for e in ledger.select("nll")) == 10 and len(ledger.select("nll")) == 4
    assert ledger.damage(deep=True) == []


def test_parts_that_vanish_between_the_check_and_the_reading_are_found_merged(path: Path) -> None:
    before = rows(path)

    class Swept(LocalStorage):
        """Is compacted before the files of checked parts are looked up."""

        looked = 0

        def files(self, wanted: Mapping[str, str]) -> dict[str, Path]:
            self.looked += 1
            if self.looked == 2:
                compact(path)
                compact(path)
            return super().files(wanted)

    store = Store.open_read(path)
    store.storage = store._ledger.storage = Swept(path)
    found = {i for file in store.part_files("nll") for i in pq.read_table(file)["nll_sum"].to_pylist()}
    assert found == {row[2] for row in before} and store.storage.looked > 2


def test_only_many_small_parts_of_one_model_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "PART_ROWS", 20)
    monkeypatch.setattr(compaction, "FEWEST", 3)
    one = [entry("a", k, 6) for k in range(7)]
    found = merges([*one, entry("a", 7, 7), entry("b", 1, 2), entry("b", 2, 2), Entry.of("examples-000001", b"x", 5),
                    entry("a", 8, 6, [("nll-" + "0" * 24, "0" * 64)])])
    assert [len(group) for group in found] == [3, 3] and all(e in one for group in found for e in group)


def test_an_older_entry_has_the_bytes_it_always_had() -> None:
    assert b"replaces" not in entry("a", 1, 2).to_bytes()
    merged = entry("a", 1, 2, [("nll-" + "0" * 24, "0" * 64)])
    assert Entry.from_bytes(merged.slot, merged.to_bytes()) == merged
    stray = merged.model_copy(update={"slot": "nll-" + "1" * 24})
    with pytest.raises(ValueError, match="only a merged part"):
        Entry.from_bytes(stray.slot, stray.to_bytes())


@pytest.mark.parametrize("how", ["flip", "cut"])
@pytest.mark.parametrize("swept", [False, True], ids=["replaced parts there", "swept"])
def test_damage_to_what_was_merged_is_noticed_and_mended(tmp_path: Path, path: Path, how: str, swept: bool) -> None:
    before, digest, dice = rows(path), Store.open_read(path).evidence_digest(), random.Random(how)
    plain = names(path, "parts") | names(path, "ledger")
    compact(path)
    if swept:
        compact(path)
    targets = [p.relative_to(path) for folder in ("parts", "ledger") for p in sorted((path / folder).glob("nll-*"))
               if p.name not in plain]
    assert len(targets) == 8
    for number in range(6):
        store = tmp_path / str(number)
        shutil.copytree(path, store)
        target = store / dice.choice(targets)
        data = bytearray(target.read_bytes())
        if how == "flip":
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        else:
            del data[dice.randrange(len(data)):]
        target.write_bytes(data)
        with pytest.raises(UserError, match=r"is damaged: (parts|ledger)/nll-") as caught:
            rows(store)
        assert caught.value.exit_code == Exit.INTEGRITY
        with Store.create_or_open(store, header()) as opened:
            assert opened.quarantined == [str(target.relative_to(store))]
            left = sum(len(WANTED - opened.scored_ids(who.id)) for who in SCORED)
        assert left in ((2, 3) if swept else (0,)), "what was replaced counts again while it is there"
        scatter(store)
        assert rows(store) == before and Store.open_read(store).evidence_digest() == digest
        assert Store.audit(store)[0] == []


def test_of_two_that_merge_the_same_rows_the_later_one_does_not_count(path: Path) -> None:
    compact(path)
    ledger = Ledger.load(LocalStorage(path))
    first = min((e for e in ledger.entries.values() if e.replaces), key=lambda e: e.slot)
    data = (path / first.path).read_bytes()
    again = Entry.of("nll-merged-000009", data, first.rows, first.model_id, first.replaces)
    (path / "ledger" / f"{again.slot}.json").write_bytes(again.to_bytes())
    assert [f.problem for f in Ledger.load(LocalStorage(path)).torn] == ["another merged part holds some of its rows"]
    before = sum(e.rows for e in ledger.select("nll"))
    with Store.create_or_open(path, header()) as store:
        assert store.quarantined == ["ledger/nll-merged-000009.json"]
        assert sum(store.n_scored(who.id) for who in SCORED) == before == 10


def test_writers_of_an_object_store_are_kept_apart(bucket: str) -> None:
    scatter(bucket)
    before = rows(bucket)
    late = Store.create_or_open(bucket, header())
    stale = Store.create_or_open(bucket, header())
    late._scored = (BASE.id, set())
    assert compact(bucket) == Compaction(10, 4, 0)
    assert compact(bucket) == Compaction(4, 4, 10)
    late.put_nll(BASE.id, nll(BASE, {"a": 9.0}))  # computed before, stored after its slot was freed
    groups = merges(stale.entries())
    assert len(groups) == 4 and [stale.merge_nll(group) for group in groups] == [False] * 4
    assert merges(stale.entries()) == []
    assert rows(bucket) == before and Store.audit(bucket)[0] == []
    assert compact(bucket) == Compaction(4, 4, 0)


def test_the_command_says_what_became_of_the_parts(path: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(main, ["compact", str(path)], catch_exceptions=False)
    assert "10 parts of scores are now 4; 0 replaced" in said.stdout and "next `curate score`" in said.stderr
    said = CliRunner().invoke(main, ["compact", str(path), "--json"], catch_exceptions=False)
    assert said.stdout.split() == ["{", '"before":', "4,", '"after":', "4,", '"removed":', "10", "}"]
    with pytest.raises(UserError, match="There is no store"):
        compact(tmp_path / "nowhere")
    with Store.create_or_open(path, header()) as store, pytest.raises(UserError) as caught:
        store.put_examples(examples("f"))
        compact(path)
    assert caught.value.exit_code == Exit.LOCKED and MEDICAL in SCORED
