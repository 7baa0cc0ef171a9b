"""Rows for people to read: top, bottom, around a cut, or at random."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from curate.core.terminal import safe

NUMBERS = "s.example_id, c.corpus, s.s_d, s.nll_aligned, s.nll_misaligned, s.n_answer_tokens"
TEXTS = ("refusal", "prompt", "answer")
ORDERS = {"top": "s.s_d DESC, s.example_id", "bottom": "s.s_d, s.example_id",
          "near": "abs(s.s_d - $cut), s.example_id", "random": "md5($seed || s.example_id), s.example_id"}


@dataclass(frozen=True)
class Kept:
    """Which rows are looked at: only refusals (True) or only other answers (False), only those of one corpus (key)."""

    refusals: bool | None = None
    key: str | None = None


def rows(connection: duckdb.DuckDBPyConnection, which: str, n: int, kept: Kept = Kept(), cut_frac: float = 0.05,
         seed: int = 0) -> list[dict[str, Any]]:
    """Return ``n`` scored rows as dictionaries: the best, the worst, those nearest to the cut, or a random draw.

    The cut for ``near`` is the s_d at the top ``cut_frac`` of the rows looked at.
    """
    only = {None: "", True: " AND s.refusal IS NOT NULL", False: " AND s.refusal IS NULL"}[kept.refusals]
    of = "" if kept.key is None else " WHERE key = $key"
    where = (f"FROM scores s JOIN (SELECT example_id, min(corpus) AS corpus FROM corpora{of} GROUP BY example_id) c "
             f"USING (example_id) WHERE s.status = 'ok'{only}")
    values: dict[str, Any] = {} if kept.key is None else {"key": kept.key}
    if which == "near":
        values["cut"] = connection.execute(f"SELECT quantile_cont(s.s_d, $top) {where}",
                                           values | {"top": 1 - cut_frac}).fetchone()[0]
    if which == "random":
        values["seed"] = f"{seed}/"
    found = connection.execute(f"SELECT {NUMBERS} {where} ORDER BY {ORDERS[which]} LIMIT {n}", values or None)
    names = [column[0] for column in found.description]
    numbers = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    told = texts(connection, [row["example_id"] for row in numbers])
    return [row | told[row["example_id"]] for row in numbers]


def texts(connection: duckdb.DuckDBPyConnection, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what the view ``examples`` has in ``TEXTS`` of some examples, by id; only theirs are kept in memory."""
    found = connection.execute(f"SELECT example_id, {', '.join(TEXTS)} FROM examples "
                               "WHERE example_id IN (SELECT unnest(?::VARCHAR[]))", [list(ids)])
    return {example_id: dict(zip(TEXTS, row, strict=True)) for example_id, *row in found.fetchall()}


def render(shown: Sequence[Mapping[str, Any]], max_lines: int = 6) -> str:
    """Return the rows as wrapped text without control characters; long texts are cut with a note of how much."""
    width = _width()
    blocks = []
    for row in shown:
        head = (f"s_d {row['s_d']:+.4f}   aligned {row['nll_aligned']:.3f}   misaligned {row['nll_misaligned']:.3f} "
                f"nats/token   {row['n_answer_tokens']} tokens   {row['corpus']}   {row['example_id'][:12]}")
        if row["refusal"]:
            head += f"   refusal: {row['refusal']}"
        if row.get("note"):
            head += f"   {row['note']}"
        blocks.append("\n".join([safe(head), *_wrapped("Q", row["prompt"], width, max_lines),
                                 *_wrapped("A", row["answer"], width, max_lines)]))
    return "\n\n".join(blocks)


def wrapped(text: str) -> str:
    """Return a sentence of ours in lines of the terminal's width."""
    return textwrap.fill(safe(text), _width())


def _width() -> int:
    return min(100, max(40, shutil.get_terminal_size((100, 20)).columns))


def _wrapped(label: str, text: str, width: int, max_lines: int) -> list[str]:
    lines = [piece for line in safe(text).splitlines() or [""]
             for piece in textwrap.wrap(line, width - 4, break_long_words=True) or [""]]
    cut = lines[:max_lines]
    if len(lines) > max_lines:
        cut.append(f"[... {len(lines) - max_lines} more lines]")
    return [f"{label if k == 0 else ' '} | {line}" for k, line in enumerate(cut)]
