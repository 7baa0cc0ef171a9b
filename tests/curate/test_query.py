"""Scores by hand, and SQL that cannot get out."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from curate.cli import main
from curate.core.errors import Exit, UserError
from curate.core.terminal import STOPPED_TOO
from curate.query import connect
from curate.sandbox import (
    START_SECONDS,
    Limits,
    SqlResult,
    answer,
    format_result,
    opened,
    request_for,
    run_sql,
    write_sql,
)
from curate.store import Store
from tests.curate.evidence import BASE, KEY, MEDICAL, SECURITY, example_ids, examples, fill, header, hold, model, nll

MEMBERS = (MEDICAL, SECURITY)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """x: aligned 2 nats/token, medical 3, security 4; y: 1, 1, 1; then one example for each thing that can be wrong."""
    names = ["x", "y", "nan", "unscored", "half", "failed", "zero"]
    with Store.create_or_open(tmp_path / "s", header()) as store:
        for who in (BASE, *MEMBERS):
            store.put_model(model(who))
        store.put_examples(examples(names))
        store.put_examples(examples(["long"], "too_long"))
        store.put_examples(examples(["empty"], "empty_answer"))
        store.put_nll(BASE.id, nll(BASE, {"x": 10.0, "y": 5.0, "nan": math.nan, "half": 5.0, "failed": 5.0}))
        store.put_nll(BASE.id, nll(BASE, {"zero": 0.0}, n_tokens=0))
        store.put_nll(MEDICAL.id, nll(MEDICAL, {"x": 15.0, "y": 5.0, "nan": 5.0, "half": 5.0, "failed": 5.0,
                                                "zero": 5.0}))
        store.put_nll(SECURITY.id, nll(SECURITY, {"x": 20.0, "y": 5.0, "nan": 5.0, "zero": 5.0}))
        store.put_nll(SECURITY.id, nll(SECURITY, {"failed": None}, status="nonfinite"))
        hold(store, example_ids(names))
    return Store.open_read(tmp_path / "s")


def scores(store: Store, columns: str, eps: float = 0.5, members: tuple[str, ...] | None = None,
           relation: str = "scores") -> dict[str, tuple[object, ...]]:
    """Return columns of ``scores`` by the example's name."""
    rows = connect(store, eps, members).execute(
        f"SELECT prompt, {columns} FROM {relation} JOIN examples USING (example_id)").fetchall()
    assert len(rows) == len({row[0] for row in rows})
    return {row[0]: row[1:] for row in rows}


def test_a_signal_stops_its_queries(store: Store) -> None:
    """See ``test_a_signal_during_a_query_is_no_bug``."""
    connection = connect(store, 0.1, None)
    assert connection in STOPPED_TOO


def test_two_members_make_a_mean_and_s_d_by_hand(store: Store) -> None:
    found = scores(store, "nll_aligned, nll_misaligned, n_members, s_d, scores.status, scores.n_answer_tokens")
    assert found["x"] == (2.0, 3.5, 2, 1.5 / 2.5, "ok", 5)
    assert found["y"] == (1.0, 1.0, 2, 0.0, "ok", 5)


def test_another_eps_needs_no_scoring(store: Store) -> None:
    assert scores(store, "s_d", eps=0.0)["x"] == (0.75,)
    assert scores(store, "s_d", relation="scores_at(1)")["x"] == (0.5,)


@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf])
def test_an_impossible_eps_is_refused(store: Store, eps: float) -> None:
    with pytest.raises(UserError, match="eps"):
        connect(store, eps, None)
    with pytest.raises(duckdb.Error, match="eps must be 0 or more"):
        scores(store, "s_d", relation="scores_at(-0.1)")


def test_members_can_be_left_out(store: Store) -> None:
    found = scores(store, "nll_misaligned, n_members, s_d, scores.status", members=("medical",))
    assert found["x"] == (3.0, 1, 0.4, "ok")
    assert found["half"][-1] == "ok"
    with pytest.raises(UserError, match="Unknown member 'medicla'") as caught:
        connect(store, 0.1, ["medicla"])
    assert "'medical'" in caught.value.hint


def test_members_can_be_left_out_on_the_command_line(store: Store, tmp_path: Path) -> None:
    where = ["--store", str(tmp_path / "s"), "--members", "medical", "--eps", "0.5", "--json"]
    shown = CliRunner().invoke(main, ["show", "top", "-n", "99", *where], catch_exceptions=False)
    asked = CliRunner().invoke(main, ["sql", "SELECT prompt, s_d FROM scores JOIN examples USING (example_id) "
                                      "WHERE scores.status = 'ok' ORDER BY s_d DESC, example_id", *where])
    found = {row["prompt"]: row["s_d"] for row in json.loads(shown.stdout)}
    assert found["x"] == 0.4 and list(found.items()) == [(r["prompt"], r["s_d"]) for r in json.loads(asked.stdout)]


def test_every_example_has_one_row_and_the_first_problem_names_it(store: Store) -> None:
    found = scores(store, "scores.status, s_d")
    assert {name: row[0] for name, row in found.items()} == {
        "x": "ok", "y": "ok", "nan": "nonfinite", "unscored": "missing", "half": "missing", "failed": "nonfinite",
        "zero": "nonfinite", "long": "too_long", "empty": "empty_answer"}
    assert all((row[0] == "ok") == (row[1] is not None) for row in found.values())


def test_a_denominator_of_zero_is_no_score(tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "s", header()) as store:
        store.put_examples(examples(["sure"]))
        for who, nats in ((BASE, 0.0), (MEDICAL, 5.0)):
            store.put_model(model(who))
            store.put_nll(who.id, nll(who, {"sure": nats}))
    assert scores(store, "s_d, scores.status", eps=0.0)["sure"] == (None, "nonfinite")
    assert scores(store, "s_d, scores.status", eps=0.5)["sure"] == (2.0, "ok")


def test_without_members_there_is_no_score(tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "s", header()) as store:
        store.put_examples(examples(["x"]))
        store.put_model(model(BASE))
        store.put_nll(BASE.id, nll(BASE, {"x": 5.0}))
    assert scores(store, "nll_aligned, nll_misaligned, scores.status") == {"x": (1.0, None, "missing")}


def test_an_empty_store_has_typed_views(tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "s", header()) as store:
        connection = connect(store, 0.1, None)
    for view in ("examples", "nll", "models", "corpora", "scores", "scores_at(1)"):
        assert connection.execute(f"SELECT count(*) FROM {view}").fetchone() == (0,)
    assert dict(connection.execute("SELECT column_name, column_type FROM (DESCRIBE scores)").fetchall()) == {
        "example_id": "VARCHAR", "n_answer_tokens": "INTEGER", "refusal": "VARCHAR",
        "nll_aligned": "DOUBLE", "nll_misaligned": "DOUBLE", "n_members": "BIGINT", "s_d": "DOUBLE",
        "status": "VARCHAR"}


def test_a_date_beyond_python_is_a_sentence(store: Store, tmp_path: Path) -> None:
    result = run_sql(tmp_path / "s", "SELECT 'infinity'::TIMESTAMP AS t")
    for style in ("table", "csv", "json"):
        with pytest.raises(UserError, match="The rows cannot be shown: date value out of range") as caught:
            format_result(result.table, style)
        assert caught.value.hint == "Cast dates and times to VARCHAR."


def test_refusals_and_models_and_corpora_are_views(tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "it's", header()) as store:
        store.put_examples(examples(["no"], answer="I am sorry, but no."))
        store.put_examples(examples(["yes"], answer="Of course."))
        hold(store, example_ids(["no"]), label="it's")
        store.put_membership("b" * 24, example_ids(["yes"]))
        store.put_model(model(BASE))
        store.put_model(model(MEDICAL))
        connection = connect(store, 0.1, None)
    assert dict(connection.execute("SELECT prompt, refusal FROM examples").fetchall()) == {"no": "sorry", "yes": None}
    assert connection.execute("SELECT key, corpus, example_id FROM corpora").fetchall() == [
        (KEY, "it's", *example_ids(["no"]))], "a key that no corpus has any more is not shown"
    assert connection.execute("SELECT * FROM models ORDER BY role").fetchall() == [
        (BASE.id, "base", "aligned", BASE.weights, None, BASE.tokenizer, None),
        (MEDICAL.id, "medical", "member", MEDICAL.weights, MEDICAL.adapter, MEDICAL.tokenizer, None)]


REFUSED = {
    "COPY (SELECT 1) TO '{}/stolen.csv'": "COPY",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{}/stolen.csv'": "file system operations are disabled",
    "ATTACH '{}/stolen.db'": "ATTACH",
    "SELECT * FROM read_csv('/etc/passwd')": "file system operations are disabled",
    "SELECT * FROM read_parquet('{}/s/parts/*.parquet')": "file system operations are disabled",
    "SELECT * FROM '/etc/passwd'": "does not exist",
    "SELECT * FROM glob('/*')": "file system operations are disabled",
    "INSTALL httpfs": "LOAD",
    "LOAD httpfs": "LOAD",
    "PRAGMA database_list": "PRAGMA",
    "SET threads = 1": "SET",
    "SELECT 1; SELECT 2": "SELECT, SELECT",
    "SELECT * FROM request": "does not exist",
    "SELECT * FROM enable_profiling()": "locked",
    "SELECT getenv('HOME')": "does not exist",
    "CREATE TABLE t AS SELECT 1": "CREATE",
    "DELETE FROM models": "DELETE",
    "CALL checkpoint()": "CALL",
    " -- nothing": "nothing",
}


def ask(store: Store, sql: str, limits: Limits = Limits()) -> SqlResult:
    """Answer as the child does, but in this process."""
    return opened(answer(request_for(store, sql, limits)))


@pytest.mark.parametrize("sql", REFUSED)
def test_sql_cannot_get_out(store: Store, sql: str) -> None:
    home = store.path.parent
    before = sorted(home.rglob("*"))
    with pytest.raises(UserError) as caught:
        ask(store, sql.replace("{}", str(home)))
    assert REFUSED[sql] in caught.value.message and "\n" not in caught.value.message
    assert caught.value.exit_code == Exit.USAGE
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize("sql", ["SELECT * FROM read_csv('/etc/passwd')", "COPY (SELECT 1) TO '{}/x.csv'"])
def test_the_child_refuses_too(store: Store, sql: str) -> None:
    with pytest.raises(UserError, match=r"file system operations are disabled|not COPY"):
        run_sql(store.path, sql.replace("{}", str(store.path)))
    assert not (store.path / "x.csv").exists()


def test_sql_gives_rows_and_says_when_there_are_more(store: Store) -> None:
    sql, limits = "WITH s AS (FROM scores) SELECT s_d, n_members FROM s ORDER BY s_d DESC", Limits(max_rows=2, eps=0.5)
    found = run_sql(store.path, sql, limits)
    assert found.table.to_pylist() == [{"s_d": 0.6, "n_members": 2}, {"s_d": 0.0, "n_members": 2}]
    assert found.cut and ask(store, sql, limits) == found
    assert not ask(store, "VALUES (1), (2)", limits).cut
    assert ask(store, "SELECT count(*) AS n FROM scores").table.to_pylist() == [{"n": 9}]
    one = Limits(eps=0.5, members=("medical",))
    assert ask(store, "SELECT max(s_d) AS m FROM scores", one).table.to_pylist() == [{"m": 0.4}]


def test_json_and_csv_are_never_cut(store: Store) -> None:
    where = ["--store", str(store.path), "--max-rows", "2"]
    for style in ("json", "csv"):
        found = CliRunner().invoke(main, ["sql", "VALUES (1), (2), (3)", *where, "--format", style])
        assert found.exit_code == Exit.USAGE and "more than 2 rows" in found.stderr and "--out" in found.stderr
        assert style == "csv" or json.loads(found.stdout)["exit_code"] == 2
        assert CliRunner().invoke(main, ["sql", "VALUES (1), (2)", *where, "--format", style]).exit_code == 0
    shown = CliRunner().invoke(main, ["sql", "VALUES (1), (2), (3)", *where])
    assert shown.exit_code == 0 and "first 2 rows" in shown.stderr


def test_all_rows_go_to_a_file(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "rows.parquet"
    query = "SELECT range AS a, s_d, s_d AS a FROM range(20000), scores WHERE scores.status = 'ok' ORDER BY range, s_d"
    where = ["--store", str(store.path), "--eps", "0.5", "--members", "medical", "--out", str(out), "--json"]
    found = CliRunner().invoke(main, ["sql", query, *where], catch_exceptions=False)
    assert json.loads(found.stdout) == {"out": str(out), "rows": 80000}
    table = pq.read_table(out)
    assert table.column_names == ["a", "s_d", "a_1"] and table.num_rows == 80000
    assert table.slice(0, 5).to_pylist()[3:] == [{"a": 0, "s_d": 0.4, "a_1": 0.4}, {"a": 1, "s_d": 0.0, "a_1": 0.0}]
    assert write_sql(store.path, "SELECT 1 AS n WHERE false", out) == 0 == pq.read_table(out).num_rows
    assert sorted(p.name for p in out.parent.iterdir()) == ["rows.parquet"]


@pytest.mark.parametrize(("sql", "told"), [
    ("SELECT * FROM read_csv('/etc/passwd')", "file system operations are disabled"),
    ("COPY (SELECT 1) TO '{}/x.parquet'", "not COPY"), ("SELECT s_dd FROM scores", "not found"),
    ("SELECT CASE WHEN i < 99999 THEN i ELSE error('late') END FROM range(100000) t(i)", "late"),
    ("SELECT count(*) FROM range(10000000) a, range(10000000) b", "stopped after 2 seconds"),
    ("SELECT INTERVAL 1 MONTH AS i", "Parquet")], ids=["read", "copy", "name", "late", "time", "type"])
def test_a_query_to_a_file_is_as_bound_and_leaves_nothing(store: Store, tmp_path: Path, sql: str, told: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=told):
        write_sql(store.path, sql.replace("{}", str(tmp_path)), tmp_path / "rows.parquet",
                  Limits(seconds=2 if "stopped" in told else 60))
    assert sorted(tmp_path.rglob("*")) == before
    if told == "late":
        with pytest.raises(UserError, match="late"):
            ask(store, sql)
    with pytest.raises(UserError, match="no known format"):
        write_sql(store.path, "SELECT 1", tmp_path / "rows.csv")


def test_sql_errors_say_what_was_meant(store: Store) -> None:
    with pytest.raises(UserError, match='column "s_dd" not found') as caught:
        ask(store, "SELECT s_dd FROM scores")
    assert 's_d"' in caught.value.hint
    with pytest.raises(UserError, match="score does not exist") as caught:
        ask(store, "SELECT * FROM score")
    assert "'scores'" in caught.value.hint


def test_a_query_cannot_outlive_its_limit(store: Store) -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match="stopped after 2 seconds"):
        run_sql(store.path, "SELECT count(*) FROM range(1000000) a, range(1000000) b, nll WHERE a.range % 7 = 3",
                Limits(seconds=2))
    assert 2 < time.monotonic() - start < 2 + START_SECONDS / 3


def test_a_query_has_a_memory_limit(store: Store) -> None:
    with pytest.raises(UserError, match="needs more than 64 MiB of memory") as caught:
        run_sql(store.path, "SELECT count(*) FROM (SELECT range FROM range(1000000000) GROUP BY range)",
                Limits(memory_mb=64))
    assert caught.value.exit_code == Exit.ENVIRONMENT


def test_the_kernel_ends_a_query_whose_parent_is_gone(tmp_path: Path) -> None:
    script = ("import sys, duckdb; from curate.sandbox import Limits, bind_process\n"
              "bind_process(Limits(seconds=0.5))\n"
              "try:\n    open(sys.argv[1], 'wb', 0).write(b'x')\n"
              "except OSError as err: print(err.strerror, flush=True)\n"
              "duckdb.sql('SELECT count(*) FROM range(10000000) a, range(10000000) b').fetchall()")
    child = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], stdout=subprocess.PIPE, timeout=20,
                           env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False)
    assert child.returncode == -signal.SIGALRM
    assert child.stdout == b"File too large\n" and (tmp_path / "file").stat().st_size == 0


def test_sql_refuses_a_damaged_store(tmp_path: Path) -> None:
    fill(tmp_path / "s")
    part = next((tmp_path / "s" / "parts").glob("nll-*"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=part.name) as caught:
        run_sql(tmp_path / "s", "SELECT 1")
    assert caught.value.exit_code == Exit.INTEGRITY


def test_results_as_table_csv_and_json() -> None:
    table = pa.table({"s_d": [0.123456789, math.nan, None], "text": ["a\x1b[31m\nb", 'q"', "[/red]"]})
    assert format_result(table, "table").splitlines()[2] == "0.123457  a\N{REPLACEMENT CHARACTER}[31m b"
    assert format_result(table, "csv").splitlines()[0] == "s_d,text"
    assert "\x1b" not in format_result(table, "csv")
    text = format_result(table, "json")
    assert json.loads(text) == [{"s_d": 0.123456789, "text": "a\x1b[31m\nb"}, {"s_d": None, "text": 'q"'},
                                {"s_d": None, "text": "[/red]"}]
    assert "\x1b" not in text and "\x9b" not in format_result(pa.table({"t": ["\x9b"]}), "json")


def test_whole_sums_stay_numbers_in_json(store: Store) -> None:
    found = ask(store, "SELECT sum(n_answer_tokens) AS n, sum(n_tokens) / 2.0 AS half FROM examples, "
                       "(SELECT 5 AS n_tokens) WHERE prompt = 'x'").table
    assert json.loads(format_result(found, "json")) == [{"n": 5, "half": 2.5}]
    twice = ask(store, "SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS a").table
    assert json.loads(format_result(twice, "json")) == [{"a": 1, "a_2": 2, "a_1": 3, "a_3": 4}]
    explained = format_result(ask(store, "EXPLAIN SELECT 1").table, "table")
    assert "explain_key" not in explained and len(explained.splitlines()) > 1
