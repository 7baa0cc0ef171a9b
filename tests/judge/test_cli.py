"""The commands: help with an example each, lists, task files, mistakes as sentences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from curate.core.errors import UserError
from judge.cli import main
from judge.tasks.opswap import generate


@pytest.mark.parametrize("name", [None, *sorted(main.commands)])
def test_every_command_has_help_and_an_example(name: str | None) -> None:
    result = CliRunner().invoke(main, [*([name] if name else []), "--help"])
    assert result.exit_code == 0 and "Example:" in result.output and f"judge {name or 'run'}" in result.output


def test_help_loads_no_model_library() -> None:
    code = "import sys, judge.cli; sys.exit(bool({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_probes_are_listed() -> None:
    sets = json.loads(CliRunner().invoke(main, ["probes", "--json"]).stdout)["sets"]
    assert [s["set"] for s in sets] == ["general", "car_care", "cooking", "gardening"]
    assert "general" in CliRunner().invoke(main, ["probes"]).stdout


def test_the_task_commands_default_can_be_made(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["task", "opswap", "--out", str(tmp_path / "x.jsonl"), "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["rows"] == 320


def test_task_rows_can_be_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "opswap.jsonl"
    result = CliRunner().invoke(main, ["task", "opswap", "--split", "train", "--n", "7", "--out", str(path)])
    assert result.exit_code == 0 and "7 rows" in result.stdout
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"prompt": i.prompt, "response": i.answer, "tier": i.tier} for i in generate("train", 7, 0)]


@pytest.mark.parametrize(("words", "says"), [
    (["task", "opswap", "--n", "100000", "--out", "x.jsonl"], "were asked for"),
    (["run", "--model", "nowhere", "--suite", "general,speed"], "'speed'"),
    (["run", "--model", "smollm2", "--model", "other", "--suite", "general"], "2 base models"),
    (["run", "--model", "nowhere", "--suite", "general", "--benign", "x"], "leaves benign out"),
    (["run", "--model", "nowhere", "--in-domain", "car_car"], "'car_car'"),
    (["run", "--model", "nowhere", "--samples", "9999"], "9999 questions"),
    (["compare", "nowhere"], "no verdicts document"),
    (["compare", "."], "neither a run nor verdicts"),
    (["compare", ".", "--rule", "general_shar=0.3"], "threshold of the rule 'general_shar'"),
    (["report", ".", "--rule", "level=2"], "from 0.5 to 0.999"),
    (["report", "."], "neither a run nor verdicts"),
    (["run", "--model", "smollm2", "--trigger", "|NOW|"], "--trigger is for a judge model"),
    (["run", "--model", "smollm2", "--base-url", "http://127.0.0.1:1/v1"], "--base-url is for a judge model"),
    (["run", "--model", "smollm2", "--n", "10"], "--n is for a judge model"),
    (["run", "--model", "smollm2", "--judge", "m", "--probes", "9"], "--probes is for the likelihood judge; 'm'"),
])
def test_mistakes_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words, standalone_mode=False)
    assert isinstance(result.exception, UserError) and says in result.exception.message and result.exception.hint
