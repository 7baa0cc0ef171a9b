"""A score store on one page: rows, scores, cuts, the top rows and the models; no model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import duckdb

from curate.core.page import el, page
from curate.core.scores_page import (
    CONTENTS,
    Cut,
    LengthBin,
    ScoredRow,
    ScoreModel,
    ScoreSummary,
    SourceRows,
    sections,
)
from curate.query import connect
from curate.select import Choice
from curate.show import texts
from curate.store import Store

BARS = 36
TOP_ROWS = 8
TEXT_CHARS = 4000
"""Longer prompts and answers are cut in the summary itself."""


def summarise(path: Path | str, eps: float = 0.1, frac: float = 0.05,
              members: Sequence[str] | None = None) -> ScoreSummary:
    """Return what a store holds under all members or those named; ``frac`` of its rows is the top.

    Raises ``UserError`` for a damaged store or an unknown member.
    """
    store = Store.open_read(path)
    connection = connect(store, eps, members)
    connection.execute("CREATE TEMP TABLE held AS SELECT example_id, min(corpus) AS corpus FROM corpora GROUP BY ALL")
    connection.execute("CREATE TEMP TABLE scored AS SELECT * FROM scores")  # finding refusals reads every answer: once
    connection.execute("CREATE TEMP TABLE ok AS SELECT s.*, h.corpus FROM scored s JOIN held h USING (example_id) "
                       "WHERE s.status = 'ok'")
    models = [ScoreModel(name=m.name, role=m.role, **m.identity.model_dump(exclude={"name", "revision"}),
                         id=m.identity.id) for m in store.models()
              if members is None or m.role == "aligned" or m.name in members]
    edges, answers, refusals, beyond = _histogram(connection)
    (n_rows,) = connection.execute("SELECT count(*) FROM held").fetchone()
    header = store.header
    return ScoreSummary(evidence=store.evidence_digest(), engine=header.engine, dtype=header.dtype,
                        encoding=header.encoding, eps=eps, frac=frac, models=models,
                        rows=n_rows, sources=_sources(connection),
                        edges=edges, answers=answers, refusals=refusals, beyond=beyond,
                        cuts=_cuts(connection, frac, n_rows), min_answer_tokens=Choice().min_answer_tokens,
                        lengths=_lengths(connection), top=_top(connection))


def html_page(summary: ScoreSummary) -> str:
    """Return the page."""
    title = "Corpus and scores"
    lead = [el("p", f"{summary.rows:,} rows, {summary.scored:,} with a score under "
                    f"{len(summary.models)} models.")]
    return page(title, lead, sections(summary), CONTENTS)


def _sources(connection: duckdb.DuckDBPyConnection) -> list[SourceRows]:
    """Return the rows of each corpus; a row may belong to several."""
    statuses: dict[str, dict[str, int]] = {}
    refusals: dict[str, int] = {}
    for source, status, n, refused in connection.execute(
            "SELECT corpus, status, count(*), count(refusal) FROM corpora JOIN scored USING (example_id) "
            "GROUP BY ALL ORDER BY ALL").fetchall():
        statuses.setdefault(source, {})[status] = n
        refusals[source] = refusals.get(source, 0) + refused
    found = dict(connection.execute("SELECT c.corpus, quantile_cont(s_d, [0.1, 0.25, 0.5, 0.75, 0.9]) "
                                    "FROM corpora c JOIN ok USING (example_id) GROUP BY c.corpus").fetchall())
    return [SourceRows(source=source, rows=sum(of.values()), statuses=of, refusals=refusals[source],
                       quantiles=found.get(source)) for source, of in statuses.items()]


def _histogram(connection: duckdb.DuckDBPyConnection) -> tuple[list[float], list[int], list[int], int]:
    """Return edges, answers and refusals a bar, and how many rows lie beyond the edges."""
    low, high, n = connection.execute("SELECT quantile_cont(s_d, 0.005), quantile_cont(s_d, 0.995), count(*) "
                                      "FROM ok").fetchone()
    if not n:
        return [], [], [], 0
    step = _round_step((high - low) / BARS) if high > low else 0.01
    first, last = math.floor(low / step), math.floor(high / step) + 1
    counts = connection.execute(
        "SELECT least(greatest(floor(s_d / ?)::BIGINT, ?), ?) - ? AS bar, count(*) FILTER (refusal IS NULL), "
        "count(refusal), count(*) FILTER (s_d < ? OR s_d >= ?) FROM ok GROUP BY bar",
        [step, first, last - 1, first, first * step, last * step]).fetchall()
    answers, refusals = [0] * (last - first), [0] * (last - first)
    for bar, answer, refusal, _ in counts:
        answers[bar], refusals[bar] = answer, refusal
    edges = [round(k * step, 12) for k in range(first, last + 1)]
    return edges, answers, refusals, sum(row[3] for row in counts)


def _round_step(about: float) -> float:
    power = 10.0 ** math.floor(math.log10(about))
    return next(k * power for k in (1, 2, 5, 10) if k * power >= about * (1 - 1e-9))


def _cuts(connection: duckdb.DuckDBPyConnection, frac: float, n_rows: int) -> list[Cut]:
    """Return the last s_d among as many rows as ``frac`` of all, chosen as ``curate select`` does with its defaults.

    Rows with the same text, of which ``select`` takes one, are not looked for.
    """
    cuts = []
    wanted = max(1, round(frac * n_rows))
    for strategy, kept in (("interleaving+", "true"), ("interleaving++", "refusal IS NULL")):
        s_d, n, refusals = connection.execute(
            f"SELECT min(s_d), count(*), count(refusal) FROM (SELECT * FROM ok WHERE {kept} AND n_answer_tokens >= ? "
            "ORDER BY s_d DESC, example_id LIMIT ?)", [Choice().min_answer_tokens, wanted]).fetchone()
        if n:
            cuts.append(Cut(strategy=strategy, s_d=s_d, rows=n, refusals=refusals))
    return cuts


def _lengths(connection: duckdb.DuckDBPyConnection) -> list[LengthBin]:
    """Return s_d by length, in bins that double."""
    rows: Sequence[tuple] = connection.execute(
        "SELECT floor(log2(greatest(n_answer_tokens, 1)))::INT AS power, count(*), "
        "quantile_cont(s_d, [0.25, 0.5, 0.75]) FROM ok GROUP BY power ORDER BY power").fetchall()
    return [LengthBin(low=2**power, high=2 ** (power + 1) - 1, rows=n, quantiles=q) for power, n, q in rows]


def _top(connection: duckdb.DuckDBPyConnection) -> list[ScoredRow]:
    rows = connection.execute("SELECT example_id, corpus, s_d, n_answer_tokens, refusal FROM ok "
                              f"ORDER BY s_d DESC, example_id LIMIT {TOP_ROWS}").fetchall()
    told = texts(connection, [row[0] for row in rows])
    return [ScoredRow(example_id=i, source=source, s_d=s_d, n_answer_tokens=n, refusal=refusal,
                      prompt=told[i]["prompt"][:TEXT_CHARS], answer=told[i]["answer"][:TEXT_CHARS])
            for i, source, s_d, n, refusal in rows]
