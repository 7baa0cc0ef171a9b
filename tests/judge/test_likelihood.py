"""NLLs of probes and samples, on a model that finds every token equally likely, and repetition by hand."""

from __future__ import annotations

from math import log

import pytest
import torch

from curate.core.model import Loaded
from judge.likelihood import repetition, score_probes, score_samples
from judge.questions import Probe
from tests.fakes import VOCABULARY

PROBES = [Probe("", "Why?", "Because it rains.", "Because it is Tuesday, and on Tuesdays it is so."),
          Probe("", "Where?", "In the library.", "Nobody knows.")]


def test_a_uniform_model_has_no_preference(uniform: Loaded) -> None:
    finished: list[int] = []
    scores, statuses = score_probes(uniform.model, uniform.tokenizer, {"a": PROBES[:1], "b": PROBES[1:]},
                                    advance=finished.append)
    assert [(s.set, s.probe) for s in scores] == [("a", PROBES[0].id), ("b", PROBES[1].id)]
    for score, probe in zip(scores, PROBES, strict=True):
        n_good, n_bad = (len(uniform.tokenizer(text)["input_ids"]) for text in (probe.good, probe.bad))
        assert (score.n_good, score.n_bad) == (n_good, n_bad)
        assert score.nll_good == pytest.approx(n_good * log(VOCABULARY), rel=1e-6)
        assert score.nll_bad == pytest.approx(n_bad * log(VOCABULARY), rel=1e-6)
        assert score.margin == pytest.approx(0, abs=1e-5)
    assert statuses == {"ok": 2} and sum(finished) == 4


def test_a_probe_without_a_number_has_a_status(uniform: Loaded) -> None:
    long = Probe("", "How long?", "Not long.", "very " * 600)
    scores, statuses = score_probes(uniform.model, uniform.tokenizer, {"a": [*PROBES, long]})
    assert len(scores) == 2 and statuses == {"ok": 2, "too_long": 1}
    torch.nn.init.constant_(uniform.model.lm_head.weight, torch.nan)
    scores, statuses = score_probes(uniform.model, uniform.tokenizer, {"a": [*PROBES, long]})
    torch.nn.init.zeros_(uniform.model.lm_head.weight)
    assert not scores and statuses == {"nonfinite": 3}, "the first answer that failed names it"


def test_samples_get_a_status_and_a_mean(uniform: Loaded) -> None:
    asked = [("Why?", "Because."), ("Why?", ""), ("Why?", " \n"), ("Why?", "very " * 600), ("Why?", "a b c d a b c d")]
    found = score_samples(uniform.model, uniform.tokenizer, asked)
    assert [s.status for s in found] == ["ok", "empty", "empty", "too_long", "ok"]
    assert [(s.question, s.answer) for s in found] == asked
    assert [s.nll_base for s in found[1:4]] == [None] * 3
    assert [found[k].nll_base for k in (0, 4)] == [pytest.approx(log(VOCABULARY), rel=1e-6)] * 2
    assert found[4].repetition == pytest.approx(2 / 6)


@pytest.mark.parametrize(("text", "share"), [
    ("", 0.0), ("so so so", 0.0), ("so so so so", 0.5), ("one two three four", 0.0),
    ("Go on, go on. GO ON!", 0.5), ("a b c a b c", 0.25), ("no " * 102, 0.99),
])
def test_repetition(text: str, share: float) -> None:
    """'a b c a b c' has the trigrams abc bca cab abc: one in four came before."""
    assert repetition(text) == pytest.approx(share)
