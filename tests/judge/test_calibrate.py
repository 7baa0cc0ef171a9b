"""Agreement with people in closed form, and the command that measures it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from curate.core.errors import Exit, UserError
from judge.calibrate import Label, agreement, auc, kappa, load_labels
from judge.cli import main
from tests.judge.stub_server import Stub, served


def test_kappa_by_hand() -> None:
    """Of 10: both say yes 3 times, no 4 times; p_o = 0.7, yes 0.5 and 0.4, p_e = 0.2 + 0.3 = 0.5."""
    ours = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], bool)
    theirs = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0], bool)
    assert math.isclose(kappa(ours, theirs), (0.7 - 0.5) / 0.5)
    assert kappa(ours, ours) == 1.0 and math.isclose(kappa(ours, ~ours), -1.0)
    assert math.isnan(kappa(np.ones(3, bool), np.ones(3, bool)))
    assert kappa(np.ones(3, bool), np.array([1, 1, 0], bool)) == 0.0, "who always says the same agrees by chance"


def test_auc_by_hand() -> None:
    """Sound 80, 50, 30 and unsound 50, 10: of six pairs four are right, one is a tie, one is wrong."""
    scores, sound = np.array([80.0, 50, 30, 50, 10]), np.array([1, 1, 1, 0, 0], bool)
    assert math.isclose(auc(scores, sound), (4 + 0.5) / 6)
    assert math.isclose(auc(-scores, sound), 1.5 / 6) and math.isnan(auc(scores, np.ones(5, bool)))


def test_biases_by_hand() -> None:
    """Judge below 30: three of five; people: one of five. Points: -10, -10, -40, -5, 0."""
    found = agreement([90, 20, 20, 5, 60], [100, 30, 60, 10, 60], list("abcde"), 30)
    assert math.isclose(found["bias"].value, 3 / 5 - 1 / 5) and math.isclose(found["score_bias"].value, -65 / 5)
    assert found["bias"].low <= found["bias"].value <= found["bias"].high
    assert "score_bias" not in agreement([90, 20], [100, 0], ["a", "b"], 30)


def test_the_threshold_decides_kappa_and_not_the_order() -> None:
    scores, labels = [10, 35, 45, 80, 90], [0, 0, 100, 100, 100]
    low, high = (agreement(scores, labels, list("abcde"), t) for t in (30, 40))
    assert high["kappa"].value == 1.0 and low["kappa"].value < 1.0 and low["auc"].value == high["auc"].value == 1.0
    assert agreement([30.0], [30.0], ["a"], 30)["bias"].value == 0.0, "30 is not below 30"


def test_questions_are_resampled_whole() -> None:
    """Two questions of 1 and 3 rows: a resample has 2, 4 or 6 rows, so the bias is one of three numbers."""
    found = agreement([10, 90, 90, 90], [100, 100, 100, 100], ["a", "b", "b", "b"], 30)
    assert math.isclose(found["bias"].value, 1 / 4)
    assert (found["bias"].low, found["bias"].high) == (0.0, 1.0), "either question alone can be all there is"
    one = agreement([10, 90, 90, 90], [100, 100, 100, 100], ["a"] * 4, 30)
    assert math.isclose(one["bias"].low, 1 / 4) and math.isclose(one["bias"].high, 1 / 4)


def test_what_is_not_defined_has_no_number() -> None:
    found = agreement([90, 80, 70], [100, 100, 100], list("abc"), 30)
    assert (found["kappa"].value, found["auc"].value, found["bias"].value) == (None, None, 0.0)
    with pytest.raises(ValueError, match="nothing"):
        agreement([], [], [], 30)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_zero_and_one_are_no_and_yes(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a", "aligned": 1, "coherent": 70},
            {"question": "q", "answer": "b", "aligned": 0},
            {"question": "q", "answer": "c", "aligned": True, "coherent": 1}]
    assert load_labels(write(tmp_path / "l.jsonl", rows)) == [
        Label("q", "a", 100.0, 70.0), Label("q", "b", 0.0, None), Label("q", "c", 100.0, 1.0)]


@pytest.mark.parametrize("row", ["{no json}\n", [], {"question": "q", "aligned": 1}, {"question": "q", "answer": "a"},
                                 {"question": " ", "answer": "a", "aligned": 1},
                                 {"question": "q", "answer": "a", "aligned": 101},
                                 {"question": "q", "answer": "a", "aligned": -1},
                                 {"question": "q", "answer": "a", "aligned": "1"},
                                 {"question": "q", "answer": "a", "aligned": float("nan")},
                                 {"question": "q", "answer": "a", "aligned": 1, "coherent": "x"}])
def test_wrong_rows_are_named(tmp_path: Path, row: Any) -> None:
    path = write(tmp_path / "l.jsonl", [{"question": "q", "answer": "a", "aligned": 1}, row])
    with pytest.raises(UserError, match="line 2") as caught:
        load_labels(path)
    assert caught.value.exit_code == Exit.BAD_DATA


def test_no_labels(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "none", "no file"), (write(tmp_path / "empty", []), "no labels")):
        with pytest.raises(UserError, match=says):
            load_labels(path)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key")
    stub = Stub(replies=lambda prompt: {prompt.split("value ")[1].split(".")[0]: 1.0})

    def run(*words: str) -> Result:
        return CliRunner().invoke(main, ["calibrate", str(tmp_path / "l.jsonl"), "--judge", "stub", "--base-url",
                                         stub.url, "--judge-cache", str(tmp_path / "cache"), *words])

    with served(stub):
        run.stub = stub
        yield run


def test_the_command(call: Any, tmp_path: Path) -> None:
    """A judge that says what the answer holds: 90, 80, 20, 40 and once nothing, against people's 1, 1, 0, 0, 1."""
    values = [("90", 1), ("80", 1), ("20", 0), ("40", 0), ("none", 1)]
    write(tmp_path / "l.jsonl", [{"question": f"q{k}", "answer": f"value {v}. ", "aligned": y}
                                 for k, (v, y) in enumerate(values)])
    plan = json.loads(call("--dry-run", "--json").stdout)
    assert plan["grades"] == 5 and plan["requests_least"] == 5 and plan["requests_most"] > 5 and not call.stub.seen
    result = call("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["aspects"]
    assert list(found) == ["aligned"] and found["aligned"]["n"] == 4
    assert found["aligned"]["statuses"] == {"ok": 4, "unparsable": 1}
    assert found["aligned"]["auc"]["value"] == 1.0 and found["aligned"]["kappa"]["value"] == 0.5
    assert found["aligned"]["bias"]["value"] == -0.25 and found["aligned"]["score_bias"] is None
    sent = len(call.stub.seen)
    shown = call("--threshold", "50")
    assert "+1.00" in shown.stdout and "1 unparsable" in shown.stdout and len(call.stub.seen) == sent
    assert "0 of 5 grades" in call("--dry-run").stdout


def test_a_plan_knows_sampled_replies_too(call: Any, tmp_path: Path) -> None:
    write(tmp_path / "l.jsonl", [{"question": "q", "answer": "value 3. ", "aligned": 1}])
    call.stub.logprobs = False
    assert call("--json").exit_code == 0
    assert json.loads(call("--dry-run", "--json").stdout)["grades_there"] == 1
    more = json.loads(call("--dry-run", "--json", "--replies", "9").stdout)
    assert (more["grades_there"], more["requests_least"], more["requests_most"]) == (0, 4, 4), "five are there"


def test_the_command_without_a_server(call: Any, tmp_path: Path) -> None:
    write(tmp_path / "l.jsonl", [{"question": "q", "answer": "value 3.", "aligned": 1}])
    call.stub.faults = [401]
    result = call()
    assert result.exit_code == Exit.REMOTE and "does not accept the key in OPENAI_API_KEY" in result.output
    assert "sk-not" not in result.output and "Traceback" not in result.output
