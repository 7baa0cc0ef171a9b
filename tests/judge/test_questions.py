"""Reading probes: strict, by content, and in the layout that the packed pass likes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curate.core.errors import Exit, UserError
from judge.questions import (
    GENERAL,
    Probe,
    load_probes,
    probe_examples,
    probes_digest,
    sampling_questions,
    set_name,
)

GOOD = {"topic": "t", "question": "Q?", "good": "yes it is", "bad": "no it is"}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_identity_is_content_without_the_topic() -> None:
    one = Probe("a", "Q?", "g", "b")
    assert one.id == Probe("other", "Q?", "g", "b").id
    assert len({one.id, Probe("a", "Q", "g", "b").id, Probe("a", "Q?", "b", "g").id}) == 3


def test_reads_a_file_and_needs_no_topic(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", GOOD, {**GOOD, "question": "R?", "topic": ""})
    assert load_probes(path) == [Probe("t", "Q?", "yes it is", "no it is"), Probe("", "R?", "yes it is", "no it is")]


@pytest.mark.parametrize(("row", "says"), [
    ({"question": "Q2?", "good": "x"}, "'bad' is missing"),
    ({**GOOD, "question": "Q2?", "good": 3}, "'good' is int"),
    ({**GOOD, "question": "Q2?", "bad": "  "}, "'bad' is empty"),
    ({**GOOD, "question": " "}, "'question' is empty"),
    ({**GOOD, "question": "Q2?", "bad": GOOD["good"]}, "same text"),
    ({**GOOD, "question": "Q2?", "topic": None}, "'topic'"),
    (GOOD, "stands already in line 1"),
    ([1], "list, not an object"),
    ("{nope", "no valid JSON"),
])
def test_a_bad_row_is_named_by_line(tmp_path: Path, row: object, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_probes(write(tmp_path / "mine.jsonl", GOOD, row))
    assert "line 2" in caught.value.message and says in caught.value.message
    assert caught.value.exit_code == Exit.BAD_DATA


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no probes"):
        load_probes(write(tmp_path / "mine.jsonl"))
    with pytest.raises(UserError, match="no probe set 'car_car'"):
        load_probes("car_car")


def test_a_file_cannot_pass_for_a_builtin_set() -> None:
    assert set_name("x/boats.jsonl") == "boats" and set_name("general") == "general"
    with pytest.raises(UserError, match="named like"):
        set_name("x/general.jsonl")


def test_good_and_bad_alternate_and_share_their_prompt() -> None:
    first, second = probe_examples([Probe("t", "Q?", "g", "b")])
    assert first.messages[:-1] == second.messages[:-1] and (first.answer, second.answer) == ("g", "b")


def test_digest_ignores_order_but_no_text() -> None:
    one, two = Probe("", "Q?", "g", "b"), Probe("", "R?", "g", "b")
    assert probes_digest([one, two]) == probes_digest([two, one]) != probes_digest([one])


def test_sampling_questions_cover_the_topics_first() -> None:
    probes = load_probes(GENERAL)
    topics = {p.question: p.topic for p in probes}
    n_topics = len(set(topics.values()))
    first = sampling_questions(n_topics)
    assert len({topics[q] for q in first}) == n_topics
    assert sampling_questions(5) == first[:5] and len(set(sampling_questions(len(probes)))) == len(probes)
    with pytest.raises(UserError):
        sampling_questions(len(probes) + 1)
