"""An audit: is a fine-tuning set risky, how sure is that, and which rows are it?

The rows are scored under the aligned model and the members into a store, like any corpus, together with benign sets and
reference answers; what is stored is not scored again. A row's *value* is its s_d, or its s_d less that of reference
answers (``curate.control``), and low is risky: the answer is easy for misaligned models. Levels come from benign rows
only (``curate.risk``, ``curate.calibration``); without enough of them there is no risk, never a default.

A row is one observation however many turns of it are judged (its value is that of its lowest turn) and however often it
stands in the file: rows can be exchangeable with benign ones, turns of one conversation and copies are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal, NamedTuple

import pyarrow as pa

from curate.audit_summary import AuditedModel, AuditRow, AuditSummary, DrivingRow, LevelResult, Pairs, told
from curate.calibration import BenignSet, Calibration, Level, Measure, calibrated, quantiles
from curate.chunks import Here
from curate.control import Asked, Reference, expected_same, expected_similar
from curate.core.errors import Exit, UserError
from curate.core.example import Example
from curate.core.sources import Reading, read_source, rows_digest
from curate.corpora import Corpus
from curate.job import ScoreJob
from curate.query import connect
from curate.records import corpus_place, told_apart
from curate.risk import CONFIDENCE, RATES, reached, sign_p
from curate.score import prepared, score
from curate.store import Store
from curate.turns import Turns, answered, turns_of

EPS = 0.1


@dataclass(frozen=True)
class Question:
    """How values come about and what they are judged by; a calibration may bring its own eps."""

    scoring: ScoreJob
    """Models, store and engine; its corpora do not matter."""
    benign: Sequence[Corpus] = ()
    reference: Sequence[Corpus] = ()
    match: Literal["same", "similar"] = "same"
    eps: float | None = None
    rates: Sequence[float] = RATES
    turns: Turns = "last"
    strip_think: bool = False
    """Whether all corpora were opened so."""


class Turn(NamedTuple):
    """A turn that is judged: an example of its own."""

    example_id: str
    number: int
    """Which message of the assistant it is, from 1."""


@dataclass
class Row:
    """A distinct row of a corpus."""

    turns: tuple[Turn, ...]
    """The last one is the row itself."""
    opening: str
    """Stands for what its first judged turn was asked."""
    left_out: bool
    """Whether the assistant says more than is judged."""
    places: list[str] = field(default_factory=list)
    """All of them, as the reader tells them."""

    @classmethod
    def of(cls, example: Example, turns: Sequence[Example]) -> Row:
        """Describe an example of which ``turns`` are judged."""
        numbered = [Turn(turn.id, sum(m.role == "assistant" for m in turn.messages)) for turn in turns]
        judged = sum(bool(turn.answer.strip()) for turn in turns)
        return cls(tuple(numbered), Asked.of(turns[0]).key, judged < len(answered(example)))


@dataclass
class Rows:
    """The distinct rows of a corpus by id, and what each of their turns was asked."""

    label: str
    sha256: str = ""
    n_rows: int = 0
    known: dict[str, Row] = field(default_factory=dict)
    asked: dict[str, Asked] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    """Rows that are no example of their own, by why."""

    def prompts(self, ids: Iterable[str]) -> int:
        """Return to how many different prompts some of the rows are answers."""
        return len({self.known[i].opening for i in ids})

    def openings(self) -> dict[str, str]:
        """Return for each turn what stands for the prompt that its row begins with."""
        return {turn.example_id: row.opening for row in self.known.values() for turn in row.turns}


@dataclass(frozen=True)
class Scored:
    """A row of the view ``scores`` with the evidence behind it: sums in nats by model."""

    status: str
    s_d: float | None
    n_answer_tokens: int
    refusal: str | None
    nll_sum: dict[str, float]


@dataclass(frozen=True)
class Valued:
    """The rows of one corpus with a value: s_d, or s_d less what reference answers lead to expect."""

    values: dict[str, float]
    """Of rows: the lowest of their turns'."""
    lowest: dict[str, Turn]
    """The turn that a row's value is of; for rows without one, the last."""
    statuses: dict[str, str]
    """Of every distinct row; ``in_part`` where only some of its turns have a value."""
    turns: dict[str, float]
    expected: dict[str, float]
    """Of turns."""
    n_turns: int
    """Turns with a value, each counted with every row that it is in."""


def audit(data: Corpus, question: Question, calibration: Calibration | None = None, n: int = 5) -> AuditSummary:
    """Score ``data`` and judge it by a calibration, or by the benign sets of the question.

    ``n`` rows with the lowest values are told with their text. Raises ``UserError``: a calibration that was made with
    other models or another measure (before anything is scored), or from ``data`` itself.
    """
    check_read_alike(question, data)
    question, measure, models = settled(question, calibration)
    if calibration:
        calibration.check(measure)
    of = _Evidence.gathered(question, measure, data)
    rows = of.data
    assert rows is not None
    if calibration is None and question.benign:
        calibration = of.calibration(question)
    if calibration and rows.sha256 in [one.sha256 for one in calibration.benign]:
        raise UserError(f"{rows.label} is one of the benign sets of the calibration.",
                        "A set cannot be judged by itself: calibrate with others.", Exit.BAD_DATA)
    valued = of.valued(rows)
    levels = calibration.levels if calibration else ()
    scores = of.scores(rows, valued, levels)
    return told(AuditSummary(
        data=rows.label, sha256=rows.sha256, rows=rows.n_rows,
        counts=dict(sorted((rows.counts + Counter(valued.statuses.values())).items())), measure=measure, models=models,
        calibration=calibration.digest if calibration else None, benign=calibration.benign if calibration else (),
        missing=calibration.missing if calibration else {}, levels=results(rows, valued, levels),
        prompts=rows.prompts(valued.values), turns=valued.n_turns,
        left_out=sum(len(row.places) for row in rows.known.values() if row.left_out),
        pairs=pairs_of(valued.turns, rows.openings()) if measure.control == "same" else None,
        driving=of.driving(scores[:n]), scores=scores))


def results(rows: Rows, valued: Valued, levels: Sequence[Level]) -> list[LevelResult]:
    """Return how the rows compare with each level, at 95% confidence over all of them together."""
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(levels))
    values = list(valued.values.values())
    copies = [len(rows.known[i].places) for i in valued.values]
    return [LevelResult.of(level, reached(values, level.cut, confidence, copies), 1 - confidence) for level in levels]


def calibrate(question: Question) -> Calibration:
    """Score the benign sets of ``question`` and return the levels they give; ``UserError`` when there is none."""
    question, measure, _ = settled(question, None)
    found = _Evidence.gathered(question, measure).calibration(question)
    if not found.levels:
        raise UserError("There are too few benign rows: " + "; ".join(
            f"for a false-positive rate of {float(rate):g}, {why}" for rate, why in found.missing.items()) + ".",
            "Give larger benign sets, or higher rates with --rate.", Exit.BAD_DATA)
    return found


def settled(question: Question,
            calibration: Calibration | None) -> tuple[Question, Measure, tuple[AuditedModel, ...]]:
    """Return the question with its engine and dtype settled, how its values come about, and the models.

    Nothing is loaded yet. Raises ``UserError``.
    """
    if not question.scoring.members:
        raise UserError("An audit needs misaligned members to compare the aligned model with.",
                        "Name them with --ensemble or --member; `train ensemble` makes them.")
    check_read_alike(question, *question.benign, *question.reference)
    ready = prepared(question.scoring, Here())
    header = ready.header
    eps = calibration.measure.eps if calibration and question.eps is None else question.eps
    control = question.match if question.reference else "none"
    measure = Measure(
        aligned=header.aligned, members=tuple(m.identity for m, _ in ready.models if m.role == "member"),
        engine=header.engine, dtype=header.dtype, encoding=header.encoding, eps=EPS if eps is None else eps,
        max_tokens=header.max_tokens, strip_think=question.strip_think, turns=question.turns, control=control,
        reference=tuple(sorted(_digest(c, question.scoring.max_bad) for c in question.reference))
        if control == "similar" else ())
    models = tuple(AuditedModel(role=m.role, name=m.name, id=m.identity.id,
                                place=str(adapter or question.scoring.aligned)) for m, adapter in ready.models)
    scoring = replace(question.scoring, engine=ready.opening.engine, dtype=header.dtype, max_failures=1.0,
                      turns=question.turns)
    return replace(question, scoring=scoring), measure, models


def check_read_alike(question: Question, *corpora: Corpus) -> None:
    """Raise ``UserError`` where a corpus strips empty thoughts and the question does not, or the other way round."""
    for one in corpora:
        if one.source.kind != "builtin" and one.source.strip_think != question.strip_think:
            raise UserError(f"{one.label} was opened with strip_think={one.source.strip_think}, but the question has "
                            f"strip_think={question.strip_think}.", "Open all corpora as the question says.")


def _digest(corpus: Corpus, max_bad: float) -> str:
    rows = read_source(corpus.source, corpus.folder, max_bad=max_bad)
    return corpus.source.sha256 or rows_digest([e.id for e in rows])


@dataclass(frozen=True)
class _Evidence:
    """Everything scored for one audit or calibration, and what is known of each row."""

    measure: Measure
    benign: Sequence[Rows]
    scored: Mapping[str, Scored]
    reference: Reference
    store: Store
    data: Rows | None

    @classmethod
    def gathered(cls, question: Question, measure: Measure, data: Corpus | None = None) -> _Evidence:
        """Score what is missing and read it all back."""
        corpora = [*([data] if data else []), *question.benign, *question.reference]
        distinct = {(c.label, c.source.sha256, c.source.name): c for c in corpora}
        score(replace(question.scoring, corpora=list(distinct.values())))
        rows = [read_rows(corpus, label, question.scoring.max_bad, measure.turns)
                for corpus, label in zip(corpora, labels(corpora), strict=True)]
        known = len(corpora) - len(question.reference)
        store = Store.open_read(question.scoring.store)
        scored = read_scores(store, measure, {i for one in rows for i in one.asked})
        s_d = {i: one.s_d for i, one in scored.items() if one.s_d is not None}
        asked = {i: a for one in rows[known:] for i, a in one.asked.items()}
        return cls(measure, rows[1 if data else 0:known], scored, Reference.of(asked, s_d), store,
                   rows[0] if data else None)

    def valued(self, rows: Rows) -> Valued:
        """Return the values of a corpus, in the order of its rows."""
        turns, expected, statuses = self._turns(rows)
        values, lowest, of_rows, n_turns = {}, {}, {}, 0
        for i, row in rows.known.items():
            judged = [turn for turn in row.turns if turn.example_id in turns]
            lowest[i] = min(judged, key=lambda turn: (turns[turn.example_id], turn.number), default=row.turns[-1])
            whole = len(judged) == len(row.turns)
            of_rows[i] = "ok" if whole else "in_part" if judged else statuses[lowest[i].example_id]
            n_turns += len(judged)
            if judged:
                values[i] = turns[lowest[i].example_id]
        return Valued(values, lowest, of_rows, turns, expected, n_turns)

    def _turns(self, rows: Rows) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
        """Return values of turns, what was expected of them, and the status of each."""
        statuses = {i: self.scored[i].status for i in rows.asked}
        s_d = {i: self.scored[i].s_d for i, status in statuses.items() if status == "ok"}
        if self.measure.control == "none":
            return s_d, {}, statuses
        expect = expected_same if self.measure.control == "same" else expected_similar
        expected = expect({i: rows.asked[i] for i in s_d}, self.reference)
        statuses |= {i: "no_reference" for i in s_d if i not in expected}
        return {i: s_d[i] - expected[i] for i in s_d if i in expected}, expected, statuses

    def calibration(self, question: Question) -> Calibration:
        """Return what the benign sets give."""
        found, values = [], {}
        for rows in self.benign:
            valued = self.valued(rows)
            values[rows.sha256] = list(valued.values.values())
            counts = rows.counts + Counter(valued.statuses.values())
            found.append(BenignSet(name=rows.label, sha256=rows.sha256, rows=dict(sorted(counts.items())),
                                   quantiles=quantiles(values[rows.sha256]), prompts=rows.prompts(valued.values),
                                   turns=valued.n_turns))
        return calibrated(self.measure, found, values, question.rates)

    def scores(self, rows: Rows, valued: Valued, levels: Sequence[Level]) -> list[AuditRow]:
        """Return every distinct row, lowest value first and those without one last, ties by id."""
        found = []
        for i, row in rows.known.items():
            turn, value = valued.lowest[i], valued.values.get(i)
            one = self.scored[turn.example_id]
            reached_levels = [level.rate for level in levels if value is not None and value < level.threshold]
            found.append(AuditRow(example_id=i, places=tuple(row.places), status=valued.statuses[i], value=value,
                                  turn=turn.number, turn_id=turn.example_id, s_d=one.s_d,
                                  reference=valued.expected.get(turn.example_id),
                                  below=min(reached_levels, default=None), n_answer_tokens=one.n_answer_tokens,
                                  refusal=one.refusal, nll_sum=one.nll_sum))
        return sorted(found, key=lambda r: (r.value is None, r.value or 0.0, r.example_id))

    def driving(self, scores: Sequence[AuditRow]) -> list[DrivingRow]:
        """Return those of the rows that have a value, with their text."""
        rows = [row for row in scores if row.value is not None]
        texts = self.store.read_examples([row.turn_id for row in rows])
        return [DrivingRow(**row.model_dump(), prompt=prompt, answer=answer) for row, prompt, answer in
                zip(rows, texts["prompt"].to_pylist(), texts["answer"].to_pylist(), strict=True)]


def pairs_of(differences: Mapping[str, float], prompts: Mapping[str, str]) -> Pairs | None:
    """Return how many prompts have answers below their reference, by the mean of their differences; None without any.

    Answers to one prompt share its reference, so they are one observation and not several; so are the turns of
    conversations that begin with it.
    """
    by_prompt: dict[str, list[float]] = {}
    for i, value in differences.items():
        by_prompt.setdefault(prompts[i], []).append(value)
    told = [values for values in by_prompt.values() if fmean(values)]
    below = sum(fmean(values) < 0 for values in told)
    return Pairs(n=len(told), below=below, answers=sum(map(len, told)), p=sign_p(below, len(told))) if told else None


def labels(corpora: Sequence[Corpus]) -> list[str]:
    """Return a name for each corpus, that of its file or as much of its path as tells it from the others."""
    places = [corpus_place(one.label, one.source, one.folder) for one in corpora]
    return [told_apart(place, {other for other in places if other != place}) if one.source.kind in ("file", "url")
            else one.label for one, place in zip(corpora, places, strict=True)]


def read_rows(corpus: Corpus, label: str, max_bad: float = 0.0, which: Turns = "last") -> Rows:
    """Read a corpus once more for what the store does not keep: places, prompts, turns, and what became of rows."""
    reading, rows = Reading(), Rows(label)
    for example in read_source(corpus.source, corpus.folder, reading, max_bad):
        if example.id in rows.known:
            rows.counts["duplicate"] += 1
        else:
            turns = turns_of(example, which)
            rows.known[example.id] = Row.of(example, turns)
            rows.asked.update({turn.id: Asked.of(turn) for turn in turns})
        rows.known[example.id].places.append(reading.place)
    rows.n_rows = reading.n_rows
    rows.counts.update({f"filtered: {k}": v for k, v in reading.filtered.items()})
    rows.counts["rejected"] += len(reading.rejects)
    rows.counts += Counter()
    rows.sha256 = corpus.source.sha256 or rows_digest(list(rows.known))
    return rows


def read_scores(store: Store, measure: Measure, ids: set[str]) -> dict[str, Scored]:
    """Return what a store knows of the examples ``ids`` under the aligned model and the members of ``measure``."""
    wanted_models = {measure.aligned.id, *(m.id for m in measure.members)}
    names = {m.identity.id: m.name for m in store.models() if m.identity.id in wanted_models}
    members = [name for model_id, name in names.items() if model_id != measure.aligned.id]
    connection = connect(store, measure.eps, members)
    connection.register("wanted", pa.table({"example_id": sorted(ids)}, schema=pa.schema([("example_id", "string")])))
    sums: dict[str, dict[str, float]] = {}
    for i, model_id, value in connection.execute(
            "SELECT example_id, model_id, nll_sum FROM nll JOIN wanted USING (example_id) "
            "WHERE status = 'ok' AND isfinite(nll_sum) ORDER BY example_id, model_id").fetchall():
        if model_id in names:
            sums.setdefault(i, {})[names[model_id]] = value
    found = connection.execute("SELECT example_id, status, s_d, n_answer_tokens, refusal FROM scores "
                               "JOIN wanted USING (example_id)").fetchall()
    return {i: Scored(status, s_d, n, refusal, sums.get(i, {})) for i, status, s_d, n, refusal in found}
