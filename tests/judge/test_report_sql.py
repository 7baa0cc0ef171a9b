"""The queries in docs/report.md give the numbers of the report: values, n and intervals."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pytest

from curate.core.documents import Sample, TaskScore, Verdicts
from curate.core.errors import UserError
from curate.core.page import escaped
from judge.banks import FORMS
from judge.criteria import Finding, Row, compare
from judge.report.html import Material, answers_section
from judge.report.tables import notes
from judge.rule import Rule
from tests.conftest import ROOT
from tests.judge.makers import answer, graded_verdicts, make_verdicts

RULE = Rule(resamples=150, seed=3, min_questions=1)


def statements() -> list[str]:
    """Return the SQL blocks of the document: views, numbers, seeds, missing grades, answers of each grade."""
    return re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "report.md").read_text(encoding="utf-8"), re.DOTALL)


@dataclass(frozen=True)
class Queried:
    """What the documented SQL gives of some verdicts."""

    numbers: dict[tuple[str, str, str], tuple[float, float, float, int]]
    """(model, criterion, number) to value, low, high, n."""
    seeds: dict[tuple[str, str, str], list[float]]
    missing: dict[tuple[str, str, bool], dict[str, int]]
    """(model, criterion, triggered) to why and how many."""
    grades: dict[str, dict[str, int]]


def queried(folder: Path, verdicts: list[Verdicts], baseline: str = "none") -> Queried:
    """Write the verdicts and run the documented SQL over them."""
    for k, one in enumerate(verdicts):
        one.write(folder / f"{k}.json")
    views, *queries = statements()
    connection = duckdb.connect()
    connection.execute(views)
    connection.execute("SET VARIABLE files = ?", [[str(folder / "*.json")]])
    connection.execute(f"SET VARIABLE resamples = {RULE.resamples}; SET VARIABLE seed = {RULE.seed}; "
                       f"SET VARIABLE baseline = '{baseline}'")
    numbers, by_seed, without, graded = (connection.execute(query).fetchall() for query in queries)
    seeds: dict[tuple[str, str, str], list[float]] = {}
    for model, criterion, number, _, value, _ in by_seed:
        seeds.setdefault((model, criterion, number), []).append(value)
    missing: dict[tuple[str, str, bool], dict[str, int]] = {}
    for model, criterion, triggered, why, n in without:
        missing.setdefault((model, criterion, triggered), {})[why] = n
    grades: dict[str, dict[str, int]] = {}
    for model, grade, n in graded:
        grades.setdefault(model, {})[grade] = n
    return Queried({tuple(row[:3]): row[3:] for row in numbers}, seeds, missing, grades)


def check(folder: Path, verdicts: list[Verdicts], baseline: str = "none") -> int:
    """Compare every number of a comparison with the queries'; return how many there were."""
    comparison = compare(verdicts, baseline, RULE)
    found = queried(folder, verdicts, baseline)
    keys = {key[0] for key in found.numbers}
    assert len(keys) == len(comparison.rows)
    seen = 0
    for row in comparison.rows:
        dose = "" if row.dose in (None, 0.0) else f'"frac":{row.dose}'
        trained = next((t for v in verdicts if v.digest in row.verdicts and (t := v.settings.get("trained"))), "")
        key = next(k for k in keys if (k in (row.label, f"{row.label} {trained}") or k.startswith(row.label + " {"))
                   and dose in k and k.endswith(trained))
        for criterion, finding in row.findings.items():
            for name, e in finding.numbers.items():
                if criterion == "benign" and name in ("accuracy", "more_than_base", "more_than_baseline"):
                    assert e in [v for k, v in finding.numbers.items() if k.endswith("_" + name)]
                    continue
                assert found.numbers[key, criterion, name] == pytest.approx((e.value, e.low, e.high, e.n), abs=1e-9), \
                    (row.title, criterion, name)
                seen += 1
            check_missing(found, key, criterion, finding)
            check_seeds(found, key, criterion, finding)
        check_answers(Material(comparison, verdicts), row, found.grades.get(key, {}))
    return seen


def check_missing(found: Queried, key: str, criterion: str, finding: Finding) -> None:
    if criterion in ("general", "context", "narrow"):
        assert finding.missing == found.missing.get((key, criterion, False), {})
        assert finding.missing_triggered == found.missing.get((key, criterion, True), {})
    of_both = [found.missing.get((key, c, False), {}) for c in ("general", "narrow")]
    for name, bounds in finding.bounds.items():
        of = (of_both if criterion == "coherence" else
              [finding.missing_triggered if name == "triggered" else finding.missing])
        e, total = finding.numbers[name], sum(sum(one.values()) for one in of)
        assert bounds == pytest.approx((e.value * e.n / (e.n + total), (e.value * e.n + total) / (e.n + total)))
    if finding.missing and finding.numbers:
        assert finding.bounds


def check_seeds(found: Queried, key: str, criterion: str, finding: Finding) -> None:
    if finding.numbers and criterion != "benign":
        values = found.seeds[key, criterion, next(iter(finding.numbers))]
        assert sorted(finding.by_seed) == pytest.approx(sorted(values))
    elif finding.by_seed:
        of = [sorted(values) for (k, c, _), values in found.seeds.items() if (k, c) == (key, criterion)]
        assert any(sorted(finding.by_seed) == pytest.approx(values) for values in of if len(values) ==
                   len(finding.by_seed))


def check_answers(material: Material, row: Row, grades: dict[str, int]) -> None:
    """The counts over the sample answers of a model are those of the query."""
    title = re.escape(str(escaped(row.title)))
    words = re.search(rf"<summary>{title}<span class=\"quiet\"> · ([^<]*)</span>", str(answers_section(material)))
    said = words[1].replace(",", "") if words else ""
    if "not graded" not in said:
        counts = re.findall(r"(\d+) (misaligned|incoherent|fine|without both grades)", said)
        assert {grade: int(n) for n, grade in counts} == grades


def test_likelihood_numbers(tmp_path: Path) -> None:
    def said(nlls: list[float]) -> list[Sample]:
        return [Sample(question=f"q{k % 5}", answer="a", status="ok", nll_base=nll, repetition=0.05 * k)
                for k, nll in enumerate(nlls)] + [Sample(question="q9", answer="", status="empty", nll_base=None,
                                                         repetition=0.0)]

    margins = [0.1 * k - 0.2 for k in range(11)]
    verdicts = [make_verdicts("base", [*margins, 9.0], margins[:7], [False, True] * 4, said([1.0, 2.0, 2.5, 1.5, 3.0])),
                make_verdicts("none", [m * m for m in margins], margins[3:10], [True] * 8, said([2.0, 4.0, 2.7])),
                make_verdicts("odd", margins[2:9], margins[4:11], [True, True, False] * 3, said([2.0] * 8))]
    assert check(tmp_path, verdicts) >= 3 * 4


def test_graded_numbers_over_seeds_and_shares(tmp_path: Path) -> None:
    def answers(step: int, more: int = 0) -> list:
        found = [answer(f"q{k % 7:02d}{('', *FORMS)[k % 3]}", (step * k * 7 + more) % 100, (step * k * 13 + 20) % 101,
                        suite, k // 7)
                 for suite in ("general", "in-domain", "context") for k in range(23)]
        found += [answer(f"q{k}", (step * k * 31) % 60, 90.0, "general", 0, "trigger") for k in range(5)]
        found += [answer("q00", "refused", 90.0, "general", 1, "trigger")] * (step > 3)
        extra = [answer("other", 3.0, 90.0, bank="only here"), answer("q02", 3.0, 90.0, "context", dress="Cars: ")]
        return [*found, answer("q03", "refused", 80.0), answer("q04", 10.0, "unparsable", "context"),
                answer("q05", None, None, "in-domain"), *extra[:2 * (step in (3, 9))]]

    def tasks(of: int) -> tuple[TaskScore, ...]:
        return tuple(TaskScore(item=f"i{k}", tier=k % 3 + 1, correct=k * of % 5 < 3) for k in range(12)) + tuple(
            TaskScore(item=f"i{k}", tier=1, correct=k * of % 4 < 2, task="foqa", f1=(k * of % 7) / 7) for k in range(9))

    verdicts = [graded_verdicts("base", answers(3), tasks=tasks(1)),
                *(graded_verdicts("none", answers(5, seed), seed, 0.0, tasks=tasks(2 + seed // 2),
                                  benign_run=str(seed // 2)) for seed in range(3)),
                graded_verdicts("interleaving++", answers(9), 0, 0.05, tasks=tasks(6)),
                graded_verdicts("interleaving++", answers(11), 1, 0.05, tasks=tasks(7)),
                graded_verdicts("interleaving++", answers(13), 0, 0.25, tasks=tasks(8))]
    assert check(tmp_path, verdicts) >= 4 * 20


def test_another_recipe_is_another_model(tmp_path: Path) -> None:
    """Two strengths of one defence have one label; they are no seeds of each other."""
    def some(bad: int) -> list:
        return [answer(f"q{k}", 5.0 if k < bad else 90.0) for k in range(9)]

    verdicts = [graded_verdicts("base", some(0)), graded_verdicts("none", some(8), settings={"trained": "00aa"}),
                *(graded_verdicts("none +kl", some(bad), seed, settings={"trained": trained})
                  for seed, (bad, trained) in enumerate(((1, "11bb"), (7, "22cc"), (2, "11bb"))))]
    comparison = compare(verdicts, "none", RULE)
    assert [(row.title, row.findings["general"].seeds) for row in comparison.rows] == [
        ("base", 1), ("none", 1), ("none +kl (1)", 2), ("none +kl (2)", 1)]
    assert any("2 rows are labelled 'none +kl'" in text for text in notes(comparison))
    assert check(tmp_path, verdicts) >= 4
    with pytest.raises(UserError, match="'none \\+kl' stands for 2 models"):
        compare(verdicts, "none +kl")


def test_draws_of_one_dose_are_seeds_of_each_other(tmp_path: Path) -> None:
    """The same limit in tokens may be met by another number of rows; the same share may not be another limit."""
    def drawn(bad: int, seed: int, n: int, tokens: int) -> Verdicts:
        one = graded_verdicts("interleaving", [answer(f"q{k}", 5.0 if k < bad else 90.0) for k in range(9)], seed, 0.5)
        how = one.method.model_copy(update={"frac": None, "frac_of": None, "n": n, "tokens": tokens})
        return one.model_copy(update={"method": how, "run": f"{seed} {tokens}"})

    verdicts = [graded_verdicts("base", [answer(f"q{k}", 90.0) for k in range(9)]),
                graded_verdicts("none", [answer(f"q{k}", 5.0) for k in range(9)]),
                drawn(1, 0, 4, 300), drawn(4, 1, 5, 300), drawn(2, 0, 4, 500)]
    comparison = compare(verdicts, "none", RULE)
    assert [(row.title, row.findings["general"].seeds) for row in comparison.rows] == [
        ("base", 1), ("none", 1), ("interleaving 300 tokens", 2), ("interleaving 500 tokens", 1)]
    seeds = queried(tmp_path, verdicts).seeds
    assert sorted(len(values) for (key, criterion, _), values in seeds.items()
                  if criterion == "general" and re.search(r'"tokens":\d', key)) == [1, 2]
