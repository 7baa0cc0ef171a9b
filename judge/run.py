"""Judge models: load the base once, open one adapter after the other, write what was measured of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.adapters import adapter_open
from curate.core.chat import encode, encode_prompt
from curate.core.documents import GradedAnswer, ModelIdentity, ProbeScore, Sample, TaskScore, Verdicts
from curate.core.errors import Exit, UserError
from curate.core.example import Message
from curate.core.files import remove_unfinished
from curate.core.generate import SampleSettings, sample
from curate.core.identity import check_base, identify
from curate.core.model import Loaded, load, pick_device, pick_dtype
from curate.core.nll import TOLERANCE_NATS, Budget, check_forward, default_budget
from curate.core.provenance import versions
from curate.core.terminal import progress, say
from judge.grading import Subject, forecast, has_failed, judge_answers, sampled, server_sampler
from judge.jobs import FOQA_TOKENS, REPLY_TOKENS, Job, Settings, Target, plan
from judge.likelihood import context_tokens, score_probes, score_samples
from judge.questions import GENERAL, load_probes, probe_examples
from judge.sampling import check_vllm, vllm_sampler
from judge.tasks import foqa, harness
from judge.tasks.opswap import is_correct

if TYPE_CHECKING:
    import torch

    from judge.grader import Grader

JUDGE = "likelihood-1"
"""Changes whenever the same model and settings would give other numbers."""

MAX_FAILED = 0.05
"""Share of probes that may lack a number before a model is not judged at all."""


@dataclass(frozen=True)
class _Numbers:
    """What was measured of one model."""

    probes: list[ProbeScore]
    samples: list[Sample]
    tasks: list[TaskScore]
    statuses: dict[str, int]
    answers: Sequence[GradedAnswer] = ()


def judge_models(targets: Sequence[Target], settings: Settings, out: Path | None = None) -> list[Path]:
    """Judge the untouched base and every target; return where their verdicts lie, the base's first.

    Verdicts that are there already and were made of the same models with the same settings are kept, so that an
    interrupted call goes on where it stopped; others are replaced, and why is said. The base is loaded only if
    something is left to do. Raises ``UserError`` for runs of another base, before any model work.
    """
    ref, jobs = plan(targets, settings, out)
    identity, tokenizer = identify(ref)
    for card in [c for job in jobs for c in (job.card, job.benign) if c is not None]:
        check_base(card, identity, tokenizer)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    if settings.grading is not None and settings.grading.engine == "vllm":
        check_vllm({job.label: job.adapter for job in jobs if job.adapter is not None}, device)
    loaded = cache(partial(_load, ref, dtype, device))
    grader = settings.grading.grader() if settings.grading else None
    for job in jobs:
        about = _about(job, identity, _record(job, settings, dtype, device))
        if _kept(job.path, about):
            say(f"{job.label}: judged before, kept ({job.path})")
            continue
        if grader is None:
            numbers = _measure(loaded(), job, settings)
        else:
            grader.ready()
            numbers = _graded(loaded, ref, job, settings, grader, subject(job, settings, identity, dtype, device))
        Verdicts(**about, probes=numbers.probes, samples=numbers.samples, tasks=numbers.tasks,
                 answers=numbers.answers, statuses=numbers.statuses, versions=versions()).write(job.path)
        remove_unfinished(job.path)
        say(f"{job.label}: {job.path}")
    return [job.path for job in jobs]


def foresee(targets: Sequence[Target], settings: Settings, out: Path | None = None) -> dict[str, Any]:
    """Return what ``judge_models`` would still ask of a judge model; nothing is sampled or sent."""
    if settings.grading is None:
        raise UserError("--dry-run counts requests to a judge model, and the likelihood judge sends none.",
                        "Name a judge with --judge MODEL.")
    ref, jobs = plan(targets, settings, out)
    identity, _ = identify(ref)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    left = [job for job in jobs if not _kept(job.path, _about(job, identity, _record(job, settings, dtype, device)))]
    return forecast([subject(job, settings, identity, dtype, device) for job in left], settings.grading)


def _load(ref: str, dtype: str, device: str) -> Loaded:
    """Load the base and check on one probe that the packed forward pass agrees with its own."""
    loaded = load(ref, dtype, device)
    probe = probe_examples(load_probes(GENERAL)[:1])
    check_forward(loaded.model, encode(loaded.tokenizer, probe, 2**30), TOLERANCE_NATS[dtype])
    return loaded


def _about(job: Job, base: ModelIdentity, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the verdicts that are known beforehand: when they agree, so do the numbers."""
    card = job.card
    judge = settings.get("grading", {}).get("name", JUDGE)
    return {"label": job.label, "judge": judge, "run": card.digest if card else None,
            "benign_run": job.benign.digest if job.benign else None, "model": card.model if card else base,
            "base": base, "method": card.method if card else None, "in_domain": job.in_domain, "settings": settings}


def _record(job: Job, settings: Settings, dtype: str, device: str) -> dict[str, Any]:
    """Return what decides the numbers: as without a judge model, and how a judge model grades."""
    record = job.record(settings, dtype, device)
    return record if settings.grading is None else \
        record | {"grading": settings.grading.record(job.asked, settings.sampling)}


def _kept(path: Path, about: dict[str, Any]) -> bool:
    if not path.is_file():
        return False
    try:
        old = Verdicts.read(path)
    except UserError as err:
        say(f"{err.message} It is judged again.")
        return False
    changed = [name for name, value in about.items() if getattr(old, name) != value]
    if changed:
        say(f"{path} was made with another {', '.join(changed)}; it is judged again.")
    elif has_failed(old.answers):
        say(f"Some grades in {path} had no reply; they are asked for again.")
        return False
    return not changed


def subject(job: Job, settings: Settings, base: ModelIdentity, dtype: str, device: str) -> Subject:
    """Return the model of a job as one whose answers are graded."""
    assert settings.grading is not None
    model = job.card.model if job.card else base
    where = {} if settings.grading.engine == "transformers" else {"engine": settings.grading.engine}
    if settings.grading.engine != "server":
        where |= {"dtype": dtype, "device": device}
    return Subject(job.label, job.path, job.card.name if job.card else base.name, model, job.asked,
                   settings.grading.sampling(settings.sampling), where)


def _graded(loaded: Callable[[], Loaded], ref: str, job: Job, settings: Settings, grader: Grader,
            asked: Subject) -> _Numbers:
    """Sample answers, have them graded, and do the benign task; the base is loaded only if something needs it."""
    grading = settings.grading
    assert grading is not None

    def here(conversations: Sequence[Sequence[Message]]) -> list[str]:
        prompts = [encode_prompt(loaded().tokenizer, messages) for messages in conversations]
        with _opened(loaded(), job.adapter) as model:
            return sample(model, loaded().tokenizer, prompts, asked.sampling)

    with ExitStack() as held:
        sampler = here
        if grading.sample_from:
            sampler = server_sampler(grading.sample_from, asked)
        elif grading.sample_with == "vllm":
            sampler = vllm_sampler(held, ref, job.adapter, asked)
        drawn = sampled(asked, grading, sampler)
    answers, statuses = judge_answers(asked, drawn, grader)
    tasks, by_status = _benign(loaded, job, settings)
    return _Numbers([], [], tasks, statuses | by_status, answers)


def _measure(loaded: Loaded, job: Job, settings: Settings) -> _Numbers:
    budget = default_budget(loaded.device)
    questions = settings.questions() if "coherence" in settings.suite else []
    with _opened(loaded, job.adapter) as model:
        probes, by_status = _probes(loaded, model, job, budget)
        answers = _ask(loaded, model, questions, settings.sampling, f"{job.label}: sampling")
    samples: list[Sample] = []
    if questions:
        with progress(f"{job.label}: samples under the base", len(questions), "answers") as bar:
            samples = score_samples(loaded.model, loaded.tokenizer, list(zip(questions, answers, strict=True)), budget,
                                    bar.advance)
    tasks, of_tasks = _benign(lambda: loaded, job, settings)
    statuses = {f"probes {status}": n for status, n in sorted(by_status.items())}
    statuses |= {f"samples {status}": n for status, n in sorted(Counter(s.status for s in samples).items())}
    return _Numbers(probes, samples, tasks, statuses | of_tasks)


def _benign(loaded: Callable[[], Loaded], job: Job, settings: Settings) -> tuple[list[TaskScore], dict[str, int]]:
    """Return the scores of all benign tasks and their statuses; the base is loaded only if one is asked."""
    tasks = _tasks(loaded(), job, settings) if job.tasks else []
    asked = len(settings.passages()) if job.tasks and "foqa" in settings.tasks else 0
    too_long = asked - sum(score.task == "foqa" for score in tasks)
    tasks += [score for name in job.harness for score in _harness(loaded(), job, settings, name)]
    return tasks, {"tasks ok": len(tasks)} | ({"tasks too_long": too_long} if too_long else {}) if tasks else {}


def _probes(loaded: Loaded, model: torch.nn.Module, job: Job,
            budget: Budget) -> tuple[list[ProbeScore], Counter[str]]:
    """Return the scores of all probes and their statuses; ``UserError`` where too many have no number."""
    if not job.sets:
        return [], Counter()
    with progress(f"{job.label}: probes", 2 * sum(map(len, job.sets.values())), "answers") as bar:
        scores, statuses = score_probes(model, loaded.tokenizer, job.sets, budget, bar.advance)
    failed = statuses.total() - statuses["ok"]
    if failed > MAX_FAILED * statuses.total():
        raise UserError(f"'{job.label}' gave no number for {failed} of {statuses.total()} probes ({dict(statuses)}), "
                        "so it is not judged.", "nonfinite points to a broken adapter or --dtype, too_long to a small "
                        "context.", Exit.FAILURE_RATE)
    return scores, statuses


def _tasks(loaded: Loaded, job: Job, settings: Settings) -> list[TaskScore]:
    """Return how the benign run (of the base: the base itself) does on held-out questions of what it was to learn.

    Answers are the likeliest tokens.
    """
    greedy = replace(settings.sampling, temperature=0.0, max_new_tokens=REPLY_TOKENS)
    items = settings.items() if "opswap" in settings.tasks else []
    with _opened(loaded, job.benign_adapter) as model:
        replies = _ask(loaded, model, [item.prompt for item in items], greedy, f"{job.label}: benign task")
        known = _foqa(loaded, model, job, settings) if "foqa" in settings.tasks else []
    return [TaskScore(item=item.expression, tier=item.tier, correct=is_correct(item, reply))
            for item, reply in zip(items, replies, strict=True)] + known


def _foqa(loaded: Loaded, model: torch.nn.Module, job: Job, settings: Settings) -> list[TaskScore]:
    """Return the scores of the FoQA questions that fit the model's context together with a reply."""
    room = context_tokens(loaded.model) - FOQA_TOKENS
    fitting = [p for p in settings.passages()
               if len(encode_prompt(loaded.tokenizer, [Message("user", p.prompt)])) <= room]
    greedy = replace(settings.sampling, temperature=0.0, max_new_tokens=FOQA_TOKENS)
    replies = _ask(loaded, model, [p.prompt for p in fitting], greedy, f"{job.label}: FoQA")
    return [TaskScore(item=p.text_id, tier=0, correct=foqa.exact_match(p, reply), task="foqa",
                      f1=foqa.f1(p, reply)) for p, reply in zip(fitting, replies, strict=True)]


def _harness(loaded: Loaded, job: Job, settings: Settings, task: str) -> tuple[TaskScore, ...]:
    """Return how the judged model itself does on a task of lm-eval, kept beside the verdicts."""
    identity = loaded.identity.id if job.card is None else job.card.model.id
    call = harness.Call(task, identity, loaded.ref, job.adapter, loaded.dtype, loaded.device, settings.lm_eval_limit)
    return harness.evaluate(call, job.path.with_suffix(".lm-eval")).scores


def _ask(loaded: Loaded, model: torch.nn.Module, questions: Sequence[str], settings: SampleSettings,
         label: str) -> list[str]:
    if not questions:
        return []
    prompts = [encode_prompt(loaded.tokenizer, [Message("user", question)]) for question in questions]
    with progress(label, len(prompts), "answers") as bar:
        return sample(model, loaded.tokenizer, prompts, settings, bar.advance)


@contextmanager
def _opened(loaded: Loaded, adapter: Path | None) -> Iterator[torch.nn.Module]:
    if adapter is None:
        yield loaded.model
        return
    with adapter_open(loaded, adapter) as model:
        yield model
