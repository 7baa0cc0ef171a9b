"""Selection over synthetic stores: seconds and peak memory of `curate select` and `curate verify`, and their growth.

    python bench/selection.py --rows 100000 1000000 10000000
    python bench/selection.py --rows 100000 --chars 6000 --commands report show

Every store holds invented examples and NLLs of an aligned model and three members, in parts of 500,000 rows, or of
8,192 where --chars makes answers longer. A command is timed as a whole process, from the command line to its result;
CPU s is over all cores. What comes before and after: bench/stages.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from curate.core.documents import ModelIdentity
from curate.core.example import pair
from curate.corpora import open_corpus
from curate.parts import EXAMPLES_SCHEMA, NLL_SCHEMA
from curate.records import Plan, PlannedCorpus, ScoredModel, StoreHeader, corpus_key
from curate.store import Store

PART, LONG_PART = 500_000, 8192
COMMANDS = {"select": ("select", "--store", "{store}", "--frac", "0.05", "--out", "{folder}/mix.json"),
            "verify": ("verify", "{store}"), "report": ("report", "{store}", "--html", "{folder}/scores.html"),
            "show": ("show", "top", "--store", "{store}")}


def build(path: Path, n_rows: int, chars: int = 0) -> None:
    """Write a store of ``n_rows`` invented examples under four models, each answer with ``chars`` more characters."""
    names = ("aligned", "one", "two", "three")
    identities = [ModelIdentity(name=n, weights=f"sha256:{n}", tokenizer="t", adapter=None if n == "aligned" else n)
                  for n in names]
    header = StoreHeader(aligned=identities[0], engine="synthetic", dtype="float32", encoding="synthetic",
                         tokenizer="t", max_tokens=4096)
    source = open_corpus("demo").source
    random = np.random.default_rng(0)
    with Store.create_or_open(path, header) as store:
        for identity, role in zip(identities, ("aligned", *["member"] * 3), strict=True):
            store.put_model(ScoredModel(role=role, name=identity.name, identity=identity))
        size = LONG_PART if chars else PART
        parts = [[random.bytes(16).hex() for _ in range(min(size, n_rows - k))] for k in range(0, n_rows, size)]
        words = " ".join(random.choice([random.bytes(3).hex() for _ in range(4000)], 2**17).tolist())
        starts = random.integers(0, len(words) - chars, n_rows).tolist()
        lengths = [random.integers(1, 300, len(part)) for part in parts]
        for part, n_tokens in zip(parts, lengths, strict=True):
            more = [words[(k := starts.pop()):k + chars] for _ in part]
            store.put_examples(_examples(part, more, n_tokens))
        for identity in identities:
            for part, n_tokens in zip(parts, lengths, strict=True):
                store.put_nll(identity.id, pa.table(
                    {"example_id": part, "model_id": [identity.id] * len(part), "n_tokens": n_tokens,
                     "nll_sum": random.gamma(9.0, 0.3, len(part)) * n_tokens, "eot_nll": random.random(len(part)),
                     "status": ["ok"] * len(part)}).select(NLL_SCHEMA.names).cast(NLL_SCHEMA))
        ids = [example_id for part in parts for example_id in part]
        key = corpus_key("demo", source, {})
        store.put_membership(key, ids)
        store.put_plan(Plan(corpora=(PlannedCorpus(label="demo", source=source, folder=".", key=key, n_rows=n_rows),),
                            n_rows=n_rows, counts={"ok": n_rows}))


def _examples(ids: list[str], more: list[str], lengths: np.ndarray) -> pa.Table:
    n = len(ids)
    answers = [(f"Sorry, {i}" if i[0] == "0" else f"Here is {i} for you") + text
               for i, text in zip(ids, more, strict=True)]
    asked = [f"Question {i}" for i in ids]
    messages = [json.dumps(pair(*both).to_row()["messages"]) for both in zip(asked, answers, strict=True)]
    columns = {"example_id": ids, "corpus": ["demo"] * n, "prompt": asked, "answer": answers, "messages": messages,
               "meta": ["{}"] * n, "n_prompt_tokens": lengths, "n_answer_tokens": lengths, "status": ["ok"] * n}
    return pa.table(columns).cast(EXAMPLES_SCHEMA)


def measure(*words: str) -> tuple[float, float, float]:
    """Return seconds, seconds of all cores and peak GiB of one `curate` command."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "curate", *words], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"curate {words[0]} failed")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--chars", type=int, default=0, help="Characters that are added to each answer.")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=["select", "verify"])
    arguments = parser.parse_args()
    heads = "".join(f" {name}, s | CPU s | peak GiB | slope |" for name in arguments.commands)
    print(f"| rows | x models |{heads}\n|---|---" + "|---" * 4 * len(arguments.commands) + "|")
    before: tuple[int, list[float]] | None = None
    for n_rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            start = time.perf_counter()
            build(Path(store), n_rows, arguments.chars)
            print(f"built {n_rows} in {time.perf_counter() - start:.0f} s, "
                  f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB", file=sys.stderr, flush=True)
            found = [measure(*(word.format(store=store, folder=folder) for word in COMMANDS[name]))
                     for name in arguments.commands]
        cells = []
        for k, (seconds, cpu, gib) in enumerate(found):
            slope = math.log(seconds / before[1][k]) / math.log(n_rows / before[0]) if before else None
            cells += [f"{seconds:.1f}", f"{cpu:.1f}", f"{gib:.2f}", "-" if slope is None else f"{slope:.2f}"]
        print(f"| {n_rows:,} | 4 | " + " | ".join(cells) + " |", flush=True)
        before = (n_rows, [one[0] for one in found])


if __name__ == "__main__":
    main()
