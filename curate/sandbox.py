"""A stranger's SQL over a store, in a process of its own that can neither reach files nor outlive its limits.

The parent checks the store and hands over the list of its files and the SQL; the child binds itself, opens the files,
makes the views of ``curate.query``, locks DuckDB down, and only then looks at the SQL. Rows come back as Arrow.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from curate.core.errors import Exit, UserError, unknown
from curate.core.files import atomic
from curate.core.terminal import CONTROL, columns, safe
from curate.parts import SCHEMAS
from curate.query import VIEWS, Ensemble, choose, corpora_of, define_views
from curate.store import Store

ALLOWED = (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN)
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "PYTHONHOME", "TZ")
ADDRESS_MARGIN_MB = 6144
"""Address space beyond DuckDB's limit: libraries, thread stacks and pyarrow's pool, most of it never touched."""
START_SECONDS = 30.0
"""How long the child may take to start; its own clock begins after that."""
CELL_CHARS = 80
CHILD = (sys.executable, "-P", "-c", "from curate.sandbox import serve; serve()")
TOLD = (UserError, duckdb.Error, pa.ArrowException, MemoryError, OSError)
"""What the child passes on as a sentence; after the first rows, pyarrow makes an OSError of any error of DuckDB's."""


@dataclass(frozen=True)
class Limits:
    """What a query may use, and the eps and members of its view ``scores``."""

    seconds: float = 60.0
    max_rows: int | None = None
    eps: float = 0.1
    members: tuple[str, ...] | None = None
    memory_mb: int = 4096
    threads: int = 4


@dataclass(frozen=True)
class SqlResult:
    """The rows of a query, and whether there were more than were asked for."""

    table: pa.Table
    cut: bool


def run_sql(place: Path | str, sql: str, limits: Limits = Limits()) -> SqlResult:
    """Run one SELECT or EXPLAIN over a store in a child process and return its rows.

    The store is checked here; the child gets the list of files. Raises ``UserError`` for a damaged store, for SQL
    that DuckDB or the rules refuse, and when the query needs more time or memory than ``limits`` allow.
    """
    request = request_for(Store.open_read(place), sql, limits)
    try:
        child = subprocess.run(CHILD, input=json.dumps(request).encode(), capture_output=True, env=_environment(),
                               timeout=limits.seconds + START_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _stopped(limits) from None
    _check_ended(child.returncode, child.stderr, limits)
    return opened(child.stdout)


def write_sql(place: Path | str, sql: str, out: Path, limits: Limits = Limits()) -> int:
    """Write all rows of a query to ``out``, a Parquet file that appears whole or not at all; return how many.

    The child is bound as by ``run_sql`` and writes no file: rows come through a pipe, a few thousand at a time, and
    this process writes them. Columns of the same name become a, a_1, a_2. Raises ``UserError`` as ``run_sql`` does.
    """
    if out.suffix != ".parquet":
        raise UserError(f"{out} is no known format.", "Possible ending: .parquet.")
    request = request_for(Store.open_read(place), sql, limits) | {"stream": True}
    with subprocess.Popen(CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=_environment()) as child:
        timer = threading.Timer(limits.seconds + START_SECONDS, child.kill)
        timer.start()
        try:
            with child.stdin:
                child.stdin.write(json.dumps(request).encode())
            with atomic(out) as handle:
                return _received(child, handle, limits)
        finally:
            timer.cancel()
            child.kill()


def _received(child: subprocess.Popen[bytes], handle: BinaryIO, limits: Limits) -> int:
    """Write what a child streams as Parquet and return the number of rows; see ``stream`` for what it sends."""
    head, n_rows = child.stdout.readline(), 0
    if head:
        _raise_told(json.loads(head))
        try:
            with pa.ipc.open_stream(child.stdout) as reader:
                schema = pa.schema([f.with_name(n) for f, n in zip(reader.schema, _distinct(reader.schema.names))])
                with _parquet(handle, schema) as writer:
                    for batch in reader:
                        writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
                        n_rows += batch.num_rows
        except (pa.ArrowInvalid, EOFError) as err:
            head = str(err).encode()  # the child died in the middle
        else:
            head = child.stdout.readline()
    said = child.stderr.read()
    _check_ended(child.wait(), said, limits)
    _raise_told(json.loads(head))
    return n_rows


def _parquet(handle: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
    try:
        return pq.ParquetWriter(handle, schema, compression="zstd", write_page_checksum=True)
    except pa.ArrowException as err:
        raise UserError(f"The rows cannot be written as Parquet: {err}.", "Cast the column to VARCHAR.") from None


def _environment() -> dict[str, str]:
    environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    return environment | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
                          "ARROW_DEFAULT_MEMORY_POOL": "system"}


def _stopped(limits: Limits) -> UserError:
    return UserError(f"The query was stopped after {limits.seconds:g} seconds.", "Make it smaller, or raise --seconds.")


def _check_ended(status: int, stderr: bytes, limits: Limits) -> None:
    """Raise what a child's exit status means."""
    if status == -signal.SIGALRM:
        raise _stopped(limits)
    if status:
        last = stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"exit status {status}"
        raise UserError(f"The process of the query died: {last}.", "It may have needed more memory than "
                        f"{limits.memory_mb} MiB; make the query smaller.", Exit.ENVIRONMENT)


def request_for(store: Store, sql: str, limits: Limits) -> dict[str, Any]:
    """Return what the child needs to know, in plain values: the SQL, the limits, the models, the checked files."""
    return {"sql": sql, "limits": asdict(limits), "ensemble": asdict(choose(store, limits.members)),
            "corpora": corpora_of(store),
            "files": {kind: [str(path.absolute()) for path in store.part_files(kind)] for kind in SCHEMAS}}


def opened(reply: bytes) -> SqlResult:
    """Read what ``answer`` returned; an error in it is raised as the ``UserError`` that it is."""
    head, _, payload = reply.partition(b"\n")
    said = json.loads(head)
    _raise_told(said)
    return SqlResult(pa.ipc.open_stream(payload).read_all(), said["cut"])


def _raise_told(said: Mapping[str, Any]) -> None:
    if "error" in said:
        raise UserError(said["error"], said["hint"], Exit(said["exit_code"]))


def serve() -> None:
    """Be the child: read a request from stdin, bind this process, answer on stdout."""
    request = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    bind_process(Limits(**request["limits"]))
    stream(request, out) if request.get("stream") else out.write(answer(request))
    out.flush()
    os._exit(0)


def answer(request: Mapping[str, Any]) -> bytes:
    """Return a line of JSON, followed by an Arrow stream of the rows if the query went well."""
    limits = Limits(**request["limits"])
    try:
        table, cut = _rows(request, limits)
        payload = pa.BufferOutputStream()
        with pa.ipc.new_stream(payload, table.schema) as writer:
            writer.write_table(table)
        return json.dumps({"cut": cut}).encode() + b"\n" + payload.getvalue().to_pybytes()
    except TOLD as err:
        return _as_line(err, limits)


def stream(request: Mapping[str, Any], out: BinaryIO) -> None:
    """Write an empty JSON object in a line, all rows as an Arrow stream, and another such line; or what went wrong."""
    limits = Limits(**request["limits"])
    try:
        reader = _reader(request, limits)
        out.write(b"{}\n")
        with pa.ipc.new_stream(out, reader.schema) as writer:
            for batch in reader:
                writer.write_batch(batch)
        out.write(b"{}\n")
    except TOLD as err:
        out.write(_as_line(err, limits))


def _as_line(err: Exception, limits: Limits) -> bytes:
    """Return what went wrong as a line of JSON."""
    if isinstance(err, UserError):
        said = err
    elif isinstance(err, duckdb.OutOfMemoryException | MemoryError) or str(err).startswith("Out of Memory Error"):
        said = UserError(f"The query needs more than {limits.memory_mb} MiB of memory.",
                         "Make it smaller: fewer columns, a WHERE, an aggregate.", Exit.ENVIRONMENT)
    else:
        said = UserError(str(err).partition("\n")[0], _hint(str(err)))
    return json.dumps({"error": said.message, "hint": said.hint, "exit_code": int(said.exit_code)}).encode() + b"\n"


def bind_process(limits: Limits) -> None:
    """Let the kernel keep the limits: it kills this process when its time is up and refuses every write to a file."""
    signal.setitimer(signal.ITIMER_REAL, limits.seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        ceiling = (limits.memory_mb + ADDRESS_MARGIN_MB) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))


def _rows(request: Mapping[str, Any], limits: Limits) -> tuple[pa.Table, bool]:
    reader = _reader(request, limits)
    batches, n_rows = [], 0
    for batch in reader:
        batches.append(batch)
        n_rows += batch.num_rows
        if limits.max_rows is not None and n_rows > limits.max_rows:
            break
    table = pa.Table.from_batches(batches, reader.schema)
    return table.slice(0, limits.max_rows), limits.max_rows is not None and n_rows > limits.max_rows


def _reader(request: Mapping[str, Any], limits: Limits) -> pa.RecordBatchReader:
    """Return the rows of a request in batches, from a connection without rights; ``UserError`` for other SQL."""
    connection = duckdb.connect()
    for kind, schema in SCHEMAS.items():
        connection.register(f"{kind}_parts", _dataset(request["files"][kind], schema))
    define_views(connection, {kind: f"{kind}_parts" for kind in SCHEMAS}, Ensemble(**request["ensemble"]), limits.eps,
                 request["corpora"])
    _lock_down(connection, limits)
    statements = connection.extract_statements(request["sql"])
    if len(statements) != 1 or statements[0].type not in ALLOWED:
        given = ", ".join(s.type.name for s in statements) or "nothing"
        raise UserError(f"Only one SELECT or EXPLAIN is allowed, not {given}.",
                        "The store is read-only here; send one query at a time.")
    return connection.sql(statements[0]).to_arrow_reader(8192)


def _dataset(files: Sequence[str], schema: pa.Schema) -> ds.Dataset:
    """Return a lazy data set over the files, with page checksums verified."""
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    return ds.dataset(list(files), schema=schema, format=ds.ParquetFileFormat(default_fragment_scan_options=options))


def _lock_down(connection: duckdb.DuckDBPyConnection, limits: Limits) -> None:
    """Take files, network, extensions, Python variables and the settings away from a connection, for good."""
    for setting in ("python_enable_replacements = false", "autoload_known_extensions = false",
                    "autoinstall_known_extensions = false", "allow_community_extensions = false",
                    "temp_directory = ''", f"memory_limit = '{int(limits.memory_mb)}MiB'",
                    f"threads = {int(limits.threads)}", "enable_external_access = false",
                    "lock_configuration = true"):
        connection.execute(f"SET {setting}")


def _hint(text: str) -> str:
    """Return what DuckDB, or we, can say about an unknown name."""
    table = re.search(r"Table with name (\S+) does not exist", text)
    if table:
        return f"{unknown('view', table[1], VIEWS).hint} Views: {', '.join(VIEWS)}; and scores_at(eps)."
    near = re.search(r"^(?:Did you mean|Candidate bindings:) .+$", text, re.MULTILINE)
    if near:
        return near[0].replace("Candidate bindings:", "Did you mean one of:")
    return ""


def format_result(table: pa.Table, style: str) -> str:
    """Return rows as ``table``, ``csv`` or ``json``, ending in a line break and safe to print on a terminal.

    In JSON control characters are escaped, so the text survives; in the other two they are replaced. JSON has no
    NaN or infinity: they become null. Columns of the same name become a, a_1, a_2 there. Raises ``UserError`` for a
    date that Python cannot hold.
    """
    try:
        return _formatted(table, style)
    except (OverflowError, ValueError) as err:
        raise UserError(f"The rows cannot be shown: {err}.", "Cast dates and times to VARCHAR.") from None


def _formatted(table: pa.Table, style: str) -> str:
    if style == "json":
        named = table.rename_columns(_distinct(table.column_names))  # keys of an object; a join may repeat a name
        text = json.dumps(_plain(named.to_pylist()), ensure_ascii=False, indent=1, allow_nan=False, default=str)
        return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"
    rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    if style == "csv":
        sink = io.StringIO()
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(table.column_names)
        writer.writerows(rows)
        return safe(sink.getvalue())
    if table.column_names == ["explain_key", "explain_value"]:
        return "".join(safe(str(row[1])).rstrip() + "\n" for row in rows)
    return columns([[_cell(value) for value in row] for row in rows], table.column_names) + "\n"


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names with _1, _2, ... at those that were there before."""
    found: dict[str, None] = {}
    for name in names:
        free = (f"{name}_{k}" for k in itertools.count(1))
        found[name if name not in found else next(other for other in free if other not in {*found, *names})] = None
    return list(found)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _cell(value: Any) -> str:
    text = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= CELL_CHARS else text[:CELL_CHARS - 3] + "..."
