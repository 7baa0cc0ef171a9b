"""The tree layout: the drawing in ``pack`` as numbers, and a naive check of who sees whom on random trees."""

from __future__ import annotations

import random

import pytest
import torch

from curate.core.chat import Encoded
from curate.core.pack import Packed, pack, plan, shared_prefix

EOT = 9


def encoded(prompt: list[int], answer: list[int], eot: bool = True) -> Encoded:
    return Encoded((*prompt, *answer, *([EOT] if eot else [])), len(prompt), len(prompt) + len(answer))


SHARED, P, Q = [1, 2, 3], [11, 12, 13], [21, 22]
DRAWN = [encoded(SHARED + P, [31, 32, 33]), encoded(SHARED + P, [41, 42]), encoded(SHARED + Q, [51, 52, 53])]
DRAWING = """
    1...............
    11..............
    111.............
    1111............
    11111...........
    111111..........
    1111111.........
    11111111........
    111111111.......
    111111...1......
    111111...11.....
    111........1....
    111........11...
    111........111..
    111........1111.
    111........11111
"""


def random_trees(rng: random.Random, n: int) -> list[Encoded]:
    """Return examples with few prompts, many of them shared or beginning alike, and answers of 1 to 7 tokens."""
    start = [rng.randint(1, 3) for _ in range(rng.randint(0, 4))]
    prompts = [start + [rng.randint(1, 3) for _ in range(rng.randint(1, 5))] for _ in range(max(1, n // 3))]
    return [encoded(rng.choice(prompts), [rng.randint(1, 8) for _ in range(rng.randint(1, 7))], rng.random() < 0.8)
            for _ in range(n)]


def sees(batch: Packed, sequence: int, position: int) -> list[int]:
    if batch.attention_mask is None:
        return list(range(position + 1))
    return [u for u, seen in enumerate(batch.attention_mask[sequence, 0, position].tolist()) if seen]


def check(examples: list[Encoded], batch: Packed) -> None:
    """Assert that every target's row sees its own example's ids before it, in order, and nothing else."""
    width, left = batch.input_ids.shape[1], {(k, t) for k, e in enumerate(examples)
                                             for t in range(e.answer_start, len(e.ids))}
    for row, target, owner, is_eot in zip(batch.rows.tolist(), batch.targets.tolist(), batch.owner.tolist(),
                                          batch.is_eot.tolist()):
        sequence, position = divmod(row, width)
        seen = sorted(sees(batch, sequence, position), key=lambda u: batch.position_ids[sequence, u].item())
        ids = examples[owner].ids
        assert batch.input_ids[sequence, seen].tolist() == list(ids[:len(seen)])
        assert batch.position_ids[sequence, seen].tolist() == list(range(len(seen)))
        assert target == ids[len(seen)] and is_eot == (len(seen) == examples[owner].answer_end)
        left.remove((owner, len(seen)))
    assert not left, "these targets are missing"


def test_the_drawing_in_the_docstring() -> None:
    batch = pack(DRAWN, [[0, 1, 2]])
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 3, 4, 5, 6, 7]]
    assert batch.input_ids.tolist() == [[1, 2, 3, 11, 12, 13, 31, 32, 33, 41, 42, 21, 22, 51, 52, 53]]
    drawn = torch.tensor([[c == "1" for c in line] for line in DRAWING.split()])
    assert torch.equal(batch.attention_mask[0, 0], drawn)
    assert batch.rows.tolist() == [5, 6, 7, 8, 5, 9, 10, 12, 13, 14, 15]
    assert batch.targets.tolist() == [31, 32, 33, EOT, 41, 42, EOT, 51, 52, 53, EOT]
    assert batch.owner.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert batch.is_eot.tolist() == [False, False, False, True, False, False, True, False, False, False, True]
    assert batch.real.all() and len(plan(DRAWN, 16)) == 1 and len(plan(DRAWN, 15)) == 2


@pytest.mark.parametrize("seed", range(7))
def test_random_trees_see_their_own_past_only(seed: int) -> None:
    rng = random.Random(seed)
    examples = random_trees(rng, rng.randint(1, 23))
    batch = pack(examples, plan(examples, rng.choice([1, 13, 37, 1000])))
    check(examples, batch)
    for s, real in enumerate(batch.real.tolist()):
        for t in range(len(real)):
            seen = sees(batch, s, t)
            assert t in seen and max(seen) == t, "a token sees itself and nothing after it"
            assert all(real[u] for u in seen) or not real[t], "no token sees padding"
            assert all(set(sees(batch, s, u)) <= set(seen) for u in seen), "what a token sees, sees nothing more"
            if real[t]:
                assert sorted(batch.position_ids[s, seen].tolist()) == list(range(batch.position_ids[s, t] + 1))


@pytest.mark.parametrize("seed", range(7))
def test_a_token_has_before_it_in_its_path_what_the_mask_lets_it_see(seed: int) -> None:
    rng = random.Random(seed)
    examples = random_trees(rng, rng.randint(2, 23))
    everything = [list(range(len(examples)))]
    masked, along = pack(examples, everything), pack(examples, everything, along_paths=True)
    assert along.attention_mask is None and torch.equal(along.input_ids, masked.input_ids)
    assert torch.equal(along.position_ids, masked.position_ids) and torch.equal(along.rows, masked.rows)
    order = []
    for pieces, own in along.paths:
        path = [t for start, end in pieces for t in range(start, end)]
        assert all(end > start for start, end in pieces) and 0 <= own <= len(path)
        for k in range(len(path) - own, len(path)):
            assert sorted(path[:k + 1]) == sees(masked, 0, path[k])
        order += path[len(path) - own:]
    assert order == list(range(masked.input_ids.shape[1]))


def test_paths_are_for_one_sequence_of_several_examples() -> None:
    for bins in ([[0], [1], [2]], [[0, 1], [2]], [[0]]):
        assert pack(DRAWN, bins, along_paths=True).paths is None
    assert pack(DRAWN, [[0, 1, 2]], along_paths=True).paths == [
        (((0, 9),), 9), (((0, 6), (9, 11)), 2), (((0, 3), (11, 16)), 5)]


def test_a_prompt_with_two_answers_is_stored_once() -> None:
    prompt = list(range(11, 28))
    examples = [encoded(prompt, [1, 2]), encoded(prompt, [3]), encoded(prompt, [1, 2])]
    batch = pack(examples, plan(examples, 1000))
    assert int(batch.real.sum()) == len(prompt) + 2 + 1 + 2
    assert batch.rows.tolist().count(len(prompt) - 1) == 3
    check(examples, batch)


def test_every_example_is_planned_once_and_fits_or_stands_alone() -> None:
    rng = random.Random(7)
    examples = [*random_trees(rng, 101), *(encoded([7, 7, 8], [k % 8 + 1] * 11) for k in range(23))]
    for capacity in (1, 16, 17, 61, 10_000):
        bins = plan(examples, capacity)
        assert sorted(i for one in bins for i in one) == list(range(len(examples)))
        longest = max(len(e.ids) for e in examples)
        widths = [int(pack(examples, [one]).real.sum()) for one in bins]
        assert all(w <= max(capacity, longest) for w in widths)
        assert all(len(one) == 1 for one, w in zip(bins, widths, strict=True) if w > capacity)
        assert plan(examples, capacity) == bins
    assert len(plan(examples, 10_000)) == 1 and plan([], 61) == []


def test_longer_than_the_capacity_gets_a_sequence_of_its_own() -> None:
    examples = [encoded([1, 2], [3]), encoded([1, 4], [5] * 40), encoded([1, 6], [7])]
    bins = plan(examples, 13)
    assert bins == [[1], [0, 2]]
    check(examples, pack(examples, bins))


def test_what_all_share_leaves_each_prompt_a_token_of_its_own() -> None:
    same = [encoded([1, 2, 3], [4]), encoded([1, 2, 3], [5])]
    assert shared_prefix(same) == 2
    assert shared_prefix([*same, encoded([1, 2], [3])]) == 1
    assert shared_prefix([*same, encoded([1], [2])]) == shared_prefix([]) == 0
    assert shared_prefix([*same, encoded([9, 2, 3], [4])]) == 0
    nested = [*same, encoded([1, 2], [3, 4]), encoded([1], [2, 3, 4])]
    check(nested, pack(nested, [[0, 1, 2, 3]]))


def test_end_of_turn_can_be_left_out_and_may_be_missing() -> None:
    batch = pack(DRAWN, [[0, 1, 2]], eot=False)
    assert batch.targets.tolist() == [31, 32, 33, 41, 42, 51, 52, 53] and not batch.is_eot.any()
    assert batch.input_ids.tolist() == [[1, 2, 3, 11, 12, 13, 31, 32, 41, 21, 22, 51, 52]]
    bare = [encoded([1, 2], [3, 4], eot=False)]
    check(bare, pack(bare, [[0]]))


def test_sequences_of_one_example_need_no_mask() -> None:
    batch = pack(DRAWN, [[2], [1], [0]], pad=77).to("cpu")
    assert batch.attention_mask is None and batch.position_ids.tolist() == [list(range(9))] * 3
    assert batch.input_ids[0].tolist() == [1, 2, 3, 21, 22, 51, 52, 53, 77]
    assert batch.real.tolist() == [[True] * 8 + [False]] * 2 + [[True] * 9]
    check(DRAWN, batch)


def test_padding_fills_the_shorter_sequence_and_moves_along() -> None:
    batch = pack(DRAWN, [[0, 1], [2]], pad=77).to("cpu")
    assert batch.input_ids.shape == (2, 11) and batch.attention_mask.shape == (2, 1, 11, 11)
    assert batch.input_ids[1].tolist() == [1, 2, 3, 21, 22, 51, 52, 53, 77, 77, 77]
    assert batch.real[1].tolist() == [True] * 8 + [False] * 3
    check(DRAWN, batch)
