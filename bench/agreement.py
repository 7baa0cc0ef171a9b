"""How far two stores of the same rows and models agree: dtypes, engines or machines.

    curate score --corpus pool.jsonl --sample 1000 --dtype float32 --store f32
    curate score --corpus pool.jsonl --sample 1000 --dtype bfloat16 --store bf16
    python bench/agreement.py f32 bf16
"""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl

from curate.query import connect
from curate.store import Store


def scores(path: Path, eps: float) -> pl.DataFrame:
    """Return example_id, mean NLL of the aligned model and s_d of a store's rows that have all of them."""
    return connect(Store.open_read(path), eps, None).sql(
        "SELECT example_id, nll_aligned, s_d FROM scores WHERE status = 'ok'").pl()


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--eps", type=float, default=0.1)
    arguments = parser.parse_args()
    both = scores(arguments.one, arguments.eps).join(scores(arguments.other, arguments.eps), on="example_id",
                                                     suffix="_other")
    top = max(1, round(0.05 * both.height))
    best = [set(both.sort([column, "example_id"], descending=[True, False])["example_id"][:top])
            for column in ("s_d", "s_d_other")]
    gap = (both["nll_aligned"] - both["nll_aligned_other"]).abs()
    spearman = both.select(pl.corr("s_d", "s_d_other", method="spearman")).item()
    print(f"{both.height} rows; aligned mean NLL differs by {gap.max():.4f} nats at most, {gap.mean():.5f} on average; "
          f"Spearman of s_d {spearman:.4f}; overlap of the top 5% {len(best[0] & best[1])}/{top}")


if __name__ == "__main__":
    main()
