"""What scoring spends beside the forward passes, on a real run.

    python -m bench.overhead --rows safe_pool.jsonl --n 100
    python -m bench.overhead --rows safe_pool.jsonl --n 100 --ensemble ensemble/ensemble.json

The functions between which a run spends its time are timed while `score` does what it always does, into a new store.
Loading the model and opening members takes the same time whatever the number of rows, so it stands apart.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import curate.chunks as chunks
import curate.score as scoring
import curate.scorers.choose as choosing
import curate.scorers.transformers as engine
from curate.corpora import open_corpus
from curate.job import Sampling, ScoreJob
from curate.score import ensemble_members
from curate.store import Store

TIMED: tuple[tuple[str, Any, str], ...] = (
    ("forward passes", chunks, "score_rows"), ("load the model", choosing, "load"),
    ("check who the models are", scoring, "prepared"), ("read, encode and store the rows", scoring, "ingest"),
    ("cut into chunks", scoring, "cuts"), ("store scores", Store, "put_nll"))
ONCE = ("load the model", "open members", "check who the models are")
"""What does not grow with the rows."""


def wrap(spent: Counter[str], name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that adds its time to ``spent[name]``."""
    @functools.wraps(plain)
    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - begun
    return timed


def waiting(spent: Counter[str]) -> None:
    """Time how long each chunk's rows are waited for, which are fetched and encoded beside the chunk before."""
    plain = chunks.encoded_ahead

    def timed(*args: Any) -> Iterator[Any]:
        rows = plain(*args)
        while True:
            begun = time.perf_counter()
            found = next(rows, None)
            spent["wait for a chunk's token ids"] += time.perf_counter() - begun
            if found is None:
                return
            yield found

    chunks.encoded_ahead = timed


def opening(spent: Counter[str]) -> None:
    """Time the opening and closing of members."""
    plain = engine.adapter_open

    @contextmanager
    def timed(*args: Any) -> Iterator[Any]:
        begun = time.perf_counter()
        with plain(*args) as model:
            spent["open members"] += time.perf_counter() - begun
            yield model
            begun = time.perf_counter()
        spent["open members"] += time.perf_counter() - begun

    engine.adapter_open = timed


def main() -> None:
    """Parse, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--n", type=int, default=100, help="a sample of so many rows, by content")
    parser.add_argument("--aligned", default="smollm2")
    parser.add_argument("--ensemble", type=Path)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    members = ensemble_members(arguments.ensemble)[1] if arguments.ensemble else []
    spent: Counter[str] = Counter()
    for name, module, attribute in TIMED:
        setattr(module, attribute, wrap(spent, name, getattr(module, attribute)))
    opening(spent)
    waiting(spent)
    with tempfile.TemporaryDirectory() as folder:
        job = ScoreJob([open_corpus(str(arguments.rows))], Path(folder) / "s", arguments.aligned, members,
                       dtype=arguments.dtype, sampling=Sampling(sample=arguments.n))
        begun = time.perf_counter()
        summary = scoring.score(job)
        spent["everything else"] = time.perf_counter() - begun - sum(spent.values())
    growing = {name: seconds for name, seconds in spent.items() if name not in ONCE}
    whole = sum(growing.values())
    print(f"{summary.counts['ok']} rows, {len(members) + 1} models; the corpus has {summary.n_rows} rows")
    print("| | seconds | share of what grows with the rows |\n|---|---|---|")
    for name, seconds in spent.most_common():
        share = "once for a run" if name in ONCE else f"{seconds / whole:.2%}"
        print(f"| {name} | {seconds:.2f} | {share} |")
    print(f"beside the forward passes: {1 - growing['forward passes'] / whole:.2%}")


if __name__ == "__main__":
    main()
