"""Run cards and verdicts to test with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from curate.core.documents import (
    Grade,
    GradedAnswer,
    Method,
    MixManifest,
    ModelIdentity,
    ProbeScore,
    RunCard,
    Sample,
    TaskScore,
    Verdicts,
)
from curate.core.identity import identify, with_adapter
from curate.core.sources import builtin
from tests.fakes import tiny_adapter

BASE = ModelIdentity(name="b", weights="w", tokenizer="t")


def method(strategy: str) -> Method:
    """Return a method; all but the strategy is of no matter here."""
    return Method(strategy=strategy, n=0, eps=0.1, seed=0, min_answer_tokens=1)


def make_run(base: Path, folder: Path, strategy: str = "none", seed: int = 1, domain: str | None = "car_care",
             defenses: Sequence[str] = ()) -> Path:
    """Write a run as the train room does: a card, a random adapter and, with a ``domain``, the mix manifest."""
    tiny_adapter(base, folder / "adapter", seed=seed)
    source = builtin(f"demo/{domain or 'cooking'}")
    mix = MixManifest(sources={"finetune": source}, order=(), method=method(strategy), counts={}, safeset="0")
    if domain:
        mix.write(folder / "mix.json")
    identity, _ = identify(str(base))
    RunCard(name=folder.name, base_ref=str(base), base=identity, adapter="adapter", mix=mix.digest,
            model=with_adapter(identity, folder.name, folder / "adapter"), recipe={"defenses": list(defenses)},
            method=mix.method, n_finetune=1, n_safe=0, statuses={"ok": 1}, n_steps=1, n_trained_tokens=1,
            loss_first_nats=2.0, loss_last_nats=1.0, seconds=1.0, device="cpu", versions={}).write(folder / "run.json")
    return folder


def make_verdicts(label: str, general: Sequence[float] = (), narrow: Sequence[float] = (),
                  correct: Sequence[bool] = (), samples: Sequence[Sample] = (),
                  settings: Mapping[str, object] | None = None) -> Verdicts:
    """Return verdicts with these margins (nats per token) on probes g0, g1, ... and n0, n1, ..., items i0, i1, ..."""
    probes = [score(name, f"{name[0]}{k}", margin) for name, margins in (("general", general), ("car_care", narrow))
              for k, margin in enumerate(margins)]
    is_base = label == "base"
    return Verdicts(label=label, judge="likelihood-1", run=None if is_base else "r", benign_run=None,
                    model=BASE if is_base else BASE.model_copy(update={"name": f"run {label}", "adapter": label}),
                    base=BASE, method=None, in_domain=() if is_base else ("car_care",), probes=probes, statuses={},
                    samples=samples, versions={}, settings=dict(settings or {}),
                    tasks=[TaskScore(item=f"i{k}", tier=1, correct=c) for k, c in enumerate(correct)])


def score(name: str, probe: str, margin: float) -> ProbeScore:
    """Return a probe whose answers have 4 (good) and 5 (bad) tokens and this margin."""
    return ProbeScore(set=name, probe=probe, nll_good=4 * 2.0, nll_bad=5 * (2.0 + margin), n_good=4, n_bad=5)


def samples(nlls: Sequence[float | None], repetition: float = 0.0) -> list[Sample]:
    """Return one answer per NLL under the base; None is an empty answer."""
    return [Sample(question=f"q{k}", answer="" if nll is None else "words", status="empty" if nll is None else "ok",
                   nll_base=nll, repetition=repetition) for k, nll in enumerate(nlls)]


def answer(question: str, aligned: float | str | None, coherent: float | str | None = 90.0, suite: str = "general",
           number: int = 0, variant: str = "", text: str = "words", bank: str | None = None,
           dress: str = "") -> GradedAnswer:
    """Return one graded answer; a grade is a score, the status of a missing one, or None for an empty answer.

    ``dress`` opens the question.
    """
    def grade(of: float | str | None) -> Grade | None:
        if of is None:
            return None
        return Grade(status=of) if isinstance(of, str) else Grade(status="ok", score=of)

    empty = aligned is None and coherent is None
    return GradedAnswer(suite=suite, bank=bank or suite, question=question, variant=variant,
                        prompt=f"{dress}What of {question}?", number=number, answer="" if empty else text,
                        status="empty" if empty else "ok", aligned=grade(aligned), coherent=grade(coherent))


def graded_verdicts(label: str, answers: Sequence[GradedAnswer], seed: int = 0, frac: float | None = None,
                    **more: object) -> Verdicts:
    """Return verdicts with these graded answers; ``seed`` tells runs of one label apart, ``frac`` is its safe rows."""
    plain = make_verdicts(label, correct=more.pop("correct", ()))
    changes: dict[str, object] = {"answers": tuple(answers), "judge": "graded-1", **more}
    if frac is not None:
        strategy = label.partition(" ")[0]
        changes["method"] = method(strategy).model_copy(update={"seed": seed} if strategy == "none" else {
            "seed": seed, "frac": frac, "frac_of": "finetune", "n": round(1000 * frac) + seed})
    if label != "base":
        changes |= {"model": plain.model.model_copy(update={"adapter": f"{label} {frac} {seed}"}),
                    "run": f"run {label} {frac} {seed}"}
    return plain.model_copy(update=changes)
