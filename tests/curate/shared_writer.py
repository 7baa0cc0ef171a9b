"""One of several writers on one shared store, which know nothing of each other.

Every writer sets out to store everything, and each in an order of its own.
"""

from __future__ import annotations

import random

from curate.records import Plan, PlannedCorpus
from curate.store import Store
from tests.curate.evidence import KEY, SCORED, SOURCE, example_ids, examples, header, model, nll

NAMES = [f"n{k}" for k in range(75)]
CHUNKS = [NAMES[k:k + 5] for k in range(0, len(NAMES), 5)]


def fill_in_order(place: str, seed: int) -> None:
    """Store all examples and scores, leaving out what is there already."""
    with Store.create_or_open(place, header()) as store:
        print("ready", flush=True)
        for start in range(0, len(NAMES), 25):
            store.put_examples(examples(NAMES[start:start + 40]))
        store.put_membership(KEY, example_ids(NAMES))
        planned = PlannedCorpus(label="demo", source=SOURCE, folder="", key=KEY, n_rows=len(NAMES))
        store.put_plan(Plan(corpora=(planned,), n_rows=len(NAMES), counts={"ok": len(NAMES)}))
        for who in SCORED:
            store.put_model(model(who))
        for who in random.Random(seed).sample(SCORED, 2):
            done = store.scored_ids(who.id)
            left = [chunk for chunk in CHUNKS if not done.issuperset(example_ids(chunk))]
            for chunk in random.Random(seed).sample(left, len(left)):
                store.put_nll(who.id, nll(who, {name: 1.0 + len(who.name) * int(name[1:]) for name in chunk}))

