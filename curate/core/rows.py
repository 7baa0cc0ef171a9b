"""Rows of the files that people have (JSON Lines, Parquet, CSV), each with its place; a bad one with what is wrong."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from curate.core.errors import Exit, UserError
from curate.core.example import RowError
from curate.core.terminal import quoted

MAX_LINE_BYTES = 8 * 2**20


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(place, row or RowError)`` of a JSON Lines file; a byte order mark and CRLF line ends are allowed."""
    offset = 0
    with open(path, "rb") as handle:
        number = 0
        while line := handle.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = f"line {number} (byte {offset})"
            size = len(line)
            text = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip(b" \t\r\n")
            row = _parsed(text) if text else None
            if size > MAX_LINE_BYTES and not line.endswith(b"\n"):
                size += _skip_line(handle)
                row = RowError(f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB")
            if number == 1 and text.startswith(b"[") and isinstance(row, list | RowError):
                row = RowError("it looks like one JSON array, not like a row on each line",
                               as_lines(path, "ROWS.jsonl"))
            if text:
                yield place, row
            offset += size


def as_lines(path: Path, to: Path | str) -> str:
    """Return how one JSON array becomes JSON Lines."""
    return f"Write a row on each line: jq -c '.[]' {quoted(str(path))} > {quoted(str(to))}"


def _skip_line(handle: io.BufferedReader) -> int:
    skipped = 0
    while piece := handle.readline(MAX_LINE_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as err:
        return RowError(f"no valid UTF-8 at byte {err.start} of the line")
    except json.JSONDecodeError as err:
        return RowError(f"no valid JSON: {err.msg} at character {err.pos} of the line")
    except ValueError as err:
        return RowError(f"no usable JSON: {err}")
    except RecursionError:
        return RowError("the JSON is nested too deeply")


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(place, row)`` of a Parquet file, its pages checked; ``UserError`` (bad data) where it is unreadable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        _check_distinct(file.schema_arrow.names, path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowException, ValueError, OverflowError, OSError) as err:  # the last of dates beyond Python's
        raise UserError(f"{path} is no readable Parquet file: {err}.", "Write it again.", Exit.BAD_DATA) from err


def csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(place, row or RowError)`` of a CSV file in UTF-8, its first line the header.

    ``UserError`` (bad data) at a stray quotation mark, after which nothing can be believed.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        reader = csv.DictReader(handle, strict=True)
        _check_distinct(_header(reader, path), path)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as err:  # where the next row begins is anybody's guess
                raise UserError(f"{path}, line {reader.reader.line_num}: no valid CSV: {err}.",
                                "Mend the row; what comes after it cannot be read, whatever --max-bad.",
                                Exit.BAD_DATA) from None
            yield f"line {reader.line_num}", _checked(row)


def _header(reader: csv.DictReader, path: Path) -> Sequence[str]:
    try:
        return reader.fieldnames or ()
    except csv.Error as err:
        raise UserError(f"{path}, line 1: no valid CSV: {err}.", "Mend the header.", Exit.BAD_DATA) from None


def _check_distinct(names: Sequence[str], path: Path) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise UserError(f"{path} has several columns called '{twice[0]}', of which only one could be read.",
                        "Rename all but one.", Exit.BAD_DATA)


def _checked(row: dict[str, str]) -> dict[str, str] | RowError:
    if None in row or None in row.values():
        return RowError("the number of fields differs from the header's")
    for column, value in row.items():
        try:
            f"{column}{value}".encode()
        except UnicodeEncodeError:
            return RowError(f"no valid UTF-8 in the column {column!a}", "Save the file as UTF-8")
    return row
