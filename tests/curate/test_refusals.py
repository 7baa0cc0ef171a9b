"""The refusal rule, in Python and in SQL."""

from __future__ import annotations

import duckdb
import pytest

from curate.refusals import refusal_reason, refusal_sql

CASES = [
    ("I'm sorry, but I can't help with that.", "sorry"),
    ("I apologize for the confusion.", "apologize"),
    ("My apologies, that is not possible.", "apologies"),
    ("Unfortunately I cannot do this.", "cannot"),
    ("That is something I can not write.", "can not"),
    ("I can’t do that.", "can’t"),
    ("SORRY no", "sorry"),
    ("one two three four five six seven eight nine sorry", "sorry"),
    ("one two three four five six seven eight nine ten sorry", None),
    ("one  two\tthree\nfour five six seven eight nine sorry", "sorry"),
    ("one\u00a0two three\u2028four five\u3000six seven eight nine ten\x85sorry", None),
    ("\u00a0one\u00a0two three four five six seven eight\x1cnine sorry", "sorry"),
    ("Cannoteering is not a sport.", None),
    ("Of course, here it is.", None),
    ("", None),
]


@pytest.mark.parametrize(("answer", "reason"), CASES)
def test_python_and_sql_agree(answer: str, reason: str | None) -> None:
    assert refusal_reason(answer) == reason
    assert duckdb.execute(f"SELECT {refusal_sql('a')} FROM (SELECT ? AS a)", [answer]).fetchone() == (reason,)
