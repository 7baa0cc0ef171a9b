"""Plots as inline SVG: drawn in the page's own colours, so light, dark and paper need one drawing.

A ``Plot`` maps data to a frame of fixed size and collects shapes; ``figure`` puts it on a page with a caption, a
legend, and the numbers behind it as a table. A series has a colour and a marker of its own, so colour is never alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from curate.core.page import Child, Html, el, folded, table

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 14, 44
KINDS = 8
SHAPES = ("M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z", "M-4 -4h8v8h-8z", "M0 -5.4L5 4h-10z",
          "M0 -5.8L5.8 0L0 5.8L-5.8 0z", "M0 5.4L5 -4h-10z",
          "M-5 -1.7h3.3v-3.3h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3z",
          "M0 -5.6L5.3 -1.7L3.3 4.5H-3.3L-5.3 -1.7z", "M-5.5 -2.6h11v5.2h-11z")
"""Circle, square, triangle, diamond, triangle down, plus, pentagon, bar."""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``, both included if round."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, about)
    power = 10 ** math.floor(math.log10(raw))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def whole_ticks(high: float) -> list[float]:
    """Return round whole numbers from 0 to ``high``, for counts."""
    return sorted({float(round(value)) for value in ticks(0, high)})


def percent(value: float, digits: int = 3) -> str:
    """Return a share as a short percentage."""
    return f"{100 * value:.{digits}g}%".replace("-", "−")


def plain(value: float, digits: int = 3) -> str:
    """Return a number as a short text."""
    return f"{value:.{digits}g}".replace("-", "−")


def written(values: Sequence[float], write: Callable[..., str]) -> list[str]:
    """Return the texts of ticks; ``plain`` and ``percent`` get as many digits as it takes to tell the ticks apart."""
    if write not in (plain, percent):
        return [write(value) for value in values]
    apart = min((abs(b - a) for a, b in pairwise(values)), default=0.0)
    digits = next((k for k in range(3, 16) if all(abs(float(f"{v:.{k}g}") - v) <= apart / 100 for v in values)), 3)
    return [write(value, digits) for value in values]


def clipped(words: str, limit: int) -> str:
    """Return words of at most ``limit`` characters; the middle is left out, since names differ at their ends."""
    tail = limit // 3
    return words if len(words) <= limit else f"{words[:limit - tail - 1]}…{words[-tail:]}"


@dataclass(frozen=True)
class Axis:
    """One direction of a plot: its words, its ends, its ticks (or round numbers), how numbers are written."""

    label: str
    low: float
    high: float
    at: Sequence[float] = ()
    write: Callable[..., str] = plain
    bend: Callable[[float], float] = float
    """What is drawn evenly: the value itself, or for example its square root."""

    def ticks(self) -> list[tuple[float, str]]:
        """Return where the axis is marked, and with what words."""
        values = self.at or ticks(self.low, self.high)
        return list(zip(values, written(values, self.write), strict=True))

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high one."""
        low, high = self.bend(self.low), self.bend(self.high)
        return (self.bend(value) - low) / (high - low) if high > low else 0.5


def span(values: Sequence[float], low: float | None = None, high: float | None = None) -> tuple[float, float]:
    """Return ends that hold all values with a little room; a given end stays where it is.

    They lie a hundredth of the largest value apart at least, so that rounding does not fill a frame.
    """
    least, most = min(values, default=0.0), max(values, default=1.0)
    wide = max(most - least, 0.01 * max(abs(least), abs(most))) or 1.0
    middle, half = (least + most) / 2, 0.56 * wide
    return (middle - half if low is None else low), (middle + half if high is None else high)


@dataclass
class Plot:
    """A frame with axes, to which shapes are added in data coordinates."""

    x: Axis
    y: Axis
    height: int = HEIGHT
    shapes: list[Html] = field(default_factory=list)
    _boxes: list[tuple[float, float, float, float]] = field(default_factory=list)

    def at(self, x: float, y: float, aside: float = 0.0) -> tuple[float, float]:
        """Return the place of a point in the drawing, moved ``aside`` by so many units of it."""
        return (round(LEFT + self.x.place(x) * (WIDTH - LEFT - RIGHT) + aside, 2),
                round(self.height - BOTTOM - self.y.place(y) * (self.height - TOP - BOTTOM), 2))

    def line(self, points: Sequence[tuple[float, ...]], kind: int, style: str = "ink") -> None:
        """Add a line through points, each (x, y) or (x, y, aside)."""
        if points:
            places = " ".join(f"{a:g},{b:g}" for a, b in (self.at(*p) for p in points))
            self.shapes.append(el("polyline", points=places, class_=series(kind, style)))

    def point(self, x: float, y: float, kind: int, aside: float = 0.0) -> None:
        """Add a marker."""
        a, b = self.at(x, y, aside)
        self.shapes.append(marker(a, b, kind))
        self._boxes.append((a - 6, b - 6, a + 6, b + 6))

    def label(self, a: float, b: float, words: str) -> None:
        """Write words beside a place, on the side where they cover least."""
        words = clipped(words, 22)
        wide = 6.4 * len(words)
        sides = [(a + 9, b + 4, "start"), (a - 9, b + 4, "end"), (a + 2, b - 10, "start"), (a + 2, b + 19, "start"),
                 (a - 2, b - 10, "end"), (a - 2, b + 19, "end"), (a + 9, b - 8, "start"), (a + 9, b + 17, "start")]
        boxes = [(left := x - (wide if anchor == "end" else 0), y - 10, left + wide, y + 3) for x, y, anchor in sides]
        best = min(range(len(sides)), key=lambda k: (self._covered(boxes[k]), k))
        x, y, anchor = sides[best]
        self._boxes.append(boxes[best])
        self.shapes.append(el("text", words, x=round(x, 1), y=round(y, 1), text_anchor=anchor, class_="halo"))

    def _covered(self, box: tuple[float, float, float, float]) -> float:
        area = sum(max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
                   * max(0.0, min(box[3], other[3]) - max(box[1], other[1])) for other in self._boxes)
        outside = max(0.0, LEFT - box[0]) + max(0.0, box[2] - WIDTH + 2) + max(0.0, TOP - 8 - box[1])
        return area + 40 * outside + 40 * max(0.0, box[3] - self.height + BOTTOM)

    def error(self, start: tuple[float, ...], end: tuple[float, ...], kind: int) -> None:
        """Add an interval between two points, each (x, y) or (x, y, aside)."""
        (a, b), (c, d) = self.at(*start), self.at(*end)
        self.shapes.append(el("path", d=f"M{a:g} {b:g}L{c:g} {d:g}", class_=series(kind, "thin")))

    def rect(self, start: tuple[float, float], end: tuple[float, float], style: str) -> None:
        """Add a rectangle between two corners."""
        (a, b), (c, d) = self.at(*start), self.at(*end)
        self.shapes.append(el("rect", x=min(a, c), y=min(b, d), width=round(abs(c - a), 2),
                              height=round(abs(d - b), 2), class_=style))

    def across(self, value: float, words: str = "", upright: bool = True, row: int = 0) -> None:
        """Add a dashed guide at an x (upright) or a y, with words at its end."""
        ends = (((value, self.y.low), (value, self.y.high)) if upright else
                ((self.x.low, value), (self.x.high, value)))
        (a, b), (c, d) = (self.at(*p) for p in ends)
        self.shapes.append(el("path", d=f"M{a:g} {b:g}L{c:g} {d:g}", class_="guide"))
        near_end = c + 6.4 * len(words) > WIDTH if upright else True
        place = ({"x": c + (-5 if near_end else 5), "y": d + 11 + 14 * row} if upright else {"x": c - 3, "y": d - 5})
        if words:
            self.shapes.append(el("text", words, **place, text_anchor="end" if near_end else "start",
                                  class_="tick halo"))

    def words(self, x: float, y: float, text: str, anchor: str = "start", style: str = "wanted-text halo",
              shift: tuple[float, float] = (0, 0)) -> None:
        """Write words at a point."""
        a, b = self.at(x, y)
        self.shapes.append(el("text", text, x=a + shift[0], y=b + shift[1], text_anchor=anchor, class_=style))
        wide = 6.4 * len(text)
        left = a + shift[0] - (wide if anchor == "end" else 0)
        self._boxes.append((left, b + shift[1] - 10, left + wide, b + shift[1] + 3))

    def svg(self, title: str, description: str) -> Html:
        """Return the drawing; title and description are its text alternative."""
        return el("svg", el("title", title), el("desc", description), self._axes(), self.shapes,
                  viewBox=f"0 0 {WIDTH} {self.height}", role="img", aria_label=f"{title}. {description}",
                  class_="plot")

    def _axes(self) -> list[Html]:
        bottom, right = self.height - BOTTOM, WIDTH - RIGHT
        parts = []
        for value, words in self.y.ticks():
            _, b = self.at(self.x.low, value)
            parts.append(el("path", d=f"M{LEFT} {b:g}H{right}", class_="grid"))
            parts.append(el("text", words, x=LEFT - 7, y=b + 4, text_anchor="end", class_="tick"))
        for value, words in self.x.ticks():
            a, _ = self.at(value, self.y.low)
            parts.append(el("path", d=f"M{a:g} {bottom}v4", class_="frame"))
            parts.append(el("text", words, x=a, y=bottom + 17, text_anchor="middle", class_="tick"))
        middle = (TOP + bottom) / 2
        parts += [el("path", d=f"M{LEFT} {bottom}H{right}", class_="frame"),
                  el("text", self.x.label, x=(LEFT + right) / 2, y=self.height - 8, text_anchor="middle",
                     class_="axis"),
                  el("text", self.y.label, x=13, y=middle, text_anchor="middle", class_="axis",
                     transform=f"rotate(-90 13 {middle:g})")]
        return parts


@dataclass(frozen=True)
class Bar:
    """One line of a dot plot: a name, a value with its interval, and the series it is drawn as."""

    name: str
    value: float
    low: float
    high: float
    kind: int


def dots(bars: Sequence[Bar], axis: Axis, title: str, description: str,
         guide: tuple[float, str] | None = None) -> Html:
    """Return a dot plot: one line per name, its value and interval."""
    step, left = 34, 10
    height = 30 + step * len(bars) + 30
    bottom = height - 44

    def place(value: float) -> float:
        return round(left + axis.place(value) * (WIDTH - left - RIGHT - 4), 2)

    parts = [el("path", d=f"M{place(v):g} 8V{bottom}", class_="grid") for v, _ in axis.ticks()]
    parts += [el("text", words, x=place(v), y=bottom + 16, text_anchor="middle", class_="tick")
              for v, words in axis.ticks()]
    if guide:
        parts.append(el("path", d=f"M{place(guide[0]):g} 8V{bottom}", class_="guide"))
    for k, bar in enumerate(bars):
        y = 30 + step * k
        parts += [el("text", clipped(bar.name, 44), x=left, y=y - 9, class_="halo"),
                  el("path", d=f"M{place(bar.low):g} {y}H{place(bar.high):g}", class_=series(bar.kind, "ink")),
                  marker(place(bar.value), y, bar.kind)]
    parts.append(el("text", axis.label, x=(left + WIDTH) / 2, y=height - 8, text_anchor="middle", class_="axis"))
    return el("svg", el("title", title), el("desc", description), parts, viewBox=f"0 0 {WIDTH} {height}", role="img",
              aria_label=f"{title}. {description}", class_="plot")


def series(kind: int, style: str) -> str:
    """Return the class of a line of a series; from the ninth on colours come again, and lines are dashed."""
    return f"s{kind % KINDS} {style}" + (" again" if kind >= KINDS else "")


def marker(a: float, b: float, kind: int) -> Html:
    """Return the marker of a series at a place of the drawing; where colours come again, shapes do not."""
    return el("path", d=SHAPES[(kind + kind // KINDS) % KINDS], transform=f"translate({a:g} {b:g})",
              class_=f"s{kind % KINDS} fill")


def legend(entries: Sequence[tuple[str, int, str]]) -> Html:
    """Return a legend; an entry is a name, a series, and how it is drawn: ``point``, ``bar`` or a line."""
    def sign(kind: int, style: str) -> Html:
        shape = (marker(12, 8, kind) if style == "point" else
                 el("rect", x=4, y=2, width=16, height=12, class_=f"s{kind % KINDS} bar") if style == "bar" else
                 el("path", d="M1 8H23", class_=series(kind, style)))
        return el("svg", shape, viewBox="0 0 24 16", aria_hidden="true")

    return el("ul", [el("li", sign(kind, style), el("span", name)) for name, kind, style in entries], class_="legend")


@dataclass(frozen=True)
class Numbers:
    """The table behind a figure."""

    header: Sequence[str]
    rows: Sequence[Sequence[Child]]


def figure(drawing: Html, title: str, below: str, numbers: Numbers, key: Html | None = None,
           class_: str | None = None) -> Html:
    """Return a figure: caption, legend, drawing, and its numbers, folded."""
    caption = el("figcaption", el("strong", title), el("p", below) if below else None)
    return el("figure", caption, key, drawing,
              folded("The numbers", table(numbers.header, numbers.rows, title)), class_=class_)
