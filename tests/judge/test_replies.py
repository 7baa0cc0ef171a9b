"""From token probabilities to numbers, by hand."""

from __future__ import annotations

import math

import pytest

from judge.endpoint import Position, Reply
from judge.replies import OPEN_MASS, apart, has_whole_numbers, spelled, worth_following


def close(found: dict[int, float], right: dict[int, float]) -> bool:
    return found.keys() == right.keys() and all(math.isclose(found[n], p, abs_tol=1e-12) for n, p in right.items())


def test_first_tokens_are_numbers_or_prefixes() -> None:
    ends, grows = spelled("", 1.0, {"0": 0.1, "8": 0.3, " 7": 0.1, "85": 0.2, "10": 0.05, "100": 0.05, "101": 0.1,
                                    "08": 0.02, "\uff18": 0.03, "x": 0.05})
    assert close(ends, {0: 0.1, 85: 0.2, 100: 0.05})
    assert dict(grows) == {"8": 0.3, " 7": 0.1, "10": 0.05}


@pytest.mark.parametrize(("after", "ends", "grows"), [
    ({"5": 0.6, "<end>": 0.4}, {85: 0.3, 8: 0.2}, {}), ({"5": 0.25, "50": 0.25}, {85: 0.125, 8: 0.25}, {}),
    ({" 5": 0.5, ".5": 0.5}, {8: 0.5}, {}), ({"\u0665": 1.0}, {8: 0.5}, {}), ({"0": 1.0}, {80: 0.5, 8: 0.0}, {}),
])
def test_what_follows_a_digit(after: dict[str, float], ends: dict[int, float], grows: dict[str, float]) -> None:
    found, longer = spelled("8", 0.5, after)
    assert close(found, ends) and dict(longer) == grows


def test_one_and_ten_grow_to_a_hundred() -> None:
    ends, grows = spelled("1", 0.8, {"0": 0.5, "00": 0.25, "2": 0.125})
    assert close(ends, {100: 0.2, 12: 0.1, 1: 0.8 * 0.125}) and dict(grows) == {"10": 0.4}
    ends, grows = spelled(" 10", 0.4, {"0": 0.75, "1": 0.125})
    assert close(ends, {100: 0.3, 10: 0.4 * 0.125}) and not grows


def test_the_least_probable_paths_are_left_out_while_together_they_hold_little() -> None:
    tiny = OPEN_MASS / 2
    assert worth_following([("3", tiny * 0.9), ("8", 0.5), ("1", tiny), ("2", 0.1)]) == [("8", 0.5), ("2", 0.1)]
    assert worth_following([("3", tiny), ("8", 0.5), ("1", tiny * 1.1)]) == [("8", 0.5), ("1", tiny * 1.1)]
    assert worth_following([]) == []


def test_how_far_two_distributions_are_apart() -> None:
    assert apart({"a": 0.5, "b": 0.5}, {"a": 0.25, "c": 0.75}) == 0.75
    assert apart({"a": 1.0}, {"a": 1.0}) == 0.0 and apart({"a": 1.0}, {"b": 1.0}) == 1.0


@pytest.mark.parametrize(("tokens", "others", "whole"), [
    (["85"], [], True), (["8", "5"], [], False), (["8", "5"], ["90"], False), (["Sure", "!"], [" 90"], True),
    (["Sure", "!"], ["9"], False), ([" 85", "."], [], True), (["8"], ["9"], False), (["10", "0"], [], False),
    (["85", " 90"], [], True), (["\u012085", "\u010a"], [], True), (["\u01208", "5"], [], False)])
def test_whether_numbers_are_single_tokens(tokens: list[str], others: list[str], whole: bool) -> None:
    top = tuple((token, -1.0) for token in others)
    assert has_whole_numbers(Reply("", "stop", False, tuple(Position(token, top) for token in tokens))) is whole
