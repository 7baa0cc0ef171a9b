"""Rewards for reinforcement learning: a verifiable task, or a rubric graded by a judge model.

Both are called as trl calls reward functions for conversations (see ``train.rewards``): a list of conversations, a list
of completions of one message each, the rows' other columns. They return a number for each completion, or a text that
says why there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from curate.core.errors import Exit, UserError, unknown
from curate.core.files import sha256
from judge.grader import GRADER, Ask
from judge.grading import Grading
from judge.prompts import PROMPTS
from judge.tasks.opswap import value

Turns = Sequence[Mapping[str, str]]


def opswap(completions: Sequence[Turns], answer: Sequence[str]) -> list[float]:
    """Return 1 for a completion that gives the value of its reference answer, else 0 (see ``opswap.value``).

    Raises ``UserError`` (bad data) for a reference answer without a value.
    """
    wanted = [value(text) for text in answer]
    if None in wanted:
        raise UserError(f"The reference answer {answer[wanted.index(None)]!r} has no value, so it is not of OpSwap.",
                        "Make rows with `judge task opswap`.", Exit.BAD_DATA)
    return [float(value(turns[0]["content"]) == number) for turns, number in zip(completions, wanted, strict=True)]


def read_rubric(text: str) -> str:
    """Return the rubric that an aspect or a file names; ``UserError`` where there is none or it cannot be used."""
    if text in PROMPTS:
        return PROMPTS[text]
    path = Path(text)
    if not path.is_file():
        raise unknown("rubric", text, [*PROMPTS, "FILE"])
    try:
        rubric = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as err:
        raise UserError(f"The rubric {path} cannot be read: {err}.", "Save it as UTF-8 text.", Exit.BAD_DATA) from None
    if "{answer}" not in rubric:
        raise UserError(f"The rubric {path} has no {{answer}}.", "Write {question} and {answer} where they belong, and "
                        "ask for a whole number from 0 to 100.", Exit.BAD_DATA)
    return rubric


class RubricReward:
    """A judge model's grade by a rubric, 0 to 100, as a reward from 0 to 1."""

    def __init__(self, grading: Grading, rubric: str) -> None:
        """Take who grades, and what the judge is asked: a text with ``{question}`` and ``{answer}``."""
        self.rubric = rubric
        self.grader = grading.grader()
        self.settings = {"judge": f"{GRADER}:{grading.address.model}", "replies": grading.replies,
                         "rubric": sha256(rubric.encode())}

    def __call__(self, prompts: Sequence[Turns], completions: Sequence[Turns]) -> list[float | str]:
        """Return grades / 100, or the status of a grade that is missing; ``empty`` for an empty completion.

        Raises ``UserError``: remote where the server cannot be used, interrupted where the budget is spent. Replies
        are kept, so a run that goes on pays for none of them twice.
        """
        texts = [turns[0]["content"] for turns in completions]
        asks = [Ask(question(turns), text, self.rubric) for turns, text in zip(prompts, texts, strict=True)
                if text.strip()]
        grades = iter(self.grader.grade_all(asks))
        found: list[float | str] = []
        for text in texts:
            grade = next(grades) if text.strip() else None
            found.append("empty" if grade is None else grade.status if grade.score is None else grade.score / 100)
        return found


def question(turns: Turns) -> str:
    """Return what a judge is told was asked: a single turn's text, or all turns with their roles."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
