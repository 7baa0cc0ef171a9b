"""From rows to a finished selection: time and peak memory of every stage, and how they grow with the rows.

    python -m bench.stages --rows 10000 100000 1000000
    python -m bench.stages --rows 10000000 --folder big            # keeps its files there and goes on after a kill

The corpus is random words of the demo's pool, read and encoded with a real tokenizer through the functions that
`curate score` calls. Scores are invented, for an aligned model and three members, and stored chunk by chunk. Every
stage is a process of its own; its seconds are those of the work (by the clock, and of processor time, which other
programs change less), its memory that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from curate.chunks import cuts, missing_chunks
from curate.compact import compact
from curate.core.documents import MixManifest, ModelIdentity
from curate.core.identity import identify
from curate.core.sources import builtin, read_source
from curate.corpora import open_corpus
from curate.export import export
from curate.intake import ingest
from curate.job import ScoreJob
from curate.parts import NLL_SCHEMA
from curate.records import ScoredModel, StoreHeader, read_header
from curate.select import Choice, build_manifest
from curate.storage import storage_at
from curate.store import Store
from curate.verify import verify_store

MEMBERS = ("one", "two", "three")


def make(folder: Path, n_rows: int) -> None:
    """Write the corpus: questions of 12 words, answers of 10 to 60, one in ten a refusal."""
    if (folder / "pool.jsonl").exists():
        return
    dice = np.random.default_rng(0)
    pool = read_source(builtin("demo"), Path())
    known = sorted({word for example in pool for word in re.findall("[a-z]+", example.prompt.lower())})
    with open(folder / "pool.tmp", "w") as out:
        for start in range(0, n_rows, 10_000):
            n = min(10_000, n_rows - start)
            drawn, lengths = dice.integers(0, len(known), (n, 72)), dice.integers(10, 61, n)
            for k in range(n):
                words = [known[w] for w in drawn[k]]
                answer = " ".join((["Sorry,"] if k % 10 == 0 else []) + words[12:12 + lengths[k]])
                out.write(f'{{"prompt": "{start + k}: {" ".join(words[:12])}?", "response": "{answer}."}}\n')
    os.replace(folder / "pool.tmp", folder / "pool.jsonl")


def identities(aligned: str) -> list[ModelIdentity]:
    """Return the aligned model and three members that exist in name only."""
    who, _ = identify(aligned)
    return [who, *(who.model_copy(update={"name": name, "adapter": name * 8}) for name in MEMBERS)]


def opened(folder: Path) -> Store:
    """Open the store to write."""
    return Store.create_or_open(folder / "s", read_header(storage_at(folder / "s")))


def read(folder: Path, aligned: str) -> None:
    """Read and encode the corpus, and store its examples."""
    who, tokenizer = identify(aligned)
    header = StoreHeader(aligned=who, engine="synthetic", dtype="float32", encoding="1", tokenizer=who.tokenizer,
                         max_tokens=4096)
    job = ScoreJob([open_corpus(str(folder / "pool.jsonl"))], folder / "s", aligned)
    with clock(folder), Store.create_or_open(folder / "s", header) as store:
        ingest(job, store, tokenizer)


def plan(folder: Path, aligned: str) -> None:
    """Work out what is to compute."""
    models = identities(aligned)
    with clock(folder):
        store = Store.open_read(folder / "s")
        rows = cuts(store)
        for who in models:
            missing_chunks(store, who.id, among=rows)


def score(folder: Path, aligned: str) -> None:
    """Store invented scores, chunk by chunk, with the rows of each chunk read as an engine would need them."""
    dice = np.random.default_rng(1)
    models = identities(aligned)
    with clock(folder), opened(folder) as store:
        for number, who in enumerate(models):
            store.put_model(ScoredModel(role="member" if number else "aligned", name=who.name, identity=who))
        rows = cuts(store)
        for who in models:
            for chunk in missing_chunks(store, who.id, among=rows):
                n = len(chunk.ids)
                store.read_examples(chunk.ids, ["messages"])
                lengths = np.array(chunk.lengths)
                store.put_nll(who.id, pa.table(
                    {"example_id": chunk.ids, "model_id": [who.id] * n, "nll_sum": dice.gamma(9.0, 0.3, n) * lengths,
                     "n_tokens": lengths, "eot_nll": dice.random(n), "status": ["ok"] * n}).cast(NLL_SCHEMA))


def merge(folder: Path, aligned: str) -> None:
    """Compact the store."""
    with clock(folder):
        print(compact(folder / "s"), file=sys.stderr)
    compact(folder / "s")


def verify(folder: Path, aligned: str) -> None:
    """Check everything."""
    with clock(folder):
        assert not verify_store(folder / "s").problems


def select(folder: Path, aligned: str) -> None:
    """Select 5% and write the manifest."""
    with clock(folder):
        build_manifest(Store.open_read(folder / "s"), Choice(frac=0.05), folder)[0].write(folder / "manifest.json")


def write(folder: Path, aligned: str) -> None:
    """Export the manifest's rows as JSON Lines."""
    with clock(folder):
        export(MixManifest.read(folder / "manifest.json"), folder, folder / "mix.jsonl")


STAGES: dict[str, tuple[str, Callable[[Path, str], None]]] = {
    "read": ("read and encode the corpus", read), "plan": ("plan the chunks", plan),
    "score": ("fetch rows and store scores", score), "verify-small": ("verify, a part per chunk", verify),
    "select-small": ("select, a part per chunk", select), "compact": ("compact", merge),
    "verify": ("verify, compacted", verify), "select": ("select, compacted", select),
    "export": ("export the mix", write)}


@contextmanager
def clock(folder: Path) -> Iterator[None]:
    """Note how long the work took: seconds, processor seconds, peak GiB."""
    begun, worked = time.perf_counter(), time.process_time()
    yield
    unit = 2**30 if sys.platform == "darwin" else 2**20
    print(json.dumps([time.perf_counter() - begun, time.process_time() - worked,
                      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit]))


def measured(folder: Path, stages: Sequence[str], aligned: str) -> dict[str, tuple[float, float, float]]:
    """Return seconds, processor seconds and peak GiB of every stage; those done before are not done again."""
    noted = folder / "stages.json"
    found = json.loads(noted.read_text()) if noted.exists() else {}
    for stage in stages:
        if stage not in found:
            command = [sys.executable, "-m", "bench.stages", "--stage", stage, "--folder", str(folder), "--aligned",
                       aligned]
            found[stage] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            noted.write_text(json.dumps(found))
            print(f"{stage}: {shown(found[stage])}", file=sys.stderr, flush=True)
    return found


def shown(one: tuple[float, float, float]) -> str:
    """Return seconds by the clock, of processor time, and GiB."""
    return f"{one[0]:.1f} s ({one[1]:.1f} s), {one[2]:.2f} GiB"


def report(rows: Sequence[int], results: Sequence[dict[str, tuple[float, float, float]]]) -> None:
    """Print time and GiB by stage and number of rows, and the slope of processor time over the last two numbers."""
    print("| stage | " + " | ".join(f"{n:,} rows" for n in rows) + " | slope |")
    print("|---|" + "---|" * (len(rows) + 1))
    for stage, (what, _) in STAGES.items():
        cells = [shown(one[stage]) if stage in one else "-" for one in results]
        pairs = [(n, one[stage][1]) for n, one in zip(rows, results, strict=True) if stage in one]
        slope = "-"
        if len(pairs) > 1:
            (n, a), (m, b) = pairs[-2:]
            slope = f"{math.log(b / a) / math.log(m / n):.2f}"
        print(f"| {what} | " + " | ".join(cells) + f" | {slope} |", flush=True)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where to work, and to go on; [default: a temporary folder]")
    parser.add_argument("--aligned", default="smollm2", help="whose tokenizer encodes")
    parser.add_argument("--only", choices=list(STAGES), nargs="+", default=list(STAGES))
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        STAGES[arguments.stage][1](arguments.folder, arguments.aligned)
        return
    results = []
    for n_rows in arguments.rows:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (arguments.folder or Path(temporary)) / str(n_rows)
            folder.mkdir(parents=True, exist_ok=True)
            make(folder, n_rows)
            results.append(measured(folder, arguments.only, arguments.aligned))
    report(arguments.rows, results)


if __name__ == "__main__":
    main()
