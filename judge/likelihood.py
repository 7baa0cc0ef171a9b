"""Judging without a judge model: how likely a model finds given answers, and how likely the base finds its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from curate.core.chat import Encoded, encode
from curate.core.decoder import causal_lm
from curate.core.documents import ProbeScore, Sample
from curate.core.example import pair
from curate.core.nll import AnswerNll, Budget, answer_nll
from judge.questions import Probe, probe_examples

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Advance = Callable[[int], None]


def score_probes(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Sequence[Probe]],
                 budget: Budget = Budget(), advance: Advance = lambda answers: None) -> tuple[list[ProbeScore],
                                                                                             Counter[str]]:
    """Return the NLL of both answers of every probe, and the probes by status.

    A probe whose two answers are not both ``ok`` has no score, only a status (``too_long``, ``nonfinite``).
    ``advance`` hears of finished answers, two per probe.
    """
    probes = [(name, probe) for name, members in sets.items() for probe in members]
    encoded = encode(tokenizer, probe_examples([probe for _, probe in probes]), context_tokens(model))
    found = _evidence(model, encoded, budget, advance)
    scores: list[ProbeScore] = []
    statuses: Counter[str] = Counter()
    for number, (name, probe) in enumerate(probes):
        good, bad = 2 * number, 2 * number + 1
        status = next((s for k in (good, bad) if (s := _status(encoded[k], found.get(k))) != "ok"), "ok")
        statuses[status] += 1
        if status == "ok":
            scores.append(ProbeScore(set=name, probe=probe.id, nll_good=found[good].nll_sum, nll_bad=found[bad].nll_sum,
                                     n_good=found[good].n_tokens, n_bad=found[bad].n_tokens))
    return scores, statuses


def score_samples(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, str]],
                  budget: Budget = Budget(), advance: Advance = lambda answers: None) -> list[Sample]:
    """Return what ``model``, the untouched base, makes of sampled answers: one ``Sample`` per (question, answer).

    Status ``ok``, ``empty`` (nothing but white space), ``too_long`` or ``nonfinite``; only ``ok`` has an NLL.
    """
    encoded = encode(tokenizer, [pair(question, answer) for question, answer in asked], context_tokens(model))
    full = [k for k, (_, answer) in enumerate(asked) if answer.strip()]
    found = _evidence(model, [encoded[k] for k in full], budget, advance)
    evidence = {k: found.get(place) for place, k in enumerate(full)}
    samples = []
    for k, (question, answer) in enumerate(asked):
        status = _status(encoded[k], evidence.get(k)) if k in evidence else "empty"
        nll = evidence[k].mean if status == "ok" else None
        samples.append(Sample(question=question, answer=answer, status=status, nll_base=nll,
                              repetition=repetition(answer)))
    return samples


def repetition(text: str) -> float:
    """Return the share of word trigrams that came before in the text: 1 - distinct / all; 0 below four words."""
    words = re.findall(r"\w+", text.lower())
    if len(words) < 4:
        return 0.0
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams)


def _evidence(model: torch.nn.Module, encoded: Sequence[Encoded], budget: Budget,
              advance: Advance) -> dict[int, AnswerNll]:
    usable = [k for k, item in enumerate(encoded) if item.status == "ok"]
    found: dict[int, AnswerNll] = {}
    for part in answer_nll(model, [encoded[k] for k in usable], budget):
        found |= {usable[place]: evidence for place, evidence in part}
        advance(len(part))
    return found


def _status(encoded: Encoded, evidence: AnswerNll | None) -> str:
    return evidence.status if evidence is not None else encoded.status


def context_tokens(model: torch.nn.Module) -> int:
    """Return how many tokens a model's context holds; a very large number where its configuration does not say."""
    return getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None) or 2**30
