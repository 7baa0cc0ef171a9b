"""The tables inside a store: their schemas, and the bytes of a part."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from curate.ledger import Entry, Kind

EXAMPLES_SCHEMA = pa.schema([
    pa.field("example_id", pa.string(), nullable=False), pa.field("corpus", pa.string(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False), pa.field("answer", pa.string(), nullable=False),
    pa.field("messages", pa.string(), nullable=False), pa.field("meta", pa.string(), nullable=False),
    pa.field("n_prompt_tokens", pa.int32(), nullable=False), pa.field("n_answer_tokens", pa.int32(), nullable=False),
    pa.field("status", pa.string(), nullable=False)])
"""``messages`` and ``meta`` (see ``intake.meta_json``) are JSON; ``status`` is ok, too_long, empty_answer or
unrenderable. A part holds less than 2 GiB in each column, which is what a column of these types can hold."""

NLL_SCHEMA = pa.schema([
    pa.field("example_id", pa.string(), nullable=False), pa.field("model_id", pa.string(), nullable=False),
    pa.field("nll_sum", pa.float64()), pa.field("n_tokens", pa.int32(), nullable=False),
    pa.field("eot_nll", pa.float64()), pa.field("status", pa.string(), nullable=False)])
"""``nll_sum`` is in nats over the ``n_tokens`` answer tokens, ``eot_nll`` in nats of the end-of-turn token."""

CORPUS_SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False),
                           pa.field("example_id", pa.string(), nullable=False)])

SCHEMAS: Mapping[Kind, pa.Schema] = {"examples": EXAMPLES_SCHEMA, "nll": NLL_SCHEMA, "corpus": CORPUS_SCHEMA}
INDEX = {"example_id": pl.String, "n_prompt_tokens": pl.Int32, "n_answer_tokens": pl.Int32, "status": pl.String}


def part_bytes(table: pa.Table) -> bytes:
    """Return a part's file: the same rows, in whatever order, give the same bytes."""
    sink = io.BytesIO()
    pq.write_table(table.sort_by("example_id"), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def checked(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table in exactly this schema; ``ValueError`` if that takes more than a cast, or an id occurs twice."""
    if sorted(table.column_names) != sorted(schema.names):
        raise ValueError(f"columns {table.column_names}, not {schema.names}")
    table = table.select(schema.names).cast(schema)
    if len(table["example_id"].unique()) != table.num_rows:
        raise ValueError("an example_id occurs twice")
    return table


def new_rows(table: pa.Table, known: Collection[str]) -> pa.Table:
    """Return the rows whose example is not in ``known``."""
    return table.filter(pa.array([i not in known for i in table["example_id"].to_pylist()], pa.bool_()))


def read_columns(paths: Sequence[Path], schema: pa.Schema, columns: Sequence[str]) -> pl.DataFrame:
    """Return columns of parts that were checked before."""
    empty = pl.from_arrow(schema.empty_table().select(list(columns)))
    return pl.concat([empty, *(pl.read_parquet(path, columns=list(columns), glob=False) for path in paths)])


@dataclass(frozen=True)
class Lookup:
    """Which part each example is in, found by bisection, so that a chunk costs no pass over all ids."""

    ids: pl.Series
    """Sorted."""
    owners: pl.Series
    """Which of ``entries`` each is in."""
    entries: Sequence[Entry]

    @classmethod
    def of(cls, entries: Sequence[Entry], paths: Sequence[Path]) -> Self:
        """Read the ids of parts that were checked before."""
        frames = [read_columns([path], EXAMPLES_SCHEMA, ["example_id"]).with_columns(owner=pl.lit(number, pl.Int32))
                  for number, path in enumerate(paths)]
        table = pl.concat([pl.DataFrame(schema={"example_id": pl.String, "owner": pl.Int32}), *frames])
        table = table.sort("example_id")
        return cls(table["example_id"], table["owner"], entries)

    def parts(self, ids: Sequence[str]) -> tuple[list[Entry], list[str]]:
        """Return the entries that hold some of ``ids``, and the ids that none holds."""
        if not len(self.ids):
            return [], list(ids)
        wanted = pl.Series(ids, dtype=pl.String)
        places = self.ids.search_sorted(wanted).clip(0, len(self.ids) - 1)
        there = self.ids.gather(places) == wanted
        owners = self.owners.gather(places.filter(there)).unique().sort()
        return [self.entries[number] for number in owners], wanted.filter(~there).to_list()


def shape(path: Path) -> tuple[pa.Schema, int] | None:
    """Return columns and number of rows that a Parquet file says it has; None if it is none."""
    try:
        metadata = pq.read_metadata(path)
        return metadata.schema.to_arrow_schema().remove_metadata(), metadata.num_rows
    except (pa.ArrowException, OSError):
        return None
