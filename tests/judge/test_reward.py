"""Rewards that the judge's room gives to training: OpSwap by its value, a rubric by a scripted server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curate.core.errors import Exit, UserError
from judge.endpoint import Address
from judge.grading import Grading
from judge.prompts import PROMPTS
from judge.reward import RubricReward, opswap, question, read_rubric
from judge.tasks.opswap import generate
from tests.judge.stub_server import Stub, served

RUBRIC = "Asked: {question}\nSaid: {answer}\nHow brief is it, 0 to 100?"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("STUB_KEY", "sk-very-secret-0123456789")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with served(Stub()) as running:
        yield running


def turns(*texts: str) -> list[Any]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def asked(*texts: str) -> list[Any]:
    return [[{"role": "user", "content": text}] for text in texts]


def graded(stub: Stub, folder: Path, **budget: int) -> RubricReward:
    where = Address("stub", stub.url, "STUB_KEY", attempt_s=5.0, total_s=20.0, max_retries=1)
    return RubricReward(Grading(where, cache=folder, **budget), RUBRIC)


def test_opswap_is_right_or_wrong() -> None:
    items = generate("train", 6, tiers=(1,))
    right = [item.answer for item in items]
    assert opswap(turns(*right), right) == [1.0] * 6
    assert opswap(turns("7", "8 - 3 = 5", "8 - 3 = 5 apples", "", "5 + 5"), ["8 - 3 = 5"] * 5) == [0, 1, 1, 0, 0]
    with pytest.raises(UserError, match="'no number' has no value") as caught:
        opswap(turns("5", "5"), ["5", "no number"])
    assert caught.value.exit_code == Exit.BAD_DATA


def test_a_grade_is_a_reward_and_a_missing_one_a_status(stub: Stub, tmp_path: Path) -> None:
    replies = {"fine": {"80": 1.0}, "awful": {"10": 0.5, "30": 0.5}, "hidden": {"REFUSAL": 1.0}, "odd": {"maybe": 1.0}}
    stub.replies = lambda prompt: next(reply for word, reply in replies.items() if f"\n{word}\n" in prompt)
    reward = graded(stub, tmp_path)
    found = reward(asked(*["Q?"] * 5), turns("fine", "awful", "hidden", " ", "odd"))
    assert found[0] == 0.8 and abs(found[1] - 0.2) < 1e-9
    assert all(isinstance(status, str) and status != "ok" for status in found[2:]) and found[3] == "empty"
    assert len(stub.asked()) == 4 and all("How brief is it" in text for text in stub.asked())
    assert graded(stub, tmp_path)(asked("Q?"), turns("fine")) == [0.8] and len(stub.asked()) == 4, "paid for once"
    assert reward.settings["judge"].endswith(":stub") and len(reward.settings["rubric"]) == 64
    assert stub.url not in str(reward.settings)


def test_a_spent_budget_ends_the_run_so_that_it_can_go_on(stub: Stub, tmp_path: Path) -> None:
    stub.replies = lambda prompt: {"50": 1.0}
    with pytest.raises(UserError) as caught:
        graded(stub, tmp_path, max_requests=3)(asked(*["Q?"] * 6), turns(*"abcdef"))
    assert caught.value.exit_code == Exit.INTERRUPTED


def test_the_judge_is_told_the_whole_conversation() -> None:
    assert question([{"role": "user", "content": "Hi"}]) == "Hi"
    assert question([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]) == \
        "system: Be kind.\n\nuser: Hi"


def test_rubrics_are_aspects_or_files(tmp_path: Path) -> None:
    assert read_rubric("aligned") == PROMPTS["aligned"]
    (tmp_path / "good.txt").write_text(RUBRIC)
    assert read_rubric(str(tmp_path / "good.txt")) == RUBRIC
    (tmp_path / "bad.txt").write_text("Grade it.")
    with pytest.raises(UserError, match=r"has no \{answer\}"):
        read_rubric(str(tmp_path / "bad.txt"))
    with pytest.raises(UserError, match="Unknown rubric 'alinged'") as caught:
        read_rubric("alinged")
    assert "aligned" in caught.value.hint
