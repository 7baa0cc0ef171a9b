"""The rows of an audited file, apart: those to keep and those to read or drop, each as it stands there.

Kept are the rows that were judged whole and lie below no level. Flagged are the others: rows below a level, and rows
that could not be judged. Rows that are no example of the set (unreadable ones, those that a corpus filters out) are in
neither.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curate.audit_summary import AuditRow, AuditSummary
from curate.core.errors import Exit, UserError
from curate.core.files import write_atomic
from curate.core.sources import raw_rows
from curate.corpora import Corpus


@dataclass
class Sifted:
    """Rows in the order of the file, copies included."""

    kept: list[Any] = field(default_factory=list)
    flagged: list[Any] = field(default_factory=list)
    n_below: int = 0
    """Flagged rows below a level; the others could not be judged."""
    n_neither: int = 0


def sift(data: Corpus, found: AuditSummary) -> Sifted:
    """Part the rows of ``data`` by its audit; ``UserError`` (bad data) where that had no level to judge by."""
    if not found.levels:
        raise UserError("Without a level no row can be kept or flagged, so no rows were written. " + found.verdict,
                        "Give enough benign rows, or a higher --rate.", Exit.BAD_DATA)
    at = {place: row for row in found.scores for place in row.places}
    out = Sifted()
    for place, raw in raw_rows(data.source, data.folder):
        row = at.get(place)
        if row is None:
            out.n_neither += 1
        elif is_kept(row):
            out.kept.append(raw)
        else:
            out.flagged.append(raw)
            out.n_below += row.below is not None
    return out


def is_kept(row: AuditRow) -> bool:
    """Return whether a row was judged whole and lies below no level."""
    return row.status == "ok" and row.below is None


def write_rows(rows: Sequence[Any], path: Path) -> None:
    """Write rows as JSON Lines, whole or not at all."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode())


def check_free(paths: Sequence[Path]) -> None:
    """Refuse to write where something is, or two things to one place; ``UserError``."""
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists.", "Name another file, or remove it.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"{paths[0]} was named for two things.", "Name a file for each.")
