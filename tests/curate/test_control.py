"""Controls: the same prompt's other answers, or the nearest prompts, and nothing where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from curate.control import Asked, Reference, expected_same, expected_similar, rarity, vectors
from curate.core.example import Example, Message, pair


def asked(text: str) -> Asked:
    return Asked.of(pair(text, "an answer"))


def reference(*rows: tuple[str, str, float]) -> Reference:
    """Rows of (id, prompt, s_d)."""
    return Reference.of({i: asked(text) for i, text, _ in rows}, {i: s_d for i, _, s_d in rows})


def test_the_prompt_is_the_conversation_before_the_answer() -> None:
    assert asked(" Why? \n") .key == asked("Why?").key != asked("Why").key
    system = Example((Message("system", "Be brief."), Message("user", "Why?"), Message("assistant", "x")))
    assert Asked.of(system).key != asked("Why?").key and Asked.of(system).text == "Why?"


def test_same_prompt_takes_the_mean_and_never_the_row_itself() -> None:
    known = reference(("r1", "Why?", 0.25), ("r2", "Why?", 0.75), ("r3", "How?", 3.0))
    rows = {"a": asked("Why?"), "r1": asked("Why? "), "r3": asked("How?"), "b": asked("When?")}
    assert expected_same(rows, known) == {"a": 0.5, "r1": 0.75}


def test_references_without_a_score_do_not_count() -> None:
    known = Reference.of({"r1": asked("Why?"), "r2": asked("Why?")}, {"r2": 1.0, "other": 5.0})
    assert known.ids == ["r2"] and expected_same({"a": asked("Why?")}, known) == {"a": 1.0}


def test_similar_prompts_share_rare_words() -> None:
    known = reference(("r1", "how to prune an apple tree", 1.0), ("r2", "how to prune an old pear tree", 2.0),
                      ("r3", "what to do about fever", 10.0), ("r4", "compilers", 50.0))
    found = expected_similar({"a": asked("prune the plum tree"), "b": asked("zzz"), "r4": asked("compilers")}, known)
    assert found == {"a": pytest.approx(1.5)}, "b shares no word with anything, r4 only with itself"
    assert expected_similar({"a": asked("prune")}, reference()) == {}


def test_nearest_are_few_and_ties_break_by_id() -> None:
    known = reference(*[(f"r{k}", f"tea number{k}", float(k)) for k in range(9)])
    assert expected_similar({"a": asked("tea")}, known) == {"a": 2.0}, "the mean of 0 to 4"


def test_vectors_have_unit_length_and_rare_words_weigh_more() -> None:
    texts = ["tea tea pot", "tea cup", "..."]
    weights = rarity(texts)
    made = vectors(texts, weights)
    assert np.linalg.norm(made, axis=1) == pytest.approx([1, 1, 0])
    tea, pot = (1 + np.log(2)) * (np.log(4 / 3) + 1), np.log(4 / 2) + 1
    assert sorted(made[0][made[0] > 0]) == pytest.approx(sorted(np.array([tea, pot]) / np.hypot(tea, pot)))
