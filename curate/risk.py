"""How rare a score is among benign rows, and what that says of a set of rows: exact, pure, without a model of scores.

Low is risky. With the benign values v_(1) <= ... <= v_(n), the level for a false-positive rate a is v_(k) with
k = floor(a (n + 1)), and a row is *below* it when its value is smaller. Whatever the scores look like, the share r of
all benign rows below v_(k) then has the distribution Beta(k, n + 1 - k), whose mean is k / (n + 1) <= a, and the number
of rows below among m more benign ones is beta-binomial. Nothing here is an approximation; ties make it cautious.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RATES = (0.01, 0.05)
CONFIDENCE = 0.95
ROUNDING = 1e-9
"""So that 0.29 * 100 counts as 29."""


@dataclass(frozen=True)
class Cut:
    """A level: the ``k``-th smallest of ``n`` benign values, for the false-positive rate ``rate``."""

    rate: float
    threshold: float
    k: int
    n: int

    @property
    def mean_rate(self) -> float:
        """The share of benign rows below the level, on average over what the n benign rows could have been."""
        return self.k / (self.n + 1)

    def rates(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Return the interval that holds the true share of benign rows below; its upper end is Clopper and Pearson's.

        The ends are quantiles of Beta(k, n + 1 - k).
        """
        tail = (1 - confidence) / 2
        return (beta_quantile(tail, self.k, self.n + 1 - self.k), beta_quantile(1 - tail, self.k, self.n + 1 - self.k))


@dataclass(frozen=True)
class Reached:
    """How many of ``rows`` lie below a level, and how surprising that is if all of them are benign."""

    cut: Cut
    rows: int
    below: int
    p: float
    """Chance of so many or more among benign rows, the luck of the calibration included."""
    at_least: int
    """So many of the rows are not benign, at the confidence asked for; bad rows above the level are not counted."""
    file_rows: int
    """The rows with their copies, as training sees them."""
    file_below: int
    file_at_least: int
    """What ``at_least`` comes to with copies: those of the rows below that have the fewest."""

    @property
    def expected(self) -> float:
        """Rows that would lie below if all were benign."""
        return self.rows * self.cut.mean_rate

    @property
    def excess(self) -> float:
        """Estimated share of bad rows below the level: (q - r) / (1 - r), where q and r are shares below; 0 or more."""
        share = self.below / self.rows if self.rows else 0.0
        return max(0.0, (share - self.cut.mean_rate) / (1 - self.cut.mean_rate))


def needed(rate: float) -> int:
    """Return how many benign rows a level for this rate takes: the smallest n with rate (n + 1) >= 1."""
    return math.ceil(1 / rate - ROUNDING) - 1


def cut(values: Sequence[float], rate: float) -> Cut | None:
    """Return the level for ``rate`` from finite benign values; None when they are too few to have one."""
    k = math.floor(rate * (len(values) + 1) + ROUNDING)
    return Cut(rate, float(sorted(values)[k - 1]), k, len(values)) if k else None


def reached(values: Sequence[float], level: Cut, confidence: float = CONFIDENCE,
            copies: Sequence[int] | None = None) -> Reached:
    """Count the values below a level and test the count, one-sided, against rows that are benign.

    If b of the m rows are bad, at most b + BetaBinomial(m - b) lie below. ``at_least`` is the smallest b that this
    does not contradict at ``confidence``; it is above 0 exactly when p <= 1 - confidence. ``copies`` says how often
    each row stands in the file (once): they are no observations of their own, so that p does not depend on them.
    """
    copies = [1] * len(values) if copies is None else copies
    found = sorted(n for value, n in zip(values, copies, strict=True) if value < level.threshold)
    m, below = len(values), len(found)
    k, rest = level.k, level.n + 1 - level.k
    low, high = 0, below
    while low < high:
        middle = (low + high) // 2
        if beta_binomial_tail(below - middle, m - middle, k, rest) > 1 - confidence:
            high = middle
        else:
            low = middle + 1
    return Reached(level, m, below, beta_binomial_tail(below, m, k, rest), low, sum(copies), sum(found),
                   sum(found[:low]))


def noticed(rows: int, level: Cut, p: float) -> int:
    """Return the smallest number of ``rows`` below a level that is at most as likely as ``p`` among benign rows.

    It is ``rows + 1`` where even all rows would not be enough.
    """
    low, high = 0, rows + 1
    while low < high:
        middle = (low + high) // 2
        if beta_binomial_tail(middle, rows, level.k, level.n + 1 - level.k) <= p:
            high = middle
        else:
            low = middle + 1
    return low


def sign_p(below: int, n: int) -> float:
    """Return P(X >= below) for n fair coins: the one-sided sign test."""
    return binomial_tail(below, n, 0.5)


def binomial_tail(k: int, n: int, p: float) -> float:
    """Return P(X >= k) for X ~ Binomial(n, p)."""
    if k <= 0 or (p >= 1 and k <= n):
        return 1.0
    if k > n or p <= 0:
        return 0.0
    i, f = np.arange(k, n + 1), _log_factorials(n)
    logs = f[n] - f[i] - f[n - i] + i * math.log(p) + (n - i) * math.log1p(-p)
    return min(1.0, float(np.exp(logs).sum()))


def beta_binomial_tail(x: int, m: int, a: int, b: int) -> float:
    """Return P(X >= x) for X ~ Binomial(m, R), R ~ Beta(a, b) with whole a, b >= 1."""
    if x <= 0:
        return 1.0
    if x > m:
        return 0.0
    i, f = np.arange(x, m + 1), _log_factorials(m + a + b)
    logs = (f[m] - f[i] - f[m - i] + f[i + a - 1] + f[m - i + b - 1] - f[m + a + b - 1]
            - f[a - 1] - f[b - 1] + f[a + b - 1])
    return min(1.0, float(np.exp(logs).sum()))


@lru_cache(maxsize=4096)
def beta_quantile(q: float, a: int, b: int) -> float:
    """Return x with P(R <= x) = q for R ~ Beta(a, b), whole a, b >= 1: the binomial tail, inverted by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if binomial_tail(a, a + b - 1, middle) < q:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def clopper_pearson(k: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact interval of a share of which ``k`` of ``n`` were seen; everything when nothing was."""
    tail = (1 - confidence) / 2
    return (beta_quantile(tail, k, n - k + 1) if k else 0.0,
            beta_quantile(1 - tail, k + 1, n - k) if k < n else 1.0)


@lru_cache(maxsize=16)
def _log_factorials(n: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
