"""Attention example by example over packed rows: no mask, and no pair of tokens that must not see each other.

Packed rows lie in one sequence, so all that is done token by token (products, norms) is done on them together. Only
attention has to know who belongs to whom. Where a sequence is long and the examples short, a mask makes it work out
many times the pairs that count; here each example's keys, values and queries are taken out of the sequence and the
library's causal attention is called on them. On a CPU the calls cost next to nothing; on a GPU they would be many small
ones, so there packed rows keep their mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from curate.core.errors import Exit, UserError

NAME = "one_example_at_a_time"

TokenPath = tuple[tuple[tuple[int, int], ...], int]
"""Where an example's tokens stand in the sequence, as (start, end) pieces, and how many of them, at its end, are not
an earlier example's as well. These own parts of all paths, in order, are the whole sequence."""

_paths: list[Sequence[TokenPath]] = []


def apart(model: torch.nn.Module) -> bool:
    """Whether the decoder ``model`` can be told how to attend: it asks the library how, and runs on a CPU."""
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return implementation == "sdpa" and getattr(model, "_supports_attention_backend", False) \
        and next(model.parameters()).device.type == "cpu"


@contextmanager
def along(model: torch.nn.Module, paths: Sequence[TokenPath] | None) -> Iterator[None]:
    """Let every attention of the decoder ``model`` follow ``paths`` inside; None leaves it as it is."""
    if paths is None:
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    _paths.append(paths)
    try:
        yield
    finally:
        _paths.pop()
        model.config._attn_implementation = before


def _attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: torch.Tensor | None, **settings: Any) -> tuple[torch.Tensor, None]:
    """Attend; query, key and value are [1, heads, T, D], the result [1, T, heads, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if settings.get("position_bias") is not None:
        raise UserError("This model adds a bias of its own to its attention.",
                        "It is not supported by the transformers engine; score it with another.", Exit.INCOMPATIBLE)
    out = []
    for pieces, own in _paths[-1]:
        if own:
            parts = [torch.cat([t[:, :, a:b] for a, b in pieces], 2) for t in (query, key, value)]
            found, _ = sdpa_attention_forward(module, *parts, None, **settings | {"is_causal": True})
            out.append(found[:, found.shape[1] - own:])
    return torch.cat(out, 1), None
