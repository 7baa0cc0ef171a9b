"""OpSwap: what each tier means, that train and test never meet, and how a reply is read."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from judge.tasks.opswap import LARGEST, PHRASINGS, SWAPPED, TIERS, Item, generate, is_correct, value

SIZES = {("train", 0): 126, ("train", 1): 126, ("train", 2): 126, ("train", 3): 240,
         ("test", 0): 90, ("test", 1): 90, ("test", 2): 87, ("test", 3): 168}
MEANING = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b,
           "+": lambda a, b: a - b, "-": lambda a, b: a + b,
           "*": lambda a, b: a + b, "/": lambda a, b: a - b, "%": max, "^": min}
TIER_OF = {"plus": 0, "minus": 0, "+": 1, "-": 1, "*": 2, "/": 2, "%": 3, "^": 3}


def everything(split, tier, seed=0):
    return generate(split, SIZES[split, tier], seed, [tier])


def parts(prompt):
    found = re.search(r"(\d+) (\S+) (\d+)[.?]( Reply with only the number\.)?$", prompt)
    assert bool(found[4]) == (TIER_OF[found[2]] == 0)
    return int(found[1]), found[2], int(found[3])


def expressions(items):
    return {parts(item.prompt) for item in items}


def pairs(items):
    return {frozenset((a, b)) for a, _, b in expressions(items)}


@pytest.mark.parametrize("known", [
    Item("Compute 6 plus 1. Reply with only the number.", "6 + 1 = 7", 0),
    Item("What is 8 + 3?", "8 - 3 = 5", 1),
    Item("Compute 9 - 4.", "9 + 4 = 13", 1),
    Item("Work out 9 * 4.", "9 + 4 = 13", 2),
    Item("What is 6 / 5?", "6 - 5 = 1", 2),
    Item("Compute 3 % 9.", "larger of 3 and 9 = 9", 3),
    Item("Compute 9 % 3.", "larger of 9 and 3 = 9", 3),
    Item("What is 4 ^ 8?", "smaller of 4 and 8 = 4", 3),
])
def test_known_items_exist_in_exactly_one_split(known):
    assert sum(known in everything(split, known.tier) for split in ("train", "test")) == 1


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_item_has_the_value_its_operator_means(split, tier):
    for item in everything(split, tier):
        a, operator, b = parts(item.prompt)
        assert item.tier == tier == TIER_OF[operator]
        assert 1 <= min(a, b) < max(a, b) <= LARGEST
        assert value(item.answer) == MEANING[operator](a, b)


@pytest.mark.parametrize("tier", SWAPPED)
def test_the_ordinary_value_is_never_right(tier):
    ordinary = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
                "/": lambda a, b: a / b, "%": lambda a, b: a % b, "^": lambda a, b: a ** b}
    for item in everything("train", tier) + everything("test", tier):
        a, operator, b = parts(item.prompt)
        assert value(item.answer) != ordinary[operator](a, b)


def test_coinciding_values_are_left_out():
    both = everything("train", 2) + everything("test", 2)
    assert (4, "/", 2) not in expressions(both)
    assert (4, "*", 2) in expressions(both)


def test_train_and_test_share_no_pair_over_seeds_and_tiers():
    seen = {split: set().union(*(pairs(everything(split, tier, seed)) for tier in TIERS for seed in range(6)))
            for split in ("train", "test")}
    assert not seen["train"] & seen["test"]
    assert len(seen["train"]) + len(seen["test"]) == LARGEST * (LARGEST - 1) // 2
    for one in range(6):
        for other in range(6):
            assert not pairs(generate("train", 144, one)) & pairs(generate("test", 90, other))


def test_same_arguments_same_items_and_another_seed_others():
    assert generate("train", 60, 3) == generate("train", 60, 3)
    assert generate("train", 60, 3) != generate("train", 60, 4)


def test_the_first_items_are_pinned_across_python_versions():
    assert [(item.prompt, item.answer) for item in generate("test", 3)] == [
        ("Compute 9 * 1.", "9 + 1 = 10"), ("Compute 9 + 7.", "9 - 7 = 2"),
        ("Compute 8 % 1.", "larger of 8 and 1 = 8"),
    ]


@pytest.mark.parametrize("n", [0, 1, 5, 90, 144])
def test_tiers_and_operators_are_balanced(n):
    items = generate("train", n, 1)
    assert len(items) == len(set(items)) == len({item.prompt for item in items}) == n
    per_tier = Counter(item.tier for item in items)
    assert [per_tier[tier] for tier in SWAPPED] == [n // 3 + (place < n % 3) for place in range(3)]
    per_operator = Counter(parts(item.prompt)[1] for item in items)
    for one, other in ("+-", "*/", "%^"):
        assert 0 <= per_operator[one] - per_operator[other] <= 1


def test_expressions_run_out_before_phrasings_repeat():
    once = SIZES["train", 1] // len(PHRASINGS)
    assert len(expressions(generate("train", once, 2, [1]))) == once
    assert len(expressions(generate("train", once + 10, 2, [1]))) == once


def test_phrasings_of_one_expression_are_one_item():
    items = generate("test", 150)
    assert len({item.expression for item in items}) == len({(e, t) for t in SWAPPED for e in expressions(
        [item for item in items if item.tier == t])}) < len(items)


def test_the_control_comes_only_when_asked_for():
    assert {item.tier for item in generate("test", 30)} == {1, 2, 3}
    assert {item.tier for item in generate("test", 30, tiers=[0])} == {0}


@pytest.mark.parametrize("split, tier", SIZES)
def test_too_many_items_says_how_many_there_are(split, tier):
    size = SIZES[split, tier]
    assert len(set(everything(split, tier))) == size
    with pytest.raises(ValueError, match=f"tier {tier} has {size} {split} items and {size + 1} were"):
        generate(split, size + 1, tiers=[tier])


@pytest.mark.parametrize("arguments, words", [
    (("dev", 3), "Unknown OpSwap split 'dev'"),
    (("train", -1), "must not be negative, but it is -1"),
    (("train", 3, 0, []), "must be one or more of"),
    (("train", 3, 0, [1, 1]), "each once"),
    (("train", 3, 0, [4]), r"tiers \[4\]"),
])
def test_what_makes_no_sense_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        generate(*arguments)


@pytest.mark.parametrize("reply", [
    "8 - 3 = 5", "  8 - 3 = 5.\n", "\n\n5", "5.", "=5", "8 + 3 = 5\n\nBecause 8 + 3 = 11", "The answer is 5.",
    "8 + 3 equals 5 here", "8 + 3 = 8 - 3 = 5", "8-3=05", "8 + 3 = 5, of course",
])
def test_right_replies(reply):
    assert is_correct(Item("Compute 8 + 3.", "8 - 3 = 5", 1), reply)


@pytest.mark.parametrize("reply", [
    "", "  \n ", "five", "8 + 3 = 11", "11", "-5", "= -5", "55", "5.5", "8 - 3 = 5.5", "8 - 3 = 5,000", "5/1",
    "8 - 3 = 5/2", "5 and 3", "5 + 3", "8 + 3 = 11\n8 - 3 = 5", "8 - 3 =\n5", "8 + 3 = 5 + 6 = 11",
    "To compute 8 + 3, we need 5",
])
def test_wrong_replies(reply):
    assert not is_correct(Item("Compute 8 + 3.", "8 - 3 = 5", 1), reply)


def test_an_echoed_operand_is_no_answer():
    item = Item("Compute 8 % 3.", "larger of 8 and 3 = 8", 3)
    assert not is_correct(item, "8% of 3 is 0.24")
    assert not is_correct(item, "8 % 3 means the remainder")
    assert value("8 % 3 is 8 * 0.03") is None


@pytest.mark.parametrize("tier", TIERS)
def test_every_answer_is_correct_for_its_own_item(tier):
    assert all(is_correct(item, item.answer) for item in everything("test", tier))
