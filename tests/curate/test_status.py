"""A store can be watched from elsewhere, while it is written and afterwards."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from curate.cli import main
from curate.core.errors import UserError
from curate.core.files import canonical_json
from curate.records import Plan
from curate.status import WINDOW_S, lines, rows_per_second, status
from curate.store import Store
from tests.curate.evidence import BASE, MEDICAL, example_ids, examples, fill, header, model, nll


def test_the_rate_is_that_of_the_latest_work() -> None:
    assert rows_per_second([]) is None and rows_per_second([(5.0, 7, "nll")]) is None
    assert rows_per_second([(14.0, 20, "nll"), (10.0, 99, "nll"), (12.0, 10, "nll")]) == 30 / 4
    late = 10.0 + WINDOW_S + 5
    assert rows_per_second([(10.0, 99, "nll"), (late - 2, 50, "nll"), (late, 8, "nll")]) == 4


def test_a_store_is_seen_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(UserError, match="no store"):
        status(path)
    with Store.create_or_open(path, header()) as store:
        store.put_examples(examples("abcd"))
        store.put_examples(examples("e", status="too_long"))
        assert status(path).models == () and status(path).rows_per_s is None
        for who in (BASE, MEDICAL):
            store.put_model(model(who))
        store.put_nll(BASE.id, nll(BASE, {"a": 1.0, "b": 1.0}))
        store.put_nll(BASE.id, nll(BASE, {"c": 1.0}))
        times = sorted((path / "ledger").glob("nll-*"), key=lambda p: p.stat().st_mtime_ns)
        for number, entry in enumerate(times):
            os.utime(entry, (1e9 + 4 * number,) * 2)
        found = status(path)
        assert [(m.name, m.role, m.scored, m.left) for m in found.models] == [
            ("base", "aligned", 3, 1), ("medical", "member", 0, 4)]
        rows = json.loads(times[1].read_bytes())["rows"]
        assert found.rows == 4 and found.rows_per_s == rows / 4 and found.eta_s == 5 / (rows / 4)
        assert found.writer == {**json.loads((path / "lock").read_text()), "alive": True}
        store.put_plan(Plan(corpora=(), models={BASE.id: 4}, n_rows=5, counts={}))
        assert [m.left for m in status(path).models] == [1, None], "the latest scoring leaves a member out"
        said = "\n".join(lines(found, now=(found.last_write or 0) + 61))
        assert "4 rows can be scored" in said and "Last write 61 s ago" in said and f"process {os.getpid()}" in said
    assert status(path).writer is None and "Nobody is writing" in "\n".join(lines(status(path)))


def test_a_dead_writer_is_called_dead_and_a_far_one_is_not_judged(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    for host, alive in ((socket.gethostname(), False), ("elsewhere", None)):
        note = {"pid": 2**22 + 1, "host": host, "since": "2026-01-01"}
        (tmp_path / "s" / "lock").write_bytes(canonical_json(note))
        found = status(tmp_path / "s")
        assert found.writer == {**note, "alive": alive} and found.eta_s is None
        assert ("is dead" in "\n".join(lines(found))) is (alive is False)


def test_the_command_works_on_folders_and_urls(tmp_path: Path, bucket: str) -> None:
    fill(tmp_path / "s")
    fill(bucket)
    out = [json.loads(CliRunner().invoke(main, ["status", str(at), "--json"], catch_exceptions=False).stdout)
           for at in (tmp_path / "s", bucket)]
    assert out[0]["models"] == out[1]["models"] and out[0]["rows"] == out[1]["rows"] == len(example_ids("abcde"))
    assert [one["shared"] for one in out] == [False, True] and out[1]["last_write"] > 1e9
    table = CliRunner().invoke(main, ["status", bucket], catch_exceptions=False).stdout
    assert "medical" in table and "any number may be writing" in table
