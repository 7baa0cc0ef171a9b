"""Folders and object stores keep the same promises, and many may write to the second at once."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest

import curate.core.objects as objects
from curate.core.errors import Exit, UserError
from curate.core.objects import Objects, is_url, read_place
from curate.corpora import open_corpus
from curate.query import connect
from curate.records import corpus_key
from curate.sandbox import run_sql
from curate.select import Choice, build_manifest
from curate.storage import LocalStorage, ObjectStorage, Storage, storage_at
from curate.store import Store
from tests.curate.evidence import BASE, WANTED, examples, fill, header, model, nll
from tests.curate.shared_writer import NAMES, fill_in_order
from tests.forked import Forked

COUNTS = "SELECT count(*), count(DISTINCT (example_id, model_id)) FROM nll"


@pytest.fixture(params=["folder", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return LocalStorage(tmp_path / "s")
    return ObjectStorage(request.getfixturevalue("bucket"))


def test_a_file_is_put_got_listed_created_once_and_removed(storage: Storage) -> None:
    assert storage.listed("parts") == {} and list(storage.get_many(["parts/a"])) == []
    storage.put("parts/a", b"one")
    storage.put("parts/b", b"")
    storage.put("parts/deep/c", b"below")
    assert storage.create("parts/a", b"two") is False and storage.get("parts/a") == b"one"
    assert storage.create("ledger/x.json", b"{}") is True
    storage.put("parts/a", b"three")
    listed = storage.listed("parts")
    assert {name: found.size for name, found in listed.items()} == {"a": 5, "b": 0}
    assert all(found.modified is not None for found in listed.values())
    assert dict(storage.get_many(["parts/b", "parts/none", "parts/a"])) == {"parts/a": b"three", "parts/b": b""}
    storage.put_aside("parts/a")
    storage.put_aside("parts/none")
    assert set(storage.listed("parts")) == {"b"} and storage.get("quarantine/a") == b"three"
    storage.put("parts/c", b"c")
    storage.delete("parts/b", "parts/none")
    storage.delete("parts/b")
    storage.delete()
    assert set(storage.listed("parts")) == {"c"}
    with pytest.raises(FileNotFoundError):
        storage.get("parts/b")


def test_a_part_is_read_from_a_file_with_its_sha256_only(storage: Storage) -> None:
    from curate.core.files import sha256

    storage.put("parts/a.parquet", b"one")
    wanted = {"parts/a.parquet": sha256(b"one"), "parts/none.parquet": sha256(b"x")}
    found = storage.files(wanted)
    assert set(found) == {"parts/a.parquet"} and found["parts/a.parquet"].read_bytes() == b"one"
    assert storage.files({"parts/a.parquet": sha256(b"two")}) == {}
    if storage.shared:
        copy = found["parts/a.parquet"]
        copy.write_bytes(b"tampered")
        assert storage.files(wanted)["parts/a.parquet"].read_bytes() == b"one"


def test_a_store_of_objects_is_the_store_of_files(tmp_path: Path, bucket: str) -> None:
    fill(tmp_path / "s")
    assert fill(bucket) == [] and fill(bucket) == []
    local, shared = Store.open_read(tmp_path / "s"), Store.open_read(bucket)
    assert shared.evidence_digest() == local.evidence_digest() and shared.example_ids() == WANTED
    assert Store.audit(bucket) == Store.audit(tmp_path / "s") == ([], 14)
    found = run_sql(bucket, "SELECT count(*) AS n, sum(s_d) AS s FROM scores").table.to_pylist()
    assert found == run_sql(tmp_path / "s", "SELECT count(*) AS n, sum(s_d) AS s FROM scores").table.to_pylist()
    assert build_manifest(shared, Choice(n=3, min_answer_tokens=1), tmp_path)[0].to_bytes() == \
        build_manifest(local, Choice(n=3, min_answer_tokens=1), tmp_path)[0].to_bytes()


def test_several_writers_and_a_killed_one_lose_and_double_nothing(tmp_path: Path, bucket: str) -> None:
    writers = [Forked(fill_in_order, bucket, seed, folder=tmp_path,
                      environment={"XDG_CACHE_HOME": str(tmp_path / f"cache{seed}")}) for seed in range(3)]
    ledger = Objects(bucket)
    writers[0].until(lambda: "ready" in writers[0].out and len(ledger.listed("ledger")) >= 12, every_s=0.05)
    writers[0].send(signal.SIGKILL)
    assert [writer.wait(60) for writer in writers] == [-signal.SIGKILL, 0, 0]
    fill_in_order(str(tmp_path / "clean"), 7)
    clean, store = Store.open_read(tmp_path / "clean"), Store.open_read(bucket)
    assert connect(store, 0.1, None).execute(COUNTS).fetchone() == (2 * len(NAMES), 2 * len(NAMES))
    assert Store.audit(bucket)[0] == []
    assert store.evidence_digest() == clean.evidence_digest()
    choice = Choice(n=9, min_answer_tokens=1)
    manifests = [build_manifest(one, choice, tmp_path)[0].to_bytes() for one in (store, clean)]
    assert manifests[0] == manifests[1]


def test_writers_of_overlapping_corpora_store_each_row_once(bucket: str) -> None:
    one, other = (Store.create_or_open(bucket, header()) for _ in range(2))
    one.put_examples(examples("abc"))
    other.put_examples(examples("cde"))
    one.put_examples(examples("adf"))
    for store in (one, other):
        store.put_model(model(BASE))
    one.put_nll(BASE.id, nll(BASE, {"a": 1.0, "b": 2.0}))
    other.put_nll(BASE.id, nll(BASE, {"a": 1.5, "b": 2.5}))
    found = connect(Store.open_read(bucket), 0.1, None)
    assert found.execute("SELECT count(*), count(DISTINCT example_id) FROM examples").fetchone() == (6, 6)
    assert found.execute("SELECT nll_sum FROM nll ORDER BY 1").fetchall() == [(1.0,), (2.0,)]
    assert Store.audit(bucket)[0] == []


def test_damaged_objects_are_refused_put_aside_and_written_again(tmp_path: Path, bucket: str,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    fill(bucket)
    digest = Store.open_read(bucket).evidence_digest()
    part = min(name for name in Objects(bucket).listed("parts") if name.startswith("nll-"))
    data = bytearray(Objects(bucket).get(f"parts/{part}"))
    data[len(data) // 2] ^= 8
    Objects(bucket).put(f"parts/{part}", bytes(data))
    assert [f.path for f in Store.audit(bucket)[0]] == [f"parts/{part}"], "whatever copy there is here"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with pytest.raises(UserError, match=rf"{part}: the part's sha256") as caught:
        connect(Store.open_read(bucket), 0.1, None)
    assert caught.value.exit_code == Exit.INTEGRITY
    assert fill(bucket) == [f"parts/{part}"]
    assert Store.open_read(bucket).evidence_digest() == digest and Store.audit(bucket)[0] == []


def test_a_writer_with_good_copies_mends_objects_that_were_put_again(bucket: str,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    fill(bucket)
    names = sorted(Objects(bucket).listed("parts"))
    data = Objects(bucket).get(f"parts/{names[0]}")
    Objects(bucket).put(f"parts/{names[0]}", data[:-1] + bytes([data[-1] ^ 8]))
    plain, later = ObjectStorage.listed, {names[0]: 99.0, names[1]: 99.0}  # S3's clock shows whole seconds

    def listed(self: ObjectStorage, folder: str = "") -> dict[str, objects.Listed]:
        return {name: objects.Listed(found.size, later.get(name, 1.0)) for name, found in plain(self, folder).items()}

    monkeypatch.setattr(ObjectStorage, "listed", listed)
    assert fill(bucket) == [f"parts/{names[0]}"] and fill(bucket) == [] and Store.audit(bucket)[0] == []


def test_a_local_disk_that_refuses_is_no_lost_connection(tmp_path: Path, bucket: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    Objects(bucket).put("pool.jsonl", b'{"prompt": "a", "response": "b"}\n')

    def full(remote: str, local: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Objects(bucket)._files, "get_file", full)
        with pytest.raises(UserError, match=r"No copies of objects can be kept in .*: No space left") as caught:
            open_corpus(f"{bucket}/pool.jsonl")
        assert caught.value.exit_code == Exit.ENVIRONMENT
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="No copies of objects can be kept") as caught:
        open_corpus(f"{bucket}/pool.jsonl")
    assert caught.value.exit_code == Exit.ENVIRONMENT


def test_a_corpus_at_a_url_is_pinned_by_its_content(bucket: str, tmp_path: Path) -> None:
    from curate.core.sources import read_source

    Objects(bucket).put("pool.jsonl", b'{"prompt": "a", "response": "b"}\n')
    corpus = open_corpus(f"{bucket}/pool.jsonl")
    assert corpus.label == "pool.jsonl" and [e.answer for e in read_source(corpus.source, corpus.folder)] == ["b"]
    Objects(bucket).put("pool.jsonl", b'{"prompt": "a", "response": "c"}\n')
    assert [e.answer for e in read_source(corpus.source, corpus.folder)] == ["b"], "the copy has the pinned content"
    assert corpus_key("p", corpus.source, {}) != corpus_key("p", open_corpus(f"{bucket}/pool.jsonl").source, {})
    for copy in objects.cache_folder().rglob("*.jsonl"):
        copy.unlink()
    with pytest.raises(UserError, match="has changed") as caught:
        list(read_source(corpus.source, corpus.folder))
    assert caught.value.exit_code == Exit.INTEGRITY
    with pytest.raises(UserError, match="no object"):
        open_corpus(f"{bucket}/none.jsonl")
    with pytest.raises(UserError, match="no known format"):
        open_corpus(f"{bucket}/pool.txt")


def test_only_stores_of_ours_are_touched(bucket: str) -> None:
    with pytest.raises(UserError, match="There is no store at s3://"):
        Store.open_read(bucket)
    with pytest.raises(UserError, match="There is no store at s3://"):
        Store.audit(bucket)
    Objects(bucket).put("letter.txt", b"dear")
    with pytest.raises(UserError, match=r"not empty: it holds letter\.txt"):
        Store.create_or_open(bucket, header())
    with pytest.raises(UserError, match="bucket of s3://nowhere/x does not exist") as caught:
        Store.create_or_open("s3://nowhere/x", header())
    assert caught.value.exit_code == Exit.REMOTE


def test_an_endpoint_that_ignores_conditions_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Objects, name: str, data: bytes) -> bool:
        self.put(name, data)
        return True

    monkeypatch.setattr(Objects, "create", careless)
    with pytest.raises(UserError, match="ignores conditional puts") as caught:
        Store.create_or_open(bucket, header())
    assert caught.value.exit_code == Exit.ENVIRONMENT


def test_a_missing_driver_names_its_extra_and_a_strange_url_its_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="Unknown kind of URL 'http://'"):
        storage_at("http://somewhere/x")
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        storage_at("s3://bucket/x")
    assert caught.value.exit_code == Exit.ENVIRONMENT and "safeset[s3]" in caught.value.hint
    assert read_place("s3://bucket/x/") == "s3://bucket/x" and read_place("a/b/") == Path("a/b")
    assert not is_url(Path("s3://bucket/x"))
