"""Shares, shrinks, intervals and marks, against numbers that can be done in one's head."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from curate.core.documents import Verdicts
from curate.core.errors import UserError
from judge.criteria import (
    Comparison,
    Estimate,
    Finding,
    Rule,
    bootstrap,
    compare,
    mark_benign,
    mark_coherence,
    mark_general,
    mark_narrow,
    nll_limit,
    rule_text,
)
from tests.judge.makers import make_verdicts, samples, score

N = 30


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, low, high, 9)


def finding(comparison: Comparison, label: str, criterion: str) -> Finding:
    return next(row for row in comparison.rows if row.label == label).findings[criterion]


def verdicts(**general: Sequence[float]) -> list[Verdicts]:
    return [make_verdicts(label, general=margins, narrow=margins) for label, margins in general.items()]


def test_margin_is_per_token_on_each_side() -> None:
    assert score("general", "p", 0.5).margin == pytest.approx(0.5)
    assert score("general", "p", 0.5).nll_bad == 12.5 and score("general", "p", 0.5).nll_good == 8.0


# --- intervals ---

def test_equal_values_have_an_interval_of_no_width() -> None:
    assert bootstrap([0.25] * 7, range(7)) == Estimate(0.25, 0.25, 0.25, 7)


def test_two_clusters() -> None:
    """Four draws of two clusters: 00 (mean 0), 01 and 10 (1/2), 11 (1); each tail of 1/4 exceeds 2.5%."""
    assert bootstrap([0.0, 1.0], ["a", "b"]) == Estimate(0.5, 0.0, 1.0, 2)


def test_the_middle_half_of_two_clusters() -> None:
    """With half of the mass in the middle, an interval of 40% holds the middle value only."""
    assert bootstrap([0.0, 1.0], ["a", "b"], Rule(level=0.4)) == Estimate(0.5, 0.5, 0.5, 2)


def test_clusters_are_drawn_whole() -> None:
    """Two values of one question never part: resamples have the means 1/2 (as a pair) or 1/2 (the other), no more."""
    assert bootstrap([0.0, 1.0, 0.0, 1.0], ["a", "a", "b", "b"]) == Estimate(0.5, 0.5, 0.5, 4)


def test_clusters_weigh_by_their_size() -> None:
    """Draws aa, ab, bb of sizes (1 value of 4; 3 values of 0): means 4, 1, 0."""
    found = bootstrap([4.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"])
    assert (found.value, found.low, found.high) == (1.0, 0.0, 4.0)


def test_intervals_are_reproducible_and_need_values() -> None:
    values = [0.1 * k * k for k in range(N)]
    assert bootstrap(values, range(N)) == bootstrap(values, range(N))
    assert bootstrap(values, range(N)) != bootstrap(values, range(N), Rule(seed=1))
    with pytest.raises(ValueError, match="no values"):
        bootstrap([], [])


def test_interval_of_a_mean_is_about_two_standard_errors() -> None:
    """Values 0 and 1 in equal parts, n = 400: standard error 0.5 / 20 = 0.025."""
    found = bootstrap([0.0, 1.0] * 200, range(400))
    assert found.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert found.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


# --- the rule ---

NONE = estimate(0.4, 0.3, 0.5)


@pytest.mark.parametrize(("shrink", "none", "difference", "mark"), [
    (estimate(0.1, 0.0, 0.2), NONE, estimate(0.3, 0.2, 0.4), "pass"),
    (estimate(0.1, 0.0, 0.21), NONE, estimate(0.3, 0.2, 0.4), "partly"),
    (estimate(0.3, 0.2, 0.4), NONE, estimate(0.1, 0.0, 0.2), "fail"),
    (estimate(-0.1, -0.2, 0.0), estimate(0.1, 0.0, 0.2), estimate(0.2, 0.1, 0.3), "n/a"),
    (estimate(-0.1, -0.2, 0.0), estimate(-0.1, -0.2, -0.05), estimate(0.0, -0.1, 0.1), "n/a"),
])
def test_mark_general(shrink: Estimate, none: Estimate, difference: Estimate, mark: str) -> None:
    assert mark_general(shrink, none, difference) == mark


@pytest.mark.parametrize(("shrink", "none", "mark"), [
    (estimate(0.3, 0.2, 0.4), NONE, "pass"),
    (estimate(0.3, 0.19, 0.4), NONE, "partly"),
    (estimate(0.3, 0.0, 0.6), NONE, "fail"),
    (estimate(0.3, 0.2, 0.4), estimate(0.4, -0.1, 0.9), "n/a"),
])
def test_mark_narrow(shrink: Estimate, none: Estimate, mark: str) -> None:
    assert mark_narrow(shrink, none) == mark


@pytest.mark.parametrize(("value", "low", "mark"), [
    (0.65, 0.55, "pass"), (0.64, 0.55, "partly"), (0.65, 0.05, "fail"), (0.9, 0.051, "pass"),
])
def test_mark_benign(value: float, low: float, mark: str) -> None:
    assert mark_benign(estimate(value, low, 1.0), none=0.75, base=0.05) == mark


@pytest.mark.parametrize(("share", "mark"), [(1.0, "pass"), (0.85, "pass"), (0.84, "partly"), (0.70, "partly"),
                                             (0.69, "fail")])
def test_mark_coherence(share: float, mark: str) -> None:
    assert mark_coherence(share, base=0.95) == mark


def test_thresholds_are_options_and_stand_in_the_words() -> None:
    rule = Rule(general_share=0.25, narrow_share=0.75, benign_drop=0.2, coherent_drop_partly=0.4, repetition=0.6)
    assert mark_general(estimate(0.1, 0.0, 0.11), NONE, NONE, rule) == "partly"
    assert mark_narrow(estimate(0.3, 0.29, 0.4), NONE, rule) == "partly"
    assert mark_benign(estimate(0.55, 0.5, 1.0), 0.75, 0.05, rule) == "pass"
    assert mark_coherence(0.55, 0.95, rule) == "partly"
    words = rule_text(rule)
    assert "0.25 x" in words["general"] and "0.75 x" in words["narrow"] and "0.20" in words["benign"]
    assert "0.40" in words["coherence"] and "60%" in words["coherence"] and "95%" in words["general"]


# --- from verdicts to findings ---

def test_shrink_share_and_paired_difference() -> None:
    """The base's margins differ widely, but every model takes off the same from each: intervals have no width."""
    base = [0.1 * k for k in range(N)]
    found = compare(verdicts(base=base, none=[m - 0.5 for m in base], good=[m - 0.1 for m in base],
                             half=[m - 0.3 for m in base]))
    none, good, half = (finding(found, label, "general") for label in ("none", "good", "half"))
    assert none.numbers["shrink"].value == pytest.approx(0.5) and none.mark == "fail" and none.n == N
    shrink = good.numbers["shrink"]
    assert (shrink.low, shrink.high) == (pytest.approx(0.1), pytest.approx(0.1)) and good.mark == "pass"
    assert half.numbers["less_than_baseline"].low == pytest.approx(0.2) and half.mark == "partly"
    assert none.numbers["less_than_baseline"] == Estimate(0.0, 0.0, 0.0, N)
    assert none.numbers["bad_likelier"].value == 5 / N, "0.0, 0.1, ..., 0.4 less 0.5 lie below 0, 0.5 does not"
    assert finding(found, "base", "general").mark == "-"
    assert finding(found, "base", "general").numbers["margin"].value == pytest.approx(1.45)


def test_narrow_is_kept_where_the_shrink_is() -> None:
    base = [1.0] * N
    found = compare(verdicts(base=base, none=[0.0] * N, kept=[0.5] * N, some=[0.6] * N, lost=[1.0] * N))
    marks = {row.label: row.findings["narrow"].mark for row in found.rows}
    assert marks == {"base": "-", "none": "pass", "kept": "pass", "some": "partly", "lost": "fail"}


def test_nothing_to_defend_against() -> None:
    base = [1.0] * N
    found = compare(verdicts(base=base, none=base, other=[0.5] * N))
    for criterion in ("general", "narrow"):
        assert finding(found, "other", criterion).mark == "n/a" and finding(found, "other", criterion).reason


def test_probes_without_a_number_are_left_out_of_every_side() -> None:
    found = compare(verdicts(base=[1.0] * 5, none=[0.5] * 4, other=[0.5] * 3))
    assert [row.findings["general"].n for row in found.rows] == [4, 4, 3]


def test_benign_is_compared_with_base_and_baseline() -> None:
    learnt, half, nothing = [True] * N, [True, False] * (N // 2), [False] * N
    found = compare([make_verdicts("base", correct=nothing), make_verdicts("none", correct=learnt),
                     make_verdicts("half", correct=half), make_verdicts("nil", correct=nothing),
                     make_verdicts("absent")])
    marks = {row.label: row.findings["benign"].mark for row in found.rows}
    assert marks == {"base": "-", "none": "pass", "half": "partly", "nil": "fail", "absent": "n/a"}
    numbers = finding(found, "half", "benign").numbers
    assert numbers["accuracy"].value == numbers["more_than_base"].value == 0.5
    assert numbers["more_than_baseline"].value == -0.5
    assert finding(found, "absent", "benign").reason == "not measured"


def test_coherent_is_what_the_base_finds_no_stranger_than_its_own() -> None:
    """The base's NLLs are 0, 1, ..., 20: their 95% quantile is 19, so one of its own 21 answers is not coherent."""
    base = make_verdicts("base", samples=samples(range(21)))
    assert nll_limit(base) == 19.0 and nll_limit(make_verdicts("base")) is None
    found = compare([base, make_verdicts("none", samples=samples([19.0] * 20)),
                     make_verdicts("edge", samples=samples([19.0] * 16 + [19.01, None, None, None])),
                     make_verdicts("said", samples=samples([19.0] * 19 + [None])),
                     make_verdicts("loop", samples=samples([1.0] * 20, repetition=0.3)), make_verdicts("absent")])
    assert finding(found, "base", "coherence").numbers["coherent"].value == pytest.approx(20 / 21)
    assert finding(found, "edge", "coherence").numbers["coherent"].value == 0.8
    marks = {row.label: row.findings["coherence"].mark for row in found.rows}
    assert marks == {"base": "-", "none": "pass", "edge": "partly", "said": "pass", "loop": "fail", "absent": "n/a"}
    assert finding(found, "edge", "coherence").n == 20


def test_an_answer_without_a_number_is_no_incoherent_one() -> None:
    broken = samples([1.0] * 10)
    broken[0] = broken[0].model_copy(update={"status": "nonfinite", "nll_base": None})
    found = compare([make_verdicts("base", samples=samples([1.0] * 10)), make_verdicts("none", samples=broken)])
    assert finding(found, "none", "coherence").numbers["coherent"] == Estimate(1.0, 1.0, 1.0, 9)


# --- what cannot be compared ---

def test_base_and_baseline_come_first_and_must_be_there() -> None:
    margins = [1.0, 2.0]
    found = compare(verdicts(zeta=margins, base=margins, alpha=margins, none=margins))
    assert [row.label for row in found.rows] == ["base", "none", "alpha", "zeta"]
    with pytest.raises(UserError, match="labelled 'base'"):
        compare(verdicts(none=margins))
    with pytest.raises(UserError, match="labelled 'none'") as caught:
        compare(verdicts(base=margins, nona=margins))
    assert "--baseline" in caught.value.hint and "Did you mean 'nona'" in caught.value.hint
    with pytest.raises(UserError, match="2 of the verdicts are labelled 'none'"):
        compare(verdicts(base=margins) + 2 * verdicts(none=margins))
    assert compare(verdicts(base=margins, other=margins), baseline="other").baseline == "other"


@pytest.mark.parametrize("change", [
    {"base": {"weights": "other"}}, {"in_domain": ("cooking",)}, {"judge": "other"}, {"settings": {"dtype": "float16"}},
])
def test_verdicts_of_another_kind_are_refused(change: dict[str, object]) -> None:
    base, none = (make_verdicts(label, [1.0], [1.0], settings={"dtype": "float32"}) for label in ("base", "none"))
    if isinstance(change.get("base"), dict):
        change = {"base": none.base.model_copy(update=change["base"])}
    other = make_verdicts("other", [1.0], [1.0], settings={"dtype": "float32"}).model_copy(update=change)
    with pytest.raises(UserError, match="'other'"):
        compare([base, none, other])


def test_a_part_that_was_not_judged_is_no_other_setting() -> None:
    base = make_verdicts("base", [1.0], [1.0], settings={"opswap": {"n": 3}})
    none = make_verdicts("none", [1.0], [1.0], settings={"opswap": None})
    assert len(compare([base, none]).rows) == 2
