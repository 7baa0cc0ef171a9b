"""The demo script: which commands it runs for which defences; and, slow, that it ends with the table on a tiny model.

    pytest -m slow tests/test_demo.py       # interrupted anywhere, it ends with the same numbers
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.fakes import tiny_model
from train.cli import main
from train.defenses import parse

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "demo.sh"
PAUSES = (9.0, 26.0, 31.0, 47.0)
"""Seconds after which the demo is interrupted, one run after the other."""


def start(folder: Path) -> subprocess.Popen[str]:
    """Start the demo in ``folder``, in a process group of its own, as a terminal would."""
    environment = os.environ | {"MODEL": "model", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(["bash", str(SCRIPT), "out"], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def finish(folder: Path) -> str:
    """Run the demo to its end and return what it printed."""
    process = start(folder)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def numbers(folder: Path) -> list[dict[str, str]]:
    """Return the comparison without digests of verdicts, which name run cards, which say how long a run took."""
    with (folder / "out" / "comparison" / "compare.csv").open(newline="") as file:
        rows = [{key: value for key, value in row.items() if key != "verdicts"} for row in csv.DictReader(file)]
    assert len(rows) == 5
    return rows


STUB = """#!/bin/bash
if [ "$*" = list ]; then cat list; exit; fi
echo "$(basename "$0") $*" >> log
if [ "$1" = vector ]; then touch out/careless.safetensors; fi
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder with commands that only note how they were called; the defences are those of the real ``train list``."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "list").write_text(CliRunner().invoke(main, ["list"]).stdout)
    for name in ("curate", "train", "judge"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def called(folder: Path, defenses: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the demo with stubs for commands; return how it ended, and the commands."""
    (folder / "log").write_text("")
    done = subprocess.run(["bash", str(SCRIPT), "out"], cwd=folder, text=True, capture_output=True, timeout=60,
                          env=os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "DEFENSES": defenses})
    return done, (folder / "log").read_text().splitlines()


def test_any_defence_can_be_in_the_table(stubs: Path) -> None:
    done, log = called(stubs, "kl ldifs:weight=2 inoculation:rows=all persona:alpha=1 safelora:k=3,base=some/model")
    assert done.returncode == 0, done.stderr
    specs = [line.split("--defense ")[1].split() for line in log if "--defense" in line]
    assert [spec for spec, _, _ in specs[::2]] == [spec for spec, _, _ in specs[1::2]] == [
        "kl", "ldifs:weight=2", "inoculation:rows=all", "persona:vector=out/careless.safetensors,alpha=1",
        "safelora:k=3,base=some/model"]
    assert all(parse(spec) for spec, _, _ in specs)
    vectors = [k for k, line in enumerate(log) if line.startswith("train vector ")]
    assert len(vectors) == 1 and vectors[0] < next(k for k, line in enumerate(log) if "persona:vector" in line)
    compared = next(line for line in log if line.startswith("judge compare")).split()
    names = ("none", "kl", "ldifs", "inoculation", "persona", "safelora")
    assert {f"out/runs/{name}" for name in names} < set(compared)
    again, log = called(stubs, "persona")
    assert again.returncode == 0 and not any(line.startswith("train vector ") for line in log), "the vector is there"
    assert not any("--defense" in line for line in called(stubs, "")[1])


@pytest.mark.parametrize(("defenses", "message"), [
    ("kl safelora", 'DEFENSES="safelora:base=PATH"'), ("safelora:k=3", "before its alignment"),
    ("kl kl:weight=1", "names 'kl' twice"),
    ("kl sefalora:base=x", "possible are: inoculation persona kl ldifs safelora.")])
def test_what_a_defence_lacks_is_said_before_anything_runs(stubs: Path, defenses: str, message: str) -> None:
    done, log = called(stubs, defenses)
    assert done.returncode == 2 and message in done.stderr and log == []


@pytest.mark.slow
def test_an_interrupted_demo_goes_on_and_ends_in_the_same_numbers(tmp_path: Path) -> None:
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    for folder in (clean, broken):
        tiny_model(folder / "model", max_position_embeddings=4096)
    whole = finish(clean)
    assert "== Done" in whole and "no general misalignment" in whole and "Traceback" not in whole
    page = (clean / "out" / "report.html").read_text()
    assert whole.index("$ judge report") < whole.index("== Done")
    assert all(words in page for words in ("Four criteria", "Training curves", "s_d, answers and refusals"))

    for pause in PAUSES:
        process = start(broken)
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=120)[0]
        assert process.returncode != 0, f"the demo was over before it was interrupted after {pause} s"
        assert "Traceback" not in output, output[-3000:]
    rest = finish(broken)
    assert "finished" in rest, "what was trained before is not trained again"

    assert numbers(clean) == numbers(broken)
