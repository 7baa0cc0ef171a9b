"""Compaction: many small parts of scores become a few large ones, and at no moment is a row missing or there twice.

Scoring commits a part and an entry for each chunk, so that a kill costs one chunk; a large store is then slow to list
and to open. Compaction merges parts of one model until they hold ``PART_ROWS`` rows:

1. the merged part is put, which counts for nothing yet;
2. its entry is created, from which moment it counts and what it replaces does not (``curate.ledger``);
3. what was replaced is removed by whoever opens the folder to write next, or by the next compaction: readers that began
   before the second step still find it until then.

A kill between any two steps leaves one of these states. The numbers, the digest of the evidence and the chunks that
count as done are the same before and after. Parts of examples are left alone, because chunks are slices of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from curate.ledger import Entry
from curate.records import read_header
from curate.storage import storage_at
from curate.store import Store

FEWEST = 64
"""Fewer parts than this are not worth a merged one, which is not merged again."""
PART_ROWS = 2**19
"""Rows of a merged part, at most."""


@dataclass(frozen=True)
class Compaction:
    """How many parts of scores counted before and after, and how many older ones were removed."""

    before: int
    after: int
    removed: int

    def as_json(self) -> dict[str, int]:
        """Return plain values."""
        return asdict(self)


def compact(place: Path | str) -> Compaction:
    """Merge the small parts of a store; ``UserError`` when there is none, or when another process writes a folder.

    On an object store others may go on writing: of two compactions at the same time one finds its number taken, looks
    again and goes on with what is left.
    """
    with Store.create_or_open(place, read_header(storage_at(place))) as store:
        store.sweep()
        before = _n_parts(store)
        while groups := merges(store.entries()):
            for group in groups:
                if not store.merge_nll(group):
                    break
        return Compaction(before, _n_parts(store), store.swept)


def merges(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Return which parts are to be merged with each other."""
    small = [e for e in entries if e.kind == "nll" and not e.replaces and e.rows <= PART_ROWS // FEWEST]
    groups: list[list[Entry]] = []
    rows = 0
    for entry in sorted(small, key=lambda e: (e.model_id or "", e.part)):
        if not groups or groups[-1][0].model_id != entry.model_id or rows + entry.rows > PART_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(entry)
        rows += entry.rows
    return [group for group in groups if len(group) >= FEWEST]


def _n_parts(store: Store) -> int:
    return sum(entry.kind == "nll" for entry in store.entries())
