"""Persona vectors: the direction in hidden states between answers with a trait and answers with its opposite.

    v[l] = mean over kept answers with the trait of m_l - mean over those with its opposite of m_l
    m_l  = mean over the tokens of an answer of hidden state l, under the system prompt that it was given to

Pairs: question x pair of system prompts x sample, one answer under the positive prompt and one under the negative. A
pair is kept where, from 0 to 100, the trait's grade is at least 50 in the one and below 50 in the other, and both
answers' coherence is at least 50. Grades come from the model's own likelihoods, which need no API
(``LikelihoodGrader``), or from a judge model (``RubricGrader``), as in the published code.

Method: arXiv 2507.21509, https://github.com/safety-research/persona_vectors.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from curate.core.chat import Encoded, encode, encode_prompt
from curate.core.decoder import hidden_states, window
from curate.core.errors import Exit, UserError, unknown
from curate.core.example import Example, Message
from curate.core.files import canonical_json, sha256, write_atomic
from curate.core.generate import SampleSettings, sample
from curate.core.model import Loaded, load
from curate.core.nll import TOLERANCE_NATS, AnswerNll, answer_nll, check_forward, default_budget
from curate.core.pack import pack, plan
from curate.core.provenance import git_state, versions
from curate.core.terminal import progress, say
from train.defenses.persona import FORMAT, PROVENANCE, TENSOR, default_layer
from train.hooks import capture, layers

TRAITS = Path(__file__).parent / "traits"
TRAIT_FROM, COHERENT_FROM = 50.0, 50.0
"""Grades from which the trait is said to show and an answer to be coherent (the published code's)."""
MIN_WORDS = 4
NO_LIMIT = 2**30


@dataclass(frozen=True)
class Trait:
    """A trait: pairs of system prompts that ask for it and for its opposite, and questions where it can show."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    questions: tuple[str, ...]
    rubric: str = ""
    """What a judge model is asked: a text with {question} and {answer} that wants a number from 0 to 100."""


@dataclass(frozen=True)
class Extraction:
    """How a vector is extracted."""

    n_questions: int | None = None
    samples: int = 1
    max_new_tokens: int = 96
    temperature: float = 0.8
    seed: int = 0
    batch_size: int = 64
    min_pairs: int = 10
    dtype: str = "auto"
    device: str = "auto"

    @property
    def sampling(self) -> SampleSettings:
        """How answers are sampled: from all tokens (top-p 1); ``UserError`` for values outside their range."""
        return SampleSettings(self.max_new_tokens, self.temperature, 1.0, self.seed, self.batch_size)


@dataclass(frozen=True)
class Answer:
    """One sampled answer: to which question, under which prompt of which pair, and its number."""

    question: str
    pair: int
    number: int
    system: str
    positive: bool
    text: str

    @property
    def example(self) -> Example:
        """The conversation as it was."""
        return Example((Message("system", self.system), Message("user", self.question),
                        Message("assistant", self.text)))


@dataclass(frozen=True)
class Grade:
    """What a grader says of an answer, 0 to 100 each; None, with a status, where there is no number."""

    trait: float | None
    coherence: float | None
    status: str = "ok"


def read_trait(text: str) -> Trait:
    """Return a builtin trait or that of a JSON file; ``UserError`` where it is neither or incomplete."""
    builtin = {path.stem: path for path in sorted(TRAITS.glob("*.json"))}
    path = builtin.get(text, Path(text))
    if not path.is_file():
        raise unknown("trait", text, [*builtin, "PATH.json"])
    try:
        body = json.loads(path.read_bytes())
        trait = Trait(str(body["name"]), *(tuple(body[key]) for key in ("positive", "negative", "questions")),
                      rubric=str(body.get("rubric", "")))
    except (ValueError, LookupError, TypeError) as err:
        raise UserError(f"{path} is no trait: {err!r}.", "It needs name, positive, negative and questions.",
                        Exit.BAD_DATA) from None
    texts = [*trait.positive, *trait.negative, *trait.questions]
    if not trait.positive or len(trait.positive) != len(trait.negative) or not trait.questions or \
            not all(isinstance(t, str) and t.strip() for t in texts) or len(set(texts)) < len(texts):
        raise UserError(f"{path} is no trait: prompts must come in pairs, and all texts be different and not empty.",
                        "Give as many negative as positive prompts.", Exit.BAD_DATA)
    return trait


def write_vector(base: str, trait: Trait, extraction: Extraction, out: Path, answers_path: Path | None = None,
                 judge: RubricGrader | None = None) -> dict[str, Any]:
    """Extract ``trait`` from ``base``, write the vector with its provenance to ``out``, and return a report.

    Answers are graded by ``judge``, or without one by the model's own likelihoods. Raises ``UserError`` where too few
    pairs pass the filter.
    """
    _ = extraction.sampling
    loaded = load(base, extraction.dtype, extraction.device)
    answers = sample_answers(loaded, trait, extraction)
    told = [item for item in encode(loaded.tokenizer, [a.example for a in answers], NO_LIMIT) if item.status == "ok"]
    check_forward(loaded.model, told, TOLERANCE_NATS[loaded.dtype])
    grader = judge or LikelihoodGrader(loaded, trait)
    grades = grader(answers)
    if answers_path is not None:
        rows = [{**asdict(answer), **asdict(grade)} for answer, grade in zip(answers, grades, strict=True)]
        write_atomic(answers_path, b"".join(canonical_json(row) + b"\n" for row in rows))
    kept, counts = kept_pairs(answers, grades)
    if len(kept) < extraction.min_pairs:
        raise UserError(f"{len(kept)} of {sum(counts.values())} pairs passed the filter ({dict(counts)}), but "
                        f"{extraction.min_pairs} are needed.", "Read them with --answers FILE; give more --questions "
                        "or --samples, another --trait, or lower --min-pairs.", Exit.FAILURE_RATE)
    means = [mean_states(loaded, [pair[k].example for pair in kept]) for k in (0, 1)]
    vector = (means[0] - means[1]).float()
    provenance = _provenance(loaded, trait, extraction, counts) | {"grader": grader.name}
    write_atomic(out, save({TENSOR: vector.contiguous()}, {PROVENANCE: canonical_json(provenance).decode()}))
    n_blocks = len(vector) - 1
    layer = default_layer(n_blocks)
    return {"path": str(out), "trait": trait.name, "pairs": provenance["pairs"], "layer": layer, "n_blocks": n_blocks,
            "norm": vector[layer].norm().item(), "state_norm": means[1][layer].norm().item()}


def plan_of(trait: Trait, extraction: Extraction, judged: bool) -> dict[str, int]:
    """Return how many answers are sampled, of how many tokens at most, and how many grades a judge model is asked."""
    n_questions = len(trait.questions[:extraction.n_questions])
    n_answers = 2 * n_questions * len(trait.positive) * extraction.samples
    return {"answers": n_answers, "sampled tokens": n_answers * extraction.max_new_tokens,
            "judge's grades": 2 * n_answers if judged else 0}


def sample_answers(loaded: Loaded, trait: Trait, extraction: Extraction) -> list[Answer]:
    """Return answers in pairs: the 2k-th under a positive system prompt, the next under its negative one."""
    plans = [(question, pair, number, prompts[pair], prompts is trait.positive)
             for question in trait.questions[:extraction.n_questions] for pair in range(len(trait.positive))
             for number in range(extraction.samples) for prompts in (trait.positive, trait.negative)]
    prompts = [encode_prompt(loaded.tokenizer, [Message("system", system), Message("user", question)])
               for question, _, _, system, _ in plans]
    with progress("sample answers", len(prompts), "answers") as state:
        texts = sample(loaded.model, loaded.tokenizer, prompts, extraction.sampling, state.advance)
    return [Answer(*parts, text.strip()) for parts, text in zip(plans, texts, strict=True)]


class LikelihoodGrader:
    """Grades answers without an API, by the model's own likelihoods.

    trait      100 / (1 + exp(NLL of the answer under its pair's positive prompt - NLL under its negative prompt)), the
               probability in percent that the answer was given under the positive prompt, if both are as likely
               beforehand. NLLs are sums in nats over the answer's tokens.
    coherence  100 x (1 - share of the answer's word trigrams that occurred in it before); 0 for fewer than
               ``MIN_WORDS`` words. So it finds loops and stumps; fluent nonsense passes.

    It asks whether the model itself tells the two prompts apart by the answer: a weak model that follows neither
    prompt gets grades near 50, and a trait that the model misunderstands passes. A judge model is the better grader.
    """

    name = "likelihood"

    def __init__(self, loaded: Loaded, trait: Trait) -> None:
        self.loaded, self.trait = loaded, trait

    def __call__(self, answers: Sequence[Answer]) -> list[Grade]:
        """Grade answers; those without tokens are ``empty_answer``, numbers that are not finite ``nonfinite``."""
        under = [self._nll(answers, prompts) for prompts in (self.trait.positive, self.trait.negative)]
        return [self._grade(answer, positive, negative)
                for answer, positive, negative in zip(answers, *under, strict=True)]

    def _nll(self, answers: Sequence[Answer], prompts: Sequence[str]) -> list[AnswerNll | None]:
        """Return the evidence about each answer under the prompt of its pair; None for an empty one."""
        examples = [Example((Message("system", prompts[answer.pair]), *answer.example.messages[1:]))
                    for answer in answers]
        encoded = encode(self.loaded.tokenizer, examples, NO_LIMIT)
        places = [k for k, item in enumerate(encoded) if item.status == "ok"]
        found: list[AnswerNll | None] = [None] * len(answers)
        for part in answer_nll(self.loaded.model, [encoded[k] for k in places], default_budget(self.loaded.device),
                               say):
            for index, evidence in part:
                found[places[index]] = evidence
        return found

    def _grade(self, answer: Answer, positive: AnswerNll | None, negative: AnswerNll | None) -> Grade:
        if positive is None or negative is None:
            return Grade(None, None, "empty_answer")
        if "nonfinite" in (positive.status, negative.status):
            return Grade(None, None, "nonfinite")
        nats = min(max(positive.nll_sum - negative.nll_sum, -700.0), 700.0)
        return Grade(100 / (1 + math.exp(nats)), coherence(answer.text))


@dataclass(frozen=True)
class RubricGrader:
    """Grades answers by two rubrics that a judge model is asked: how much of the trait, how coherent.

    ``trait`` and ``coherence`` are rewards as ``train rl`` has them: they are given conversations and completions of
    one message each, and return a share from 0 to 1, or a status, for each.

    The judge is told the question and the answer, not the system prompt. An answer of which either grade is missing
    has the status of the one that is.
    """

    name: str
    trait: Callable[[Sequence[Any], Sequence[Any]], Sequence[float | str]]
    coherence: Callable[[Sequence[Any], Sequence[Any]], Sequence[float | str]]

    def __call__(self, answers: Sequence[Answer]) -> list[Grade]:
        """Grade answers."""
        asked = [[{"role": "user", "content": answer.question}] for answer in answers]
        given = [[{"role": "assistant", "content": answer.text}] for answer in answers]
        return [self._grade(trait, coherent) for trait, coherent in zip(
            self.trait(asked, given), self.coherence(asked, given), strict=True)]

    def _grade(self, trait: float | str, coherent: float | str) -> Grade:
        for found in (trait, coherent):
            if isinstance(found, str):
                return Grade(None, None, found)
        return Grade(100 * float(trait), 100 * float(coherent))


def coherence(text: str) -> float:
    """Return 100 times the share of new word trigrams in ``text``; 0 for fewer than ``MIN_WORDS`` words."""
    words = text.lower().split()
    if len(words) < MIN_WORDS:
        return 0.0
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 100 * len(set(trigrams)) / len(trigrams)


def kept_pairs(answers: Sequence[Answer], grades: Sequence[Grade]) -> tuple[list[tuple[Answer, Answer]], Counter[str]]:
    """Return the pairs that pass the filter, and how many pairs met which fate; the counts add up to all pairs."""
    kept, counts = [], Counter[str]()
    for k in range(0, len(answers), 2):
        fate = _fate(grades[k], grades[k + 1])
        counts[fate] += 1
        if fate == "kept":
            kept.append((answers[k], answers[k + 1]))
    return kept, counts


def _fate(positive: Grade, negative: Grade) -> str:
    for grade in (positive, negative):
        if grade.trait is None or grade.coherence is None:
            return grade.status
    if min(positive.coherence or 0, negative.coherence or 0) < COHERENT_FROM:
        return "incoherent"
    if (positive.trait or 0) < TRAIT_FROM:
        return "trait_missing"
    return "kept" if (negative.trait or 0) < TRAIT_FROM else "trait_in_opposite"


def mean_states(loaded: Loaded, examples: Sequence[Example]) -> torch.Tensor:
    """Return the mean over examples of the mean over answer tokens of every hidden state: float64 [L + 1, H].

    The states are those *at* the answer's tokens. A packed sequence has every answer token but, without an
    end-of-turn token in the template, the last one, which predicts nothing; examples with no other are left out.
    """
    encoded = [item for item in encode(loaded.tokenizer, examples, NO_LIMIT) if len(item.ids) - item.answer_start > 1]
    if not encoded:
        raise UserError("No answer has a token with a hidden state: all have a single token and no end of turn.",
                        "Ask for longer answers with --max-new-tokens.", Exit.FAILURE_RATE)
    states = range(len(layers(loaded.model)) + 1)
    total = torch.zeros(len(states), loaded.model.config.get_text_config().hidden_size, dtype=torch.float64)
    with progress("hidden states", len(encoded), "answers") as state, torch.inference_mode():
        for members in plan(encoded, min(default_budget(loaded.device).capacity, window(loaded.model))):
            total += _answer_sums(loaded, encoded, members, states)
            state.advance(len(members))
    return total / len(encoded)


def _answer_sums(loaded: Loaded, encoded: Sequence[Encoded], members: list[int], states: range) -> torch.Tensor:
    """Return the sum over ``members`` of the mean over answer tokens of every state: float64 [L + 1, H]."""
    batch = pack(encoded, [members]).to(loaded.device)
    with capture(loaded.model, states) as found:
        hidden_states(loaded.model, batch)
    # The position that predicts an answer's first token is the prompt's last; the others are the answer's tokens.
    inside = torch.zeros_like(batch.owner, dtype=torch.bool)
    inside[1:] = batch.owner[1:] == batch.owner[:-1]
    owner, rows = batch.owner[inside], batch.rows[inside]
    weights = 1 / torch.bincount(owner, minlength=len(encoded))[owner].double()
    return torch.stack([(found[s].flatten(0, 1)[rows].double() * weights[:, None]).sum(0) for s in states]).cpu()


def _provenance(loaded: Loaded, trait: Trait, extraction: Extraction, counts: Counter[str]) -> dict[str, Any]:
    return {"format": FORMAT, "base": loaded.identity.model_dump(mode="json"), "trait": trait.name,
            "trait_digest": sha256(canonical_json(asdict(trait))),
            "trait_from": TRAIT_FROM, "coherent_from": COHERENT_FROM,
            "settings": {**asdict(extraction), "dtype": loaded.dtype, "device": loaded.device},
            "pairs": dict(sorted(counts.items())), "versions": versions(), "git": git_state()}
