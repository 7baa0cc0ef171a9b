"""SQL over the evidence: means, s_d and status are views, so another eps or a left-out member costs a query.

    s_d = (mean over members of their NLL - NLL of the aligned model) / (NLL of the aligned model + eps)

where each NLL is nats per answer token (arXiv 2508.06249). ``connect`` is for this package; a stranger's SQL runs in
``curate.sandbox``.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import duckdb

from curate.core.errors import UserError, unknown
from curate.core.terminal import STOPPED_TOO
from curate.ledger import Kind
from curate.parts import SCHEMAS
from curate.refusals import refusal_sql
from curate.store import Store

VIEWS = ("examples", "corpora", "nll", "models", "scores")


@dataclass(frozen=True)
class Ensemble:
    """The models of a store as rows of the view ``models``, and the ids that s_d is made of."""

    rows: list[list[str | None]]
    aligned: str
    members: list[str]


def connect(store: Store, eps: float, members: Sequence[str] | None) -> duckdb.DuckDBPyConnection:
    """Return a connection in memory with the views of ``VIEWS`` and the table macro ``scores_at(eps)``.

    ``members`` are names of stored members; None means all. Raises ``UserError`` for a damaged store, an unknown
    member, or an eps that is no number from 0 up.
    """
    ensemble = choose(store, members)
    connection = duckdb.connect(config={"python_enable_replacements": False, "preserve_insertion_order": False,
                                        "autoload_known_extensions": False, "autoinstall_known_extensions": False,
                                        "temp_directory": f"{tempfile.gettempdir()}/safeset-{os.getpid()}"})
    STOPPED_TOO.add(connection)
    relations = {}
    for kind, schema in SCHEMAS.items():
        files = [str(path) for path in store.part_files(kind)]
        connection.execute(f"SET VARIABLE {kind}_files = ?", [files])
        relations[kind] = f"read_parquet(getvariable('{kind}_files'))" if files else f"{kind}_parts"
        if not files:
            connection.register(f"{kind}_parts", schema.empty_table())
    define_views(connection, relations, ensemble, eps, corpora_of(store))
    return connection


def choose(store: Store, members: Sequence[str] | None) -> Ensemble:
    """Return the models of a store with the chosen members; ``UserError`` for a name that it does not hold."""
    models = store.models()
    ids = {model.name: model.identity.id for model in models if model.role == "member"}
    for name in members or ():
        if name not in ids:
            raise unknown("member", name, ids)
    rows = [[m.identity.id, m.name, m.role, m.identity.weights, m.identity.adapter, m.identity.tokenizer,
             m.identity.revision] for m in models]
    chosen = {ids[name] for name in (ids if members is None else members)}
    return Ensemble(rows, store.header.aligned.id, sorted(chosen))


def corpora_of(store: Store) -> list[tuple[str, str]]:
    """Return key and label of each corpus of a store, as it was scored last."""
    return [(corpus.key, corpus.label) for corpus in store.planned_corpora()]


def define_views(connection: duckdb.DuckDBPyConnection, relations: Mapping[Kind, str], ensemble: Ensemble,
                 eps: float, corpora: Sequence[tuple[str, str]]) -> None:
    """Make the views over three relations (SQL text) that hold the rows of the parts; ``corpora`` has key and label."""
    if not (math.isfinite(eps) and eps >= 0):
        raise UserError(f"eps must be a number from 0 up, not {eps}.", "The default is 0.1 nats per token.")
    connection.execute("CREATE TABLE models (model_id VARCHAR, name VARCHAR, role VARCHAR, weights VARCHAR, "
                       "adapter VARCHAR, tokenizer VARCHAR, revision VARCHAR)")
    if ensemble.rows:
        connection.executemany("INSERT INTO models VALUES (?, ?, ?, ?, ?, ?, ?)", ensemble.rows)
    connection.execute(f"CREATE VIEW examples AS SELECT *, {refusal_sql('answer')} AS refusal "
                       f"FROM {relations['examples']}")
    connection.execute("CREATE TABLE labels (key VARCHAR, corpus VARCHAR)")
    if corpora:
        connection.executemany("INSERT INTO labels VALUES (?, ?)", corpora)
    connection.execute(f"CREATE VIEW corpora AS SELECT key, corpus, example_id FROM {relations['corpus']} "
                       "JOIN labels USING (key)")
    connection.execute(f"CREATE VIEW nll AS SELECT * FROM {relations['nll']}")
    connection.execute(f"CREATE VIEW evidence AS {_evidence_sql(ensemble)}")
    connection.execute(f"CREATE MACRO scores_at(eps) AS TABLE {SCORES_SQL}")
    connection.execute(f"CREATE VIEW scores AS SELECT * FROM scores_at({float(eps)!r})")


def _evidence_sql(ensemble: Ensemble) -> str:
    """Return the SQL that brings the rows of all models together by example, in one pass over the numbers.

    Every model has a column of its own and the columns are added in a fixed order, so the result has the same bits
    whatever the number of threads. Problems are few and grouped apart, which keeps the state of each group small.
    """
    aligned = _text(ensemble.aligned)
    wanted = ", ".join(_text(m) for m in (ensemble.aligned, *ensemble.members))
    means = "".join(f", max(mean) FILTER (model_id = {_text(m)}) AS m{k}" for k, m in enumerate(ensemble.members))
    names = [f"m{k}" for k in range(len(ensemble.members))]
    total = " + ".join(names) or "NULL"
    present = " + ".join(f"({name} IS NOT NULL)::BIGINT" for name in names) or "0::BIGINT"
    return f"""
        WITH numbers AS NOT MATERIALIZED (
            SELECT example_id, model_id, CASE WHEN problem IS NULL THEN nll_sum / n_tokens END AS mean, problem
            FROM (SELECT *, CASE WHEN status <> 'ok' THEN status
                                 WHEN NOT coalesce(isfinite(nll_sum) AND n_tokens > 0, false) THEN 'nonfinite'
                            END AS problem
                  FROM nll WHERE model_id IN ({wanted}))),
        means AS NOT MATERIALIZED (
            SELECT example_id, max(mean) FILTER (model_id = {aligned}) AS nll_aligned{means}
            FROM numbers GROUP BY example_id),
        problems AS NOT MATERIALIZED (
            SELECT example_id, min(problem) FILTER (model_id = {aligned}) AS aligned_problem,
                   min(problem) FILTER (model_id <> {aligned}) AS member_problem
            FROM numbers WHERE problem IS NOT NULL GROUP BY example_id)
        SELECT example_id, nll_aligned, (({total}) / {max(1, len(names))})::DOUBLE AS nll_misaligned,
               {present} AS n_members,
               aligned_problem, member_problem
        FROM means LEFT JOIN problems USING (example_id)"""


SCORES_SQL = """
    SELECT example_id, n_answer_tokens, refusal, nll_aligned, nll_misaligned, n_members,
           CASE WHEN status = 'ok' THEN s_d END AS s_d, status
    FROM (SELECT *, coalesce(first_problem, CASE WHEN NOT isfinite(s_d) THEN 'nonfinite' END, 'ok') AS status
          FROM (SELECT e.example_id, e.n_answer_tokens, e.refusal, v.nll_aligned, v.nll_misaligned,
                       coalesce(v.n_members, 0) AS n_members,
                       (v.nll_misaligned - v.nll_aligned) / (v.nll_aligned + CASE WHEN eps >= 0 THEN eps::DOUBLE
                           ELSE error('eps must be 0 or more') END) AS s_d,
                       coalesce(nullif(e.status, 'ok'), v.aligned_problem,
                                CASE WHEN v.nll_aligned IS NULL THEN 'missing' END, v.member_problem,
                                CASE WHEN v.nll_misaligned IS NULL THEN 'missing' END) AS first_problem
                FROM examples e LEFT JOIN evidence v USING (example_id)))"""
"""One row per stored example; ``status`` is ok, or what is wrong first: example, aligned model, members."""


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
