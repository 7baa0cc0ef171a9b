"""Levels, counts and tests whose values can be worked out on paper."""

from __future__ import annotations

import itertools
import math

import pytest

from curate.risk import (
    Cut,
    beta_binomial_tail,
    beta_quantile,
    binomial_tail,
    clopper_pearson,
    cut,
    needed,
    noticed,
    reached,
    sign_p,
)


def test_a_level_is_the_kth_smallest_and_needs_enough_rows() -> None:
    values = [7.0, 3.0, 5.0, 1.0, 9.0, 2.0, 8.0, 4.0, 6.0]
    assert cut(values, 0.3) == Cut(0.3, 3.0, 3, 9)
    assert cut(values, 0.1) == Cut(0.1, 1.0, 1, 9) and cut(values[1:], 0.1) is None and cut([], 0.5) is None
    assert [needed(rate) for rate in (0.01, 0.05, 0.1, 0.3, 0.5)] == [99, 19, 9, 3, 1]
    assert cut([float(k) for k in range(99)], 0.29).k == 29, "0.29 * 100 falls below 29 in floating point"
    for rate in (0.01, 0.05, 0.07, 0.3):
        assert cut([0.0] * needed(rate), rate) is not None and cut([0.0] * (needed(rate) - 1), rate) is None


def test_binomial_and_beta_agree_with_formulas() -> None:
    assert binomial_tail(2, 3, 0.5) == pytest.approx(0.5) and binomial_tail(3, 3, 0.25) == pytest.approx(1 / 64)
    assert [binomial_tail(0, 5, 0.1), binomial_tail(6, 5, 0.9), binomial_tail(1, 5, 0.0), binomial_tail(5, 5, 1.0)] == [
        1.0, 0.0, 0.0, 1.0]
    assert sign_p(12, 13) == pytest.approx(14 / 2**13) and sign_p(0, 4) == 1.0
    for q in (0.025, 0.5, 0.9):
        assert beta_quantile(q, 1, 7) == pytest.approx(1 - (1 - q) ** (1 / 7))
        assert beta_quantile(q, 7, 1) == pytest.approx(q ** (1 / 7))
    assert beta_quantile(0.5, 3, 3) == pytest.approx(0.5)


def test_clopper_and_pearson_at_the_ends() -> None:
    low, high = clopper_pearson(0, 30)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 30))
    low, high = clopper_pearson(30, 30)
    assert low == pytest.approx(0.025 ** (1 / 30)) and high == 1
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    assert clopper_pearson(2, 9)[1] == pytest.approx(Cut(0.3, 0.0, 3, 9).rates()[1]), "2 of 9 lie below the third"


@pytest.mark.parametrize(("n", "m", "k"), [(3, 2, 1), (2, 3, 2), (4, 3, 2)])
def test_the_count_below_a_level_is_that_of_all_orders(n: int, m: int, k: int) -> None:
    """Benign and other rows in random order: count those before the k-th benign one in every order there is."""
    counts = []
    for places in itertools.combinations(range(n + m), n):
        counts.append(places[k - 1] - (k - 1))
    for x in range(m + 2):
        share = sum(count >= x for count in counts) / len(counts)
        assert beta_binomial_tail(x, m, k, n + 1 - k) == pytest.approx(share)


def test_a_large_tail_stays_a_small_number() -> None:
    """The 60 smallest of 2,099 rows all belong to one group of 100."""
    assert beta_binomial_tail(60, 100, 1, 1999) == pytest.approx(math.perm(100, 60) / math.perm(2099, 60), rel=1e-6)


def test_copies_change_what_is_told_of_the_file_and_no_p() -> None:
    """5 of 6 rows below are bad (P(2 of 6) = 30 / (30 29) is below 0.05): those with the fewest copies are 1 each."""
    level, values = Cut(0.04, 0.0, 1, 24), [-1.0] * 6 + [1.0] * 4
    plain, copied = reached(values, level), reached(values, level, copies=[7, 1, 1, 1, 1, 1, 2, 1, 1, 1])
    assert (plain.file_rows, plain.file_below, plain.file_at_least) == (10, 6, 5) == (plain.rows, 6, plain.at_least)
    assert (copied.file_rows, copied.file_below, copied.file_at_least) == (17, 12, 5)
    assert (copied.rows, copied.below, copied.p, copied.at_least) == (10, 6, plain.p, 5)


def test_reached_counts_strictly_and_bounds_the_bad_rows() -> None:
    """One benign row: the count below it is uniform, so P(X >= x) = (m + 1 - x) / (m + 1)."""
    level = Cut(0.5, 0.0, 1, 1)
    found = reached([-1.0] * 39, level)
    assert (found.rows, found.below, found.expected) == (39, 39, 19.5) and found.p == pytest.approx(1 / 40)
    assert found.at_least == 21, "1 / (40 - b) first exceeds 0.05 at b = 21"
    assert reached([0.0, 0.0, -1.0], level).below == 1, "a value at the level is not below it"
    assert reached([-1.0] * 18, level).at_least == 0 and reached([-1.0] * 19, level, 0.9499).at_least == 1
    empty = reached([], level)
    assert (empty.rows, empty.below, empty.p, empty.at_least, empty.excess) == (0, 0, 1.0, 0, 0.0)


def test_excess_is_what_benign_rows_do_not_explain() -> None:
    level = Cut(0.25, 0.0, 1, 3)
    assert reached([-1.0] * 6 + [1.0] * 4, level).excess == pytest.approx((0.6 - 0.25) / 0.75)
    assert reached([-1.0] * 2 + [1.0] * 8, level).excess == 0.0


def test_noticed_is_the_first_surprising_count() -> None:
    level = Cut(0.5, 0.0, 1, 1)
    assert noticed(39, level, 0.0501) == 38 and noticed(39, level, 0.01) == 40
    assert beta_binomial_tail(noticed(50, Cut(0.05, 0.0, 5, 99), 0.05), 50, 5, 95) <= 0.05
    assert beta_binomial_tail(noticed(50, Cut(0.05, 0.0, 5, 99), 0.05) - 1, 50, 5, 95) > 0.05
