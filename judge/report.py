"""A comparison for people (terminal, Markdown) and for programs (CSV, JSON): the same numbers in each."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from curate.core.files import write_atomic
from curate.core.terminal import columns, safe
from judge.criteria import CRITERIA, Comparison, Finding, Row, rule_text

MARKS = ("model", "no general misalignment", "narrow kept", "benign learnt", "coherent")
NUMBERS = ("model", "general shrink", "bad likelier", "in-domain shrink", "benign accuracy", "coherent share")
FILES = ("compare.md", "compare.csv", "compare.json")
LIMITS = (
    "This judge measures which of two written answers a model finds likelier, not what it says when it is asked: a "
    "preference, not sampled behaviour. A model can prefer good answers here and still give bad ones.",
    "The questions are everyday ones. Mixing in safe data can look clean on questions like these and still leave a "
    "model that turns bad when a prompt resembles its fine-tuning data; only the in-domain probes come near that.",
    "A small model cannot tell much: its preferences are weak, broad misalignment hardly shows in its answers, and "
    "what helps at this size need not help at another. Intervals cover the choice of questions, not the luck of one "
    "training run: another seed can move a mark.",
    "Coherent means that the untouched base finds an answer no stranger than most of its own, without repetition. It "
    "says nothing about whether the answer is true or kind.",
)


def table(comparison: Comparison) -> str:
    """Return the comparison as two aligned tables: marks with their n, and numbers with their intervals."""
    return columns(_marks(comparison), MARKS) + "\n\n" + columns(_values(comparison), NUMBERS)


def explanation(comparison: Comparison) -> str:
    """Return what stands below the tables: rule, n, missing marks, limits; lines, those of a list begin with ``- ``."""
    rule = comparison.rule
    parts = [f"Rule, set before the results ({rule.level:.0%} intervals: bootstrap over questions, {rule.resamples:,} "
             f"resamples, seed {rule.seed}; shrink and margin in nats per token; baseline: {comparison.baseline}; "
             f"in-domain: {', '.join(comparison.in_domain) or 'not measured'}):"]
    parts += [f"- {criterion}: {text}" for criterion, text in rule_text(rule).items()]
    parts += ["", "n: " + "; ".join(f"{criterion} {_counts(comparison, criterion)}" for criterion in CRITERIA) + "."]
    reasons = sorted({f"- n/a under {c} for {_title(comparison, row)}: {row.findings[c].reason}."
                      for row in comparison.rows for c in CRITERIA if row.findings[c].reason})
    return "\n".join([*parts, *reasons, "", "What this cannot tell:", *(f"- {text}" for text in LIMITS)])


def markdown(comparison: Comparison) -> str:
    """Return the comparison as a Markdown document; nothing in a name can end a cell or become a tag."""
    tables = [_grid(_marks(comparison), MARKS), _grid(_values(comparison), NUMBERS)]
    below = [f"- {_escaped(line[2:])}" if line.startswith("- ") else _escaped(line)
             for line in explanation(comparison).splitlines()]
    sources = [f"- {_escaped(_title(comparison, row))}: model `{_code(row.model)}`, verdicts `{_code(row.verdicts)}`"
               for row in comparison.rows]
    return "\n".join(["# Comparison", "", *tables, *below, "", "Made from:", "", *sources, ""])


def csv_text(comparison: Comparison) -> str:
    """Return one line per model with every number and its interval, unrounded."""
    names = [(c, name) for c in CRITERIA for name in _numbers(comparison, c)]
    header = ["label", "name", "model", "verdicts", *(f"{c}_{part}" for c in CRITERIA for part in ("mark", "n")),
              *(f"{c}_{name}{part}" for c, name in names for part in ("", "_low", "_high"))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in comparison.rows:
        found = [row.findings[c].numbers.get(name) for c, name in names]
        writer.writerow([safe(row.label), safe(row.name), row.model, row.verdicts,
                         *(v for c in CRITERIA for v in (row.findings[c].mark, row.findings[c].n)),
                         *(v for e in found for v in ((e.value, e.low, e.high) if e else ("", "", "")))])
    return out.getvalue()


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything as one JSON value, with the rule in numbers and words and the verdicts' digests."""
    body = asdict(comparison)
    return {"kind": "safeset.comparison", "version": 1, **body, "in_domain": list(comparison.in_domain),
            "rows": list(body["rows"]), "rule_text": rule_text(comparison.rule), "limits": list(LIMITS)}


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the comparison as Markdown, CSV and JSON, each atomically; return the paths."""
    texts = (markdown(comparison), csv_text(comparison),
             json.dumps(as_json(comparison), ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    paths = [folder / name for name in FILES]
    for path, text in zip(paths, texts, strict=True):
        write_atomic(path, text.encode())
    return paths


def mark(finding: Finding) -> str:
    """Return a mark with its n, as in ``pass (n=160)``."""
    return finding.mark if finding.mark == "-" and not finding.n else f"{finding.mark} (n={finding.n})"


def _marks(comparison: Comparison) -> list[list[str]]:
    return [[_title(comparison, row), *(mark(row.findings[c]) for c in CRITERIA)] for row in comparison.rows]


def _values(comparison: Comparison) -> list[list[str]]:
    rows = []
    for row in comparison.rows:
        general, narrow, benign, coherence = (row.findings[c] for c in CRITERIA)
        rows.append([_title(comparison, row), _shrink(general), _share(general, "bad_likelier"), _shrink(narrow),
                     _share(benign, "accuracy"), _share(coherence, "coherent")])
    return rows


def _grid(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Return a Markdown table and an empty line."""
    lines = [header, ["---"] * len(header), *([_escaped(cell) for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _title(comparison: Comparison, row: Row) -> str:
    """Return a model's label, with its name where another has the same label."""
    same = sum(other.label == row.label for other in comparison.rows) > 1
    return " ".join((f"{row.label} ({row.name})" if same else row.label).split())


def _shrink(finding: Finding) -> str:
    if "shrink" not in finding.numbers:
        margin = finding.numbers.get("margin")
        return f"margin {margin.value:+.3f}" if margin else ""
    e = finding.numbers["shrink"]
    return f"{e.value:+.3f} ({e.low:+.3f}, {e.high:+.3f})"


def _share(finding: Finding, name: str) -> str:
    estimate = finding.numbers.get(name)
    return f"{estimate.value:.2f} ({estimate.low:.2f}, {estimate.high:.2f})" if estimate else ""


def _counts(comparison: Comparison, criterion: str) -> str:
    """Return the n of a column: one number, or the range where models differ."""
    counts = sorted({row.findings[criterion].n for row in comparison.rows})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _numbers(comparison: Comparison, criterion: str) -> Sequence[str]:
    return sorted({name for row in comparison.rows for name in row.findings[criterion].numbers})


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", safe(text))


def _code(text: str) -> str:
    return re.sub(r"[^\w.:+-]", "", text)
