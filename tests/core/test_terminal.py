"""What a user sees: safe text, one JSON document, exit codes, and how to go on after an interruption."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from curate.core import terminal
from curate.core.errors import Exit, UserError, require, unknown
from curate.core.terminal import Progress, Room, columns, emit_json, progress, safe

TOOL = """
import signal, sys, time
import click
from curate.core.terminal import STOPPED_TOO, Room, emit_json, say

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may start with it ignored

@click.group(cls=Room)
def main():
    pass

@main.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--name")
def wait(as_json, name):
    say("ready")
    time.sleep(60)

@main.command()
@click.option("--json", "as_json", is_flag=True)
@click.argument("query")
@click.option("--memory", default="1GB")
@click.option("--told", is_flag=True)
def ask(as_json, query, memory, told):
    import duckdb
    connection = duckdb.connect(config={"memory_limit": memory, "temp_directory": "/dev/null/tmp"})
    STOPPED_TOO.add(connection)
    if told:
        raise RuntimeError("Query interrupted")
    say("ready")
    connection.execute(query).fetchall()

@main.command()
def busy():
    import duckdb, hashlib, os, threading
    connection = duckdb.connect()
    STOPPED_TOO.add(connection)
    def ask():
        try:
            connection.execute("SELECT count(*) FROM range(100000000000) t(i) WHERE sqrt(i)::VARCHAR LIKE '%77%'")
        except duckdb.InterruptException:
            os.write(2, b"stopped\\n")
    asking = threading.Thread(target=ask)
    asking.start()
    say("ready")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)     # in C: no handler of Python's runs before it is done
    os.write(2, b"back in Python\\n")
    asking.join()

@main.command("open")
@click.option("--json", "as_json", is_flag=True)
@click.argument("path")
def open_(as_json, path):
    print(open(path).read())

@main.command()
@click.option("--err", is_flag=True)
def spam(err):
    for _ in range(100_000):
        click.echo("x" * 100, err=err)
    open("worked", "w").close()
    return 8

@main.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True)
def tell(path, as_json):
    emit_json({"path": path, "wide": "\u2019 \U0001f600"}) if as_json else click.echo(f"{path} \u2019")

main()
"""


@pytest.fixture
def tool(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a small tool, as a script or (``module=True``) with ``python -m``."""
    package = tmp_path / "tool"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(TOOL)
    (tmp_path / "tool.py").write_text(TOOL)
    root = Path(__file__).resolve().parents[2]
    started: list[subprocess.Popen[str]] = []

    def start(*args: str, module: bool = False, by: Sequence[str] = ()) -> subprocess.Popen[str]:
        command = ["-m", "tool"] if module else [str(tmp_path / "tool.py")]
        started.append(subprocess.Popen(
            [*by, sys.executable, *command, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.wait()


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "Interrupted"),
                                                      (signal.SIGTERM, 143, "Terminated")], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module", [False, True], ids=["script", "python -m"])
def test_a_signal_ends_with_its_code_and_the_line_to_go_on_with(tool: Callable[..., subprocess.Popen[str]], number: int,
                                                                code: int, word: str, module: bool) -> None:
    child = tool("wait", "--json", "--name", "two words", module=module)
    assert child.stderr.readline() == "ready\n"
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    again = ("python -m tool" if module else "tool.py") + " wait --json --name 'two words'"
    assert child.returncode == code and "Traceback" not in err
    assert word in err and f"Go on with: {again}" in err
    assert json.loads(out) == {"error": f"{word}; what was finished is kept.", "hint": f"Go on with: {again}",
                               "exit_code": code}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_during_a_query_is_no_bug(tool: Callable[..., subprocess.Popen[str]], number: int, code: int) -> None:
    """DuckDB turns the exception of a signal's handler into ``RuntimeError: Query interrupted``."""
    query = "SELECT count(*) FROM range(100000000000) t(i) WHERE sqrt(i)::VARCHAR LIKE '%77%'"
    child = tool("ask", "--json", query)
    assert child.stderr.readline() == "ready\n"
    time.sleep(0.5)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code == json.loads(out)["exit_code"] and "Traceback" not in err
    assert 'Go on with: tool.py ask --json' in err
    _, err = (told := tool("ask", "SELECT 1", "--told")).communicate(timeout=60)
    assert told.returncode == Exit.BUG and "RuntimeError" in err, "the same text without a signal is a bug"


def test_a_query_ends_although_python_cannot_look(tool: Callable[..., subprocess.Popen[str]]) -> None:
    child = tool("busy")
    assert child.stderr.readline() == "ready\n"
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    assert child.stderr.readline() == "stopped\n", "the handler alone would come after this"
    child.communicate(timeout=60)
    assert child.returncode == Exit.INTERRUPTED


@pytest.mark.parametrize(("query", "memory", "told"), [
    ("SELECT list(repeat('x', 1000) || i) FROM range(1000000) t(i)", "20MB", "There is not enough memory: Out of Mem"),
    ("SELECT repeat('x', 1000) || i AS s FROM range(1000000) t(i) ORDER BY s", "60MB", "be read or written: IO Error"),
    ("SELECT * FROM read_parquet('/nowhere.parquet')", "1GB", "cannot be read or written: IO Error")])
def test_a_query_that_this_machine_cannot_hold_is_no_bug(tool: Callable[..., subprocess.Popen[str]], query: str,
                                                         memory: str, told: str) -> None:
    child = tool("ask", "--json", query, "--memory", memory)
    out, err = child.communicate(timeout=60)
    assert child.returncode == Exit.ENVIRONMENT == json.loads(out)["exit_code"] and "Traceback" not in err
    assert told in json.loads(out)["error"] and "TMPDIR" in json.loads(out)["hint"]


def test_wrong_sql_of_ours_is_a_bug(tool: Callable[..., subprocess.Popen[str]]) -> None:
    child = tool("ask", "SELECT a")
    _, err = child.communicate(timeout=60)
    assert child.returncode == Exit.BUG and "BinderException" in err


AS_OTHERS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search",
             "--inh-caps=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
"""Without root's right to read everything."""


@pytest.mark.skipif(bool(AS_OTHERS) and not shutil.which("setpriv"), reason="root reads every file")
def test_a_file_that_cannot_be_read_is_a_sentence(tool: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    path = tmp_path / "private.jsonl"
    path.write_text("x")
    path.chmod(0)
    child = tool("open", str(path), "--json", by=AS_OTHERS)
    out, err = child.communicate(timeout=60)
    assert child.returncode == Exit.ENVIRONMENT and "Traceback" not in err
    assert json.loads(out) == {"error": f"{path} cannot be read or written: Permission denied.",
                               "hint": terminal.FILE_HINT, "exit_code": 6}


@pytest.mark.parametrize(("error", "told"), [
    (OSError(errno.EIO, "Input/output error"), "A file cannot be read or written: [Errno 5] Input/output error."),
    (OSError(errno.ESTALE, "Stale file handle", "a.jsonl"), "a.jsonl cannot be read or written: Stale file handle."),
    (PermissionError("Permission denied (os error 13): a.parquet"),
     "A file cannot be read or written: Permission denied (os error 13): a.parquet."),
    (MemoryError(), "There is not enough memory: none is left."),
    (OSError("Not a gzip file"), None), (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), None),
    (ValueError("x"), None)], ids=repr)
def test_what_this_machine_does_to_us_is_told_apart_from_bugs(error: Exception, told: str | None) -> None:
    found = terminal._sentence(error)
    assert (found and found.message) == told and (found is None or found.exit_code == Exit.ENVIRONMENT)


@pytest.mark.parametrize("err", [False, True], ids=["stdout", "stderr"])
def test_a_reader_that_stops_reading_changes_nothing(tool: Callable[..., subprocess.Popen[str]], tmp_path: Path,
                                                     err: bool) -> None:
    """The work is done to its end, with its exit code: a gate in a pipe stays one."""
    child = tool("spam", *["--err"] * err)
    read, other = (child.stderr, child.stdout) if err else (child.stdout, child.stderr)
    read.readline()
    read.close()
    assert other.read() == "" and child.wait(timeout=20) == 8 and (tmp_path / "worked").is_file()
    other.close()


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_what_the_terminal_cannot_show_is_escaped(tool: Callable[..., subprocess.Popen[str]], encoding: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    odd = os.fsdecode(b"st\xe9re")
    out, err = tool("tell", odd).communicate(timeout=60)
    assert err == "" and out == {"utf-8": "st\\udce9re \u2019\n", "latin-1": "st\\udce9re \\u2019\n",
                                 "ascii": "st?re \u2019\n"}[encoding], "click takes ASCII for a mistake"
    out, err = tool("tell", odd, "--json").communicate(timeout=60)
    assert err == "" and json.loads(out) == {"path": odd, "wide": "\u2019 \U0001f600"}


@click.group(cls=Room)
def group() -> None:
    """Commands that end in every way."""


@group.command()
@click.argument("code", type=int)
@click.option("--json", "as_json", is_flag=True)
def fail(code: int, as_json: bool) -> None:
    raise UserError("It \x1b[31mbroke\u202e \ud800.", "Mend it.", Exit(code))


@group.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--n", type=int)
def fine(as_json: bool, n: int | None) -> int:
    emit_json({"n": n, "é": "\u2028"})
    return Exit.FAILURE_RATE if n else 0


@group.command()
@click.option("--json", "path", type=click.Path())
def write(path: str) -> None:
    raise UserError("It broke.", "Mend it.")


@group.command()
@click.option("--format", "style")
def shown(style: str) -> None:
    raise UserError("It broke.", "Mend it.")


@group.command()
def bug() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("code", [c for c in Exit if c != Exit.DONE])
def test_errors_are_sentences_with_their_exit_code(code: Exit) -> None:
    plain = CliRunner().invoke(group, ["fail", str(int(code))])
    assert plain.exit_code == code and plain.stdout == ""
    assert plain.stderr == "Error: It \ufffd[31mbroke\ufffd \ufffd.\nMend it.\n"
    both = CliRunner().invoke(group, ["fail", str(int(code)), "--json"])
    assert both.exit_code == code and both.stderr == plain.stderr
    assert json.loads(both.stdout) == {"error": "It \ufffd[31mbroke\ufffd \ufffd.", "hint": "Mend it.",
                                       "exit_code": int(code)}


@pytest.mark.parametrize("args", [["fine", "--n", "x"], ["fine", "--m", "3"], ["fime"], ["fail"]], ids=" ".join)
def test_usage_errors_end_with_2_and_are_json_where_asked(args: list[str]) -> None:
    plain, both = CliRunner().invoke(group, args), CliRunner().invoke(group, [*args, "--json"])
    assert plain.exit_code == both.exit_code == Exit.USAGE and plain.stdout == ""
    assert "Usage:" in plain.stderr and "Traceback" not in plain.stderr
    assert json.loads(both.stdout)["exit_code"] == Exit.USAGE


def test_json_goes_to_stdout_where_it_was_asked_for() -> None:
    assert CliRunner().invoke(group, ["write", "--json", "out.json"]).stdout == ""
    assert CliRunner().invoke(group, ["shown", "--format", "table"]).stdout == ""
    for words in (["--format", "json"], ["--format=json"]):
        assert json.loads(CliRunner().invoke(group, ["shown", *words]).stdout)["error"] == "It broke."


def test_a_command_returns_its_exit_code_and_a_bug_is_1() -> None:
    assert CliRunner().invoke(group, ["fine", "--json"]).exit_code == Exit.DONE
    assert CliRunner().invoke(group, ["fine", "--n", "3"]).exit_code == Exit.FAILURE_RATE
    assert json.loads(CliRunner().invoke(group, ["fine", "--n", "3"]).stdout) == {"n": 3, "é": "\u2028"}
    assert CliRunner().invoke(group, ["--help"]).exit_code == Exit.DONE
    found = CliRunner().invoke(group, ["bug"])
    assert found.exit_code == Exit.BUG and isinstance(found.exception, ZeroDivisionError)
    assert group.main(["fine"], standalone_mode=False) == 0


def test_json_has_no_nan() -> None:
    with pytest.raises(ValueError):
        emit_json({"score": float("nan")})


@pytest.mark.parametrize(("text", "shown"), [
    ("\x1b[2J\x1b]8;;http://x\x07", "?[2J?]8;;http://x?"), ("a\rb", "a?b"), ("a\r\nb\n", "a\nb\n"), ("a\tb", "a    b"),
    ("\x00\x08\x7f\x9b\x85", "?????"), ("\u202eevil\u2066\u200f\u061c\u200b", "?evil????"),
    ("\ufeff\u2028\u2029", "???"),
    ("\ud83d", "?"), ("é 雪 \U0001f600 [link=x] [/nope]", "é 雪 \U0001f600 [link=x] [/nope]")], ids=ascii)
def test_text_cannot_steer_the_terminal(text: str, shown: str) -> None:
    assert safe(text) == shown.replace("?", "\ufffd")


@pytest.mark.parametrize(("word", "quoted"), [
    ("a-b/c.d", "a-b/c.d"), ("two words", "'two words'"), ("it's", "'it'\\''s'"), ("", "''"), ("é 雪", "'é 雪'"),
    ("a\tb", r"$'a\x09b'"), ("a\nb", r"$'a\x0ab'"), ("a\u2028b'\\", r"$'a\xe2\x80\xa8b\x27\x5c'"),
    ("\udcff é", r"$'\xff é'")], ids=ascii)
def test_the_line_to_go_on_with_survives_being_made_safe(word: str, quoted: str) -> None:
    assert terminal.quoted(word) == quoted == safe(quoted)


def test_progress_is_said_while_nothing_moves_and_not_after(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    third = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            third.set()

    monkeypatch.setattr(terminal, "PLAIN_EVERY_S", 0.01)
    monkeypatch.setattr(terminal, "say", say)
    with progress("score", 400, "rows"):
        assert third.wait(20)
    n = len(said)
    assert said[0].startswith("score: 0% of 400 rows") and said[-1].startswith("score: 0 rows in ")
    time.sleep(0.05)
    assert len(said) == n


def test_progress_away_from_a_terminal_is_a_plain_line(monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    now = SimpleNamespace(monotonic=lambda: clock[0])
    clock = [100.0]
    monkeypatch.setattr(terminal, "time", now)
    with progress("score", 400, "rows") as state:
        for seconds, rows in ((29.0, 10), (1.0, 90), (29.0, 100)):
            clock[0] += seconds
            state.advance(rows, "loss \x1b1.5")
        assert state.line() == "score: 50% of 400 rows, 3.4 rows/s, 59 s left loss \x1b1.5"
        clock[0] += 1.0
        state.advance(200)
    assert capsys.readouterr() == ("", "score: 400 rows in 60.0 s (6.7 rows/s)\n")


def test_progress_of_nothing_divides_by_nothing() -> None:
    assert Progress("score", 0, "rows").line().startswith("score: 100% of 0 rows, 0.0 rows/s, 0 s left")
    assert Progress("score", 7, "rows").line().startswith("score: 0% of 7 rows")


def test_progress_says_nothing_of_success_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress("score", 4, "rows"):
        raise ZeroDivisionError
    assert capsys.readouterr().err == ""


def test_columns_align_numbers_to_the_right() -> None:
    assert columns([["a\x07", "1.5"], ["long", "-12"]], ["name", "n"]).splitlines() == [
        "name    n", "----  ---", "a\ufffd    1.5", "long  -12"]
    assert columns([], ["name", "n"]).splitlines()[0] == "name  n"


def test_unknown_names_and_missing_packages_have_a_next_step() -> None:
    assert unknown("corpus", "wildgaurdmix", ["wildguardmix", "demo"]).hint == "Did you mean 'wildguardmix'?"
    assert unknown("corpus", "zzz", ["b", "a"]).hint == "Possible: a, b."
    require("json")
    with pytest.raises(UserError, match="needs the package 'no_such_package'") as caught:
        require("no_such_package", "vllm")
    assert caught.value.hint == "Install it with: pip install 'safeset[vllm]'"
    assert caught.value.exit_code == Exit.ENVIRONMENT
