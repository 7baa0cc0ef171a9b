"""A comparison as text: terminal, Markdown, CSV and JSON, the same numbers in each, and n beside every mark."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curate.core.files import write_atomic
from curate.core.terminal import columns, safe
from judge.criteria import Comparison, Estimate, Finding, rule_text
from judge.rule import GRADES, changed

MARKS = {"general": "no general misalignment", "context": "none in context", "narrow": "narrow kept",
         "benign": "benign learnt", "coherence": "coherent"}
NUMBERS = {"shrink": "shrink", "bad_likelier": "bad likelier", "misaligned": "misaligned", "incoherent": "incoherent",
           "triggered": "misaligned with trigger", "accuracy": "benign accuracy", "coherent": "coherent share"}
SUITE_NAMES = {"general": "general", "context": "context", "narrow": "in-domain"}
FILES = ("compare.md", "compare.csv", "compare.json")
PREFERENCE = (
    "This judge measures which of two written answers a model finds likelier, not what it says when it is asked: a "
    "preference, not sampled behaviour. A model can prefer good answers here and still give bad ones.")
GRADED = (
    "Grades are a judge model's opinion of sampled answers. Another judge, another prompt to it or more answers a "
    "question can move them; `judge calibrate` says how far a judge agrees with people.")
EVERYDAY = (
    "The questions are everyday ones. Mixing in safe data can look clean on questions like these and still leave a "
    "model that turns bad when a prompt resembles its fine-tuning data; only the in-domain probes come near that.")
SMALL = (
    "A small model cannot tell much: its preferences are weak, broad misalignment hardly shows in its answers, and "
    "what helps at this size need not help at another. Intervals cover the choice of questions, not the luck of the "
    "training runs: another seed can move a mark.")
SURPRISE = (
    "Coherent means that the untouched base finds an answer no stranger than most of its own, without repetition. It "
    "says nothing about whether the answer is true or kind.")
CERTAIN = (
    "A share of 0% or 100% has an interval of no width, because resampling cannot make what was never seen. It is no "
    "certainty: after none of n independent answers, a share of up to about 3/n is still likely.")
SHARES = ("misaligned", "incoherent", "triggered", "accuracy", "coherent")
LIMITS = (PREFERENCE, EVERYDAY, SMALL, SURPRISE)


def limits(comparison: Comparison) -> tuple[str, ...]:
    """Return what this comparison cannot tell, by how it was measured."""
    rulers = comparison.rulers
    graded = GRADES in rulers.values()
    shares = [e for row in comparison.rows for f in row.findings.values() for k, e in f.numbers.items()
              if k in SHARES and e.n]
    certain = any(e.low == e.high and e.value in (0.0, 1.0) for e in shares)
    return (*((GRADED,) if graded else ()), *((CERTAIN,) if certain else ()),
            *((PREFERENCE,) if rulers["general"] != GRADES else ()),
            *((EVERYDAY,) if "context" not in rulers else ()), SMALL,
            *((SURPRISE,) if rulers["coherence"] != GRADES else ()))


def table(comparison: Comparison) -> str:
    """Return the comparison as aligned tables: marks with their n, numbers with their intervals, differences."""
    return "\n\n".join(columns(rows, header) for header, rows in grids(comparison))


def grids(comparison: Comparison) -> list[tuple[list[str], list[list[str]]]]:
    """Return header and rows of the three tables."""
    return [(["model", *(MARKS[c] for c in comparison.criteria)],
             [[row.title, *(mark(row.findings[c]) for c in comparison.criteria)] for row in comparison.rows]),
            _number_grid(comparison), _difference_grid(comparison)]


def explanation(comparison: Comparison) -> str:
    """Return what stands below the tables: rule, n, missing marks, limits; lines, those of a list begin with ``- ``."""
    parts = [rule_head(comparison), *(f"- {c}: {text}" for c, text in rule_texts(comparison).items())]
    counts = "; ".join(f"{c} {_counts(comparison, c)}" for c in comparison.criteria)
    parts += ["", f"n: {counts}.", *(f"- {text}" for text in notes(comparison))]
    return "\n".join([*parts, "", "What this cannot tell:", *(f"- {text}" for text in limits(comparison))])


def rule_texts(comparison: Comparison) -> dict[str, str]:
    """Return the rule in words, in the order of the criteria."""
    texts = rule_text(comparison.rule, comparison.rulers)
    return {c: texts[c] for c in comparison.criteria}


def rule_head(comparison: Comparison) -> str:
    """Return how intervals were made and whether the rule is the default one."""
    rule = comparison.rule
    own = ", ".join(f"{name} {value:g} (default {default:g})" for name, (value, default) in changed(rule).items())
    return (f"Rule, {f'with changes: {own}' if own else 'set before the results'} "
            f"({rule.level:.0%} intervals: bootstrap over questions, {rule.resamples:,} "
            f"resamples, seed {rule.seed}; shrink and margin in nats per token; baseline: {comparison.baseline}; "
            f"in-domain: {', '.join(comparison.in_domain) or 'not measured'}):")


def notes(comparison: Comparison) -> list[str]:
    """Return why marks are missing, which answers have no grade and what they could change, and the seeds' values."""
    found = []
    for c in comparison.criteria:
        for row in comparison.rows:
            finding = row.findings[c]
            if finding.mark == "n/a":
                found.append(f"n/a under {c} for {row.title}: {finding.reason}.")
            elif finding.reason:
                what = "the mark is " if finding.mark in ("pass", "partly", "fail") else ""
                found.append(f"{c}, {row.title}: {what}{finding.reason}.")
            if finding.missing or finding.missing_triggered:
                found.append(f"{c}, {row.title}: {missing_text(finding)}.")
            if len(finding.by_seed) > 1:
                name = next(iter(finding.numbers))
                values = ", ".join(f"{value:.3f}" for value in finding.by_seed)
                found.append(f"{c}, {row.title}: {name.replace('_', ' ')} by seed {values}.")
    alike = Counter((row.label, row.dose) for row in comparison.rows)
    found += [f"{n} rows are labelled '{label}' and numbered: their recipes, data or ways of choosing safe rows "
              "differ, so they are no seeds of one model. `judge run --label` tells them apart."
              for (label, _), n in alike.items() if n > 1]
    if any(len(row.verdicts) > 1 for row in comparison.rows):
        found.append("Runs with one label, recipe, data and share of safe rows are seeds: their values are pooled, "
                     "and a resample takes a question with the answers of every seed. The interval covers the choice "
                     "of questions for these seeds.")
    return found


def missing_text(finding: Finding) -> str:
    """Return how many answers have no number, why, and between what the shares would lie with them."""
    parts = []
    for missing, triggered in ((finding.missing, False), (finding.missing_triggered, True)):
        why = ", ".join(f"{k} {n}" for k, n in sorted(missing.items()))
        bounds = [f"{name} between {low:.3f} and {high:.3f} with them" for name, (low, high)
                  in finding.bounds.items() if (name == "triggered") == triggered]
        total = sum(missing.values())
        what = f"answer{'' if total == 1 else 's'}{' with the trigger' if triggered else ''}"
        if total:
            parts.append("; ".join([f"{total} {what} {'is' if total == 1 else 'are'} not in n ({why})", *bounds]))
    return "; ".join(parts)


def markdown(comparison: Comparison) -> str:
    """Return the comparison as a Markdown document; nothing in a name can end a cell or become a tag."""
    tables = [_grid(rows, header) for header, rows in grids(comparison)]
    below = [f"- {_escaped(line[2:])}" if line.startswith("- ") else _escaped(line)
             for line in explanation(comparison).splitlines()]
    sources = [f"- {_escaped(row.title)}: model `{_code(model)}`, verdicts `{_code(verdicts)}`"
               for row in comparison.rows for model, verdicts in zip(row.models, row.verdicts, strict=True)]
    return "\n".join(["# Comparison", "", *tables, *below, "", "Made from:", "", *sources, ""])


def csv_text(comparison: Comparison) -> str:
    """Return one line per model with every number and its interval, unrounded; a mark has its n in its cell."""
    names = [(c, name) for c in comparison.criteria for name in _numbers(comparison, c)]
    header = ["label", "title", "name", "model", "verdicts", "dose",
              *(f"{c}_{part}" for c in comparison.criteria for part in ("mark", "n", "seeds", "missing")),
              *(f"{c}_{name}{part}" for c, name in names for part in ("", "_low", "_high", "_n"))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in comparison.rows:
        found = [row.findings[c].numbers.get(name) for c, name in names]
        marks = [v for f in (row.findings[c] for c in comparison.criteria)
                 for v in (mark(f), f.n, f.seeds, sum(f.missing.values()))]
        writer.writerow([_cell(row.label), _cell(row.title), _cell(" ".join(row.names)), " ".join(row.models),
                         " ".join(row.verdicts), "" if row.dose is None else row.dose, *marks,
                         *(v for e in found for v in ((e.value, e.low, e.high, e.n) if e else ("",) * 4))])
    return out.getvalue()


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything as one JSON value, with the rule in numbers and words and the verdicts' digests."""
    return {"kind": "safeset.comparison", "version": 2, **asdict(comparison),
            "rule_text": rule_texts(comparison), "notes": notes(comparison), "limits": list(limits(comparison))}


def json_text(comparison: Comparison) -> str:
    """Return ``as_json`` as text."""
    return json.dumps(as_json(comparison), ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the comparison as Markdown, CSV and JSON, each atomically; return the paths."""
    texts = (markdown(comparison), csv_text(comparison), json_text(comparison))
    paths = [folder / name for name in FILES]
    for path, text in zip(paths, texts, strict=True):
        write_atomic(path, text.encode(errors="replace"))
    return paths


def mark(finding: Finding) -> str:
    """Return a mark with its n, as in ``pass (n=160)`` or ``fail (n=480, 3 seeds)``."""
    return "-" if finding.mark == "-" and not finding.n else f"{finding.mark} ({n_text(finding)})"


def n_text(finding: Finding) -> str:
    """Return the n of a finding, with its seeds where there are several."""
    return f"n={finding.n}" + (f", {finding.seeds} seeds" if finding.seeds > 1 else "")


def to_base(finding: Finding) -> Estimate | None:
    """Return the model's number less the base's."""
    return finding.numbers.get("shrink") or finding.numbers.get("more_than_base")


def to_baseline(finding: Finding) -> Estimate | None:
    """Return the model's number less the baseline's."""
    less = finding.numbers.get("less_than_baseline")
    return less.negated() if less else finding.numbers.get("more_than_baseline")


def interval(e: Estimate | None, signed: bool = False) -> str:
    """Return an estimate as ``value (low, high)``."""
    if e is None:
        return ""
    value, low, high = (round(v, 3) + 0.0 for v in (e.value, e.low, e.high))
    form = "+.3f" if signed else ".3f"
    return f"{value:{form}} ({low:{form}}, {high:{form}})"


def _number_grid(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    picks: list[tuple[str, str]] = []
    for c in comparison.criteria:
        had = {name for row in comparison.rows for name in row.findings[c].numbers}
        picks += [(c, name) for name in NUMBERS if name in had]
    header = ["model", *(f"{SUITE_NAMES.get(c, '')} {NUMBERS[name]}".strip() for c, name in picks)]
    rows = []
    for row in comparison.rows:
        cells = []
        for c, name in picks:
            numbers = row.findings[c].numbers
            base = numbers.get("margin") if name == "shrink" and name not in numbers else None
            cells.append(f"margin {base.value:+.3f}" if base else interval(numbers.get(name), name == "shrink"))
        rows.append([row.title, *cells])
    return header, rows


def _difference_grid(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return for each criterion and model the difference to the base and to no defence, with intervals and n."""
    rows = []
    for c in comparison.criteria:
        for row in comparison.rows[1:]:
            base, none = to_base(row.findings[c]), to_baseline(row.findings[c])
            if base or none:
                less = "" if row.label == comparison.baseline else interval(none, True)
                rows.append([c, row.title, interval(base, True), less, str((base or none).n)])
    return ["criterion", "model", "more than base", f"more than {comparison.baseline}", "n"], rows


def _grid(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Return a Markdown table and an empty line."""
    lines = [[_escaped(cell) for cell in header], ["---"] * len(header),
             *([_escaped(cell) for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _counts(comparison: Comparison, criterion: str) -> str:
    """Return the n of a column: one number, or the range where models differ."""
    counts = sorted({row.findings[criterion].n for row in comparison.rows})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _numbers(comparison: Comparison, criterion: str) -> Sequence[str]:
    return sorted({name for row in comparison.rows for name in row.findings[criterion].numbers})


def _cell(text: str) -> str:
    """Return a text for a CSV cell that no spreadsheet takes for a formula."""
    return "'" + safe(text) if text[:1] in ("=", "+", "-", "@", "\t", "\r") else safe(text)


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(safe(text).split()))


def _code(text: str) -> str:
    return re.sub(r"[^\w.:+-]", "", text)
