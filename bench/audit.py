"""How well an audit tells bad rows from good ones: by row and by set, with the audited domain held out of the ensemble.

    python -m bench.audit rows --narrow ../shared/data/narrow --pairs docs/study/pairs \\
        --benign pool:source=../shared/data/pool/safe_pool.jsonl --sample 1000 --out audit-rows
    curate score $(printf -- '--corpus %s ' audit-rows/*.jsonl) --ensemble ensemble/ensemble.json \\
        --store audit-stores/all
    python -m bench.audit table audit-stores --save audit-scores.parquet > audit-tables.md

``rows`` writes one file with the bad answers of each domain, one with good answers to the same prompts, and one for
each benign source; set, domain, label (bad, good, benign) and pair travel through the store as each row's meta.
``table`` reads every store below the folder (or the Parquet file that it saved before) and prints Markdown. A member
has seen a domain when its name begins with the domain's; such members are left out where that domain is audited, from
the same evidence.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from bench.study.prepare import expand, prompt_id, tidy
from curate.control import Asked, Reference, expected_similar
from curate.core.errors import UserError
from curate.core.example import from_row, pair
from curate.core.files import canonical_json, write_atomic
from curate.core.rows import json_rows
from curate.core.sources import file_source, read_source
from curate.query import connect
from curate.records import StoreHeader
from curate.risk import Cut, beta_binomial_tail, clopper_pearson, cut, sign_p
from curate.risk import noticed as surprising
from curate.store import Store

DOMAINS = ("medical", "security", "code")
FRACS = (0.0, 0.01, 0.05, 0.2)
RATES = (0.01, 0.05)
TEXTS = {"example_id": pl.String, "set": pl.String, "domain": pl.String, "label": pl.String, "pair": pl.String,
         "prompt": pl.String, "n_tokens": pl.Int64}


# Rows


def paired_rows(narrow: Path, pairs: Path, domain: str) -> list[dict[str, Any]]:
    """Return the rows of a narrow set that have a good answer to the same prompt, and those answers."""
    good: dict[str, Any] = {}
    for place, row in json_rows(pairs):
        if not isinstance(row, Mapping):
            raise UserError(f"{pairs}, {place}: {row}.", "Mend the file of good answers.")
        good[row["prompt_id"]] = row["answer"]
    rows, used = [], set()
    for example in read_source(file_source(narrow, narrow.parent, strip_think=True), narrow.parent):
        key = prompt_id(example.prompt)
        if key not in good:
            continue
        right = good[key] if isinstance(good[key], str) else expand(good[key], example.prompt)
        answers = [("bad", example.answer)] + ([] if key in used else [("good", right)])
        used.add(key)
        rows += [pair(example.prompt, tidy(answer)).to_row() | {
            "set": f"{domain}-{label}", "domain": domain, "label": label, "pair": key} for label, answer in answers]
    if absent := good.keys() - used:
        raise UserError(f"{len(absent)} prompts of {pairs} are not in {narrow}, the first is {min(absent)}.",
                        "Give the narrow set that the good answers were written for.")
    return rows


def benign_rows(name: str, column: str | None, path: Path, sample: int | None) -> list[dict[str, Any]]:
    """Return benign rows, the same sample each time; with a ``column`` its values make sets of their own."""
    examples = list(read_source(file_source(path, path.parent, strip_think=True), path.parent))
    examples.sort(key=lambda e: hashlib.sha256(e.id.encode()).digest())
    return [e.to_row() | {"set": f"{name}/{e.meta[column]}" if column else name, "domain": "", "label": "benign",
                          "pair": ""} for e in examples[:sample]]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON Lines, each checked to be one that ``curate score`` reads."""
    for row in rows:
        from_row(row)
    write_atomic(path, b"".join(canonical_json(row) + b"\n" for row in rows))


# The scores table: TEXTS, ``aligned`` and ``member:NAME`` (sums in nats over ``n_tokens`` answer tokens)


def read_table(place: Path) -> pl.DataFrame:
    """Return one row per labelled example, from every store at or below a folder, or from a saved table."""
    if place.is_file():
        return pl.read_parquet(place)
    stores = [path.parent for path in sorted([*place.glob("store.json"), *place.glob("*/store.json")])]
    if not stores:
        raise UserError(f"There is no store at or below {place}.", "Make one with: curate score ... --store FOLDER")
    rows: dict[str, dict[str, Any]] = {}
    first: StoreHeader | None = None
    for path in stores:
        store = Store.open_read(path)
        first = first or store.header
        if {**store.header.compared(), "max_tokens": 0} != {**first.compared(), "max_tokens": 0}:
            raise UserError(f"{path} was made with another aligned model, engine or dtype than {stores[0]}.",
                            "Such numbers cannot be compared: score again in one way.")
        for example_id, row in labelled(store):
            rows[example_id] = rows.get(example_id, {}) | row
    names = sorted({name for row in rows.values() for name in row} - TEXTS.keys() - {"aligned"})
    schema = {**TEXTS, "aligned": pl.Float64, **dict.fromkeys(names, pl.Float64)}
    return pl.DataFrame([rows[i] for i in sorted(rows)], schema=schema)


def labelled(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the examples of a store with the finite sums of every model.

    Those whose meta has no label are benign, and their sets are the store's name with the ``source`` in their meta.
    """
    connection = connect(store, 0.1, None)
    sums: dict[str, dict[str, float]] = {}
    for i, role, name, value in connection.execute(
            "SELECT example_id, role, name, nll_sum FROM nll JOIN models USING (model_id) "
            "WHERE status = 'ok' AND isfinite(nll_sum)").fetchall():
        sums.setdefault(i, {})["aligned" if role == "aligned" else f"member:{name}"] = value
    for i, prompt, n_tokens, text in connection.execute(
            "SELECT example_id, prompt, n_answer_tokens, meta FROM examples WHERE status = 'ok'").fetchall():
        meta = json.loads(text)
        if "label" not in meta:
            name = Path(store.path).name
            meta = {"set": f"{name}/{meta['source']}" if "source" in meta else name, "label": "benign"}
        yield i, {"example_id": i, "prompt": prompt, "n_tokens": n_tokens,
                  **{k: meta.get(k, "") for k in ("set", "domain", "label", "pair")}, **sums.get(i, {})}


# Values: low is risky


def s_d(table: pl.DataFrame, members: Sequence[str], eps: float) -> np.ndarray:
    """Return s_d by ``members`` (names of columns), NaN where a number is missing."""
    n = table["n_tokens"].to_numpy()
    aligned = table["aligned"].to_numpy() / n
    misaligned = sum(table[m].to_numpy() / n for m in members) / len(members)
    return (misaligned - aligned) / (aligned + eps)


def methods(table: pl.DataFrame, domain: str, eps: float) -> dict[str, np.ndarray]:
    """Return the values of every row by method, with the members that never saw ``domain``; baselines come last."""
    members = [c for c in table.columns if c.startswith("member:")]
    held = [m for m in members if not m.removeprefix("member:").startswith(domain)]
    if not held:
        raise UserError(f"Every member has seen {domain}.", "Score under members of other domains, too.")
    values = s_d(table, held, eps)
    found = {"s_d": values, "s_d, similar prompts": controlled(table, values)}
    if len(held) > 1:
        found |= {f"s_d, {m.removeprefix('member:')} alone": s_d(table, [m], eps) for m in held}
    if held != members:
        found["s_d, all members"] = s_d(table, members, eps)
    return found | {"aligned NLL (high is risky)": -table["aligned"].to_numpy() / table["n_tokens"].to_numpy(),
                    "length (short is risky)": table["n_tokens"].to_numpy().astype(float)}


def controlled(table: pl.DataFrame, values: np.ndarray) -> np.ndarray:
    """Return values less what good answers to similar prompts of the same domain, or benign set, have."""
    found = np.full(len(values), np.nan)
    groups = [d or s for d, s in zip(table["domain"], table["set"], strict=True)]
    labels, keys, texts = table["label"].to_list(), table["pair"].to_list(), table["prompt"].to_list()
    asked = {i: Asked(keys[i] or str(i), texts[i]) for i in range(len(values)) if np.isfinite(values[i])}
    for group in sorted(set(groups)):
        inside = {str(i): a for i, a in asked.items() if groups[i] == group}
        known = Reference.of({i: a for i, a in inside.items() if labels[int(i)] != "bad"},
                             {i: float(values[int(i)]) for i in inside})
        for i, expected in expected_similar(inside, known).items():
            found[int(i)] = values[int(i)] - expected
    return found


# Statistics


def auc(bad: np.ndarray, good: np.ndarray, w_bad: np.ndarray | None = None,
        w_good: np.ndarray | None = None) -> np.ndarray | float:
    """Return P(bad < good) + P(bad = good) / 2; with weights [R, B] and [R, G] one value per resample."""
    wins = (bad[:, None] < good[None, :]) + 0.5 * (bad[:, None] == good[None, :])
    if w_bad is None or w_good is None:
        return float(wins.mean())
    return ((w_bad @ wins) * w_good).sum(1) / (w_bad.sum(1) * w_good.sum(1))


def auc_interval(bad: np.ndarray, good: np.ndarray, keys: tuple[Sequence[str], Sequence[str]], seed: int = 0,
                 resamples: int = 1000) -> tuple[float, float, float]:
    """Return the AUC and its 95% bootstrap interval; rows with the same key (a prompt) are drawn together."""
    names = sorted({*keys[0], *keys[1]})
    place = {name: k for k, name in enumerate(names)}
    drawn = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), resamples).astype(float)
    weights = [drawn[:, [place[key] for key in of]] for of in keys]
    with np.errstate(invalid="ignore"):
        found = auc(bad, good, *weights)
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(auc(bad, good)), float(low), float(high)


@dataclass(frozen=True)
class Share:
    """So many of n, with the Clopper-Pearson interval."""

    k: int
    n: int

    def __str__(self) -> str:
        if not self.n:
            return "-"
        low, high = clopper_pearson(self.k, self.n)
        return f"{self.k / self.n:.3f} ({low:.3f}, {high:.3f})"


def below(values: np.ndarray, threshold: float) -> Share:
    """Return how many values lie below a threshold."""
    return Share(int((values < threshold).sum()), len(values))


def worst_cut(sets: Sequence[np.ndarray], rate: float) -> Cut | None:
    """Return the lowest level of benign sets; None where one of them is too small, as ``curate audit`` has it."""
    cuts = [cut(values.tolist(), rate) for values in sets]
    return None if not cuts or None in cuts else min(cuts, key=lambda c: (c.threshold, c.n))


def mixtures(bad: Mapping[str, float], good: Mapping[str, float], frac: float, seed: int,
             repeats: int) -> list[np.ndarray]:
    """Return ``repeats`` sets of all prompts that have both answers, ``bad_rows`` of them with the bad one.

    Without bad ones there is one such set.
    """
    prompts = sorted(bad.keys() & good.keys())
    n_bad = bad_rows(frac, len(prompts))
    random = np.random.default_rng([seed, round(1000 * frac)])
    worse, better = (np.array([of[p] for p in prompts]) for of in (bad, good))
    chosen = (random.permutation(len(prompts)) < n_bad for _ in range(repeats if n_bad else 1))
    return [np.where(one, worse, better) for one in chosen]


def bad_rows(frac: float, n: int) -> int:
    """Return how many of ``n`` rows are bad where a share ``frac`` should be: one at least, unless none should."""
    return max(1, round(frac * n)) if frac else 0


def noticed(sets: Sequence[np.ndarray], level: Cut, p: float = 0.05) -> Share:
    """Return how many sets, all of one size, have more rows below the level than benign rows explain."""
    least = surprising(len(sets[0]), level, p)
    return Share(sum(int((one < level.threshold).sum()) >= least for one in sets), len(sets))


# Tables


Row = Mapping[str, str]


@dataclass(frozen=True)
class View:
    """The values of one method where one domain is audited; rows without a number do not count."""

    rows: Sequence[Row]
    values: np.ndarray
    domain: str

    def of(self, keep: Callable[[Row], bool]) -> tuple[np.ndarray, list[str]]:
        """Return values and keys (prompts; rows without one are by themselves) of the rows to keep."""
        kept = [k for k, row in enumerate(self.rows) if np.isfinite(self.values[k]) and keep(row)]
        return self.values[kept], [self.rows[k]["pair"] or self.rows[k]["example_id"] for k in kept]

    def label(self, label: str, keep: Callable[[str], bool] = lambda key: True) -> tuple[np.ndarray, list[str]]:
        """Return the audited domain's rows with a label, of the prompts to keep."""
        return self.of(lambda row: row["domain"] == self.domain and row["label"] == label and keep(row["pair"]))

    def benign_sets(self) -> dict[str, np.ndarray]:
        """Return what a provider has who has never seen the domain: good answers of others, and benign sets."""
        names = sorted({row["set"] for row in self.rows if row["domain"] != self.domain and row["label"] != "bad"})
        return {name: self.of(lambda row, name=name: row["set"] == name)[0] for name in names}

    def by_prompt(self, label: str, keep: Callable[[str], bool] = lambda key: True) -> dict[str, float]:
        """Return one value per prompt."""
        return dict(zip(*reversed(self.label(label, keep)), strict=True))


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]])


def auc_rows(views: Mapping[str, View]) -> Iterator[list[object]]:
    """Yield: domain, what bad rows are told from, rows, and the AUC of every method."""
    first = next(iter(views.values()))
    for name in (f"{first.domain}-good", *first.benign_sets()):
        cells, counts = [], ""
        for view in views.values():
            bad, bad_keys = view.label("bad")
            other, other_keys = view.of(lambda row, name=name: row["set"] == name)
            counts = counts or f"{len(bad)} / {len(other)}"
            cells.append("{:.3f} ({:.3f}, {:.3f})".format(*auc_interval(bad, other, (bad_keys, other_keys)))
                         if len(bad) and len(other) else "-")
        yield [first.domain, name, counts, *cells]


def pair_rows(views: Mapping[str, View]) -> Iterator[list[object]]:
    """Yield: domain, method, pairs whose bad answer has the lower value, and the one-sided sign test."""
    for method, view in views.items():
        bad, good = view.by_prompt("bad"), view.by_prompt("good")
        gaps = [bad[p] - good[p] for p in sorted(bad.keys() & good.keys()) if bad[p] != good[p]]
        lower = sum(gap < 0 for gap in gaps)
        yield [view.domain, method, Share(lower, len(gaps)), f"{sign_p(lower, len(gaps)):.2g}"]


def levels(view: View, rate: float) -> Iterator[tuple[str, Cut, Callable[[str], bool]]]:
    """Yield what a level comes from, the level, and which prompts it is tried on.

    ``other``: the worst of all benign sets of other topics. ``same topic``: good answers to one half of the prompts,
    tried on the other half, so that no row is judged by itself. Levels that would need more rows are left out.
    """
    other = worst_cut(list(view.benign_sets().values()), rate)
    if other:
        yield "other", other, lambda key: True
    prompts = sorted(set(view.label("good")[1]), key=lambda key: hashlib.sha256(key.encode()).digest())
    for half in (0, 1):
        mine = set(prompts[half::2])
        same = worst_cut([view.label("good", mine.__contains__)[0]], rate)
        if same:
            yield f"same topic, half {half + 1}", same, lambda key, mine=mine: key not in mine


def rate_rows(views: Mapping[str, View]) -> Iterator[list[object]]:
    """Yield: domain, method, rate, source of the level, level, share of good rows below it, share of bad rows."""
    for method, view in views.items():
        for rate in RATES:
            for source, level, tried in levels(view, rate):
                shares = (below(view.label(label, tried)[0], level.threshold) for label in ("good", "bad"))
                yield [view.domain, method, rate, source, f"{level.threshold:+.4f}", *shares]


def set_rows(views: Mapping[str, View], seed: int, repeats: int) -> Iterator[list[object]]:
    """Yield: domain, method, rate, source of the level, rows in a set, whether the clean set is noticed, and shares.

    These are of the sets with more and more bad rows that are noticed, with the number of the bad rows.
    """
    for method, view in views.items():
        bad = view.by_prompt("bad")
        for rate in RATES:
            for source, level, tried in levels(view, rate):
                good = view.by_prompt("good", tried)
                n = len(bad.keys() & good.keys())
                clean, *shares = (noticed(mixtures(bad, good, frac, seed, repeats), level) for frac in FRACS)
                yield [view.domain, method, rate, source, n, "yes" if clean.k else "no",
                       *(f"{bad_rows(frac, n)}: {share}" for frac, share in zip(FRACS[1:], shares, strict=True))]


def benign_rows_below(views: Mapping[str, View]) -> Iterator[list[object]]:
    """Yield: domain held out, method, rate, benign set, its share below the worst level of the others, p of the set."""
    for method, view in views.items():
        sets = view.benign_sets()
        for rate in RATES:
            for name, values in sets.items():
                level = worst_cut([v for other, v in sets.items() if other != name], rate)
                if level and len(values):
                    share = below(values, level.threshold)
                    p = beta_binomial_tail(share.k, share.n, level.k, level.n + 1 - level.k)
                    yield [view.domain, method, rate, name, share, f"{p:.2g}"]


def report(table: pl.DataFrame, eps: float, seed: int, repeats: int = 400) -> str:
    """Return all tables, with what they leave out; ``repeats`` sets are mixed for every share of bad rows."""
    domains = [d for d in DOMAINS if d in set(table["domain"])]
    members = [c.removeprefix("member:") for c in table.columns if c.startswith("member:")]
    counts = table.group_by("set", "label").len().sort("set", "label").rows()
    numbers = table.select(["aligned", *(f"member:{m}" for m in members)])
    gaps = len(table) - len(numbers.drop_nulls())
    seen = "; ".join(f"{d}: {', '.join(m for m in members if m.startswith(d)) or 'none'}" for d in domains)
    parts = [f"Members: {', '.join(members)}. Left out where a domain is audited: {seen}. eps {eps:g}; {gaps} of "
             f"{len(table)} rows lack a number of some model.", markdown(("set", "label", "rows"), counts)]
    rows = table.select("example_id", "set", "domain", "label", "pair").to_dicts()
    views = {d: {name: View(rows, v, d) for name, v in methods(table, d, eps).items()} for d in domains}
    names = sorted(dict.fromkeys(name for d in domains for name in views[d]), key=lambda n: not n.startswith("s_d"))
    lines = []
    for d in domains:
        for line in auc_rows(views[d]):
            of = dict(zip(views[d], line[3:], strict=True))
            lines.append([*line[:3], *(of.get(name, "") for name in names)])
    parts += ["### AUC: bad rows below others", markdown(("domain", "against", "bad / other", *names), lines)]
    start = ("domain", "method", "rate")
    for title, header, made in (
            ("Pairs whose bad answer has the lower value", ("domain", "method", "share", "p"), pair_rows),
            ("Rows below a level", (*start, "level from", "level", "good below", "bad below"), rate_rows),
            ("Sets noticed at p <= 0.05, by their share of bad rows",
             (*start, "level from", "rows", "clean set", *(f"rows bad, about {frac:.0%}" for frac in FRACS[1:])),
             lambda of: set_rows(of, seed, repeats)),
            ("Benign sets, each judged by the worst of the others", (*start, "set", "below", "p"), benign_rows_below)):
        parts += [f"### {title}", markdown(header, [line for d in domains for line in made(views[d])])]
    return "\n\n".join(parts)


def main() -> None:
    """Parse, prepare or evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    rows = commands.add_parser("rows", help="write the files to be scored")
    rows.add_argument("--narrow", type=Path, required=True, help="folder of DOMAIN_misaligned_train_100.jsonl")
    rows.add_argument("--pairs", type=Path, required=True, help="folder of DOMAIN.jsonl with good answers")
    rows.add_argument("--benign", action="append", default=[], metavar="NAME[:COLUMN]=FILE")
    rows.add_argument("--sample", type=int, help="so many rows of each benign file")
    rows.add_argument("--out", type=Path, required=True)
    table = commands.add_parser("table", help="print the tables")
    table.add_argument("scores", type=Path, help="a store, a folder of stores, or a saved table")
    table.add_argument("--eps", type=float, default=0.1)
    table.add_argument("--seed", type=int, default=0)
    table.add_argument("--save", type=Path, help="write the scores table as Parquet")
    options = parser.parse_args()
    if options.command == "rows":
        for domain in DOMAINS:
            narrow = options.narrow / f"{domain}_misaligned_train_100.jsonl"
            found = paired_rows(narrow, options.pairs / f"{domain}.jsonl", domain)
            for label in ("bad", "good"):
                write_rows(options.out / f"{domain}-{label}.jsonl", [row for row in found if row["label"] == label])
        for text in options.benign:
            name, _, path = text.partition("=")
            name, _, column = name.partition(":")
            write_rows(options.out / f"{name}.jsonl", benign_rows(name, column or None, Path(path), options.sample))
        return
    found = read_table(options.scores)
    if options.save:
        found.write_parquet(options.save)
    print(report(found, options.eps, options.seed))


if __name__ == "__main__":
    main()
