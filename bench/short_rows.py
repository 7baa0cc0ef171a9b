"""Draw short rows of a pool, for comparisons of engines where time is scarce.

    python bench/short_rows.py pool.jsonl --max-tokens 96 --n 500 --seed 0 --out rows.jsonl

Of the rows with at most so many tokens (prompt, template and answer) the ``n`` with the smallest digest of seed and
content are taken, so the file's order does not matter. Short answers are the harder case for a mean: less averages out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from pathlib import Path

from curate.core.chat import encode
from curate.core.files import write_atomic
from curate.core.refs import load_tokenizer
from curate.core.sources import file_source, read_source


def main() -> None:
    """Parse, draw, write, and say what was drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--tokenizer", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = {row.id: row for row in read_source(file_source(arguments.pool, arguments.pool.parent),
                                               arguments.pool.parent)}
    encoded = encode(load_tokenizer(arguments.tokenizer), list(rows.values()), arguments.max_tokens)
    short = {name: item for name, item in zip(rows, encoded, strict=True) if item.status == "ok"}
    drawn = sorted(short, key=lambda name: hashlib.sha256(f"{arguments.seed}/{name}".encode()).digest())[:arguments.n]
    write_atomic(arguments.out, "".join(json.dumps(rows[name].to_row()) + "\n" for name in drawn).encode())
    answers = [short[name].n_answer_tokens for name in drawn]
    print(f"{len(drawn)} of {len(short)} short rows of {len(rows)}: {sum(len(short[name].ids) for name in drawn)} "
          f"tokens; answer tokens {min(answers)} to {max(answers)}, median {statistics.median(answers):g}")


if __name__ == "__main__":
    main()
