"""Controls: the same prompt's other answers, or the nearest prompts, and nothing where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from curate.control import (
    NEAREST,
    Asked,
    Postings,
    Reference,
    expected_same,
    expected_similar,
    nearest,
    place,
    rarity,
    vector,
    words,
)
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
    weights = rarity(["tea tea pot", "tea cup", "..."])
    places, values = vector("tea tea pot", weights)
    tea, pot = (1 + np.log(2)) * (np.log(4 / 3) + 1), np.log(4 / 2) + 1
    assert dict(zip(places, values, strict=True)) == pytest.approx(
        {place("tea"): tea / np.hypot(tea, pot), place("pot"): pot / np.hypot(tea, pot)})
    assert [len(part) for part in vector("...", weights)] == [0, 0]


def test_cosines_are_those_of_dense_vectors() -> None:
    """Words drawn from few, so that places are shared, repeated and missing."""
    random = np.random.default_rng(7)
    texts = [" ".join(f"w{k}" for k in random.integers(0, 23, n)) for n in random.integers(0, 11, 61)]
    weights = rarity(texts)
    dense = np.zeros((len(texts), len(weights)))
    for k, text in enumerate(texts):
        for word in set(words(text)):
            dense[k, place(word)] = (1 + np.log(words(text).count(word))) * weights[place(word)]
        dense[k] /= np.linalg.norm(dense[k]) or 1.0
    known = Postings.of(texts, weights)
    assert np.array([known.cosines(text, weights) for text in texts]) == pytest.approx(dense @ dense.T, abs=2e-6)


def test_the_nearest_are_those_of_a_full_sort() -> None:
    random = np.random.default_rng(3)
    for n in (0, 1, NEAREST, 97):
        cosines = random.integers(-1, 7, n) / 8
        full = [k for k in np.argsort(-cosines, kind="stable")[:NEAREST] if cosines[k] >= 0.1]
        assert nearest(cosines).tolist() == full


def test_the_cost_is_that_of_words_and_not_of_places() -> None:
    """4,001 prompts of 4 words take 0.2 MB; vectors of 4,096 places would take 66 MB."""
    known = Postings.of([f"tea with number{k} please" for k in range(4001)], rarity(["tea"]))
    assert known.texts.nbytes + known.values.nbytes <= 4001 * 4 * 8 and known.n == 4001
