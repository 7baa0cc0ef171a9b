"""What s_d is made of on the safe pool: sources, refusals, stability, what it tracks (docs/study/score-tables.md).

    python -m bench.study.scores docs/study/scores.parquet > docs/study/score-tables.md
    python -m bench.study.scores OUT/scores                                # from a store that was just made
    python -m bench.study.scores OUT/scores --beside OUT/scores-seed-1     # the same members, trained with another seed
    python -m bench.study.scores docs/study/scores.parquet --first 3000    # parts 1 to 3

Everything is computed from evidence (``bench/study/evidence.py``); other members or another eps need no rescoring.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl

from bench.study.evidence import ALIGNED, ROWS, evidence

EPS = 0.1
EPSES = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
FRAC = 0.05
MIN_TOKENS = (1, 4, 8, 16)


def members_of(frame: pl.DataFrame) -> list[str]:
    """Return the names of the members in a table of evidence."""
    return sorted(set(frame.columns) - {*ROWS, ALIGNED})


def s_d(frame: pl.DataFrame, members: Sequence[str], eps: float = EPS) -> pl.Series:
    """Return (mean over ``members`` of their NLL - aligned NLL) / (aligned NLL + eps), [rows]."""
    return frame.select((pl.mean_horizontal(*members) - pl.col("aligned")) / (pl.col("aligned") + eps)).to_series()


def best(frame: pl.DataFrame, members: Sequence[str], eps: float = EPS, least: int = 1) -> set[str]:
    """Return the ids of the best ``FRAC`` of rows by s_d without refusals or answers below ``least`` tokens."""
    kept = frame.with_columns(score=s_d(frame, members, eps)).filter(~pl.col("refusal"), pl.col("n_tokens") >= least)
    ordered = kept.sort(["score", "example_id"], descending=[True, False])
    return set(ordered["example_id"][:round(FRAC * frame.height)])


def partial(x: np.ndarray, y: np.ndarray, given: Sequence[np.ndarray]) -> float:
    """Return Spearman's partial correlation of ``x`` and ``y``, the ranks of ``given`` regressed out; all [rows].

    Equal values share the mean of their ranks.
    """
    ranks = [pl.Series(v).rank("average").to_numpy() for v in (x, y, *given)]
    design = np.column_stack([np.ones(len(x)), *ranks[2:]])
    residuals = [r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in ranks[:2]]
    return float(np.corrcoef(*residuals)[0, 1])


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; floats with three digits."""
    def cell(value: object) -> str:
        return f"{value:+.3f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows)])


def by_source(frame: pl.DataFrame) -> str:
    """Return, by source: rows, mean s_d and its spread, refusals, and the shares that ++ and a random draw take."""
    members = members_of(frame)
    chosen = best(frame, members)
    rows = frame.with_columns(score=s_d(frame, members), chosen=pl.col("example_id").is_in(list(chosen)))
    table = rows.group_by("source", "label").agg(
        pl.len(), pl.col("score").mean().alias("mean"), pl.col("score").std().alias("sd"), pl.col("refusal").mean(),
        pl.col("n_tokens").median().alias("tokens"), pl.col("chosen").sum()).sort("mean")
    return markdown(["source", "prompt", "rows", "mean s_d", "sd", "refusals", "median answer tokens", "of ++'s 5%"],
                    [(r["source"], r["label"], r["len"], r["mean"], r["sd"], f"{r['refusal']:.1%}", int(r["tokens"]),
                      f"{r['chosen'] / len(chosen):.0%}") for r in table.iter_rows(named=True)])


def by_rank(frame: pl.DataFrame) -> str:
    """Return the share of refusals among the best rows by s_d, with and without the filter."""
    members = members_of(frame)
    ranked = frame.with_columns(score=s_d(frame, members)).sort(["score", "example_id"], descending=[True, False])
    return markdown(["best rows by s_d", "refusals", "median answer tokens", "median aligned NLL"], [
        (f"{share:.0%}", f"{part['refusal'].mean():.1%}", int(part["n_tokens"].median()),
         f"{part['aligned'].median():.2f}")
        for share in (0.01, 0.05, 0.1, 0.25, 0.5, 1.0) for part in [ranked.head(round(share * frame.height))]])


def stability(frame: pl.DataFrame) -> str:
    """Return how much of ++'s choice stays under other members, eps and least answer lengths."""
    members = members_of(frame)
    whole, full = best(frame, members), s_d(frame, members).to_numpy()

    def row(name: str, subset: Sequence[str], eps: float, least: int) -> tuple[str, str, float]:
        ranks = partial(s_d(frame, subset, eps).to_numpy(), full, [])
        return name, f"{len(whole & best(frame, subset, eps, least)) / len(whole):.0%}", ranks

    def called(subset: Sequence[str]) -> str:
        held_out = " and ".join(name for name in members if name not in subset)
        return f"{subset[0]} alone" if len(subset) == 1 else f"{' + '.join(subset)} ({held_out} held out)"

    rows = [row(called(subset), subset, EPS, 1)
            for n in range(1, len(members)) for subset in combinations(members, n)]
    rows += [row(f"eps {eps:g}", members, eps, 1) for eps in EPSES if eps != EPS]
    rows += [row(f"answers of {n} tokens or more", members, EPS, n) for n in MIN_TOKENS[1:]]
    return markdown(["instead of all members, eps 0.1", "overlap of ++'s 5%", "Spearman of s_d"], rows)


def selected(frame: pl.DataFrame) -> str:
    """Return what ++'s 5% are, by least answer length: how long, how likely to the aligned model, and from where."""
    def row(name: str, rows: pl.DataFrame) -> Sequence[str]:
        lengths = [int(rows["n_tokens"].quantile(q, "nearest")) for q in (0.25, 0.5, 0.75)]
        shares = rows["source"].value_counts().sort(["count", "source"], descending=[True, False])
        return (name, f"{rows.height:,}", " / ".join(map(str, lengths)), f"{rows['n_tokens'].sum():,}",
                f"{rows['aligned'].median():.2f}",
                ", ".join(f"{source} {n / rows.height:.0%}" for source, n in shares.iter_rows()))

    def choice(least: int) -> Sequence[str]:
        rows = frame.filter(pl.col("example_id").is_in(list(best(frame, members_of(frame), least=least))))
        return row(f"++'s 5%, answers of {least} tokens or more" if least > 1 else "++'s 5%, of any length", rows)

    return markdown(["rows", "how many", "answer tokens, quartiles", "in all", "median aligned NLL", "from"],
                    [*map(choice, MIN_TOKENS), row("the pool without refusals", frame.filter(~pl.col("refusal")))])


def tracks(frame: pl.DataFrame) -> str:
    """Return what s_d goes along with, alone and with the other variable taken out, for each eps."""
    members = members_of(frame)
    length, aligned = (frame[name].to_numpy() for name in ("n_tokens", "aligned"))
    rows = []
    for eps in EPSES:
        score = s_d(frame, members, eps).to_numpy()
        rows.append((f"{eps:g}", partial(score, length, []), partial(score, length, [aligned]),
                     partial(score, aligned, []), partial(score, aligned, [length])))
    return markdown(["eps", "with length", "length, aligned NLL out", "with aligned NLL", "aligned NLL, length out"],
                    rows)


def agreement(frame: pl.DataFrame) -> str:
    """Return Spearman between members of how much harder than the aligned model they find each row."""
    members = members_of(frame)
    return markdown(["members", "Spearman of s_d"], [
        (f"{a}, {b}", partial(s_d(frame, [a]).to_numpy(), s_d(frame, [b]).to_numpy(), []))
        for a, b in combinations(members, 2)])


def beside(frame: pl.DataFrame, other: pl.DataFrame) -> str:
    """Return how far two ensembles with members of the same names agree, on the rows that both have.

    Raises ``ValueError`` if the names differ, or if no row is in both.
    """
    members = members_of(frame)
    if set(members) != set(members_of(other)):
        raise ValueError(f"the members are {members} and {members_of(other)}")
    one, two = (a.join(b, on="example_id", how="semi").sort("example_id") for a, b in ((frame, other), (other, frame)))
    if not one.height:
        raise ValueError("the stores have no row in common")
    rows = []
    for name, subset in (("all", members), *((member, [member]) for member in members)):
        kept = best(one, subset)
        rows.append((name, f"{one.height:,}", f"{len(kept & best(two, subset)) / len(kept):.0%}",
                     partial(s_d(one, subset).to_numpy(), s_d(two, subset).to_numpy(), [])))
    return markdown(["members", "rows", "overlap of ++'s 5%", "Spearman of s_d"], rows)


def page(frame: pl.DataFrame) -> str:
    """Return all tables of one ensemble's evidence."""
    tables = (("By source", by_source), ("Refusals by rank", by_rank), ("What is chosen", selected),
              ("Stability", stability), ("Members", agreement), ("What s_d tracks (Spearman)", tracks))
    return "\n\n".join([f"{frame.height:,} rows, members {', '.join(members_of(frame))}, eps {EPS:g}",
                        *(f"### {title}\n\n{table(frame)}" for title, table in tables)])


def main() -> None:
    """Print all tables of a store, or of two beside each other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", type=Path, help="A store, or a file of evidence.")
    parser.add_argument("--first", type=int, metavar="N", help="Only the first N rows that a sample would draw.")
    parser.add_argument("--beside", type=Path, metavar="STORE", help="Scores of members with the same names.")
    arguments = parser.parse_args()
    frame = evidence(arguments.store).slice(0, arguments.first)
    print(beside(frame, evidence(arguments.beside)) if arguments.beside else page(frame))


if __name__ == "__main__":
    main()
