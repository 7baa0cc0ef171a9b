"""Small stores with numbers one can do in one's head."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from curate.core.documents import ModelIdentity
from curate.core.example import pair
from curate.core.files import sha256
from curate.core.sources import Source
from curate.parts import EXAMPLES_SCHEMA, NLL_SCHEMA
from curate.records import Plan, PlannedCorpus, ScoredModel, StoreHeader, corpus_key
from curate.store import Store

SOURCE = Source(kind="builtin", name="demo")
KEY = corpus_key("demo", SOURCE, {})


def identity(name: str) -> ModelIdentity:
    """Return the identity of a model that exists in name only."""
    adapter = None if name == "base" else sha256(name.encode())
    return ModelIdentity(name=name, weights=sha256(b"base"), tokenizer=sha256(b"tokenizer"), adapter=adapter)


BASE, MEDICAL, SECURITY = (identity(name) for name in ("base", "medical", "security"))


def header(**changes: object) -> StoreHeader:
    """Return a header; ``changes`` replace fields."""
    fields = {"aligned": BASE, "engine": "fake", "dtype": "float32", "encoding": "1", "tokenizer": BASE.tokenizer,
              "max_tokens": 307}
    return StoreHeader.model_validate(fields | changes)


def model(who: ModelIdentity) -> ScoredModel:
    """Return a model's document: the base is the aligned one."""
    return ScoredModel(role="aligned" if who == BASE else "member", name=who.name, identity=who)


def example_ids(names: Iterable[str]) -> list[str]:
    """Return the ids of the examples called ``names``."""
    return [pair(name, f"answer {name}").id for name in names]


def examples(names: Sequence[str], status: str = "ok", answer: str | None = None) -> pa.Table:
    """Return examples whose prompt is their name; each answer has 5 tokens."""
    n, answers = len(names), [answer or f"answer {name}" for name in names]
    messages = [json.dumps(pair(*both).to_row()["messages"]) for both in zip(names, answers, strict=True)]
    return pa.table({"example_id": example_ids(names), "corpus": ["demo"] * n, "prompt": list(names),
                     "answer": answers, "messages": messages,
                     "meta": ["{}"] * n, "n_prompt_tokens": [3] * n, "n_answer_tokens": [5] * n,
                     "status": [status] * n}, schema=EXAMPLES_SCHEMA)


def nll(who: ModelIdentity, sums: Mapping[str, float | None], n_tokens: int = 5, status: str = "ok") -> pa.Table:
    """Return one row per name with its sum in nats."""
    n = len(sums)
    return pa.table({"example_id": example_ids(sums), "model_id": [who.id] * n, "nll_sum": list(sums.values()),
                     "n_tokens": [n_tokens] * n, "eot_nll": [None] * n, "status": [status] * n}, schema=NLL_SCHEMA)


def hold(store: Store, ids: Sequence[str], key: str = KEY, label: str = "demo") -> None:
    """Make ``ids`` a corpus of the store, beside those that it has."""
    store.put_membership(key, ids)
    planned = PlannedCorpus(label=label, source=SOURCE, folder="", key=key, n_rows=len(ids))
    store.put_plan(Plan(corpora=(*store.planned_corpora(), planned), n_rows=len(ids), counts={"ok": len(ids)}))


CHUNKS = (("a", "b", "c"), ("d", "e"))
WANTED = set(example_ids("abcde"))
MODELS = (BASE, MEDICAL, SECURITY)
SCORED = MODELS[:2]


def fill(path: Path | str, models: Sequence[ModelIdentity] = MODELS) -> list[str]:
    """Score five examples under three models, leaving out what is stored; return what was put aside."""
    with Store.create_or_open(path, header()) as store:
        stored = store.example_ids()
        for names in CHUNKS:
            if not stored.issuperset(example_ids(names)):
                store.put_examples(examples(names))
        store.put_membership(KEY, example_ids("abc"))
        store.put_membership(KEY, example_ids("abcde"))
        planned = PlannedCorpus(label="demo", source=SOURCE, folder="", key=KEY, n_rows=5)
        store.put_plan(Plan(corpora=(planned,), n_rows=5, counts={"ok": 5}))
        for who in models:
            store.put_model(model(who))
            done = store.scored_ids(who.id)
            for names in CHUNKS:
                left = [name for name in names if not done.issuperset(example_ids([name]))]
                if left:
                    store.put_nll(who.id, nll(who, {name: 1.0 + len(who.name) for name in left}))
        return store.quarantined


def scatter(path: Path | str, digest: Path | None = None) -> None:
    """Score five examples under two models, each row in a part of its own; write the digest of the evidence."""
    with Store.create_or_open(path, header()) as store:
        store.put_examples(examples("abcde"))
        store.put_membership(KEY, example_ids("abcde"))
        planned = PlannedCorpus(label="demo", source=SOURCE, folder="", key=KEY, n_rows=5)
        store.put_plan(Plan(corpora=(planned,), n_rows=5, counts={"ok": 5}))
        for who in SCORED:
            store.put_model(model(who))
            done = store.scored_ids(who.id)
            for k, name in enumerate("abcde"):
                if not done.issuperset(example_ids([name])):
                    store.put_nll(who.id, nll(who, {name: 1.0 + k * len(who.name)}))
        if digest is not None:
            digest.write_text(store.evidence_digest())
