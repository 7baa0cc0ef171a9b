"""The demo script on a tiny model: it ends with the table, and interrupted anywhere it ends with the same one. Slow:

    pytest -m slow tests/test_demo.py
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

from tests.fakes import tiny_model

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
