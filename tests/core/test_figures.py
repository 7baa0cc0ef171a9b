"""Drawings: ticks that say what they mark, and series that can be told apart."""

from __future__ import annotations

import math

import pytest

from curate.core.figures import (
    KINDS,
    Axis,
    Bar,
    Plot,
    clipped,
    dots,
    legend,
    marker,
    percent,
    series,
    span,
    ticks,
    whole_ticks,
    written,
)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.2998, 2.3003), (-0.3, 0.12), (0, 1e-9), (1e6, 1e6 + 7),
                                           (-5, -4.9)])
def test_ticks_are_told_apart_by_their_words(low: float, high: float) -> None:
    values = ticks(low, high)
    words = written(values, Axis("x", low, high).write)
    step = values[1] - values[0]
    assert len(set(words)) == len(values)
    assert [float(w.replace("\u2212", "-")) for w in words] == pytest.approx(values, abs=step / 50)
    assert [text for _, text in Axis("x", low, high).ticks()] == words


def test_shares_and_words_of_ones_own() -> None:
    assert written([0.0, 0.5, 1.0], percent) == ["0%", "50%", "100%"]
    assert written([0.9998, 0.9999, 1.0], percent) == ["99.98%", "99.99%", "100%"]
    assert written([1.0, 2.0], lambda v: f"<{v:g}>") == ["<1>", "<2>"]


@pytest.mark.parametrize(("tallest", "marks"), [(1.18, [0, 1]), (2.36, [0, 1, 2]), (5.9, [0, 2, 4]), (0, [0])])
def test_counts_have_whole_ticks(tallest: float, marks: list[int]) -> None:
    assert whole_ticks(tallest) == marks


def test_rounding_does_not_fill_a_frame() -> None:
    low, high = span([0.1, math.nextafter(0.1, 1)])
    assert low < 0.1 - 4e-4 and high > 0.1 + 4e-4
    assert span([2.2998, 2.3003])[1] - span([2.2998, 2.3003])[0] > 0.02
    low, high = span([1.0, 3.0])
    assert (low, high) == pytest.approx((0.88, 3.12)) and span([1.0, 3.0], low=0)[0] == 0
    assert span([0.0, 0.0])[0] < 0 < span([0.0])[1] and span([])[0] < span([])[1]


def test_twice_as_many_series_as_colours_can_be_told_apart() -> None:
    assert len({str(marker(0, 0, kind)) for kind in range(2 * KINDS)}) == 2 * KINDS
    assert len({series(kind, "ink") for kind in range(2 * KINDS)}) == 2 * KINDS
    keys = [str(legend([("name", kind, style)])) for kind in range(2 * KINDS) for style in ("point", "ink")]
    assert len(set(keys)) == 4 * KINDS


def test_names_that_differ_at_their_ends_stay_different() -> None:
    names = ["interleaving++ +inoculation 5%", "interleaving++ +inoculation 25%"]
    assert clipped("short", 22) == "short" and all(len(clipped(name, 22)) == 22 for name in names)
    assert len({clipped(name, 22) for name in names}) == 2
    plot = Plot(Axis("x", 0, 1), Axis("y", 0, 1))
    for name in names:
        plot.label(100, 100, name)
    assert len({str(shape).split(">")[1] for shape in plot.shapes}) == 2
    drawn = str(dots([Bar(name * 3, 0.5, 0.4, 0.6, 0) for name in names], Axis("x", 0, 1), "t", "d"))
    assert "5%</text>" in drawn and "25%</text>" in drawn
