"""The table of marks as a PNG image, for slides and README files."""

from __future__ import annotations

import io

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from curate.core.figures import clipped
from curate.core.terminal import safe
from judge.criteria import Comparison, Finding
from judge.report.tables import MARKS, n_text

COLOURS = {"pass": "#1a6b4a", "partly": "#8a5a00", "fail": "#a92f24"}
SIGNS = {"pass": "✓", "partly": "–", "fail": "✗"}
ROW, COLUMN, FIRST, LETTER = 0.62, 2.35, 2.3, 0.1
"""Inches; the first column is wider than ``FIRST`` where a name takes more than that."""
LONGEST = 48


def table_png(comparison: Comparison, title: str = "") -> bytes:
    """Return the marks, each with its n and the value behind it, as a picture."""
    names = [MARKS[c] for c in comparison.criteria]
    titles = [_short(row.title, LONGEST) for row in comparison.rows]
    first = max(FIRST, 0.4 + LETTER * max(map(len, titles)))
    width, height = first + COLUMN * len(names) + 0.3, ROW * (len(comparison.rows) + 1) + (0.5 if title else 0.2)
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")

    def write(x: float, row: float, text: str, **style: object) -> None:
        y = height - (0.45 if title else 0.1) - ROW * row
        figure.text(x / width, y / height, text.replace("$", r"\$"), va="center", family="DejaVu Sans", **style)

    if title:
        figure.text(0.2 / width, 1 - 0.22 / height, _short(title, 90).replace("$", r"\$"), fontsize=12, weight="bold",
                    va="center")
    for k, name in enumerate(["model", *names]):
        write(_left(k, first), 0.5, name, fontsize=9.5, color="#59626b")
    for r, row in enumerate(comparison.rows):
        _rule(figure, height - (0.45 if title else 0.1) - ROW * (r + 1), width, height)
        write(0.2, r + 1.5, titles[r], fontsize=10.5, weight="bold", color="#1c2126")
        for k, c in enumerate(comparison.criteria, start=1):
            finding = row.findings[c]
            words = f"{SIGNS.get(finding.mark, '')} {finding.mark}".strip() if finding.mark != "-" else "not marked"
            write(_left(k, first), r + 1.33, f"{words}  ({n_text(finding)})", fontsize=9.5,
                  color=COLOURS.get(finding.mark, "#59626b"))
            write(_left(k, first), r + 1.7, _value(finding), fontsize=8.5, color="#59626b")
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _left(column: int, first: float) -> float:
    return 0.2 if column == 0 else first + COLUMN * (column - 1)


def _rule(figure: Figure, y: float, width: float, height: float) -> None:
    figure.add_artist(Line2D([0.15 / width, 1 - 0.15 / width], [y / height] * 2, color="#d9dee3", linewidth=0.8))


def _value(finding: Finding) -> str:
    for name, share in (("misaligned", True), ("accuracy", True), ("coherent", True), ("shrink", False),
                        ("margin", False)):
        if e := finding.numbers.get(name):
            return (f"{name} {e.value:.1%} ({e.low:.1%} to {e.high:.1%})" if share else
                    f"{name} {e.value:+.3f} ({e.low:+.3f} to {e.high:+.3f})")
    return "not measured"


def _short(text: str, limit: int) -> str:
    return clipped(" ".join(safe(text).split()), limit)
