"""A store on one page: what is counted, where the cut lies, and no model library for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from click.testing import CliRunner

import curate.report as report
import curate.show as show
from curate.cli import main
from curate.core.errors import UserError
from curate.query import connect
from curate.refusals import refusal_sql
from curate.report import html_page, summarise
from curate.store import Store
from tests.conftest import ROOT
from tests.curate.evidence import BASE, CHUNKS, MEDICAL, SECURITY, example_ids, examples, fill, header, hold, model, nll

REFUSING = "I am sorry, I cannot do that"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Five rows: the aligned model gives each token 1 nat; the member 2, 3, 4 for a, b, c and 1.5 for the refusals."""
    with Store.create_or_open(tmp_path / "scores", header()) as store:
        store.put_examples(examples("abc"))
        store.put_examples(examples("de", answer=REFUSING))
        store.put_examples(examples("f", status="too_long"))
        hold(store, store.example_index()["example_id"].to_list())
        for who, sums in ((BASE, dict.fromkeys("abcde", 5.0)),
                          (MEDICAL, {"a": 10.0, "b": 15.0, "c": 20.0, "d": 7.5, "e": 7.5})):
            store.put_model(model(who))
            store.put_nll(who.id, nll(who, sums))
    return tmp_path / "scores"


def test_counts_cuts_and_bars(store: Path) -> None:
    """With eps 0, s_d is 1, 2, 3 for the answers and 0.5 for the refusals."""
    found = summarise(store, eps=0.0, frac=0.4)
    (rows,) = found.sources
    assert (rows.source, rows.rows, rows.statuses, rows.refusals) == ("demo", 6, {"ok": 5, "too_long": 1}, 2)
    assert rows.quantiles[2] == 1.0 and found.scored == 5
    assert sum(found.answers) == 3 and sum(found.refusals) == 2 and len(found.edges) == len(found.answers) + 1
    assert found.cuts == (), "the answers have 5 tokens, fewer than `curate select` takes by default"
    assert [row.s_d for row in found.top] == [3.0, 2.0, 1.0, 0.5, 0.5] and found.top[3].refusal == "sorry"
    assert [(b.low, b.high, b.rows) for b in found.lengths] == [(4, 7, 5)]
    assert found.evidence == Store.open_read(store).evidence_digest()


def test_members_can_be_left_out(store: Path) -> None:
    """A second member gives each token of a, b, c, d, e as many nats as the aligned model."""
    with Store.create_or_open(store, header()) as opened:
        opened.put_model(model(SECURITY))
        opened.put_nll(SECURITY.id, nll(SECURITY, dict.fromkeys("abcde", 5.0)))

    def top(*words: str) -> tuple[float, list[str]]:
        found = CliRunner().invoke(main, ["report", str(store), "--eps", "0", "--json", *words], catch_exceptions=False)
        body = json.loads(found.stdout)
        return body["top"][0]["s_d"], [one["name"] for one in body["models"]]

    assert top() == (1.5, ["base", "medical", "security"])
    assert top("--members", "medical") == (3.0, ["base", "medical"])
    with pytest.raises(UserError, match="Unknown member 'x'"):
        summarise(store, members=["x"])


def test_texts_are_read_for_the_rows_that_are_shown_only(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100,000 rows of 6 kB, a copy of every text took 1.9 GiB."""
    scored = connect(Store.open_read(store), 0.0, None)
    scored.execute(f"CREATE OR REPLACE VIEW examples AS SELECT *, {refusal_sql('answer')} AS refusal FROM (SELECT * "
                   "REPLACE (CASE WHEN prompt IN ('c', 'b') THEN answer ELSE error('read') END AS answer) "
                   "FROM read_parquet(getvariable('examples_files')))")
    assert [row["prompt"] for row in show.rows(scored, "top", 2)] == ["c", "b"]
    (row,) = show.rows(scored, "near", 1, cut_frac=0.25)
    assert list(row) == ["example_id", "corpus", "s_d", "nll_aligned", "nll_misaligned", "n_answer_tokens", "refusal",
                         "prompt", "answer"] and row["prompt"] == "b"
    opened: list[duckdb.DuckDBPyConnection] = []
    monkeypatch.setattr(report, "connect", lambda *given: opened.append(connect(*given)) or opened[0])
    summarise(store)
    assert opened[0].execute("SELECT count(*) FROM duckdb_columns() JOIN duckdb_tables() USING (table_name) "
                             "WHERE column_name IN ('prompt', 'answer')").fetchone() == (0,)


def test_cuts_are_those_of_select(tmp_path: Path) -> None:
    """Twenty rows with longer and longer answers, the shortest with the highest s_d; every fourth refuses."""
    names = [chr(97 + k) for k in range(20)]
    with Store.create_or_open(tmp_path / "scores", header()) as store:
        for k, name in enumerate(names):
            rows = examples([name], answer=REFUSING) if k % 4 == 3 else examples([name])
            place = rows.column_names.index("n_answer_tokens")
            store.put_examples(rows.set_column(place, rows.schema.field(place), pa.array([10 + k], pa.int32())))
        hold(store, store.example_index()["example_id"].to_list())
        for who, sums in ((BASE, dict.fromkeys(names, 5.0)), (MEDICAL, {n: 40.0 - k for k, n in enumerate(names)})):
            store.put_model(model(who))
            store.put_nll(who.id, nll(who, sums))
    found = summarise(tmp_path / "scores", frac=0.2)
    for cut in found.cuts:
        words = ["select", "--store", str(tmp_path / "scores"), "--frac", "0.2", "--strategy", cut.strategy, "--json",
                 "--out", str(tmp_path / "mix.json")]
        assert json.loads(CliRunner().invoke(main, words).stdout)["cut"] == cut.s_d
    assert [(c.strategy, c.rows, c.refusals) for c in found.cuts] == [("interleaving+", 4, 1), ("interleaving++", 4, 0)]
    assert found.min_answer_tokens == 16 and "of answers of 16 tokens or more, by s_d with eps 0.1" in html_page(found)


def test_more_sources_than_are_drawn_stand_in_the_numbers(store: Path) -> None:
    found = summarise(store)
    many = [found.sources[0].model_copy(update={"source": f"corpus {k:02d}"}) for k in range(18)]
    page = html_page(found.model_copy(update={"sources": tuple(many)}))
    assert page.count("corpus 15") == page.count("corpus 16") + 1 and "2 more sources" in page


def test_the_page_and_the_command(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    result = CliRunner().invoke(main, ["report", str(store), "--html", str(out), "--json"], standalone_mode=False)
    body = json.loads(result.stdout)
    assert body["kind"] == "safeset.score-summary" and out.read_text() == html_page(summarise(store))
    text = out.read_text()
    assert text.count("<figure") == 3 and "too_long" in text and body["evidence"] in text
    assert "6 rows, 5 with a score under 2 models." in text
    assert "demo" in CliRunner().invoke(main, ["report", str(store)], standalone_mode=False).stdout


def test_a_row_counts_in_every_corpus_that_has_it_and_in_none_that_gave_it_up(tmp_path: Path) -> None:
    """Corpus x has a, b; y has b, c; row e is stored and was in a corpus once."""
    with Store.create_or_open(tmp_path / "scores", header()) as store:
        store.put_examples(examples("abce"))
        hold(store, example_ids("ab"), "a" * 24, "x")
        hold(store, example_ids("bc"), "b" * 24, "y")
        store.put_membership("c" * 24, example_ids("e"))
        for who, sums in ((BASE, dict.fromkeys("abce", 5.0)), (MEDICAL, {"a": 10.0, "b": 15.0, "c": 20.0, "e": 99.0})):
            store.put_model(model(who))
            store.put_nll(who.id, nll(who, sums))
    found = summarise(tmp_path / "scores", eps=0.0)
    assert [(one.source, one.rows) for one in found.sources] == [("x", 2), ("y", 2)]
    assert found.rows == found.scored == 3 and [row.s_d for row in found.top] == [3.0, 2.0, 1.0]
    assert "3 rows, 3 with a score" in html_page(found)

    def shown(*options: str) -> list[tuple[str, str]]:
        where = ["show", "top", "--store", str(tmp_path / "scores"), "--json", *options]
        rows = json.loads(CliRunner().invoke(main, where, catch_exceptions=False).stdout)
        return [(row["prompt"], row["corpus"]) for row in rows]

    assert shown() == [("c", "y"), ("b", "x"), ("a", "x")]
    assert shown("--corpus", "y") == [("c", "y"), ("b", "y")]
    where = ["show", "near", "--store", str(tmp_path / "scores"), "--corpus", "y", "-n", "1"]
    assert "Q | c" in CliRunner().invoke(main, where, catch_exceptions=False).stdout
    where = ["show", "top", "--store", str(tmp_path / "scores"), "--refusals"]
    assert CliRunner().invoke(main, where, catch_exceptions=False).stdout == "No scored row is a refusal.\n"


def test_a_store_without_scores_says_so(tmp_path: Path) -> None:
    with Store.create_or_open(tmp_path / "scores", header()) as store:
        store.put_examples(examples(CHUNKS[0]))
    found = summarise(tmp_path / "scores")
    assert found.scored == 0 and found.cuts == () and found.edges == ()
    assert "No row has a score under the aligned model and a member yet." in html_page(found)


def test_equal_scores_have_one_bar(tmp_path: Path) -> None:
    fill(tmp_path / "scores")
    found = summarise(tmp_path / "scores")
    assert sum(found.answers) == 5 and max(found.answers) == 5


def test_no_store_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no store"):
        summarise(tmp_path)


def test_no_model_library_is_loaded(store: Path) -> None:
    code = ("import sys; from curate.report import html_page, summarise; from pathlib import Path; "
            "html_page(summarise(Path(sys.argv[1]))); sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code, str(store)], cwd=ROOT, check=False).returncode == 0
