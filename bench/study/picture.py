"""Two pictures for each customer of the study: what the dose of safe data does, and what each defence trades.

    python -m bench.study.picture docs/study/runs/{medical,security} --out docs/study/training.png

Left, every run: how much margin it keeps on an unseen domain beyond the undefended run of its seed, over the answer
tokens of its safe rows. Right, every condition: how far the margin has shrunk on the unseen domain, over how far it has
in the domain; the dashed line goes to no defence, and what lies below it spreads less than it teaches. Bars are 95%
bootstrap intervals by question; on the right there are none, because conditions are compared question by question and
not by whether such bars overlap (training-tables.md).
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.study.training import BASE, Group, cards_in, grouped, read, values
from curate.core.documents import RunCard
from judge.intervals import Estimate, difference

LOOKS = {"none": ("#444444", "X"), "interleaving": ("#1f6fb2", "o"), "interleaving+": ("#3a9a5b", "^"),
         "interleaving++": ("#c8501e", "s"), "other": ("#8257a8", "D")}
"""Colour and marker by strategy; ``other`` is a defence without safe rows."""


@dataclass(frozen=True)
class Point:
    """One mark: where it is, in nats per token (or answer tokens along x), and what it is of."""

    look: str
    name: str
    x: float
    y: Estimate


def look_of(condition: str) -> str:
    """Return which of ``LOOKS`` a condition has."""
    if " +" in condition:
        return "other"
    return condition.partition(",")[0]


def dose_points(cards: Mapping[str, RunCard], groups: Sequence[Group]) -> list[Point]:
    """Return for every run with safe rows the margin kept on the unseen domain, over its safe answer tokens."""
    plain = {run.seed: run for seeds in groups if seeds[0].condition == "none" for run in seeds}
    points = []
    for run in (run for seeds in groups for run in seeds if run.name in cards and cards[run.name].n_safe):
        kept = difference(values([run], "unseen"), values([plain[run.seed]], "unseen"))
        if kept is not None:
            tokens = cards[run.name].n_trained_tokens - cards[plain[run.seed].name].n_trained_tokens
            points.append(Point(look_of(run.condition), run.name, tokens, kept))
    return points


def trade_points(groups: Sequence[Group]) -> list[Point]:
    """Return for every condition the margin lost on the unseen domain, over what is lost in the domain."""
    base = groups[0]
    points = []
    for seeds in groups[1:]:
        lost = [difference(values(seeds, kind), values(base, kind)) for kind in ("in", "unseen")]
        if lost[0] is not None and lost[1] is not None:
            points.append(Point(look_of(seeds[0].condition), short(seeds[0].condition), -lost[0].value,
                                lost[1].negated()))
    return points


def short(condition: str) -> str:
    """Return a condition's name with a word or two of its dose."""
    name = condition.replace("none +", "").replace("interleaving", "random").replace("random++", "++")
    return name.replace("random+", "+").replace(", answers of 16 tokens or more", " long")


def draw(axes: Axes, points: Sequence[Point], intervals: bool) -> None:
    """Put points on axes, with their intervals if these are wanted."""
    for point in points:
        colour, marker = LOOKS[point.look]
        if intervals:
            axes.plot([point.x] * 2, [point.y.low, point.y.high], color=colour, linewidth=1, alpha=0.7)
        axes.plot([point.x], [point.y.value], color=colour, marker=marker, markersize=6)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write_names(axes: Axes, points: Sequence[Point], slope: float) -> None:
    """Write the points' names beside the line of a ``slope`` and away from it, none over another.

    Choices and draws from other parts of the pool have none: they are repeats.
    """
    low, high = axes.get_ylim()
    pad = 0.03 * (axes.get_xlim()[1] - axes.get_xlim()[0])
    for below in (True, False):
        side = [point for point in points
                if (point.y.value < slope * point.x) == below and "of pool-" not in point.name]
        for group in stacked(sorted(side, key=lambda p: -p.y.value), 0.045 * (high - low)):
            x = max(p.x for p, _ in group) + pad if below else min(p.x for p, _ in group) - pad
            for point, y in group:
                axes.annotate(point.name, (point.x, point.y.value), (x, y), fontsize=7, color=LOOKS[point.look][0],
                              ha="left" if below else "right", va="center",
                              arrowprops={"arrowstyle": "-", "color": LOOKS[point.look][0], "linewidth": 0.4,
                                          "relpos": (0 if below else 1, 0.5)})


def stacked(points: Sequence[Point], gap: float) -> list[list[tuple[Point, float]]]:
    """Return groups of points, from the top down, and a height for each name: its own, or ``gap`` below the last.

    A group is what had to be moved together; it is then moved up to lie around its points.
    """
    groups: list[list[tuple[Point, float]]] = []
    for point in points:
        if groups and groups[-1][-1][1] - point.y.value < gap:
            groups[-1].append((point, groups[-1][-1][1] - gap))
        else:
            groups.append([(point, point.y.value)])
    return [[(p, y + sum(q.y.value - v for q, v in group) / len(group)) for p, y in group] for group in groups]


def picture(folders: Sequence[Path]) -> bytes:
    """Return a PNG image with a row for each customer."""
    figure = Figure(figsize=(10.5, 4.1 * len(folders)), dpi=130, layout="constrained")
    for row, folder in enumerate(folders):
        groups = grouped(read(folder))
        dose, trade = (figure.add_subplot(len(folders), 2, 2 * row + k) for k in (1, 2))
        points = dose_points(cards_in(folder), groups)
        draw(dose, points, intervals=True)
        dose.axhline(0, color="#444444", linewidth=0.8, linestyle="--")
        dose.set_xlim(left=-200)
        dose.set(xlabel="answer tokens of safe rows", ylabel="margin kept, unseen domain\n(nats per token)",
                 title=f"{folder.name} customer: every run, against no defence")
        for look in dict.fromkeys(point.look for point in points):
            colour, marker = LOOKS[look]
            dose.plot([], [], color=colour, marker=marker, linestyle="", label=look)
        dose.legend(frameon=False, fontsize=8, loc="upper left")
        points = trade_points(groups)
        none = next(point for point in points if point.look == "none")
        draw(trade, points, intervals=False)
        trade.set_xlim(-0.08 * none.x, max(point.x for point in points) + 0.3 * none.x)
        write_names(trade, points, none.y.value / none.x)
        trade.plot([0, none.x], [0, none.y.value], color="#444444", linewidth=0.8, linestyle="--")
        trade.set(xlabel="margin lost in the domain: what is learnt", ylabel="margin lost, unseen domain: what spreads",
                  title=f"{folder.name} customer: every condition")
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def main() -> None:
    """Draw folders of runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help=f"folders with evidence.csv or verdicts, {BASE} among them")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    arguments = parser.parse_args()
    arguments.out.write_bytes(picture(arguments.runs))


if __name__ == "__main__":
    main()
