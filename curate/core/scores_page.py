"""What a score store holds, in numbers that fit on a page, and the sections of a report that show them.

``curate report`` makes a ``ScoreSummary``; the judge's report shows the same sections from its JSON, so that both
rooms draw one picture and neither imports the other.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from curate.core.figures import Axis, Numbers, Plot, clipped, figure, legend, percent, plain, whole_ticks
from curate.core.page import Html, code, el, escaped, note, section, shortened, table

OTHER, REFUSAL = 2, 1
"""Series of answers and of refusals."""


class _Piece(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoreModel(_Piece):
    """A model of the store."""

    name: str
    role: str
    id: str
    weights: str
    tokenizer: str
    adapter: str | None


class SourceRows(_Piece):
    """The rows of one corpus: by status, and where the s_d of those with a score lies."""

    source: str
    rows: int
    statuses: dict[str, int]
    refusals: int
    quantiles: tuple[float, float, float, float, float] | None
    """10%, 25%, 50%, 75% and 90% of s_d; None without a score."""


class LengthBin(_Piece):
    """Scored rows whose answers have ``low`` to ``high`` tokens."""

    low: int
    high: int
    rows: int
    quantiles: tuple[float, float, float]
    """25%, 50% and 75% of s_d."""


class Cut(_Piece):
    """Where the top rows begin, and how many of them are refusals."""

    strategy: str
    s_d: float
    rows: int
    refusals: int


class ScoredRow(_Piece):
    """A row to read."""

    example_id: str
    source: str
    s_d: float
    n_answer_tokens: int
    refusal: str | None
    prompt: str
    answer: str


class ScoreSummary(_Piece):
    """What ``curate report --json`` prints."""

    kind: str = "safeset.score-summary"
    version: int = 1
    evidence: str
    """Digest of all examples and scores; mixes that were selected from them name it."""
    engine: str
    dtype: str
    encoding: str
    eps: float
    frac: float
    models: tuple[ScoreModel, ...]
    rows: int
    """Distinct rows; one of several corpora counts in each of ``sources``."""
    sources: tuple[SourceRows, ...]
    edges: tuple[float, ...]
    """Of the bars of the histogram; the outermost bars hold what lies beyond them, too."""
    answers: tuple[int, ...]
    refusals: tuple[int, ...]
    beyond: int
    """Rows outside the edges."""
    cuts: tuple[Cut, ...]
    min_answer_tokens: int = 1
    """Rows with shorter answers are on the page, but not among those that the cuts are of."""
    lengths: tuple[LengthBin, ...]
    top: tuple[ScoredRow, ...]

    @property
    def scored(self) -> int:
        """Rows with an s_d."""
        return sum(self.answers) + sum(self.refusals)


def sections(summary: ScoreSummary) -> list[Html]:
    """Return the corpus-and-scores half of a report."""
    return [rows_section(summary), scores_section(summary), top_section(summary), models_section(summary)]


CONTENTS = (("rows", "Rows"), ("scores", "Scores"), ("top", "Top rows"), ("models", "Models"))


def rows_section(summary: ScoreSummary) -> Html:
    """Return rows by source and status."""
    statuses = sorted({s for one in summary.sources for s in one.statuses}, key=lambda s: (s != "ok", s))
    rows = [[one.source, f"{one.rows:,}", *(f"{one.statuses.get(s, 0):,}" for s in statuses),
             _of(one.refusals, one.rows)] for one in summary.sources]
    return section("rows", "Rows by source and status",
                   table(("source", "rows", *statuses, "refusals"), rows,
                         "Every stored row has one status; only ok rows have an s_d.") if rows
                   else note("The store holds no rows."))


def scores_section(summary: ScoreSummary) -> Html:
    """Return where s_d lies: the histogram with the cuts, by source, by length."""
    if not summary.scored:
        return section("scores", "Scores", note("No row has a score under the aligned model and a member yet."))
    figures = [histogram(summary)]
    if any(one.quantiles for one in summary.sources):
        figures.append(_by_source(summary))
    if summary.lengths:
        figures.append(_by_length(summary))
    lead = (f"s_d with eps {summary.eps:g}: how much harder the misaligned models find an answer than the aligned one, "
            f"relative to the aligned one's own NLL. {summary.scored:,} rows have a score.")
    return section("scores", "Scores", el("p", lead), el("div", figures, class_="figures"))


def histogram(summary: ScoreSummary, class_: str | None = None) -> Html:
    """Return the histogram of s_d, refusals apart, with the cuts."""
    tallest = max(a + r for a, r in zip(summary.answers, summary.refusals, strict=True))
    plot = Plot(Axis("s_d", summary.edges[0], summary.edges[-1]),
                Axis("rows", 0, tallest * 1.18 or 1, at=whole_ticks(tallest * 1.18), write=lambda v: f"{v:,.0f}"))
    for k, (answers, refusals) in enumerate(zip(summary.answers, summary.refusals, strict=True)):
        low, high = summary.edges[k], summary.edges[k + 1]
        for start, more, kind in ((0, answers, OTHER), (answers, refusals, REFUSAL)):
            if more:
                plot.rect((low, start), (high, start + more), f"s{kind} bar")
    inside = [cut for cut in summary.cuts if summary.edges[0] <= cut.s_d <= summary.edges[-1]]
    for row, cut in enumerate(inside):
        plot.across(cut.s_d, f"cut of {cut.strategy}", row=row)
    rows = [[f"{plain(summary.edges[k])} to {plain(summary.edges[k + 1])}", f"{a:,}", f"{r:,}"]
            for k, (a, r) in enumerate(zip(summary.answers, summary.refusals, strict=True))]
    least = f" of answers of {summary.min_answer_tokens} tokens or more" if summary.min_answer_tokens > 1 else ""
    below = f"As many rows as {percent(summary.frac)} of all{least}, by s_d with eps {summary.eps:g}: " + "; ".join(
        [f"{cut.strategy} takes {cut.rows:,}, of which {_of(cut.refusals, cut.rows)} are refusals, down to s_d "
         f"{plain(cut.s_d)}" for cut in summary.cuts]) + ". A mix may have been chosen otherwise."
    if summary.beyond:
        below += f" {summary.beyond:,} rows lie beyond the edges and are in the outermost bars."
    key = legend([("answers", OTHER, "bar"), ("refusals", REFUSAL, "bar")])
    drawing = plot.svg("Histogram of s_d", f"Rows by s_d, refusals stacked on answers, with {len(inside)} cuts.")
    return figure(drawing, "s_d, answers and refusals", below, Numbers(("s_d", "answers", "refusals"), rows), key,
                  class_)


def _by_source(summary: ScoreSummary) -> Html:
    every = [one for one in summary.sources if one.quantiles]
    found = every[:16]
    low = min(one.quantiles[0] for one in found)
    high = max(one.quantiles[4] for one in found)
    room = 0.05 * ((high - low) or 1)
    height = 62 + 34 * len(found)
    plot = Plot(Axis("s_d", low - room, high + room), Axis("", 0, len(found), at=(0,), write=lambda v: ""), height)
    for k, one in enumerate(found):
        y = len(found) - k - 0.72
        q10, q25, q50, q75, q90 = one.quantiles
        plot.error((q10, y), (q90, y), OTHER)
        plot.line([(q25, y), (q75, y)], OTHER, "ink thick")
        plot.point(q50, y, OTHER)
        plot.words(plot.x.low, y, clipped(one.source, 44), style="halo", shift=(2, -9))
    rows = [[one.source, *(plain(q) for q in one.quantiles)] for one in every]
    left_out = f" Not drawn, but among the numbers: {len(every) - len(found)} more sources." if found != every else ""
    drawing = plot.svg("s_d by source", "For each source the median of s_d, its middle half and its middle 80%.")
    return figure(drawing, "s_d by source", "Dot: median. Thick: middle half. Thin: 10% to 90%." + left_out,
                  Numbers(("source", "10%", "25%", "median", "75%", "90%"), rows))


def _by_length(summary: ScoreSummary) -> Html:
    values = [q for one in summary.lengths for q in one.quantiles]
    room = 0.08 * ((max(values) - min(values)) or 1)
    n = len(summary.lengths)
    names = [f"{one.low}–{one.high}" if one.low != one.high else f"{one.low}" for one in summary.lengths]
    plot = Plot(Axis("answer tokens, from", -0.5, n - 0.5, at=range(n), write=lambda v: f"{summary.lengths[v].low:,}"),
                Axis("s_d", min(values) - room, max(values) + room))
    plot.line([(k, one.quantiles[1]) for k, one in enumerate(summary.lengths)], OTHER, "thin")
    for k, one in enumerate(summary.lengths):
        plot.error((k, one.quantiles[0]), (k, one.quantiles[2]), OTHER)
        plot.point(k, one.quantiles[1], OTHER)
    rows = [[name, f"{one.rows:,}", *(plain(q) for q in one.quantiles)]
            for name, one in zip(names, summary.lengths, strict=True)]
    drawing = plot.svg("s_d by length", "Median and middle half of s_d by the answer's length in tokens.")
    return figure(drawing, "Length against s_d", "Dot: median of the rows of that length. Line: middle half.",
                  Numbers(("answer tokens", "rows", "25%", "median", "75%"), rows))


def top_section(summary: ScoreSummary) -> Html:
    """Return the rows with the largest s_d, shortened."""
    blocks = [el("div", el("p", f"s_d {row.s_d:+.4f} · {row.n_answer_tokens} tokens · {row.source}"
                                f"{f' · refusal: {row.refusal}' if row.refusal else ''} · ", code(row.example_id),
                           class_="head"),
                 el("p", "Prompt", class_="who"), shortened(row.prompt, 300), el("p", "Answer", class_="who"),
                 shortened(row.answer, 300), class_="answer") for row in summary.top]
    return section("top", "Rows with the largest s_d", blocks or note("No row has a score."))


def models_section(summary: ScoreSummary) -> Html:
    """Return the models and the digests that stand for what was computed."""
    rows = [[m.name, m.role, code(m.id), code(m.weights), code(m.adapter), code(m.tokenizer)] for m in summary.models]
    about = el("p", escaped(f"Engine {summary.engine}, {summary.dtype}, encoding {summary.encoding}. Evidence "),
               code(summary.evidence, 64), ".")
    return section("models", "Models and digests", about,
                   table(("model", "role", "id", "weights", "adapter", "tokenizer"), rows, "The models of the store"))


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({percent(part / whole)})" if whole else "0"
