"""Selection: which scored rows go into a mix, and why each other row does not.

Rows pass through gates in a fixed order; each dropped row has exactly one reason, the first gate that stopped it:
its status (too_long, empty_answer, unrenderable, nonfinite, missing), ``in_finetune``, ``short``, ``duplicate``,
``refusal``, and at last ``not_selected``. What is left is ranked, by s_d (highest first) or at random, ties broken by
id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from importlib.metadata import version
from pathlib import Path

import duckdb

from curate.core.documents import Method, MixManifest
from curate.core.errors import Exit, UserError, unknown
from curate.core.files import file_sha256, relative_to_root
from curate.core.sources import Reading, Source, read_source
from curate.core.terminal import quoted
from curate.query import connect
from curate.records import PlannedCorpus
from curate.store import Store

STRATEGIES = ("none", "interleaving", "interleaving+", "interleaving++")
NEAR_NATS = 0.01
"""A row this close to the cut in s_d might fall on the other side on another machine or in another dtype."""


@dataclass(frozen=True)
class Choice:
    """What to select: exactly one of ``n``, ``frac`` and ``tokens`` is used.

    ``frac`` is of the fine-tuning set if there is one; ``tokens`` is a dose: the first rows by rank whose answers have
    no more tokens than that together.
    """

    strategy: str = "interleaving++"
    frac: float | None = None
    n: int | None = None
    tokens: int | None = None
    eps: float = 0.1
    seed: int = 0
    members: tuple[str, ...] | None = None
    min_answer_tokens: int = 16
    placement: str = "even"
    max_bad: float | None = None
    """Share of the fine-tuning set's rows that may be unreadable; None is 0 where the user cannot ask for more."""


@dataclass(frozen=True)
class Selection:
    """The chosen ids, best first; rows by reason (they add up to ``corpus``); and how many lie near the cut."""

    ids: tuple[str, ...]
    counts: dict[str, int]
    cut: float | None = None
    near: int = 0
    tokens: int = 0
    """Answer tokens of the chosen rows."""
    tokens_by_chance: float = 0.0
    """How many as many rows would have on average, drawn from all that the gates let through."""


def select(connection: duckdb.DuckDBPyConnection, choice: Choice, corpus: str,
           finetune: Mapping[str, str]) -> Selection:
    """Choose rows of a corpus (its key in the view ``corpora``) from an open store; see the module for the order.

    ``finetune`` has the messages of each row of the fine-tuning set, as JSON, by its id.
    """
    _gates(connection, choice, corpus, finetune)
    order, values = _ranking(choice)
    n_rows, n_left, n_tokens = connection.execute(
        "SELECT count(*), count(*) FILTER (reason IS NULL), coalesce(sum(n_tokens) FILTER (reason IS NULL), 0) "
        "FROM gates").fetchone()
    n = wanted(choice, n_rows, len(finetune)) if choice.tokens is None else _within(connection, choice, n_tokens)
    reasons = dict(connection.execute("SELECT reason, count(*) FROM gates WHERE reason IS NOT NULL GROUP BY reason "
                                      "ORDER BY reason").fetchall())
    if n > n_left:
        raise UserError(f"{n} rows are wanted, but only {n_left} of {n_rows} are left after the filters "
                        f"({', '.join(f'{k} {v}' for k, v in reasons.items()) or 'nothing dropped'}).",
                        "Score more rows, or ask for a smaller --frac or --n"
                        + (f", or take answers under {choice.min_answer_tokens} tokens too (--min-answer-tokens)."
                           if reasons.get("short") else "."))
    chosen = connection.execute(f"SELECT example_id, s_d, n_tokens FROM gates WHERE reason IS NULL ORDER BY {order} "
                                f"LIMIT {n}", values).fetchall()
    cut = chosen[-1][1] if chosen and choice.strategy != "interleaving" else None
    near = 0 if cut is None else connection.execute(
        "SELECT count(*) FROM gates WHERE reason IS NULL AND abs(s_d - ?) <= ?", [cut, NEAR_NATS]).fetchone()[0]
    counts = {"corpus": n_rows, "selected": n, **reasons, "not_selected": n_left - n}
    return Selection(tuple(row[0] for row in chosen), counts, cut, near, sum(row[2] for row in chosen),
                     n * n_tokens / n_left if n else 0.0)


def _ranking(choice: Choice) -> tuple[str, list[str]]:
    """Return by what rows are ranked, in SQL, and its parameters."""
    if choice.strategy == "interleaving":
        return "md5(? || example_id), example_id", [f"{choice.seed}/"]
    return "s_d DESC, example_id", []


def _within(connection: duckdb.DuckDBPyConnection, choice: Choice, n_tokens: int) -> int:
    """Return how many of the first rows have no more than ``choice.tokens`` answer tokens together."""
    order, values = _ranking(choice)
    if choice.tokens > n_tokens:
        raise UserError(f"{choice.tokens} answer tokens are wanted, but the rows left after the filters have only "
                        f"{n_tokens}.", "Score more rows, or ask for fewer --tokens.")
    (n,) = connection.execute(f"""
        SELECT count(*) FILTER (total <= ?) FROM (
            SELECT sum(n_tokens) OVER (ORDER BY {order} ROWS UNBOUNDED PRECEDING) AS total
            FROM gates WHERE reason IS NULL)""", [choice.tokens, *values]).fetchone()
    if not n:
        raise UserError(f"The first row alone has more than {choice.tokens} answer tokens.", "Ask for more --tokens.")
    return n


def _text_digest(messages: str) -> str:
    """Return the SQL for the digest of a conversation up to case and white space; ``messages`` is a column of JSON."""
    text = f"replace({messages}, '\\\\', chr(1))"  # a backslash of the text, so that the others are escapes
    for pattern, by in ((r"(\s|\\[nrt])+", " "), (r" ?\" ?", '"')):
        text = f"regexp_replace({text}, '{pattern}', '{by}', 'g')"
    return f"md5(lower({text}))"


def _gates(connection: duckdb.DuckDBPyConnection, choice: Choice, corpus: str, finetune: Mapping[str, str]) -> None:
    """Make the table ``gates``: example_id, s_d, n_tokens and the first reason to drop the row, or NULL."""
    scored = choice.strategy != "interleaving"
    connection.execute("CREATE OR REPLACE TEMP TABLE tuned (example_id VARCHAR, messages VARCHAR)")
    if finetune:
        connection.execute("INSERT INTO tuned SELECT unnest(?), unnest(?)", [list(finetune), list(finetune.values())])
    status = "s.status" if scored else "e.status"
    refusal = "'refusal'" if choice.strategy == "interleaving++" else "NULL"
    connection.execute(f"""
        CREATE OR REPLACE TEMP TABLE gates AS
        WITH early AS (
            SELECT e.example_id, s.s_d, e.n_answer_tokens AS n_tokens, e.refusal, {_text_digest("e.messages")} AS text,
                   CASE WHEN {status} IS DISTINCT FROM 'ok' THEN coalesce({status}, 'missing')
                        WHEN e.example_id IN (SELECT example_id FROM tuned)
                             OR {_text_digest("e.messages")} IN (SELECT {_text_digest("messages")} FROM tuned)
                             THEN 'in_finetune'
                        WHEN e.n_answer_tokens < ? THEN 'short' END AS reason
            FROM corpora c JOIN examples e USING (example_id) LEFT JOIN scores s USING (example_id)
            WHERE c.key = ?)
        SELECT example_id, s_d, n_tokens, CASE
            WHEN reason IS NOT NULL THEN reason
            WHEN row_number() OVER (PARTITION BY text, reason IS NULL ORDER BY example_id) > 1 THEN 'duplicate'
            WHEN refusal IS NOT NULL THEN {refusal} END AS reason
        FROM early""", [choice.min_answer_tokens, corpus])


def wanted(choice: Choice, n_corpus: int, n_finetune: int) -> int:
    """Return how many rows to take: ``n``, or ``frac`` of the fine-tuning set (of the corpus without one), rounded."""
    if choice.strategy == "none":
        return 0
    if choice.n is not None:
        return choice.n
    if choice.frac is None or not 0 < choice.frac <= 1:
        raise UserError(f"--frac must lie above 0 and at most at 1, not {choice.frac}.", "For example --frac 0.05.")
    exact = Decimal(str(choice.frac)) * (n_finetune or n_corpus)
    return max(1, int(exact.to_integral_value(ROUND_HALF_UP)))


def placed(finetune: Sequence[str], safe: Sequence[str], seed: int, placement: str) -> list[str]:
    """Return the training order as ``finetune/<id>`` and ``safe/<id>``.

    Both sets are shuffled by content and seed. ``even`` puts the k-th of m safe rows at position
    floor((k + 1/2) N / m) of N rows; ``shuffled`` shuffles all together.
    """
    def shuffled(entries: Sequence[str]) -> list[str]:
        return sorted(entries, key=lambda e: hashlib.sha256(f"{seed}/{e}".encode()).digest())

    tuned = shuffled([f"finetune/{i}" for i in finetune])
    kept = shuffled([f"safe/{i}" for i in safe])
    if placement == "shuffled":
        return shuffled(tuned + kept)
    total = len(tuned) + len(kept)
    spots = {(2 * k + 1) * total // (2 * len(kept)): entry for k, entry in enumerate(kept)}
    rest = iter(tuned)
    return [spots[k] if k in spots else next(rest) for k in range(total)]


def read_distinct(source: Source, root: Path, max_bad: float | None = None,
                  rejects: Path | None = None) -> tuple[dict[str, str], dict[str, int]]:
    """Return the messages of a fine-tuning set's distinct examples by id, as JSON, and rows by what became of them.

    See ``read_source`` for ``max_bad`` and ``rejects``; what nothing was left out for is not counted, duplicates are.
    """
    reading, found = Reading(), dict[str, str]()
    for example in read_source(source, root, reading, max_bad, rejects):
        if example.id not in found:
            found[example.id] = json.dumps(example.to_row()["messages"], ensure_ascii=False)
    counts = {"finetune": len(found), "finetune_duplicates": reading.n_examples - len(found)}
    left_out = {"finetune_rejected": len(reading.rejects), "finetune_filtered": sum(reading.filtered.values())}
    return found, counts | {name: n for name, n in left_out.items() if n}


def planned_corpus(store: Store, label: str | None) -> PlannedCorpus:
    """Return the corpus to select from: the one with this label, whose path ends so, or whose content this file has.

    Without a label it is the only one.

    ``UserError`` where none fits, or several that differ.
    """
    corpora = store.plan.corpora
    found = [c for c in corpora if label in (None, c.label)] or [c for c in corpora
                                                                 if f"/{c.place}".endswith(f"/{label}")]
    found = found or [c for c in corpora if is_file_of(c, label)]
    if not found and label is not None:
        raise unknown("corpus in this store", label, [c.label for c in corpora])
    if not found:
        raise UserError(f"The store {store.path} holds no corpus.", "Score one into it: curate score --corpus ...")
    if len({c.key for c in found}) > 1:
        raise UserError("The store holds several corpora" + (f" called '{label}'" if label else "") + ": "
                        + "; ".join(f"{c.label} ({c.n_rows} rows, {c.place})" for c in found) + ".",
                        "Choose one with --corpus; the end of a path will do.")
    return found[-1]


def is_file_of(corpus: PlannedCorpus, name: str | None) -> bool:
    """Return whether ``name`` is a file that holds, byte for byte, what was scored as this corpus."""
    if name is None or corpus.source.kind != "file" or Path(name).suffix != Path(corpus.source.name).suffix:
        return False
    return Path(name).is_file() and file_sha256(Path(name)) == corpus.source.sha256


def found_again(corpus: PlannedCorpus, name: str | None, store: Path | str) -> PlannedCorpus:
    """Return a corpus with its file where it is now: at ``name`` if that has its content, or where it was scored.

    ``UserError`` (integrity) where the file is gone or is another: a mix that names it could not be read by anyone.
    """
    if corpus.source.kind != "file":
        return corpus
    if name is not None and is_file_of(corpus, name):
        path = Path(name).resolve()
        return corpus.model_copy(update={"folder": str(path.parent),
                                         "source": corpus.source.model_copy(update={"name": path.name})})
    path = Path(corpus.folder) / corpus.source.name
    if not path.is_file():
        raise UserError(f"{path}, which was scored, is not there any more, so no mix could be made of it.",
                        "Say where it is now with --corpus NEWPATH: it is known by its content. The store learns it, "
                        f"computing nothing, with: curate score --corpus NEWPATH --store {quoted(str(store))}",
                        Exit.INTEGRITY)
    if file_sha256(path) != corpus.source.sha256:
        raise UserError(f"{path} has changed since it was scored, so no mix could be made of it.",
                        f"Score it again, which computes only what is new: curate score --corpus {quoted(str(path))}",
                        Exit.INTEGRITY)
    return corpus


def rerooted(corpus: PlannedCorpus, root: Path) -> Source:
    """Return a corpus's source with its path relative to ``root``, as a manifest there must name it."""
    if corpus.source.kind != "file":
        return corpus.source
    return corpus.source.model_copy(update={"name": relative_to_root(Path(corpus.folder) / corpus.source.name, root)})


def build_manifest(store: Store | None, choice: Choice, root: Path, finetune: Source | None = None,
                   corpus: str | None = None, rejects: Path | None = None) -> tuple[MixManifest, Selection]:
    """Select from ``store`` and return the manifest with what was counted.

    The store may be None for the strategy ``none``, which needs a fine-tuning set and no scores. Bad rows of that set,
    as far as the choice allows them, are listed in ``rejects``.
    """
    tuned, tuned_counts = read_distinct(finetune, root, choice.max_bad, rejects) if finetune else ({}, {})
    sources = {"finetune": finetune} if finetune else {}
    if choice.strategy == "none":
        if not finetune:
            raise UserError("The strategy 'none' needs a fine-tuning set.", "Give it with --finetune FILE.")
        selection, models, scoring = Selection((), {"corpus": 0, "selected": 0}), (), {}
    else:
        assert store is not None
        planned = planned_corpus(store, corpus)
        planned = found_again(planned, corpus, store.path)
        selection = select(connect(store, choice.eps, choice.members), choice, planned.key, tuned)
        sources["safe"] = rerooted(planned, root)
        models = [m for m in store.models() if m.role == "aligned" or m.name in (choice.members or [m.name])]
        header = store.header
        scoring = {"engine": header.engine, "dtype": header.dtype, "encoding": header.encoding,
                   "max_tokens": str(header.max_tokens), "evidence": store.evidence_digest()}
    frac_of = None if choice.frac is None else "finetune" if finetune else "corpus"
    manifest = MixManifest(
        sources=sources, order=tuple(placed(list(tuned), selection.ids, choice.seed, choice.placement)),
        method=Method(strategy=choice.strategy, n=len(selection.ids), frac=choice.frac, frac_of=frac_of,
                      tokens=choice.tokens, eps=choice.eps, seed=choice.seed,
                      min_answer_tokens=choice.min_answer_tokens, placement=choice.placement),
        aligned=next((m.identity for m in models if m.role == "aligned"), None),
        members=tuple(sorted((m.identity for m in models if m.role == "member"), key=lambda i: i.name)),
        scoring=scoring, counts=selection.counts | tuned_counts, safeset=version("safeset"))
    return manifest, selection
