"""What the three command lines share: errors as sentences, exit codes, progress, safe text, JSON."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NoReturn, TextIO
from weakref import WeakSet

import click

from curate.core import processes
from curate.core.errors import Exit, UserError

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
PLAIN_EVERY_S = 30.0
ROOM_HINT = ("Free memory, or set TMPDIR to a folder on a disk with space, where what does not fit is put meanwhile; "
             "nothing stored is lost.")
FILE_HINT = "Look at the path, its permissions and its disk; what was finished is kept, so run it again."


def safe(text: str) -> str:
    """Return ``text`` without control and direction characters, so that a row cannot write to the terminal."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\t", "    "))


_ARRIVED: set[int] = set()
"""Signals that have arrived. Libraries that wait in C pass on the exception of a handler as another one: Ray that of
any signal as Ctrl-C, DuckDB both as a RuntimeError."""
BROKEN_FILE = {errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}
"""What only files and disks do; Python names the file with some of them only."""


STOPPED_TOO: WeakSet[Any] = WeakSet()
"""Database connections whose queries a signal ends: of its own accord DuckDB finishes what its threads are at first."""


_WATCHED: list[int] = []
"""Where the numbers of signals can be read, once a thread does."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""

    def __init__(self) -> None:
        super().__init__()
        _ARRIVED.add(signal.SIGTERM)


class Number(click.FloatRange):
    """The type of an option that is a finite number; click lets NaN through every bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See ``click.FloatRange.convert``."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


class Room(click.Group):
    """A command group that ends whatever is no bug of ours with a sentence and its exit code, never a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; see ``click.Group.main``."""
        if kwargs.pop("standalone_mode", True) is False:
            return super().main(*args, standalone_mode=False, **kwargs)
        argv = list(kwargs.get("args") or (args[0] if args else None) or sys.argv[1:])
        as_json = self._wants_json(argv)
        _ARRIVED.clear()
        sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
        again = " ".join([_program(), *map(quoted, argv)]) if processes.count() == 1 else "the same launch"
        if processes.rank():
            sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or someone else's
            signal.signal(signal.SIGINT, interrupt)
        _watch()
        try:
            result = super().main(*args, standalone_mode=False, **kwargs)
            sys.exit(result if isinstance(result, int) else 0)
        except UserError as err:
            _fail(err.message, err.hint, err.exit_code, as_json)
        except click.ClickException as err:
            if as_json:
                _fail(err.format_message(), "", err.exit_code, True)
            err.show()
            sys.exit(err.exit_code)
        except (KeyboardInterrupt, click.Abort):
            _interrupted(again, as_json)
        except Exception as err:
            if _cut_off(err):
                _interrupted(again, as_json)
            told = _sentence(err)
            if told is None:
                raise
            _fail(told.message, told.hint, told.exit_code, as_json)

    def _wants_json(self, argv: Sequence[str]) -> bool:
        """Whether a command line asks for JSON on stdout; ``--json FILE`` does not."""
        command = next((self.commands[word] for word in argv if word in self.commands), self)
        file = any("--json" in p.opts and not p.is_flag for p in command.params if isinstance(p, click.Option))
        return not file and ("--json" in argv or "--format=json" in argv or ("--format", "json") in pairwise(argv))


class _Lasting(io.FileIO):
    """A descriptor that goes on as the null device once nobody reads it any more (``| head``)."""

    def write(self, data: Any) -> int:
        """See ``io.FileIO.write``."""
        try:
            return super().write(data)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def lasting(stream: TextIO) -> TextIO:
    """Return stdout or stderr so that neither a reader who leaves nor a character it cannot show ends the work.

    Characters outside its encoding are written as escapes. What stands in for the real stream is returned as it is.
    """
    if stream is None or stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    stream.flush()
    raw = _Lasting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace",
                            line_buffering=stream is sys.__stderr__ or raw.isatty())


def _program() -> str:
    """Return what this program was called as, also for ``python -m``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.parent or spec.name}" if spec else os.path.basename(sys.argv[0])


def quoted(word: str) -> str:
    """Return a word as a shell reads it; what ``safe`` would change is written as bytes, in ``$'...'``."""
    if re.fullmatch(r"[\w@%+=:,./-]+", word):
        return word
    if safe(word) == word and "\n" not in word:
        return "'" + word.replace("'", "'\\''") + "'"
    return "$'" + "".join(_as_bytes(c) if c in "\\'\t\n" or CONTROL.match(c) else c for c in word) + "'"


def _as_bytes(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def _terminate(signum: int, frame: Any) -> None:
    _stop_queries()
    raise Terminated


def interrupt(signum: int, frame: Any) -> None:
    """Be the handler of SIGINT: note that it has arrived, and do what Python does."""
    _ARRIVED.add(signum)
    _stop_queries()
    raise KeyboardInterrupt


def _watch() -> None:
    """Have a thread stop queries: Python's handlers wait until the library that runs comes back to Python."""
    if _WATCHED or threading.current_thread() is not threading.main_thread():
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _WATCHED.append(reading)
    threading.Thread(target=_stop_when_told, args=(reading,), daemon=True).start()


def _stop_when_told(pipe: int) -> None:
    while arrived := os.read(pipe, 64):
        if {signal.SIGINT, signal.SIGTERM} & set(arrived):
            _stop_queries()


def _stop_queries() -> None:
    for connection in list(STOPPED_TOO):
        connection.interrupt()


def _interrupted(again: str, as_json: bool) -> NoReturn:
    """End as a signal asks for, with the line to go on with."""
    _stop_listening()
    word, code = (("Terminated", Exit.TERMINATED) if signal.SIGTERM in _ARRIVED else
                  ("Interrupted", Exit.INTERRUPTED))
    _fail(f"{word}; what was finished is kept.", f"Go on with: {again}", code, as_json)


def _cut_off(err: Exception) -> bool:
    """Return whether this is how DuckDB passes on the exception of a signal's handler."""
    return bool(_ARRIVED) and (_of_duckdb(err, "InterruptException") or
                               (type(err) is RuntimeError and str(err) == "Query interrupted"))


def _of_duckdb(err: Exception, *names: str) -> bool:
    """Return whether an error is of one of these classes of DuckDB, which is not imported for it."""
    duckdb = sys.modules.get("duckdb")
    return duckdb is not None and isinstance(err, tuple(getattr(duckdb, name) for name in names))


def _sentence(err: Exception) -> UserError | None:
    """Return what to say of an error that comes from this machine: memory, disk or files; None where it is a bug."""
    if isinstance(err, MemoryError) or _of_duckdb(err, "OutOfMemoryException"):
        return UserError(f"There is not enough memory: {_first_line(err) or 'none is left'}.", ROOM_HINT,
                         Exit.ENVIRONMENT)
    if _of_duckdb(err, "IOException"):
        return UserError(f"A file cannot be read or written: {_first_line(err)}.", ROOM_HINT, Exit.ENVIRONMENT)
    if not isinstance(err, OSError):
        return None
    if err.filename is not None:
        what = f"{err.filename} cannot be read or written: {err.strerror}."
    elif err.errno in BROKEN_FILE or isinstance(err, PermissionError):
        what = f"A file cannot be read or written: {_first_line(err)}."
    else:
        return None
    return UserError(what, FILE_HINT, Exit.ENVIRONMENT)


def _first_line(err: Exception) -> str:
    return str(err).partition("\n")[0].rstrip(". ")


def _stop_listening() -> None:
    """Let a second Ctrl-C not cut off the line that says how to go on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _fail(message: str, hint: str, code: int, as_json: bool) -> NoReturn:
    if as_json:
        emit_json({"error": safe(message), "hint": safe(hint), "exit_code": int(code)})
    rank = processes.rank()
    if rank and code not in (Exit.INTERRUPTED, Exit.TERMINATED):
        click.echo(safe(f"[process {rank} of {processes.count()}] Error: {message} {hint}"), err=True)
    say(f"Error: {message}")
    if hint:
        say(hint)
    sys.exit(int(code))


def say(text: str = "") -> None:
    """Print a line for people: on stderr, so that stdout holds results only; of several processes the first does."""
    if not processes.rank():
        click.echo(safe(text), err=True)


def emit_json(value: Any) -> None:
    """Print one JSON document on stdout, in ASCII unless that takes UTF-8."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(value, ensure_ascii=not utf8, indent=1, allow_nan=False))


def quiet_libraries() -> None:
    """Turn off the progress bars and warnings of the model libraries; our own say what matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft|torch")
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    logging.getLogger("accelerate").setLevel(logging.ERROR)


class Progress:
    """Counts work: a bar with rate and ETA on a terminal, a plain line every 30 s elsewhere."""

    def __init__(self, label: str, total: float | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.note = ""
        self.started = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def advance(self, amount: float, note: str = "") -> None:
        """Add finished work, in units; ``note`` (such as a loss) is shown beside the rate."""
        self.done += amount
        self.note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self.rate(), note=safe(note))

    def rate(self) -> str:
        """Return the rate so far, for people."""
        per_second = self.done / max(time.monotonic() - self.started, 1e-9)
        return f"{per_second:,.1f} {self.unit}/s" if per_second < 10 else f"{per_second:,.0f} {self.unit}/s"

    def line(self) -> str:
        """Return the state in one line."""
        if self.total is None:
            return f"{self.label}: {self.done:,.0f} {self.unit}, {self.rate()} {self.note}".rstrip()
        spent = time.monotonic() - self.started
        left = spent * (self.total - self.done) / self.done if self.done else 0.0
        share = self.done / self.total if self.total else 1.0
        return (f"{self.label}: {share:.0%} of {self.total:,.0f} {self.unit}, {self.rate()}, "
                f"{left:.0f} s left {self.note}").rstrip()


@contextmanager
def progress(label: str, total: float | None, unit: str) -> Iterator[Progress]:
    """Show progress for the length of a ``with`` block and one closing line after it; ``total`` may be unknown."""
    state = Progress(label, total, unit)
    if not sys.stderr.isatty() or processes.rank():
        with _lines(state):
            yield state
    else:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                   TextColumn("{task.fields[rate]}", markup=False), TimeRemainingColumn(),
                   TextColumn("{task.fields[note]}", markup=False))
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            state._bar, state._task = bar, bar.add_task(label, total=total, rate="", note="")
            yield state
    say(f"{label}: {state.done:,.0f} {unit} in {time.monotonic() - state.started:.1f} s ({state.rate()})")


@contextmanager
def _lines(state: Progress) -> Iterator[None]:
    """Say the state at every interval, whether there was progress or not."""
    stop = threading.Event()

    def tell() -> None:
        while not stop.wait(PLAIN_EVERY_S):
            say(state.line())

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        stop.set()
        teller.join()


def columns(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Return a plain table with aligned columns; numbers to the right."""
    cells = [[safe(str(c)) for c in row] for row in [header, *rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    right = [all(re.fullmatch(r"[-+]?[\d.,%]*|-", row[k]) for row in cells[1:]) for k in range(len(header))]
    lines = ["  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
             for row in cells]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
