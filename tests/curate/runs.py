"""Run cards of adapters that were never trained, for scoring with tiny models."""

from __future__ import annotations

from pathlib import Path

from curate.core.documents import EnsembleSpec, MemberRef, Method, RunCard
from curate.core.identity import identify, with_adapter
from tests.fakes import tiny_adapter


def tiny_run(model: Path, folder: Path, name: str, seed: int, scale: float = 0.3) -> Path:
    """Write a random adapter of ``model`` with a run card and return the card's path."""
    base, _ = identify(str(model))
    adapter = tiny_adapter(model, folder / "adapter", seed=seed, scale=scale)
    method = Method(strategy="none", n=0, eps=0.0, seed=0, min_answer_tokens=1)
    RunCard(name=name, base_ref=str(model), base=base, model=with_adapter(base, name, adapter), adapter="adapter",
            recipe={}, mix="0" * 64, method=method, n_finetune=0, n_safe=0, statuses={}, n_steps=0,
            n_trained_tokens=0, loss_first_nats=0.0, loss_last_nats=0.0, seconds=0.0, device="cpu",
            versions={}).write(folder / "run.json")
    return folder / "run.json"


def tiny_ensemble(model: Path, folder: Path, n: int = 2) -> Path:
    """Write ``n`` members and their spec; return the spec's path."""
    members = []
    for k in range(n):
        card = tiny_run(model, folder / f"m{k}", f"m{k}", seed=k + 1)
        members.append(MemberRef(name=f"m{k}", run=f"m{k}/run.json", digest=RunCard.read(card).digest))
    EnsembleSpec(base=str(model), members=tuple(members)).write(folder / "ensemble.json")
    return folder / "ensemble.json"
