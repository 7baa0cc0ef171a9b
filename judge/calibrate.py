"""How far a judge model agrees with people: kappa at a threshold, AUC and bias, with intervals; pure but for one call.

    kappa = (p_o - p_e) / (1 - p_e)       agreement on "below the threshold" beyond what two such raters share by chance
    AUC   = P(a sound answer scores above an unsound one) + P(equal) / 2      whatever the threshold
    bias  = share the judge calls unsound - share people do; with labels from 0 to 100 also mean(judge - label)

Intervals are percentiles of a bootstrap over questions: all of a question's rows are drawn or left out together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curate.core.documents import Grade
from curate.core.errors import Exit, UserError
from curate.core.example import RowError
from curate.core.rows import json_rows
from curate.core.terminal import columns, progress
from judge.endpoint import Address, Budget, Endpoint, journal_path, tokens_about
from judge.grader import Ask, Grader
from judge.grading import foreseen
from judge.journal import Journal
from judge.prompts import ASPECTS, PROMPTS, request_text

LEVEL = 0.95
RESAMPLES = 2000
SEED = 0
MEASURES = ("kappa", "auc", "bias", "score_bias")

Measure = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Label:
    """One answer and what people say of it, from 0 to 100; None: they did not say."""

    question: str
    answer: str
    aligned: float | None
    coherent: float | None


@dataclass(frozen=True)
class Agreement:
    """One measure: its value and interval, or None where it is not defined (one class only, nothing but agreement)."""

    value: float | None
    low: float | None
    high: float | None


def load_labels(path: Path) -> list[Label]:
    """Return the rows of a JSONL file with ``question``, ``answer``, ``aligned`` and, optionally, ``coherent``.

    A column whose labels are all 0 or 1 is read as no and yes, which stand for 0 and 100. Raises ``UserError`` with
    the place of a row that is wrong.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.", "Give a JSONL file with question, answer and aligned.")
    rows = []
    for place, row in json_rows(path):
        try:
            rows.append(_label(row))
        except RowError as err:
            raise UserError(f"{path}, {place}: {err}.", "Mend the row.", Exit.BAD_DATA) from None
    if not rows:
        raise UserError(f"{path} holds no labels.", "Give one JSON object a line with question, answer and aligned.",
                        Exit.BAD_DATA)
    scale = {a: 100.0 if {getattr(r, a) for r in rows} <= {0.0, 1.0, None} else 1.0 for a in ASPECTS}
    scaled = [{a: None if (v := getattr(r, a)) is None else v * scale[a] for a in ASPECTS} for r in rows]
    return [Label(row.question, row.answer, **values) for row, values in zip(rows, scaled, strict=True)]


def _label(row: Any) -> Label:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {type(row).__name__}, not an object")
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise RowError(f"'{name}' is no text, or empty")
    return Label(row["question"], row["answer"], _number(row, "aligned", True), _number(row, "coherent", False))


def _number(row: Mapping[str, Any], name: str, needed: bool) -> float | None:
    value = row.get(name)
    if value is None and not needed:
        return None
    if isinstance(value, bool):
        value = int(value)
    if not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise RowError(f"'{name}' is no number from 0 to 100")
    return float(value)


def agreement(scores: Sequence[float], labels: Sequence[float], questions: Sequence[str],
              threshold: float) -> dict[str, Agreement]:
    """Return kappa, AUC and bias of ``scores`` against ``labels``, all from 0 to 100; below ``threshold`` is unsound.

    Labels of 0 and 100 only are classes, so there is no ``score_bias`` then. Resamples in which a measure is not
    defined are left out of its interval. Raises ValueError for no values.
    """
    if not len(scores):
        raise ValueError("nothing to compare")
    ours, theirs = np.asarray(scores, float), np.asarray(labels, float)
    measures: dict[str, Measure] = {
        "kappa": lambda a, b: kappa(a < threshold, b < threshold), "auc": lambda a, b: auc(a, b >= threshold),
        "bias": lambda a, b: float(np.mean(a < threshold) - np.mean(b < threshold))}
    if not set(theirs.tolist()) <= {0.0, 100.0}:
        measures["score_bias"] = lambda a, b: float(np.mean(a - b))
    _, member = np.unique(np.array([repr(q) for q in questions]), return_inverse=True)
    groups = [np.flatnonzero(member == g) for g in range(member.max() + 1)]
    draws = np.random.default_rng(SEED).integers(len(groups), size=(RESAMPLES, len(groups)))
    picked = [np.concatenate([groups[g] for g in draw]) for draw in draws]
    return {name: _interval(measure(ours, theirs), [measure(ours[i], theirs[i]) for i in picked])
            for name, measure in measures.items()}


def kappa(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return Cohen's kappa of two yes-no ratings; NaN where chance alone would agree always."""
    p, q = float(np.mean(ours)), float(np.mean(theirs))
    expected = p * q + (1 - p) * (1 - q)
    return float("nan") if expected >= 1 else (float(np.mean(ours == theirs)) - expected) / (1 - expected)


def auc(scores: np.ndarray, sound: np.ndarray) -> float:
    """Return the chance that a sound answer scores above an unsound one, ties counting half; NaN for one class."""
    high, low = scores[sound], np.sort(scores[~sound])
    if not len(high) or not len(low):
        return float("nan")
    below, upto = (np.searchsorted(low, high, side=side) for side in ("left", "right"))
    return float(np.mean((below + upto) / 2) / len(low))


def _interval(value: float, resampled: Sequence[float]) -> Agreement:
    defined = np.array([v for v in resampled if not np.isnan(v)])
    if np.isnan(value) or not len(defined):
        return Agreement(None, None, None)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Agreement(value, float(low), float(high))


def calibrated(labels: Sequence[Label], thresholds: Mapping[str, float], address: Address,
               options: Mapping[str, Any]) -> dict[str, Any]:
    """Have every labelled answer graded and return the agreement per aspect, with n and the statuses.

    With the option ``dry_run``, return what that takes instead.
    """
    journal = Journal(journal_path(options["judge_cache"], address.model))
    budget = Budget(options["max_requests"], options["max_judge_tokens"])
    grader = Grader(Endpoint(address, journal, budget), options["replies"])
    rows = {a: [label for label in labels if getattr(label, a) is not None] for a in ASPECTS}
    asks = [Ask(label.question, label.answer, PROMPTS[a]) for a in ASPECTS for label in rows[a]]
    if options["dry_run"]:
        return _foreseen(grader, asks)
    with progress("grades", len(asks), "grades") as bar:
        grades = iter(grader.grade_all(asks, bar.advance))
    found = {a: compared(rows[a], [next(grades) for _ in rows[a]], a, thresholds[a]) for a in ASPECTS if rows[a]}
    return {"kind": "safeset.calibration", "version": 1, "judge": address.model, "level": LEVEL,
            "resamples": RESAMPLES, "aspects": found}


def compared(labels: Sequence[Label], grades: Sequence[Grade], aspect: str, threshold: float) -> dict[str, Any]:
    """Return one aspect's agreement over the answers that have a score, and all answers by status."""
    scored = [(grade.score, getattr(label, aspect), label.question) for label, grade in zip(labels, grades, strict=True)
              if grade.score is not None]
    found = agreement(*zip(*scored, strict=True), threshold) if scored else {}
    return {"n": len(scored), "n_questions": len({question for *_, question in scored}), "threshold": threshold,
            "statuses": dict(sorted(Counter(grade.status for grade in grades).items())),
            **{name: asdict(found[name]) if name in found else None for name in MEASURES}}


def _foreseen(grader: Grader, asks: Sequence[Ask]) -> dict[str, Any]:
    way = grader.abilities
    tokens = [tokens_about(grader.first_body(request_text(a.template, a.question, a.answer))) for a in asks]
    return {"judge": grader.endpoint.address.model, "way": way.way if way else "unknown", "answers": 0,
            "answers_there": 0, **foreseen(grader.to_come(asks), tokens)}


def table(body: Mapping[str, Any]) -> str:
    """Return the agreement for people: a row per aspect, what has no number, and how to read it."""
    rows = []
    for aspect, found in body["aspects"].items():
        missing = {status: n for status, n in found["statuses"].items() if status != "ok"}
        rows.append([aspect, str(found["n"]), *(_shown(found[name]) for name in MEASURES),
                     ", ".join(f"{n} {status}" for status, n in missing.items()) or "none"])
    return columns(rows, ("aspect", "n", *MEASURES, "without a score")) + (
        f"\n\n{body['level']:.0%} intervals, bootstrap over questions. kappa: 0 is chance, 1 agreement; auc: 0.5 is "
        "chance;\nbias: above 0 the judge calls more answers unsound than people do; score_bias: in points.")


def _shown(value: Mapping[str, float] | None) -> str:
    if value is None or value["value"] is None:
        return "n/a"
    return f"{value['value']:+.2f} ({value['low']:+.2f}, {value['high']:+.2f})"
