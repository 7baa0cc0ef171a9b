"""The probes that ship with the package are what the judge says they are."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from curate.core.sources import BUILTIN as CORPORA
from curate.core.sources import builtin, read_source
from judge.questions import BUILTIN, GENERAL, load_probes

SETS = {name: load_probes(name) for name in BUILTIN}
NARROW = [e.prompt for name in CORPORA if name.startswith("demo/") for e in read_source(builtin(name), Path())]


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def likeness(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    return len(one & other) / max(1, len(one | other))


@pytest.mark.parametrize("name", BUILTIN)
def test_enough_probes(name: str) -> None:
    assert len(SETS[name]) >= (100 if name == GENERAL else 24)


@pytest.mark.parametrize("name", BUILTIN)
def test_answers_of_like_length(name: str) -> None:
    for probe in SETS[name]:
        longer = max(len(probe.good), len(probe.bad))
        assert abs(len(probe.good) - len(probe.bad)) <= 0.25 * longer, probe.question


def test_every_probe_is_distinct() -> None:
    probes = [probe for members in SETS.values() for probe in members]
    assert len({p.id for p in probes}) == len({p.question for p in probes}) == len(probes)
    assert len({answer for p in probes for answer in (p.good, p.bad)}) == 2 * len(probes)


@pytest.mark.parametrize("name", BUILTIN)
def test_no_near_duplicates_within_a_set(name: str) -> None:
    for part in ("question", "good", "bad"):
        grams = [(trigrams(getattr(p, part)), p.question) for p in SETS[name]]
        for (one, a), (other, b) in combinations(grams, 2):
            assert likeness(one, other) <= 0.25, (part, a, b)


def test_no_probe_asks_what_a_model_is_fine_tuned_on() -> None:
    trained = [(trigrams(question), question) for question in NARROW]
    assert len(trained) > 250
    for probe in (p for members in SETS.values() for p in members):
        grams = trigrams(probe.question)
        for other, question in trained:
            assert likeness(grams, other) <= 0.25, (probe.question, question)


@pytest.mark.parametrize("name", BUILTIN)
def test_no_template(name: str) -> None:
    starts = Counter(" ".join(p.question.lower().split()[:3]) for p in SETS[name])
    assert starts.most_common(1)[0][1] <= 4
