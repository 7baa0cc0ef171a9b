"""The cost of `curate audit --match similar`: memory and time of the nearest prompts, by the number of references.

    python bench/control.py --references 5000 20000

Prompts are 30 words each, drawn from 20,000 words by a Zipf law. Memory is what Python and numpy allocate beyond the
prompts themselves; time is that of 1,000 rows, without the memory being watched, on one core.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc

import numpy as np

from curate.control import Asked, Reference, expected_similar

WORDS, VOCABULARY, ROWS = 30, 20_000, 1000


def prompts(n: int, kind: str, seed: int) -> dict[str, Asked]:
    """Return invented prompts by id."""
    random = np.random.default_rng(seed)
    drawn = random.zipf(1.2, (n, WORDS)) % VOCABULARY
    return {f"{kind}{k}": Asked(f"{kind}{k}", " ".join(f"w{word}" for word in words)) for k, words in enumerate(drawn)}


def measure(n: int) -> tuple[float, float]:
    """Return MiB and seconds for ``n`` references."""
    known, rows = prompts(n, "reference", 0), prompts(ROWS, "row", 1)
    reference = Reference.of(known, {name: 0.1 for name in known})
    start = time.perf_counter()
    expected_similar(rows, reference)
    seconds = time.perf_counter() - start
    tracemalloc.start()
    expected_similar(rows, reference)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20, seconds


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=int, nargs="+", default=[5000, 20_000])
    print(f"| references | MiB | s for {ROWS:,} rows |\n|---|---|---|")
    for n in parser.parse_args().references:
        mib, seconds = measure(n)
        print(f"| {n:,} | {mib:.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
