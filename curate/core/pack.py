"""Examples laid out as a tree, so that what they share is computed once and nothing is padded between them.

Every example is a path: the ids that *all* share (a default system prompt) - its prompt - its answer. One packed
sequence holds the shared ids, then prompts, each followed by the answers to it:

    position   0 1 2 | 3 4 5 | 6 7 8 | 6 7 | 3 4 | 5 6 7
    token      s s s | p p p | a a a | b b | q q | c c c
    prompt     0 0 0 | 1 1 1 | 1 1 1 | 1 1 | 2 2 | 2 2 2        a token sees earlier tokens whose prompt is 0 or its
    answer     0 0 0 | 0 0 0 | 1 1 1 | 2 2 | 0 0 | 3 3 3        own, and whose answer is 0 or its own

This equals computing each example alone, up to rounding. Where every sequence holds a single example there is no mask:
attention is plainly causal, which has the faster kernels, and the model masks what lies outside its window itself. One
sequence of many examples can do without, too, if attention follows their paths (``curate/core/attend.py``).
A target's logits come from the token before it, so the last prompt token serves the first token of each of its answers,
and an answer's last token is never an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from curate.core.attend import TokenPath
from curate.core.chat import Encoded


@dataclass
class Packed:
    """S packed sequences of T positions with N targets.

    ``input_ids``, ``position_ids``: int64 [S, T]. ``attention_mask``: bool [S, 1, T, T], True where attended, or None:
    each token attends all before it, padding to the right included, or along ``paths`` where there are any.
    ``rows``: int64 [N], flat index ``s * T + t`` of the hidden state that predicts a target. ``targets``: int64 [N].
    ``owner``: int64 [N], index of the target's example. ``is_eot``: bool [N]. ``real``: bool [S, T], False on padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    rows: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    is_eot: torch.Tensor
    real: torch.Tensor
    paths: Sequence[TokenPath] | None = None

    def to(self, device: torch.device | str) -> Packed:
        """Return the same batch on ``device``."""
        return Packed(**{name: value.to(device) if isinstance(value, torch.Tensor) else value
                         for name, value in vars(self).items()})


@dataclass
class _Sequence:
    """One packed sequence while it is filled."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int, bool]] = field(default_factory=list)
    """(position of the predicting token, target id, owner, is end of turn)"""
    paths: list[TokenPath] = field(default_factory=list)

    def add(self, ids: Sequence[int], start: int, prompt: int, answer: int) -> int:
        """Append tokens that stand at positions ``start``, ...; return the index of the last one."""
        self.ids += ids
        self.positions += range(start, start + len(ids))
        self.prompts += [prompt] * len(ids)
        self.answers += [answer] * len(ids)
        return len(self.ids) - 1


def plan(encoded: Sequence[Encoded], capacity: int) -> list[list[int]]:
    """Distribute examples over packed sequences of about ``capacity`` tokens, longest first.

    Returns lists of example indices; those with the same prompt stay together as far as they fit. An example longer
    than ``capacity`` gets a sequence of its own. The result depends only on the examples and ``capacity``.
    """
    shared = shared_prefix(encoded)
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(encoded):
        groups.setdefault(item.ids[:item.answer_start], []).append(index)
    parts = [(size, key, part) for key, members in groups.items()
             for size, part in _parts(encoded, members, len(key) - shared, capacity - shared)]
    bins: list[list[int]] = []
    room: list[int] = []
    for size, _, members in sorted(parts, key=lambda p: (-p[0], p[1])):
        place = next((n for n, left in enumerate(room) if left >= size), None)
        if place is None:
            bins.append([])
            room.append(capacity - shared)
            place = len(bins) - 1
        bins[place] += members
        room[place] -= size
    return bins


def _parts(encoded: Sequence[Encoded], members: Sequence[int], n_prompt: int,
           capacity: int) -> list[tuple[int, list[int]]]:
    """Cut the answers to one prompt of ``n_prompt`` tokens into runs that fit; return their sizes and indices."""
    parts: list[tuple[int, list[int]]] = []
    for index in members:
        more = len(encoded[index].ids) - encoded[index].answer_start - 1
        if not parts or parts[-1][0] + more > capacity:
            parts.append((n_prompt, []))
        size, part = parts[-1]
        parts[-1] = (size + more, [*part, index])
    return parts


def shared_prefix(encoded: Sequence[Encoded]) -> int:
    """Return how many leading prompt ids all examples share, leaving each prompt at least one id of its own."""
    if not encoded:
        return 0
    length = min(item.answer_start for item in encoded) - 1
    first = encoded[0].ids
    for item in encoded:
        while length > 0 and item.ids[:length] != first[:length]:
            length -= 1
    return max(length, 0)


def pack(encoded: Sequence[Encoded], bins: Sequence[Sequence[int]], pad: int = 0, eot: bool = True,
         device: torch.device | str = "cpu", along_paths: bool = False) -> Packed:
    """Build the tensors for the sequences planned in ``bins`` (lists of indices into ``encoded``).

    With ``eot`` False the end-of-turn tokens are no targets; with ``along_paths`` a single sequence has paths instead
    of a mask. What has a number for each position is made on ``device``, because the mask is large to make and to
    move; the rest stays here.
    """
    members = [encoded[i] for one in bins for i in one]
    shared = shared_prefix(members)
    sequences = [_filled(encoded, one, shared, eot) for one in bins]
    width = max(len(s.ids) for s in sequences)

    def grid(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([getattr(s, name) + [fill] * (width - len(s.ids)) for s in sequences]).to(device)

    prompts, answers = grid("prompts", -1), grid("answers", -1)
    paths = None
    if all(len(one) == 1 for one in bins):
        positions, mask = torch.arange(width, device=device).expand(len(bins), width), None
    elif along_paths and len(bins) == 1:
        positions, mask, paths = grid("positions", 0), None, sequences[0].paths
    else:
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        same_prompt = (prompts[:, :, None] == prompts[:, None, :]) | (prompts[:, None, :] == 0)
        same_answer = (answers[:, :, None] == answers[:, None, :]) | (answers[:, None, :] == 0)
        positions, mask = grid("positions", 0), (causal & same_prompt & same_answer)[:, None]
    targets = [(s * width + t, target, owner, is_eot)
               for s, one in enumerate(sequences) for t, target, owner, is_eot in one.targets]
    rows, ids, owner, is_eot = zip(*targets, strict=True)
    return Packed(grid("ids", pad), positions, mask, torch.tensor(rows), torch.tensor(ids), torch.tensor(owner),
                  torch.tensor(is_eot), prompts >= 0, paths)


def _filled(encoded: Sequence[Encoded], members: Sequence[int], shared: int, eot: bool) -> _Sequence:
    out = _Sequence()
    out.add(encoded[members[0]].ids[:shared], 0, 0, 0)
    prompts: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for number, index in enumerate(members, 1):
        item = encoded[index]
        key, own = item.ids[:item.answer_start], len(out.ids) if out.paths else 0
        if key not in prompts:
            node = len(prompts) + 1
            prompts[key] = (node, len(out.ids), out.add(key[shared:], shared, node, 0))
        node, first, before = prompts[key]
        last = len(item.ids) if eot else item.answer_end
        begin = len(out.ids)
        end = out.add(item.ids[item.answer_start:last - 1], item.answer_start, node, number) + 1
        out.paths.append((_joined((0, shared), (first, before + 1), (begin, end)), end - own))
        for offset, target in enumerate(item.ids[item.answer_start:last]):
            row = before if offset == 0 else begin + offset - 1
            out.targets.append((row, target, index, offset + item.answer_start == item.answer_end))
    return out


def _joined(*pieces: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return pieces without empty ones, those that follow each other as one."""
    out: list[tuple[int, int]] = []
    for start, end in pieces:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], end)
        elif end > start:
            out.append((start, end))
    return tuple(out)
