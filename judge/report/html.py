"""The judge's report as one self-contained HTML file: the table first, then figures, answers and digests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from curate.core.documents import GradedAnswer, MixManifest, Verdicts
from curate.core.figures import percent
from curate.core.files import canonical_json, sha256
from curate.core.page import Html, code, el, folded, note, page, section, shortened, table
from curate.core.scores_page import ScoreSummary, histogram, models_section, rows_section
from judge.criteria import Comparison, Estimate, Finding, Row, grade_of
from judge.report import plots
from judge.report.tables import (
    MARKS,
    SUITE_NAMES,
    interval,
    json_text,
    limits,
    missing_text,
    n_text,
    notes,
    rule_head,
    rule_texts,
    to_base,
    to_baseline,
)
from judge.report.trace import RunTrace
from judge.rule import GRADES

CHAIN = ("verdicts", "run card", "model id", "mix", "evidence")
PER_GRADE = 3
"""Answers shown of each grade and model."""
ICONS = {"pass": "M1.5 8.5L6 13L14.5 3.5", "fail": "M3 3L13 13M13 3L3 13", "partly": "M2 8H14",
         "n/a": "M5 8H11"}
HEADLINES = ("shrink", "misaligned", "accuracy", "coherent", "margin")


@dataclass(frozen=True)
class Material:
    """All that a report is made of."""

    comparison: Comparison
    verdicts: Sequence[Verdicts]
    traces: Mapping[str, RunTrace] = field(default_factory=dict)
    """What is known of the runs, by the digest of their cards."""
    scores: ScoreSummary | None = None
    title: str = "Judge report"

    @cached_property
    def by_digest(self) -> dict[str, Verdicts]:
        """The verdicts by their digests, which take a while to compute."""
        return {v.digest: v for v in self.verdicts}

    def of(self, row: Row) -> list[Verdicts]:
        """Return the verdicts of a row."""
        return [self.by_digest[digest] for digest in row.verdicts]


def html_page(material: Material) -> str:
    """Return the report."""
    comparison = material.comparison
    parts = [("marks", "Marks", marks_section(comparison)), ("figures", "Figures", figures_section(material)),
             ("training", "Training", training_section(material)), ("scores", "Scores", scores_section(material)),
             ("answers", "Answers", answers_section(material)), ("numbers", "All numbers", numbers_section(comparison)),
             ("measured", "Measurement", measurement_section(material)),
             ("chain", "Digests", chain_section(material))]
    n_runs = sum(len(row.verdicts) for row in comparison.rows)
    lead = el("p", f"{len(comparison.rows)} models, {n_runs} verdicts; base {material.verdicts[0].base.name}; "
                   f"in-domain: {', '.join(comparison.in_domain) or 'not measured'}; "
                   f"compared with '{comparison.baseline}'.")
    return page(material.title, [lead], [part for _, _, part in parts], [(name, words) for name, words, _ in parts])


# The table

def marks_section(comparison: Comparison) -> Html:
    """Return the marks with their n and the number behind each, and the rule."""
    header = ["model", *(MARKS[c] for c in comparison.criteria)]
    rows = [[row.title, *(mark_cell(row.findings[c]) for c in comparison.criteria)] for row in comparison.rows]
    caption = (f"A mark, its n, and the value it rests on with its {comparison.rule.level:.0%} interval. A defence "
               "counts only if it holds in every column at once.")
    rule = [el("li", el("strong", f"{MARKS[c]}: "), text) for c, text in rule_texts(comparison).items()]
    said = [el("li", text) for text in notes(comparison)]
    return section("marks", "Four criteria" if "context" not in comparison.rulers else
                   "Four criteria, and the first of them in context", table(header, rows, caption, "marks"),
                   folded("The rule behind the marks", el("p", rule_head(comparison)), el("ul", rule, class_="plain")),
                   folded(f"Missing marks, missing grades and seeds ({len(said)} notes)", el("ul", said,
                                                                                         class_="plain")) if said
                   else None,
                   el("h3", "What this cannot tell"),
                   el("ul", [el("li", text) for text in limits(comparison)], class_="plain"))


def mark_cell(finding: Finding) -> Html:
    """Return a mark that cannot be read without its n, and the number behind it."""
    name = finding.mark if finding.mark in ICONS else ""
    icon = el("svg", el("path", d=ICONS[name], fill="none", stroke="currentColor", stroke_width="2.4",
                        stroke_linecap="round", stroke_linejoin="round"), viewBox="0 0 16 16",
              aria_hidden="true") if name else None
    kind = finding.mark if finding.mark in ("pass", "partly", "fail") else "none"
    word = finding.mark if name else ("not marked" if finding.n else "not measured")
    said = el("span", icon, el("span", word), " ", el("span", f"({n_text(finding)})", class_="n"),
              class_=f"mark {kind}")
    return el("span", said, [el("span", line, class_="value") for line in _values(finding)])


def _values(finding: Finding) -> list[list[Html | str]]:
    """Return the lines below a mark: the headline number, what the trigger does, and how many grades are missing."""
    lines: list[list[Html | str]] = []
    name = next((n for n in HEADLINES if n in finding.numbers), None)
    if name:
        lines += _number(name, finding.numbers[name])
    if "triggered" in finding.numbers:
        lines += _number("with trigger", finding.numbers["triggered"])
    if missing := sum(finding.missing.values()) + sum(finding.missing_triggered.values()):
        lines.append([el("span", f"{missing:,} not graded", class_="quiet")])
    return lines


def _number(name: str, e: Estimate) -> list[list[Html | str]]:
    """Return a value and, on a line of its own, its interval."""
    if name in ("shrink", "margin"):
        return [[el("strong", f"{e.value:+.3f}"), f" {name}"],
                [el("span", f"{e.low:+.3f} to {e.high:+.3f}", class_="quiet")]]
    return [[el("strong", f"{100 * e.value:.1f}%"), f" {name}"],
            [el("span", f"{100 * e.low:.1f} to {100 * e.high:.1f}%", class_="quiet")]]


# Figures

def figures_section(material: Material) -> Html:
    """Return the figures of the criteria; a sentence stands for each that cannot be drawn."""
    comparison = material.comparison
    doses = [plots.dose_response(comparison, c) for c in ("general", "context", "narrow")
             if c in comparison.rulers]
    drawn = [plots.general_against_narrow(comparison), *doses, plots.coherence(comparison), plots.benign(comparison)]
    absent = []
    if drawn[0] is None:
        absent.append("No model was judged both in general and in its domain, so the two are not set against each "
                      "other.")
    if not any(doses):
        absent.append("The verdicts do not hold two shares of safe rows of one fine-tuning set, so there is no "
                      "dose-response.")
    if "context" not in comparison.rulers:
        absent.append("No context-matched questions were asked.")
    absent += [f"{what} was not measured." for what, plot in (("Coherence", drawn[-2]), ("A benign task", drawn[-1]))
               if plot is None]
    return section("figures", "Figures", el("div", [d for d in drawn if d], class_="figures") if any(drawn) else None,
                   [note(text) for text in absent])


def training_section(material: Material) -> Html:
    """Return the training curves of the runs at hand."""
    losses = {row.title: [material.traces[v.run].losses for v in material.of(row) if v.run in material.traces]
              for row in material.comparison.rows}
    drawn = plots.curves(material.comparison, losses)
    return section("training", "Training", drawn if drawn else
                   note("There is no losses.csv beside the verdicts, so there are no training curves."))


def scores_section(material: Material) -> Html:
    """Return the histogram of s_d, if a store was given."""
    summary = material.scores
    if summary is None:
        return section("scores", "Scores of the safe rows",
                       note("No score store was given (--store), so the histogram of s_d is left out."))
    if not summary.scored:
        return section("scores", "Scores of the safe rows", note("The score store holds no row with a score."))
    return section("scores", "Scores of the safe rows", histogram(summary, "single"))


# Answers

def answers_section(material: Material) -> Html:
    """Return sample answers of each model by grade, folded."""
    blocks = []
    for row in material.comparison.rows:
        graded = [(grade_of(a, material.comparison.rule), a) for v in material.of(row) for a in v.answers]
        if graded:
            blocks.append(_graded_block(row, graded))
        elif samples := _sampled(material, row):
            blocks.append(folded([row.title, el("span", f" · {len(samples)} sampled answers, not graded",
                                                class_="quiet")],
                                 [_plain_answer(q, a, words) for q, a, words in samples[:2 * PER_GRADE]],
                                 class_="block"))
    lead = ("The worst answers of each grade, one a question, shortened: what to look at first, not what is typical. "
            "No advice in them should be followed.")
    return section("answers", "Sample answers", el("p", lead) if blocks else None,
                   blocks or note("The verdicts hold no sampled answers."))


def _graded_block(row: Row, graded: Sequence[tuple[str, GradedAnswer]]) -> Html:
    sorted_out: dict[str, list[tuple[str, GradedAnswer]]] = {grade: [] for grade in (*_ORDER, NOT_GRADED)}
    for grade, answer in graded:
        sorted_out[grade if grade in _ORDER else NOT_GRADED].append((grade, answer))
    parts = []
    for grade, of in sorted_out.items():
        worst: dict[tuple[str, str], tuple[str, GradedAnswer]] = {}
        for pair in sorted(of, key=lambda pair: _badness(*pair)):
            worst.setdefault((pair[1].bank, pair[1].question), pair)
        shown = list(worst.values())[:PER_GRADE]
        if shown:
            parts.append(folded(f"{grade} · {len(shown)} of {len(of):,}", [_answer(*pair) for pair in shown]))
    words = ", ".join(f"{len(of):,} {grade}" for grade, of in sorted_out.items() if of)
    return folded([row.title, el("span", f" · {words}", class_="quiet")], parts, class_="block")


_ORDER, NOT_GRADED = ("misaligned", "incoherent", "fine"), "without both grades"


def _badness(grade: str, answer: GradedAnswer) -> tuple[float, str, str, int]:
    of = answer.coherent if grade == "incoherent" else answer.aligned
    score = of.score if of is not None and of.score is not None else 0.0
    return score, answer.question, answer.prompt, answer.number


def _answer(grade: str, answer: GradedAnswer) -> Html:
    scores = [f"{name} {of.score:.0f}" if of is not None and of.score is not None else f"{name} none"
              for name, of in (("alignment", answer.aligned), ("coherence", answer.coherent))]
    about = [*scores, answer.suite, *([answer.variant] if answer.variant else []), answer.question]
    if grade not in _ORDER:
        about.append(grade)
    system = [el("p", "System", class_="who"), shortened(answer.system, 200)] if answer.system else []
    return el("div", el("p", " · ".join(about), class_="head"), system, el("p", "Question", class_="who"),
              shortened(answer.prompt, 300), el("p", "Answer", class_="who"), shortened(answer.answer or "(empty)"),
              class_=f"answer {grade if grade in _ORDER else ''}")


def _sampled(material: Material, row: Row) -> list[tuple[str, str, str]]:
    """Return question, answer and what was measured of it, the least coherent first."""
    found = [s for v in material.of(row) for s in v.samples]
    found.sort(key=lambda s: (-(s.nll_base if s.nll_base is not None else float("inf")), s.question))
    return [(s.question, s.answer, " · ".join([s.status, "NLL under the base none" if s.nll_base is None else
                                               f"NLL under the base {s.nll_base:.2f} nats per token",
                                               f"repeated trigrams {percent(s.repetition)}"])) for s in found]


def _plain_answer(question: str, answer: str, words: str) -> Html:
    return el("div", el("p", words, class_="head"), el("p", "Question", class_="who"), shortened(question, 300),
              el("p", "Answer", class_="who"), shortened(answer or "(empty)"), class_="answer")


# Numbers, measurement, digests

def numbers_section(comparison: Comparison) -> Html:
    """Return the differences, then every number there is, folded."""
    differences = []
    for c in comparison.criteria:
        for row in comparison.rows[1:]:
            base, none = to_base(row.findings[c]), to_baseline(row.findings[c])
            if base or none:
                differences.append([MARKS[c], row.title, interval(base, True) or "none",
                                    "" if row.label == comparison.baseline else interval(none, True) or "none",
                                    f"{(base or none).n:,}"])
    every = [[c, row.title, name.replace("_", " "), f"{e.value:.4f}", f"{e.low:.4f}", f"{e.high:.4f}", f"{e.n:,}"]
             for c in comparison.criteria for row in comparison.rows for name, e in row.findings[c].numbers.items()]
    missing = [[SUITE_NAMES.get(c, c), row.title, missing_text(row.findings[c])] for c in comparison.criteria
               for row in comparison.rows if row.findings[c].missing or row.findings[c].missing_triggered]
    return section(
        "numbers", "All numbers",
        table(("criterion", "model", "more than base", f"more than {comparison.baseline}", "n"), differences,
              "Differences to the untouched base and to no defence, with intervals; taken question by question.")
        if differences else note("There is nothing to compare with."),
        folded(f"Every number ({len(every)})", table(("criterion", "model", "number", "value", "low", "high", "n"),
                                                     every, "Every number with its interval")),
        folded("Answers without grades", table(("suite", "model", "what is missing"), missing, "Missing grades"))
        if missing else None)


def measurement_section(material: Material) -> Html:
    """Return how was measured: the judge, the statuses, the settings and the versions."""
    first = material.verdicts[0]
    statuses = [[v.label, ", ".join(f"{k}: {n:,}" for k, n in sorted(v.statuses.items())) or "none"]
                for v in material.verdicts]
    settings = [[k, canonical_json(v).decode()] for k, v in sorted(first.settings.items())]
    versions = [[k, v] for k, v in sorted(first.versions.items())]
    graded = GRADES in material.comparison.rulers.values()
    return section(
        "measured", "How it was measured",
        el("p", f"Judge: {first.judge}. " + ("Sampled answers were graded from 0 to 100 for alignment and coherence."
                                             if graded else "Paired answers were scored by the model itself.")),
        folded("Statuses of every model", table(("model", "statuses"), statuses, "What became of each item")),
        folded("Settings", table(("setting", "value"), settings, "Settings of the first verdicts")),
        folded("Versions", table(("package", "version"), versions, "Versions of the first verdicts")))


def chain_section(material: Material) -> Html:
    """Return the chain of digests: report, verdicts, run card, mix, evidence, models."""
    comparison = material.comparison
    rows, full = [], []
    for row in comparison.rows:
        for digest, v in zip(row.verdicts, material.of(row), strict=True):
            trace = material.traces.get(v.run or "")
            mix = trace.mix if trace else None
            digests = (digest, v.run, v.model.id, trace.card.mix if trace else None,
                       mix.scoring.get("evidence") if mix else None)
            full += [el("li", f"{row.title}, {name}: ", code(digest, 64))
                     for name, digest in zip(CHAIN, digests, strict=True) if digest]
            rows.append([row.title, *map(code, digests), _sources(mix)])
    store = material.scores
    evidence = {trace.mix.scoring["evidence"] for trace in material.traces.values()
                if trace.mix is not None and "evidence" in trace.mix.scoring}
    said = [note("Each digest is the beginning of a SHA-256. Where it says none, the document was not at hand, or "
                 "there is no such thing: the base has no run.")]
    if store is not None:
        agree = ("the mixes were selected from it." if evidence == {store.evidence} else
                 "no mix at hand names it." if store.evidence not in evidence else
                 "some mixes were selected from it, others from other evidence.")
        said.append(note(f"The score store given holds the evidence {store.evidence[:12]}: {agree}"))
    return section("chain", "From this report to the scores",
                   el("p", "This comparison: ", code(sha256(json_text(comparison).encode(errors="replace")), 64),
                      " (SHA-256 of its JSON form)."),
                   table(("model", *CHAIN, "data"), rows, "The chain of digests"), said,
                   folded("Digests in full", el("ul", full, class_="plain")),
                   [folded("The score store", rows_section(store), models_section(store))] if store else None)


def _sources(mix: MixManifest | None) -> Html:
    if mix is None:
        return el("span", "none", class_="quiet")
    parts = [[el("span", f"{role}: {source.name} "), code(source.sha256 or source.revision), el("br")]
             for role, source in sorted(mix.sources.items())]
    return el("span", parts)
