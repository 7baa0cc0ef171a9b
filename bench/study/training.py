"""What each mix and defence did to a fine-tuning run: the training tables of docs/study.md.

    python -m bench.study.training OUT/runs/security

Reads the verdicts below a folder. Runs that differ in nothing but the seed are one row. All figures are means over
pairs with 95% bootstrap intervals by question; a difference to no defence is over the same questions and *one* seed of
each unless several are there, so it covers the choice of questions, and the luck of training only as far as seeds do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.study.scores import markdown
from curate.core.documents import RunCard, Verdicts
from judge.findings import key_of, nll_limit
from judge.intervals import Estimate, Values, difference, mean
from judge.rule import Rule

SETS = {"general": "general", "context": "in context", "unseen": "unseen domain", "in": "in domain"}
"""First word of a probe set's name to what it is called."""


def margins(seeds: Sequence[Verdicts], kind: str) -> Values:
    """Return NLL(bad) - NLL(good), nats per token, by probe, of the sets whose name begins with ``kind``."""
    found: dict[str, list[float]] = {}
    for one in seeds:
        for p in one.probes:
            if p.set.partition("-")[0] == kind:
                found.setdefault(p.probe, []).append(p.nll_bad / p.n_bad - p.nll_good / p.n_good)
    return found


def misread(seeds: Sequence[Verdicts], kind: str) -> Values:
    """Return by probe whether the bad answer is the likelier one, per token: 1 or 0."""
    return {probe: [float(value < 0) for value in values] for probe, values in margins(seeds, kind).items()}


def learnt(seeds: Sequence[Verdicts]) -> Values:
    """Return by item of OpSwap whether the reply was right: 1 or 0."""
    found: dict[str, list[float]] = {}
    for one in seeds:
        for score in one.tasks:
            if score.task == "opswap":
                found.setdefault(score.item, []).append(float(score.correct))
    return found


def coherent(seeds: Sequence[Verdicts], limit: float, rule: Rule = Rule()) -> Values:
    """Return by question whether the answer is not empty, not repetitive and no stranger than ``limit``: 1 or 0."""
    found: dict[str, list[float]] = {}
    for one in seeds:
        for s in one.samples:
            fine = s.nll_base is not None and s.nll_base <= limit and s.repetition < rule.repetition
            found.setdefault(s.question, []).append(float(s.status == "ok" and fine))
    return found


def shown(estimate: Estimate | None, sign: bool = True) -> str:
    """Return a number with its interval, or a dash."""
    if estimate is None:
        return "-"
    form = "{:+.3f} ({:+.3f}, {:+.3f})" if sign else "{:.2f} ({:.2f}, {:.2f})"
    return form.format(estimate.value, estimate.low, estimate.high)


def turned(estimate: Estimate | None) -> Estimate | None:
    """Return the same difference the other way round: a margin's loss."""
    return None if estimate is None else estimate.negated()


def title(seeds: Sequence[Verdicts]) -> str:
    """Return a condition's name: label, share of safe rows, number of seeds."""
    method = seeds[0].method
    dose = "" if method is None or method.frac is None else f", {method.frac:.0%}"
    if method is not None and method.tokens is not None:
        dose = f", {method.tokens:,} tokens"
    if method is not None and method.min_answer_tokens > 1:
        dose += f", answers of {method.min_answer_tokens} tokens or more"
    return f"{seeds[0].label}{dose}" + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")


def grouped(verdicts: Sequence[Verdicts]) -> list[list[Verdicts]]:
    """Return runs that differ in the seed alone together: the base first, then no defence, then by name."""
    groups: dict[str, list[Verdicts]] = {}
    for one in verdicts:
        groups.setdefault(key_of(one), []).append(one)
    order = {"base": 0, "none": 1}
    return sorted(groups.values(), key=lambda g: (order.get(g[0].label, 2), title(g)))


def read(folder: Path) -> list[list[Verdicts]]:
    """Return the verdicts below ``folder``, seeds together."""
    paths = [*folder.glob("*verdicts.json"), *folder.glob("*/verdicts.json")]
    return grouped([Verdicts.read(path) for path in sorted(paths)])


def doses(folder: Path) -> str:
    """Return how much was trained on in each run: rows, answer tokens, and how many of them are not the customer's."""
    cards = {path.parent.name: RunCard.read(path) for path in sorted(folder.glob("*/run.json"))}
    plain = cards["none"].n_trained_tokens
    return markdown(["run", "fine-tuning rows", "safe rows", "answer tokens trained on", "of these safe"], [
        [name, str(card.n_finetune), str(card.n_safe), f"{card.n_trained_tokens:,}",
         f"{card.n_trained_tokens - plain:,} ({1 - plain / card.n_trained_tokens:.1%})"]
        for name, card in cards.items() if not name.endswith("-opswap")])


def table(groups: Sequence[Sequence[Verdicts]], cells: Mapping[str, Callable[[Sequence[Verdicts]], str]]) -> str:
    """Return a Markdown table with a row for each condition."""
    return markdown(["condition", *cells], [[title(g), *(cell(g) for cell in cells.values())] for g in groups])


def shrinks(groups: Sequence[Sequence[Verdicts]]) -> str:
    """Return how much each model's margin has shrunk from the base's, by kind of question."""
    base = groups[0]

    def cell(kind: str) -> Callable[[Sequence[Verdicts]], str]:
        def of(seeds: Sequence[Verdicts]) -> str:
            if seeds is base:
                return f"margin {shown(mean(margins(base, kind)))}"
            return shown(turned(difference(margins(seeds, kind), margins(base, kind))))
        return of

    return table(groups, {name: cell(kind) for kind, name in SETS.items()})


def differences(groups: Sequence[Sequence[Verdicts]], other: Sequence[Verdicts]) -> str:
    """Return how much less than that of ``other`` each model's margin has shrunk, by kind of question."""
    cells = {f"kept, {name}": (lambda seeds, kind=kind: shown(difference(margins(seeds, kind), margins(other, kind))))
             for kind, name in SETS.items()}
    return table([seeds for seeds in groups[1:] if seeds is not other], cells)


def by_seed(groups: Sequence[Sequence[Verdicts]], other: Sequence[Verdicts], kind: str) -> str:
    """Return how much less each run's margin has shrunk than that of ``other`` with the same seed, and the range."""
    theirs = {one.method.seed: one for one in other if one.method is not None}
    rows = []
    for seeds in groups[1:]:
        ours = {one.method.seed: one for one in seeds if one.method is not None and one.method.seed in theirs}
        if seeds is other or len(ours) < 2:
            continue
        kept = {seed: difference(margins([one], kind), margins([theirs[seed]], kind)) for seed, one in ours.items()}
        values = [one.value for one in kept.values() if one is not None]
        rows.append([title(seeds), *(shown(kept.get(seed)) for seed in sorted(theirs)),
                     f"{min(values):+.3f} to {max(values):+.3f}"])
    return markdown(["condition", *(f"seed {seed}" for seed in sorted(theirs)), "range"], rows)


def others(groups: Sequence[Sequence[Verdicts]]) -> str:
    """Return the shares of bad answers preferred, the benign task, and coherence."""
    limit = nll_limit(groups[0][0]) or 0.0
    cells: dict[str, Callable[[Sequence[Verdicts]], str]] = {
        f"bad likelier, {SETS[kind]}": (lambda seeds, kind=kind: shown(mean(misread(seeds, kind)), sign=False))
        for kind in ("general", "unseen")}
    cells["OpSwap accuracy"] = lambda seeds: shown(mean(learnt(seeds)), sign=False) if learnt(seeds) else "-"
    cells["coherent"] = lambda seeds: shown(mean(coherent(seeds, limit)), sign=False)
    return table(groups, cells)


def main() -> None:
    """Print all tables of a folder of runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--against", default="none", metavar="RUN", help="compare with this run instead of no defence")
    arguments = parser.parse_args()
    runs, groups = arguments.runs, read(arguments.runs)
    key = key_of(Verdicts.read(runs / arguments.against / "verdicts.json"))
    other = next(seeds for seeds in groups if key_of(seeds[0]) == key)
    counts = {name: len(margins(groups[0], kind)) for kind, name in SETS.items()}
    print(f"### Dose\n\n{doses(runs)}\n")
    print(", ".join(f"{n} pairs {name}" for name, n in counts.items()) + "\n")
    for heading, of in (("Shrink of the margin, nats per token", shrinks),
                        (f"Margin kept beyond {title(other)}, nats per token", lambda them: differences(them, other)),
                        ("The same, seed by seed, unseen domain", lambda them: by_seed(them, other, "unseen")),
                        ("Preference, benign task, coherence", others)):
        print(f"### {heading}\n\n{of(groups)}\n")


if __name__ == "__main__":
    main()
