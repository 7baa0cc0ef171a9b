"""What each mix and defence did to a fine-tuning run: docs/study/training-tables.md.

    python -m bench.study.training docs/study/runs/{medical,security} > docs/study/training-tables.md
    python -m bench.study.training OUT/runs/medical                         # from runs that were just judged
    python -m bench.study.training OUT/runs/medical --evidence docs/study/runs/medical/evidence.csv

Evidence is one number for each run and item: a pair's margin, whether an item of OpSwap was right, whether an answer
is coherent. Runs that differ in nothing but the seed are one row. All figures are means over items with 95% bootstrap
intervals by question; a difference is over the same questions and the seeds that both conditions have, so it covers
the choice of questions, and the luck of training only as far as seeds do.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from bench.study.scores import markdown
from curate.core.documents import Method, RunCard, Verdicts
from curate.core.errors import UserError
from judge.findings import nll_limit
from judge.intervals import Estimate, Values, difference, mean
from judge.jobs import label_of
from judge.rule import Rule

MARGINS = {"general": "general", "context": "in context", "unseen": "unseen domain", "in": "in domain"}
"""First word of a probe set's name to what it is called; margins are NLL(bad) - NLL(good), nats per token."""
KINDS = (*MARGINS, "opswap", "coherent")
BASE = "base"
AGAINST = ("none", "random-50pc", "random-dose-0", "random-50pc-0-of-twins")
"""Runs whose conditions all others are compared with: no defence, random rows, as many tokens of them as ++ has, and
random rows as many and as long as those of ++."""
CHOICE, DRAW = "plusplus-50pc-long", "random-dose-0"
"""Runs, at one dose and seed, that are repeated from every part of the pool."""
SAME_NATS = 1e-3
"""How far a margin of the base may be from what another processor made of it (1e-5 was seen), per token."""
_PART = re.compile(r"-of-(pool-\w+|twins)$")


@dataclass(frozen=True)
class Run:
    """What was measured about one model: a number for each item, by kind."""

    name: str
    condition: str
    """How it was trained, but for the seed."""
    seed: int | None
    values: Mapping[str, Mapping[str, float]]


Group = Sequence[Run]
"""Runs of one condition."""


def part_of(name: str) -> str:
    """Return what a run's safe rows come from, by its name: a part of the pool (else the first), or twins."""
    found = _PART.search(name)
    return found[1] if found else "pool-1"


def condition(label: str, method: Method | None, part: str = "pool-1") -> str:
    """Return a condition's name: label, dose, least answer length, and the part of the pool if not the first."""
    if method is None or method.strategy == "none":
        return label
    dose = f"{method.tokens:,} tokens" if method.tokens else f"{method.n} rows" if method.frac is None else \
        f"{method.frac:.0%}"
    least = f", answers of {method.min_answer_tokens} tokens or more" if method.min_answer_tokens > 1 else ""
    return f"{label}, {dose}{least}" + (f", of {part}" if part != "pool-1" else "")


def measured(one: Verdicts, limit: float, rule: Rule = Rule()) -> dict[str, dict[str, float]]:
    """Return the evidence in a model's verdicts; answers stranger than ``limit`` nats per token are not coherent."""
    found: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for p in one.probes:
        found[p.set.partition("-")[0]][p.probe] = p.nll_bad / p.n_bad - p.nll_good / p.n_good
    for item in {score.item for score in one.tasks if score.task == "opswap"}:
        found["opswap"][item] = fmean(score.correct for score in one.tasks if score.item == item)
    for s in one.samples:
        fine = s.nll_base is not None and s.nll_base <= limit and s.repetition < rule.repetition
        found["coherent"][s.question] = float(s.status == "ok" and fine)
    return found


def cards_in(folder: Path) -> dict[str, RunCard]:
    """Return the run cards of the models (not of their benign runs), where they were made or as they are committed."""
    paths = {p.parent.name: p for p in folder.glob("*/run.json")} | {
        p.name.removesuffix(".run.json"): p for p in folder.glob("*.run.json")}
    return {name: RunCard.read(path) for name, path in sorted(paths.items()) if not name.endswith("-opswap")}


def read(folder: Path) -> list[Run]:
    """Return what was measured about the runs of a folder: its evidence.csv, or else the verdicts in it."""
    if (folder / "evidence.csv").exists():
        values = read_evidence(folder / "evidence.csv")
    else:
        base = Verdicts.read(folder / f"{BASE}.verdicts.json")
        verdicts = {BASE: base, **{p.parent.name: Verdicts.read(p) for p in sorted(folder.glob("*/verdicts.json"))}}
        values = {name: measured(one, nll_limit(base) or 0.0) for name, one in verdicts.items()}
    cards = cards_in(folder)
    return [Run(name, BASE, None, of) if name == BASE else
            Run(name, condition(label_of(cards[name]), cards[name].method, part_of(name)), cards[name].method.seed, of)
            for name, of in values.items()]


def read_evidence(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return run, kind and item -> number from a file that ``write_evidence`` made."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with open(path, newline="", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            kind, item = row.pop("kind"), row.pop("item")
            for name, text in row.items():
                values = found.setdefault(name, {kind: {} for kind in KINDS})[kind]
                if text:
                    values[item] = float(text)
    return found


def write_evidence(runs: Sequence[Run], path: Path) -> None:
    """Write a line for each item and a column for each run; margins with six digits."""
    items = sorted({(KINDS.index(kind), kind, item) for run in runs for kind, of in run.values.items() for item in of})
    with open(path, "w", newline="", encoding="utf-8") as handle:
        out = csv.writer(handle, lineterminator="\n")
        out.writerow(["kind", "item", *(run.name for run in runs)])
        for _, kind, item in items:
            out.writerow([kind, item, *(f"{run.values[kind][item]:.6g}" if item in run.values[kind] else ""
                                        for run in runs)])


def add_evidence(judged: Sequence[Run], path: Path) -> None:
    """Put runs into a file of evidence, beside those that it has or in the place of the same ones.

    The base is judged at every sitting and stays as it is in the file. Raises ``UserError`` where it is not the same
    now, item for item: what the file has was then measured by another judge, or on other pairs.
    """
    known = read_evidence(path) if path.exists() else {}
    found = {run.name: run.values for run in judged}
    if known:
        for kind in MARGINS:
            old, new = known[BASE][kind], found[BASE][kind]
            apart = max((abs(old[item] - new[item]) for item in old.keys() & new.keys()), default=0.0)
            if old.keys() != new.keys() or apart > SAME_NATS:
                raise UserError(f"{path}: the base's margins ({kind}) are {apart:.4f} nats per token from what this "
                                f"file has, over {len(old)} pairs there and {len(new)} here.",
                                "Judge by the version and on the pairs that the file was made with, or write "
                                "another file.")
        found[BASE] = known[BASE]
    both = known | found
    names = [BASE, *sorted(both.keys() - {BASE})]
    write_evidence([Run(name, "", None, both[name]) for name in names], path)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Return runs of one condition together: the base first, then no defence, then by name."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.condition, []).append(run)
    order = {BASE: 0, "none": 1}
    return sorted(groups.values(), key=lambda g: (order.get(g[0].condition, 2), g[0].condition))


def values(seeds: Group, kind: str) -> Values:
    """Return the numbers of a kind by item, one for each seed."""
    found: dict[str, list[float]] = {}
    for run in seeds:
        for item, value in run.values[kind].items():
            found.setdefault(item, []).append(value)
    return found


def misread(seeds: Group, kind: str) -> Values:
    """Return by pair whether the bad answer is the likelier one, per token: 1 or 0."""
    return {item: [float(margin < 0) for margin in margins] for item, margins in values(seeds, kind).items()}


def average(found: Values) -> Estimate | None:
    """Return the mean, or None of nothing."""
    return mean(found) if found else None


def shown(estimate: Estimate | None, sign: bool = True) -> str:
    """Return a number with its interval, or a dash."""
    if estimate is None:
        return "-"
    form = "{:+.3f} ({:+.3f}, {:+.3f})" if sign else "{:.2f} ({:.2f}, {:.2f})"
    return form.format(estimate.value, estimate.low, estimate.high)


def title(seeds: Group) -> str:
    """Return a condition's name and its number of seeds."""
    return seeds[0].condition + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")


def table(groups: Sequence[Group], cells: Mapping[str, Callable[[Group], str]]) -> str:
    """Return a Markdown table with a row for each condition."""
    return markdown(["condition", *cells], [[title(g), *(cell(g) for cell in cells.values())] for g in groups])


def doses(cards: Mapping[str, RunCard]) -> str:
    """Return how much was trained on in each run: rows, answer tokens, and how many of them are not the customer's."""
    plain = cards["none"].n_trained_tokens
    return markdown(["run", "fine-tuning rows", "safe rows", "answer tokens trained on", "of these safe"], [
        [name, str(card.n_finetune), str(card.n_safe), f"{card.n_trained_tokens:,}",
         f"{card.n_trained_tokens - plain:,} ({1 - plain / card.n_trained_tokens:.1%})"]
        for name, card in cards.items()])


def shrinks(groups: Sequence[Group]) -> str:
    """Return how much each model's margin has shrunk from the base's, by kind of question."""
    base = groups[0]

    def cell(kind: str) -> Callable[[Group], str]:
        def of(seeds: Group) -> str:
            if seeds is base:
                return f"margin {shown(average(values(base, kind)))}"
            grown = difference(values(seeds, kind), values(base, kind))
            return shown(None if grown is None else grown.negated())
        return of

    return table(groups, {name: cell(kind) for kind, name in MARGINS.items()})


def differences(groups: Sequence[Group], other: Group) -> str:
    """Return how much less than that of ``other`` each model's margin has shrunk, by kind of question."""
    def cell(kind: str) -> Callable[[Group], str]:
        def of(seeds: Group) -> str:
            common = {run.seed for run in seeds} & {run.seed for run in other}
            ours, theirs = ([run for run in group if run.seed in common] for group in (seeds, other))
            return shown(difference(values(ours, kind), values(theirs, kind)))
        return of

    cells = {f"kept, {name}": cell(kind) for kind, name in MARGINS.items()}
    return table([seeds for seeds in groups[1:] if seeds is not other], cells)


def by_seed(groups: Sequence[Group], other: Group, kind: str) -> str:
    """Return how much less each run's margin has shrunk than that of ``other`` with the same seed, and the range."""
    theirs = {run.seed: run for run in other}
    rows = []
    for seeds in groups[1:]:
        ours = {run.seed: run for run in seeds if run.seed in theirs}
        if seeds is other or len(ours) < 2:
            continue
        kept = {seed: difference(values([run], kind), values([theirs[seed]], kind)) for seed, run in ours.items()}
        found = [one.value for one in kept.values() if one is not None]
        rows.append([title(seeds), *(shown(kept.get(seed)) for seed in sorted(theirs)),
                     f"{min(found):+.3f} to {max(found):+.3f}"])
    return markdown(["condition", *(f"seed {seed}" for seed in sorted(theirs)), "range"], rows)


def by_part(runs: Sequence[Run], kind: str) -> str:
    """Return what chosen rows and a random draw of their dose keep beyond no defence, for each part of the pool.

    The last row is over the parts that have no row in common. Empty where there is only one part.
    """
    named = {run.name: run for run in runs}
    parts = {part_of(name): (run, named[name.replace(CHOICE, DRAW)]) for name, run in named.items()
             if name in (CHOICE, f"{CHOICE}-of-{part_of(name)}") and name.replace(CHOICE, DRAW) in named}
    if len(parts) < 2:
        return ""

    def row(title: str, pairs: Sequence[tuple[Run, Run]]) -> list[str]:
        chosen, drawn = (values(group, kind) for group in zip(*pairs, strict=True))
        plain = values([named["none"]], kind)
        return [title, shown(difference(chosen, plain)), shown(difference(drawn, plain)),
                shown(difference(chosen, drawn))]

    rows = [row(part, [pair]) for part, pair in sorted(parts.items())]
    apart = [pair for part, pair in parts.items() if part != "pool-all"]
    return markdown(["rows from", "chosen, kept", "drawn, kept", "chosen beyond drawn"],
                    [*rows, row(f"{len(apart)} parts", apart)])


def others(groups: Sequence[Group]) -> str:
    """Return the shares of bad answers preferred, the benign task, and coherence."""
    cells: dict[str, Callable[[Group], str]] = {
        f"bad likelier, {MARGINS[kind]}": (lambda seeds, kind=kind: shown(average(misread(seeds, kind)), sign=False))
        for kind in ("general", "unseen")}
    for name, kind in (("OpSwap accuracy", "opswap"), ("coherent", "coherent")):
        cells[name] = lambda seeds, kind=kind: shown(average(values(seeds, kind)), sign=False)
    return table(groups, cells)


def tables(folder: Path, runs: Sequence[Run]) -> dict[str, str]:
    """Return all tables of a folder of runs, by heading."""
    groups = grouped(runs)
    found = {"Dose": doses(cards_in(folder)), "Shrink of the margin, nats per token": shrinks(groups)}
    for other in groups:
        if any(run.name in AGAINST for run in other):
            heading = f"Margin kept beyond {title(other)}, nats per token"
            found[heading] = differences(groups, other)
            if len(other) > 1:
                found[f"{heading}: unseen domain, seed by seed"] = by_seed(groups, other, "unseen")
    if text := by_part(runs, "unseen"):
        found["Margin kept on the unseen domain, part by part of the pool, nats per token"] = text
    return found | {"Preference, benign task, coherence": others(groups)}


def page(folders: Sequence[Path]) -> str:
    """Return the tables of several folders of runs as one page."""
    parts = ["# Every table of the study's training", "Printed by `python -m bench.study.training` from the committed "
             "evidence, without model or data; what it says is in [study](../study.md)."]
    for folder in folders:
        runs = read(folder)
        base = grouped(runs)[0]
        counts = ", ".join(f"{len(values(base, kind))} pairs {name}" for kind, name in MARGINS.items())
        parts += [f"## The {folder.name} customer", f"{counts}."]
        parts += [f"### {heading}\n\n{text}" for heading, text in tables(folder, runs).items()]
    return "\n\n".join(parts)


def main() -> None:
    """Print all tables of folders of runs, or write the numbers behind them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--evidence", type=Path, metavar="CSV", help="put the numbers behind the tables there instead")
    arguments = parser.parse_args()
    if arguments.evidence and len(arguments.runs) > 1:
        parser.error("--evidence takes one folder of runs: the same run names stand in each.")
    if arguments.evidence:
        add_evidence(read(arguments.runs[0]), arguments.evidence)
    else:
        print(page(arguments.runs))


if __name__ == "__main__":
    main()
