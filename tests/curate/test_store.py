"""The store keeps what it was given, once, and notices every change to it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from curate.core.errors import Exit, UserError
from curate.parts import NLL_SCHEMA
from curate.query import connect
from curate.records import HEADER_COPY, Plan, ScoredModel, corpus_key
from curate.storage import storage_at
from curate.store import Store
from tests.curate import killed_store
from tests.curate.evidence import (
    BASE,
    KEY,
    MEDICAL,
    MODELS,
    SCORED,
    SECURITY,
    SOURCE,
    WANTED,
    example_ids,
    examples,
    fill,
    header,
    hold,
    identity,
    model,
    nll,
)
from tests.forked import Forked

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the disk: only a power cut could tell the difference."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "s"
    assert fill(path) == []
    return path


def refusal(work: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        work()
    return caught.value


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_what_was_put_comes_back(whole: Path) -> None:
    store = Store.open_read(whole)
    assert store.header == header()
    assert [(m.role, m.name) for m in store.models()] == [
        ("aligned", "base"), ("member", "medical"), ("member", "security")]
    assert store.plan.n_rows == 5 and store.plan.corpora[0].key == KEY
    index = store.example_index()
    assert index.schema == {"example_id": pl.String, "n_prompt_tokens": pl.Int32, "n_answer_tokens": pl.Int32,
                            "status": pl.String}
    assert index["example_id"].to_list() == sorted(WANTED) and set(index["n_answer_tokens"]) == {5}
    assert store.read_examples(example_ids("eab")).select(["prompt", "answer"]).to_pylist() == [
        {"prompt": name, "answer": f"answer {name}"} for name in "eab"]
    assert store.read_examples([]).num_rows == 0
    assert sum(part.num_rows for part in store.example_parts()) == 5
    assert store.statuses([*example_ids("ab"), "stranger"]) == {"ok": 2}
    assert "stranger" in refusal(lambda: store.read_examples(["stranger"])).message
    assert connect(store, 0.0, None).execute("SELECT DISTINCT nll_aligned, s_d FROM scores").fetchall() == [
        (1.0, (1.6 + 1.8) / 2 - 1.0)]


def test_the_same_work_twice_changes_no_byte(whole: Path) -> None:
    before = files(whole)
    assert fill(whole) == []
    assert files(whole) == before
    assert [name for name in before if name.endswith(".tmp") or name.startswith("quarantine")] == []
    assert Store.audit(whole) == ([], 1 + 1 + 3 + 2 + 6 + 1)


def test_rows_that_are_stored_are_not_stored_again(tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "s", header()) as store:
        store.put_examples(examples("abc"))
        store.put_examples(examples("cd"))
        store.put_examples(examples("da"))
        assert len(store.example_index()) == 4
        store.put_model(model(BASE))
        store.put_nll(BASE.id, nll(BASE, {"a": 1.0, "b": 2.0}))
        store.put_nll(BASE.id, nll(BASE, {"b": 7.0, "c": 3.0}))
        assert store.scored_ids(BASE.id) == set(example_ids("abc"))
    rows = connect(Store.open_read(tmp_path / "s"), 0.1, None).execute("SELECT nll_sum FROM nll ORDER BY 1").fetchall()
    assert rows == [(1.0,), (2.0,), (3.0,)]


def test_parts_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    for name, order in (("s", "abc"), ("t", "cab")):
        with Store.create_or_open(tmp_path / name, header()) as store:
            store.put_examples(examples(order))
    assert files(tmp_path / "s") == files(tmp_path / "t")


def test_what_is_missing_is_the_difference_of_ids(tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "s", header()) as store:
        store.put_examples(examples("abcd"))
        store.put_model(model(BASE))
        store.put_nll(BASE.id, nll(BASE, {"c": 1.0, "a": None}, status="nonfinite"))
        assert store.example_ids() - store.scored_ids(BASE.id) == set(example_ids("bd"))
        assert store.example_ids() - store.scored_ids(MEDICAL.id) == set(example_ids("abcd"))
        store.put_nll(BASE.id, nll(BASE, {"b": float("inf"), "d": 1.0}))
        assert store.failed_ids([BASE.id, MEDICAL.id]) == set(example_ids("abc"))


def test_a_corpus_is_replaced_not_added_to(tmp_path: Path) -> None:
    other = corpus_key("demo", SOURCE, {"limit": 3})
    with Store.create_or_open(tmp_path / "s", header()) as store:
        for key, names in ((KEY, "abc"), (other, "a")):
            hold(store, example_ids(names), key)
        for _ in range(2):
            store.put_membership(KEY, example_ids("cd"))
    connection = connect(Store.open_read(tmp_path / "s"), 0.1, None)
    found = connection.execute("SELECT key, example_id FROM corpora").fetchall()
    assert sorted(found) == sorted([(other, *example_ids("a")), *((KEY, i) for i in example_ids("cd"))])
    assert len(list((tmp_path / "s" / "parts").iterdir())) == 2
    assert Store.audit(tmp_path / "s")[0] == []


@pytest.mark.parametrize("wrong", [
    lambda store: store.put_examples(examples("ab").drop_columns(["meta"])),
    lambda store: store.put_examples(examples("ab").append_column("more", pa.array([1, 2]))),
    lambda store: store.put_examples(pa.concat_tables([examples("a"), examples("a")])),
    lambda store: store.put_nll(BASE.id, nll(MEDICAL, {"a": 1.0})),
    lambda store: store.put_nll(MEDICAL.id, nll(MEDICAL, {"a": 1.0})),
    lambda store: store.put_nll(BASE.id, pa.table({**nll(BASE, {"a": 1.0}).to_pydict(), "status": [None]})),
    lambda store: Store.open_read(store.path).put_examples(examples("a")),
])
def test_a_wrong_table_is_a_bug_of_the_caller(tmp_path: Path, wrong: Callable[[Store], object]) -> None:
    with Store.create_or_open(tmp_path / "s", header()) as store:
        store.put_model(model(BASE))
        with pytest.raises(ValueError):
            wrong(store)
        assert not list((tmp_path / "s" / "parts").iterdir())


def test_tables_from_polars_are_cast(tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "s", header()) as store:
        store.put_model(model(BASE))
        frame = pl.from_arrow(nll(BASE, {"a": 1.0}))
        store.put_nll(BASE.id, frame.with_columns(pl.col("n_tokens").cast(int)).to_arrow())
        (part,) = store.part_files("nll", BASE.id)
    assert pa.parquet.read_schema(part).equals(NLL_SCHEMA)


@pytest.mark.parametrize(("changes", "words"), [
    ({"dtype": "bfloat16"}, "dtype 'float32', but now it would be 'bfloat16'"), ({"engine": "other"}, "engine"),
    ({"max_tokens": 8}, "max_tokens 307"), ({"aligned": MEDICAL}, "aligned adapter None")])
def test_numbers_that_cannot_be_compared_are_kept_apart(whole: Path, changes: dict[str, object], words: str) -> None:
    error = refusal(lambda: Store.create_or_open(whole, header(**changes)))
    assert words in error.message and "another --store" in error.hint
    assert error.exit_code == Exit.INCOMPATIBLE
    assert (whole / "lock").read_bytes() == b""


def test_a_model_may_be_called_otherwise(whole: Path) -> None:
    renamed = BASE.model_copy(update={"name": "/elsewhere/base"})
    with Store.create_or_open(whole, header(aligned=renamed)) as store:
        assert store.header.aligned.name == "base"


def test_models_have_one_name_and_one_role(tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "s", header()) as store:
        store.put_model(model(BASE))
        store.put_model(model(MEDICAL))
        store.put_model(model(MEDICAL))
        other = ScoredModel(role="member", name="medical", identity=SECURITY)
        assert "already holds another model called 'medical'" in refusal(lambda: store.put_model(other)).message
        self_member = ScoredModel(role="member", name="m", identity=BASE)
        assert "the aligned model itself" in refusal(lambda: store.put_model(self_member)).message
        strange = ScoredModel(role="aligned", name="x", identity=identity("x"))
        assert refusal(lambda: store.put_model(strange)).exit_code == Exit.INCOMPATIBLE
        assert [m.name for m in store.models()] == ["base", "medical"]


def test_only_folders_of_ours_are_touched(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert "letter.txt" in refusal(lambda: Store.create_or_open(tmp_path, header())).message
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]
    assert "is a file" in refusal(lambda: Store.create_or_open(tmp_path / "letter.txt", header())).message
    assert "no store" in refusal(lambda: Store.open_read(tmp_path)).message
    assert "no store" in refusal(lambda: Store.audit(tmp_path)).message


HOLDER = """
import os, sys, time
from pathlib import Path
from curate.store import Store
from tests.curate.evidence import header
store = Store.create_or_open(Path(sys.argv[1]), header())
worker = os.fork()
if worker == 0:
    time.sleep(60)
    os._exit(0)
print(worker, flush=True)
time.sleep(60)
"""


def test_one_writer_at_a_time_and_a_dead_one_is_no_writer(tmp_path: Path) -> None:
    path = tmp_path / "s"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], env=ENVIRONMENT, stdout=subprocess.PIPE)
    worker = int(holder.stdout.readline())
    try:
        error = refusal(lambda: Store.create_or_open(path, header()))
        assert f"process {holder.pid} on " in error.message and error.exit_code == Exit.LOCKED
        assert Store.open_read(path).example_ids() == set()
        holder.kill()
        holder.wait()
        os.kill(worker, 0)
        with Store.create_or_open(path, header()) as store:
            assert json.loads((path / "lock").read_text())["pid"] == os.getpid()
            assert refusal(lambda: Store.create_or_open(path, header())).exit_code == Exit.LOCKED
            store.put_examples(examples("a"))
    finally:
        holder.stdout.close()
        os.kill(worker, signal.SIGKILL)
    Store.create_or_open(path, header()).close()


def read_all(path: Path) -> None:
    """Rely on everything in a store."""
    connect(Store.open_read(path), 0.1, None)


def missing(path: Path) -> int:
    """Return how many rows of examples and of scores a writer finds missing."""
    with Store.create_or_open(path, header()) as store:
        assert store.quarantined, "nothing was put aside"
        gone = len(WANTED - store.example_ids())
        gone += sum(len(WANTED - store.scored_ids(who.id)) for who in MODELS)
    return gone


def assert_noticed_and_mended(path: Path, whole: Path, again: bool = True) -> None:
    """A reader refuses, a writer finds rows missing, and (``again``) the same work makes the same store."""
    error = refusal(lambda: read_all(path))
    assert error.exit_code == Exit.INTEGRITY and re.search(r"(parts|ledger)/\S+: .*\(1 damaged in all\)", error.message)
    corpus = "corpus-" in error.message
    assert (missing(path) > 0) is not corpus
    if not again:
        return
    assert fill(path) == []
    read_all(path)
    assert Store.audit(path)[0] == []
    assert Store.open_read(path).evidence_digest() == Store.open_read(whole).evidence_digest()


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_no_damage_is_silent(tmp_path: Path, whole: Path, how: str) -> None:
    dice = random.Random(how)
    targets = [p.relative_to(whole) for folder in ("parts", "ledger") for p in sorted((whole / folder).iterdir())]
    for number in range(40 if how == "flip" else 20):
        path = tmp_path / str(number)
        shutil.copytree(whole, path)
        target = path / dice.choice(targets)
        data = bytearray(target.read_bytes())
        if how == "flip":
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        else:
            del data[dice.randrange(len(data)):]
        target.write_bytes(data)
        assert_noticed_and_mended(path, whole, again=number % 8 == 0)
        shutil.rmtree(path)


@pytest.mark.parametrize("kind", ["examples", "nll"])
def test_a_part_that_is_gone_is_missed(tmp_path: Path, whole: Path, kind: str) -> None:
    shutil.copytree(whole, tmp_path / "s")
    part = next((tmp_path / "s" / "parts").glob(f"{kind}-*"))
    part.unlink()
    assert f"{part.name}: the part is missing" in refusal(lambda: read_all(tmp_path / "s")).message
    assert_noticed_and_mended(tmp_path / "s", whole)


def test_a_part_behind_a_link_is_no_part(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "s")
    part = next((tmp_path / "s" / "parts").glob("nll-*"))
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    assert_noticed_and_mended(tmp_path / "s", whole)


@pytest.mark.parametrize("data", [b"", b"{}\n", b"[]\n", b"\xff", b"[" * 100_000])
def test_a_torn_entry_is_damage(tmp_path: Path, whole: Path, data: bytes) -> None:
    shutil.copytree(whole, tmp_path / "s")
    next((tmp_path / "s" / "ledger").glob("nll-*")).write_bytes(data)
    assert_noticed_and_mended(tmp_path / "s", whole)


def test_an_entry_under_another_name_is_damage(tmp_path: Path, whole: Path) -> None:
    shutil.copytree(whole, tmp_path / "s")
    entry = next((tmp_path / "s" / "ledger").glob("nll-*"))
    shutil.copy(entry, entry.with_name("nll-" + "0" * 24 + ".json"))
    assert refusal(lambda: read_all(tmp_path / "s")).exit_code == Exit.INTEGRITY


def test_spoilt_documents_are_put_aside_and_written_anew(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "s"
    shutil.copytree(whole, path)
    spoilt = path / "models" / f"{MEDICAL.id}.json"
    spoilt.write_bytes(spoilt.read_bytes().replace(b'"member"', b'"aligned"'))
    (path / "plan.json").write_bytes(b"{")
    assert refusal(lambda: read_all(path)).exit_code == Exit.INTEGRITY
    assert [f.path for f in Store.audit(path)[0]] == [f"models/{MEDICAL.id}.json", "plan.json"]
    assert sorted(fill(path)) == [f"models/{MEDICAL.id}.json", "plan.json"]
    assert Store.audit(path)[0] == []
    older = type("Older", (Plan,), {"VERSION": 1})
    (path / "plan.json").write_bytes(older(corpora=(), n_rows=0, counts={}).to_bytes())
    assert refusal(lambda: Store.open_read(path).plan).exit_code == Exit.INCOMPATIBLE and fill(path) == ["plan.json"]


@pytest.mark.parametrize("place", ["folder", "objects"])
def test_a_spoilt_header_is_restored_from_its_copy_and_the_other_way_round(
        tmp_path: Path, place: str, request: pytest.FixtureRequest) -> None:
    where = tmp_path / "s" if place == "folder" else request.getfixturevalue("bucket")
    fill(where, SCORED)
    storage = storage_at(where)
    good = storage.get("store.json")
    assert storage.get(HEADER_COPY) == good
    for name in ("store.json", HEADER_COPY):
        storage.put(name, good.replace(b'"version": 1', b'"version": 3'))
        assert storage.get(name) != good
        assert [f.path for f in Store.audit(where)[0]] == [name]
        if name == "store.json":
            refused = refusal(lambda: Store.open_read(where))
            assert refused.exit_code == Exit.INTEGRITY and "curate score" in refused.hint
        assert fill(where, SCORED) == [name]
        assert storage.get("store.json") == storage.get(HEADER_COPY) == good and Store.audit(where)[0] == []
    storage.delete(HEADER_COPY)
    assert Store.audit(where)[0] == [] and fill(where, SCORED) == [] and storage.get(HEADER_COPY) == good
    for name in ("store.json", HEADER_COPY):
        storage.put(name, b"{")
    assert refusal(lambda: Store.create_or_open(where, header())).exit_code == Exit.INTEGRITY
    assert [f.path for f in Store.audit(where)[0]] == [HEADER_COPY, "store.json"]


def test_leftovers_of_a_cut_write_count_for_nothing(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "s"
    shutil.copytree(whole, path)
    leftovers = [path / ".store.json.01234567.tmp", path / "parts" / ".nll-x.parquet.89abcdef.tmp"]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    entry = next((path / "ledger").glob("nll-*"))
    entry.unlink()
    assert all("left behind" in f.problem for f in Store.audit(path)[0]) and len(Store.audit(path)[0]) == 3
    read_all(path)
    assert sum(len(WANTED - Store.open_read(path).scored_ids(who.id)) for who in MODELS) in (2, 3)
    assert fill(path) == []
    assert Store.audit(path)[0] == [] and not any(leftover.exists() for leftover in leftovers)
    assert entry.exists()


def test_an_audit_reads_what_the_parts_say(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Store.create_or_open(path, header()) as store:
        store.put_examples(examples("ab"))
        store.put_model(model(BASE))
        store.put_model(model(MEDICAL))
        store.put_nll(BASE.id, nll(BASE, {"a": 1.0, "stranger": 2.0}))
        store.put_nll(MEDICAL.id, nll(MEDICAL, {"a": 1.0}))
        store._scored = (MEDICAL.id, set())
        store.put_nll(MEDICAL.id, nll(MEDICAL, {"a": 1.0, "b": 2.0}))
    (path / "models" / f"{BASE.id}.json").unlink()
    assert [(f.path, f.problem) for f in Store.audit(path)[0]] == sorted([
        (f"models/{BASE.id}.json", "1 scored rows have no example"),
        (f"models/{BASE.id}.json", "there are scores of this model, but not who it is"),
        (f"models/{MEDICAL.id}.json", "1 rows of nll are there twice")])


def test_the_digest_of_the_evidence_is_that_of_its_parts(tmp_path: Path, whole: Path) -> None:
    digests = {Store.open_read(whole).evidence_digest()}
    with Store.create_or_open(tmp_path / "s", header()) as store:
        for step in (lambda: None, lambda: store.put_examples(examples("abc")), lambda: store.put_model(model(BASE)),
                     lambda: store.put_nll(BASE.id, nll(BASE, {"a": 1.0}))):
            step()
            digests.add(store.evidence_digest())
        store.put_membership(KEY, example_ids("a"))
        store.put_plan(Plan(corpora=(), n_rows=0, counts={}))
        digests.add(store.evidence_digest())
    assert len(digests) == 4


def test_a_kill_at_any_step_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    child = Forked(killed_store.main, tmp_path, folder=tmp_path)
    assert child.wait(240) == 0, child.err[-3000:]
    n_new, n_damaged, n_compacted = map(int, child.out.split())
    assert n_new >= 50 and n_damaged >= 15 and n_compacted >= 30, (n_new, n_damaged, n_compacted)
