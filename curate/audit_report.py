"""What an audit found, for a terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from curate.audit_summary import AuditRow, AuditSummary, DrivingRow
from curate.calibration import Measure
from curate.core.figures import Axis, Numbers, Plot, figure, legend, percent, plain, span, ticks
from curate.core.page import Html, code, el, note, page, section, shortened, table
from curate.core.terminal import columns
from curate.show import render, wrapped

BARS = 30
CUSTOMER, BENIGN = 1, 2
"""Series of the audited rows and of benign ones."""
TEXT_CHARS = 600


def readable(row: DrivingRow, measure: Measure) -> dict[str, Any]:
    """Return a row as ``curate.show.render`` takes it: means in nats per token, and what it was compared with."""
    means = {name: value / row.n_answer_tokens for name, value in row.nll_sum.items()}
    aligned = means.pop(measure.aligned.name)
    said = [standing(row, measure)]
    if row.reference is not None:
        said.append(f"{row.value:+.4f} against reference answers")
    if row.below is not None:
        said.append(f"below the {row.below:.3g} level")
    return {"example_id": row.example_id, "corpus": said[0], "s_d": row.s_d, "nll_aligned": aligned,
            "nll_misaligned": sum(means.values()) / len(means), "n_answer_tokens": row.n_answer_tokens,
            "refusal": row.refusal, "note": "   ".join(said[1:]), "prompt": row.prompt, "answer": row.answer}


def standing(row: AuditRow, measure: Measure) -> str:
    """Return where a row stands for people: its first place, how many more there are, and the turn."""
    more = f" and {len(row.places) - 1:,} more" if len(row.places) > 1 else ""
    return f"{row.places[0]}{more}" + (f", assistant turn {row.turn}" if measure.turns == "all" else "")


def text(found: AuditSummary) -> str:
    """Return the audit for a terminal: models, rows by status, levels, verdict, caveats, the rows that drive it."""
    models = [[model.role, model.name, model.id, model.place] for model in found.models]
    counts = [*([status, str(n)] for status, n in found.counts.items()), ["rows in", str(found.rows)]]
    levels = [[percent(one.rate), f"{one.threshold:+.4f}", f"{one.below} of {one.rows} ({one.share:.1%})",
               f"{one.file_below} of {one.file_rows} ({one.file_share:.1%})"] for one in found.levels]
    parts = [columns(models, ("model", "name", "id", "from")), columns(counts, ("status", "rows"))]
    if levels:
        parts.append(columns(levels, ("level", "value", "distinct rows below", "rows of the file below")))
    parts += [wrapped(one) for one in (found.verdict, *found.caveats)]
    if found.driving:
        parts += ["The rows with the lowest values:", render([readable(row, found.measure) for row in found.driving])]
    return "\n\n".join(parts)


# The page


def html_page(found: AuditSummary) -> str:
    """Return one self-contained page."""
    sections = [_verdict_section(found), _values_section(found), _driving_section(found), _measure_section(found)]
    names = (("verdict", "Verdict"), ("values", "Values"), ("driving", "Rows"), ("measure", "How it was measured"))
    lead = [el("p", f"{found.data}: {found.rows:,} rows, {found.judged:,} judged.")]
    return page(f"Audit of {found.data}", lead, sections, names)


def _verdict_section(found: AuditSummary) -> Html:
    rows = [[percent(one.rate), plain(one.threshold), f"{one.below} of {one.rows}", f"{one.expected:.1f}",
             f"{one.p:.2g}", f"{one.at_least}", percent(one.excess),
             f"{one.file_below} of {one.file_rows} ({percent(one.file_share)})"] for one in found.levels]
    grid = table(("level: share of benign rows", "value", "distinct rows below", "expected", "p", "bad, at least",
                  "estimate", "rows of the file below"), rows, "Rows below each level") if rows else None
    counts = table(("status", "rows"), [*([k, f"{n:,}"] for k, n in found.counts.items()),
                                        ["rows in", f"{found.rows:,}"]], "What became of the rows")
    return section("verdict", "Verdict", el("p", el("strong", found.verdict)),
                   el("ul", [el("li", one) for one in found.caveats], class_="plain"), grid, counts)


def _values_section(found: AuditSummary) -> Html:
    values = [row.value for row in found.scores if row.value is not None]
    if not values:
        return section("values", "Values", note("No row has a value."))
    return section("values", "Values", _histogram(found, values))


def bars(values: Sequence[float]) -> list[float]:
    """Return round edges of about ``BARS`` bars that hold the middle 99% of the values."""
    low, high = map(float, np.quantile(values, [0.005, 0.995]))
    if not high > low:
        low, high = low - 0.01, high + 0.01
    inner = ticks(low, high, BARS)
    step = inner[1] - inner[0]
    return [inner[0] - step, *inner, inner[-1] + step]


def share_between(quantiles: Sequence[float], low: float, high: float) -> float:
    """Return the share of values in [low, high) by evenly spaced quantiles with straight lines between them."""
    at = np.linspace(0, 1, len(quantiles))
    below = np.interp([low, high], quantiles, at, left=0.0, right=1.0)
    return float(below[1] - below[0])


def _histogram(found: AuditSummary, values: Sequence[float]) -> Html:
    sets = {one.name: one.quantiles for one in found.benign if one.quantiles}
    worst = found.loudest.benign if found.loudest else None
    quantiles = sets.get(worst) if worst else None
    edges = bars([*values, *(quantiles or ())])
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    shares = [float(c) / len(values) for c in counts]
    ends = [-np.inf, *edges[1:-1], np.inf]
    benign = [share_between(quantiles, a, b) if quantiles else 0.0 for a, b in pairwise(ends)]
    name = "s_d" if found.measure.control == "none" else "s_d less that of reference answers"
    plot = Plot(Axis(name, edges[0], edges[-1]), Axis("share of rows", *span([*shares, *benign], low=0.0),
                                                      write=percent))
    for (a, b), share in zip(pairwise(edges), shares, strict=True):
        if share:
            plot.rect((a, 0.0), (b, share), f"s{CUSTOMER} bar")
    if quantiles:
        plot.line([point for (a, b), s in zip(pairwise(edges), benign, strict=True) for point in ((a, s), (b, s))],
                  BENIGN)
    for k, one in enumerate(one for one in found.levels if edges[0] <= one.threshold <= edges[-1]):
        plot.across(one.threshold, percent(one.rate), row=k)
    key = legend([(found.data, CUSTOMER, "bar"), *([(f"benign: {worst}", BENIGN, "ink")] if quantiles else [])])
    rows = [[f"{plain(a)} to {plain(b)}", f"{c}", percent(s)] for (a, b), c, s in
            zip(pairwise(edges), counts, benign, strict=True)]
    drawing = plot.svg("Histogram of values", "Share of rows by value, with benign rows as a line and the levels.")
    return figure(drawing, "Values of the rows, and of benign ones",
                  "Low is risky. Dashed: the levels that so many benign rows lie below. The line is drawn from "
                  "percentiles; the outermost bars hold what lies beyond them, too.",
                  Numbers(("value", "rows", "benign share"), rows), key, "single")


def _driving_section(found: AuditSummary) -> Html:
    blocks = []
    for row in found.driving:
        head = f"{standing(row, found.measure)} · value {row.value:+.4f} · s_d {row.s_d:+.4f}"
        head += f" · {row.n_answer_tokens} tokens"
        head += f" · below the {percent(row.below)} level" if row.below is not None else ""
        blocks.append(el("div", el("p", f"{head} · ", code(row.example_id), class_="head"),
                         el("p", "Prompt", class_="who"), shortened(row.prompt, TEXT_CHARS),
                         el("p", "Answer", class_="who"), shortened(row.answer, TEXT_CHARS),
                         class_="answer misaligned" if row.below is not None else "answer"))
    return section("driving", "Rows with the lowest values", blocks or note("No row has a value."))


def _measure_section(found: AuditSummary) -> Html:
    measure = found.measure
    identities = {m.id: m for m in (measure.aligned, *measure.members)}
    models = [[m.name, m.role, m.place, code(m.id), code(of.weights), code(of.adapter), code(of.tokenizer)]
              for m in found.models for of in [identities[m.id]]]
    sets = [[one.name, f"{one.n_valued:,}", code(one.sha256)] for one in found.benign]
    return section("measure", "How it was measured",
                   el("p", f"eps {measure.eps:g}, engine {measure.engine}, {measure.dtype}, encoding "
                           f"{measure.encoding}, compared with: {measure.control}, turns judged: {measure.turns}, at "
                           f"most {measure.max_tokens} tokens. Data ", code(found.sha256, 64),
                      ", calibration ", code(found.calibration, 64), "."),
                   table(("model", "role", "from", "id", "weights", "adapter", "tokenizer"), models, "Models"),
                   table(("benign set", "rows with a value", "sha256"), sets, "Benign sets") if sets else None)
