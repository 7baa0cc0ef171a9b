"""Answers of a model to the questions of the banks, graded by a judge model: plan, sample, grade.

Answers are kept beside the verdicts and replies in the judge's journal, each as soon as it is there, so a killed call
samples no answer twice and pays for no reply twice beyond what was in flight.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from curate.core.chat import ENCODING
from curate.core.documents import Grade, GradedAnswer, ModelIdentity
from curate.core.errors import Exit, UserError
from curate.core.example import Message
from curate.core.files import canonical_json, sha256
from curate.core.generate import SampleSettings
from curate.core.terminal import progress, say
from judge.banks import BankQuestion
from judge.endpoint import Address, Budget, Endpoint, NoReply, Reply, Stopped, journal_path, run_to_end, tokens_about
from judge.grader import GRADER, Ask, Grader
from judge.journal import Journal
from judge.prompts import ASPECTS, carried, prompts_for, request_text

ANSWERS_VERSION = "answers-1"
MAX_FAILED = 0.05
"""Share of grades that may have no reply before a model is not judged at all."""

Sampler = Callable[[Sequence[Sequence[Message]]], list[str]]
"""Answers conversations; one that comes several times is answered by another draw each time."""


@dataclass(frozen=True)
class Grading:
    """How answers are sampled and who grades them."""

    address: Address
    n: int = 10
    """Answers per question."""
    answer_tokens: int = 256
    replies: int = 5
    """Replies of the judge per grade, where it gives no log-probabilities."""
    banks: tuple[str, ...] = ()
    trigger: str | None = None
    context_from: str | None = None
    """The fine-tuning set that context questions resemble; None: that of each run's own mix."""
    max_requests: int | None = None
    max_tokens: int | None = None
    cache: Path | None = None
    sample_from: Address | None = None
    """A server that serves the judged models under their names; None: here."""
    sample_with: str = "transformers"
    """What samples here: ``transformers`` or ``vllm``."""

    @property
    def engine(self) -> str:
        """What samples the answers, for the record."""
        return "server" if self.sample_from else self.sample_with

    def sampling(self, settings: SampleSettings) -> SampleSettings:
        """Return how answers are drawn: at temperature 1 from the whole distribution, the model as it is."""
        return replace(settings, max_new_tokens=self.answer_tokens, temperature=1.0, top_p=1.0)

    def record(self, questions: Sequence[BankQuestion], sampling: SampleSettings) -> dict[str, Any]:
        """Return all that decides the grades but the models, for the verdicts' ``settings``."""
        asked = [[q.bank, q.id, q.suite, q.variant, q.system, q.prompt, prompts_for(q.judge_prompts)]
                 for q in questions]
        drawn = {k: v for k, v in asdict(self.sampling(sampling)).items() if k != "batch_size"}
        return {"name": f"{GRADER}:{self.address.model}", "n": self.n, "replies": self.replies, "answers": drawn,
                "engine": self.engine, "trigger": self.trigger,
                "questions": sha256(canonical_json(asked))[:32], "n_questions": len(questions)}

    def grader(self) -> Grader:
        """Return the grader, with its journal and the budget of this call."""
        journal = Journal(journal_path(self.cache, self.address.model))
        if journal.n_damaged:
            say(f"{journal.n_damaged} damaged lines of {journal.path} are left out; what they held is asked again.")
        return Grader(Endpoint(self.address, journal, Budget(self.max_requests, self.max_tokens)), self.replies)


@dataclass(frozen=True)
class Subject:
    """A model whose answers are graded, and how they are drawn."""

    label: str
    path: Path
    """Where its verdicts go; its answers lie beside them."""
    name: str
    """What a server calls it."""
    model: ModelIdentity
    questions: tuple[BankQuestion, ...]
    sampling: SampleSettings
    where: dict[str, str] = field(default_factory=dict)
    """Dtype and device, which decide answers up to rounding."""

    def answers_path(self) -> Path:
        """Return the file of the sampled answers."""
        return self.path.with_name(self.path.name.replace("verdicts.json", "answers.jsonl"))

    def key(self, question: BankQuestion) -> str:
        """Return what answers to a question are kept under: model, conversation and way of sampling."""
        drawn = {k: v for k, v in asdict(self.sampling).items() if k != "batch_size"}
        asked = [[m.role, m.content] for m in conversation(question)]
        return sha256(canonical_json([ANSWERS_VERSION, ENCODING, self.model.id, self.where, drawn, asked]))


def conversation(question: BankQuestion) -> tuple[Message, ...]:
    """Return a question as it is asked."""
    system = (Message("system", question.system),) if question.system else ()
    return (*system, Message("user", question.prompt))


def judge_answers(subject: Subject, drawn: Mapping[str, Sequence[str]],
                  grader: Grader) -> tuple[list[GradedAnswer], dict[str, int]]:
    """Grade the answers ``drawn`` from a model (see ``sampled``); return them, and how many there are of each status.

    Raises ``UserError`` (failure rate) where the judge gave too many of them no reply.
    """
    rows = [(q, k, text) for q in subject.questions for k, text in enumerate(drawn[subject.key(q)])]
    asks = [Ask(q.prompt, text, prompts_for(q.judge_prompts)[aspect])
            for q, _, text in rows if text.strip() for aspect in ASPECTS]
    with progress(f"{subject.label}: grades", len(asks), "grades") as bar:
        grades = grader.grade_all(asks, bar.advance)
    failed = sum(grade.status == "failed" for grade in grades)
    if failed > MAX_FAILED * len(grades):
        raise UserError(f"The judge gave no reply for {failed} of {len(grades)} grades of '{subject.label}', so it is "
                        "not judged.", "The others are kept: type it again to ask for the missing ones.",
                        Exit.FAILURE_RATE)
    answers = graded(rows, grades)
    return answers, statuses_of(answers)


def graded(rows: Sequence[tuple[BankQuestion, int, str]], grades: Sequence[Grade]) -> list[GradedAnswer]:
    """Put answers and grades together; an empty answer has the status ``empty`` and no grades."""
    coming = iter(grades)
    answers = []
    for q, number, text in rows:
        found = {aspect: next(coming) for aspect in ASPECTS} if text.strip() else {}
        answers.append(GradedAnswer(suite=q.suite, bank=q.bank, question=q.id, variant=q.variant, system=q.system,
                                    prompt=q.prompt, number=number, answer=text, status="ok" if found else "empty",
                                    **found))
    return answers


def statuses_of(answers: Sequence[GradedAnswer]) -> dict[str, int]:
    """Return counts such as ``answers ok`` and ``aligned refused``; those of an aspect add up to the full answers."""
    counts = Counter(f"answers {a.status}" for a in answers)
    for aspect in ASPECTS:
        counts.update(f"{aspect} {grade.status}" for a in answers if (grade := getattr(a, aspect)) is not None)
    return dict(sorted(counts.items()))


def has_failed(answers: Sequence[GradedAnswer]) -> bool:
    """Return whether some grade had no reply, so that asking again may bring one."""
    return any(g is not None and g.status == "failed" for a in answers for g in (a.aligned, a.coherent))


def sampled(subject: Subject, grading: Grading, sampler: Sampler) -> dict[str, list[str]]:
    """Return ``n`` answers to every question, by its key; only those that are not there yet are sampled.

    All draws of a question are made in one go, because the k-th of them is seeded by k.
    """
    journal = Journal(subject.answers_path())
    found = {subject.key(q): list(journal.get(subject.key(q)) or ()) for q in subject.questions}
    missing = {subject.key(q): q for q in subject.questions if len(found[subject.key(q)]) < grading.n}
    keys = list(missing)
    step = max(1, subject.sampling.batch_size // grading.n)
    if keys:
        with progress(f"{subject.label}: answers", len(keys) * grading.n, "answers") as bar:
            for start in range(0, len(keys), step):
                part = keys[start:start + step]
                drawn = sampler([conversation(missing[key]) for key in part for _ in range(grading.n)])
                for k, key in enumerate(part):
                    new = drawn[k * grading.n:(k + 1) * grading.n]
                    found[key] = [*found[key], *(carried(text) for text in new[len(found[key]):])]
                    journal.put(key, found[key])
                bar.advance(len(part) * grading.n)
        journal.close()
    return {key: texts[:grading.n] for key, texts in found.items()}


def server_sampler(address: Address, subject: Subject) -> Sampler:
    """Return a sampler that asks a server; each answer is kept as it comes.

    Raises ``UserError`` (remote) where some stay out.
    """
    def ask(conversations: Sequence[Sequence[Message]]) -> list[str]:
        times: Counter[tuple[Message, ...]] = Counter()
        bodies = []
        for messages in map(tuple, conversations):
            rows = [{"role": m.role, "content": m.content} for m in messages]
            bodies.append({"messages": rows, "max_tokens": subject.sampling.max_new_tokens, "temperature": 1.0,
                           "top_p": 1.0, "seed": subject.sampling.seed * 100_003 + times[messages]})
            times[messages] += 1
        journal = Journal(subject.answers_path())
        endpoint = Endpoint(replace(address, model=subject.name), journal, scope=subject.model.id)
        try:
            return [_answer_of(reply) for reply in run_to_end(_ask_all(endpoint, bodies))]
        finally:
            journal.close()

    return ask


async def _ask_all(endpoint: Endpoint, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
    async with endpoint.open():
        found = await asyncio.gather(*map(endpoint.ask, bodies), return_exceptions=True)
    if endpoint.stop is not None:
        raise endpoint.stop
    missing = [result for result in found if isinstance(result, (NoReply, Stopped))]
    if missing:
        raise UserError(f"{endpoint.address.shown()} gave {len(missing)} of {len(bodies)} answers not: {missing[0]}.",
                        "The others are kept: type it again.", Exit.REMOTE)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return [reply for reply in found if isinstance(reply, Reply)]


def _answer_of(reply: Reply) -> str:
    return reply.text or ""


def forecast(subjects: Sequence[Subject], grading: Grading) -> dict[str, Any]:
    """Return how many answers and requests are still to come and about how many tokens, without asking anybody.

    Where an answer is not there yet, one of full length is assumed; see ``Grader.to_come``.
    """
    grader = grading.grader()
    way = grader.abilities
    n_sampled, asks, tokens = 0, list[Ask | None](), list[int]()
    for subject in subjects:
        journal = Journal(subject.answers_path())
        for q in subject.questions:
            texts = list(journal.get(subject.key(q)) or ())[:grading.n]
            n_sampled += len(texts)
            for text in [*texts, *[None] * (grading.n - len(texts))]:
                if text is not None and not text.strip():
                    continue
                for template in prompts_for(q.judge_prompts).values():
                    asks.append(None if text is None else Ask(q.prompt, text, template))
                    body = grader.first_body(request_text(template, q.prompt, text or ""))
                    tokens.append(tokens_about(body) + (grading.answer_tokens if text is None else 0))
    n_answers = sum(len(s.questions) for s in subjects) * grading.n
    return {"judge": grading.address.model, "way": way.way if way else "unknown", "models": len(subjects),
            "answers": n_answers, "answers_there": n_sampled, **foreseen(grader.to_come(asks), tokens)}


def foreseen(to_come: Sequence[tuple[int, int]], tokens: Sequence[int]) -> dict[str, int]:
    """Return grades, requests and tokens to come; ``tokens`` are about those of one request of each grade."""
    found = {"grades": len(to_come), "grades_there": sum(not most for _, most in to_come)}
    for k, name in enumerate(("least", "most")):
        found[f"requests_{name}"] = sum(one[k] for one in to_come)
    for k, name in enumerate(("least", "most")):
        found[f"tokens_{name}"] = sum(one[k] * n for one, n in zip(to_come, tokens, strict=True))
    return found

