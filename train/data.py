"""From a mix manifest to rows and token ids, in the manifest's order; whatever does not fit is refused before training.

The manifest's own digest is checked where it is read (``MixManifest.read``). Here: every source is pinned and as it
was, every entry of the order is well formed, named once, and held by the source it names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from curate.core.chat import Encoded, encode
from curate.core.documents import MixManifest
from curate.core.errors import Exit, UserError
from curate.core.example import Example
from curate.core.sources import check_pinned, named_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENTRY = re.compile(r"(finetune|safe)/([0-9a-f]{32})")


@dataclass(frozen=True)
class MixRow:
    """One row of a mix: which source it is from (``finetune`` or ``safe``) and what it says."""

    source: str
    example: Example


@dataclass(frozen=True)
class EncodedMix:
    """A mix as token ids: ``rows`` are the ``ok`` ones, in order.

    ``n_finetune`` and ``n_safe`` count them by source, ``statuses`` counts all rows of the mix.
    """

    rows: list[Encoded]
    n_finetune: int
    n_safe: int
    statuses: dict[str, int]


def load_mix(manifest: MixManifest, root: Path) -> list[MixRow]:
    """Return the rows that ``manifest`` names, in its order; its paths are relative to ``root``.

    Raises ``UserError`` (integrity) for a source that is not pinned, missing, changed or outside ``root``, and for an
    entry that is malformed, named twice or held by no source.
    """
    entries = _entries(manifest)
    found: dict[tuple[str, str], Example] = {}
    for name, source in manifest.sources.items():
        check_pinned(name, source)
        wanted = [example_id for where, example_id in entries if where == name]
        found |= {(name, example_id): row for example_id, row in named_rows(source, root, wanted).items()}
    missing = [entry for entry in entries if entry not in found]
    if missing:
        where, example_id = missing[0]
        raise _refused(f"{len(missing)} of {len(entries)} rows of the manifest are not in its sources; first: "
                       f"{where}/{example_id}.", "Make the manifest anew from the data as it is.")
    return [MixRow(where, found[where, example_id]) for where, example_id in entries]


def encode_mix(tokenizer: PreTrainedTokenizerBase, rows: Sequence[MixRow], max_tokens: int) -> EncodedMix:
    """Return the rows as token ids; rows that are too long or have an empty answer are counted and left out.

    Raises ``UserError`` (bad data) where no row is left.
    """
    encoded = encode(tokenizer, [row.example for row in rows], max_tokens)
    kept = Counter(row.source for row, item in zip(rows, encoded, strict=True) if item.status == "ok")
    statuses = dict(sorted(Counter(item.status for item in encoded).items()))
    if not kept:
        raise UserError(f"No row of the mix can be trained on: {statuses}.",
                        "Raise --max-tokens, or give rows with answers.", Exit.BAD_DATA)
    return EncodedMix([item for item in encoded if item.status == "ok"], kept["finetune"], kept["safe"], statuses)


def _entries(manifest: MixManifest) -> list[tuple[str, str]]:
    """Return the order as (source, id), or refuse it."""
    if not manifest.order:
        raise _refused("The manifest names no rows.", "Give `curate select` a fine-tuning set or a share above 0.")
    entries, seen = [], set()
    for entry in manifest.order:
        match = ENTRY.fullmatch(entry)
        if match is None or match[1] not in manifest.sources:
            raise _refused(f"The manifest's order holds {entry!r}, which names no row of a source "
                           f"({', '.join(manifest.sources) or 'it has none'}).", "Make the manifest anew.")
        if match[2] in seen:
            raise _refused(f"The manifest names the row {match[2]} twice.", "Make the manifest anew.")
        seen.add(match[2])
        entries.append((match[1], match[2]))
    return entries


def _refused(message: str, hint: str) -> UserError:
    return UserError(message, hint, Exit.INTEGRITY)
