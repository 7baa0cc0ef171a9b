"""A mix manifest as a file that any other trainer reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curate.core.documents import MixManifest
from curate.core.errors import Exit, UserError
from curate.core.files import write_atomic
from curate.core.sources import named_rows


def rows(manifest: MixManifest, root: Path) -> Iterator[dict[str, Any]]:
    """Yield ``{"messages", "source", "example_id"}`` in the manifest's order; ``UserError`` if a row is not found."""
    found = {f"{name}/{example_id}": example for name, source in manifest.sources.items()
             for example_id, example in named_rows(source, root, manifest.ids(name)).items()}
    for entry in manifest.order:
        if entry not in found:
            raise UserError(f"The row {entry} of the manifest is in none of its sources.",
                            "Restore the source, or select again.", Exit.INTEGRITY)
        name, _, example_id = entry.partition("/")
        yield {**found[entry].to_row(), "source": name, "example_id": example_id}


def export(manifest: MixManifest, root: Path, out: Path) -> int:
    """Write the rows to ``out`` (.jsonl or .parquet), whole or not at all; return how many."""
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{out} is no known format.", "Possible endings: .jsonl, .parquet.")
    exported = list(rows(manifest, root))
    if out.suffix == ".jsonl":
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in exported).encode()
    else:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(exported), sink, write_page_checksum=True, compression="zstd")
        data = sink.getvalue().to_pybytes()
    write_atomic(out, data)
    return len(exported)
