"""Answers sampled from a model, each from a stream of random numbers of its own.

What a prompt is answered with depends on the prompt, the seed and how often the prompt came before, but not on the
other prompts, their order, the batch size or earlier use of a generator (up to rounding in the model).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from curate.core.chat import encode
from curate.core.decoder import causal_lm, is_out_of_memory
from curate.core.errors import Exit, UserError
from curate.core.example import pair
from curate.core.files import canonical_json, sha256
from curate.core.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTLIST = 1024
"""A nucleus is looked for among so many tokens before the whole vocabulary is sorted."""


@dataclass(frozen=True)
class SampleSettings:
    """How answers are sampled. ``temperature`` 0 takes the likeliest token; ``top_p`` is the nucleus' probability."""

    max_new_tokens: int = 48
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Raise ``UserError`` for values outside their range."""
        if self.temperature < 0 or not 0 < self.top_p <= 1 or min(self.max_new_tokens, self.batch_size) < 1:
            raise UserError(f"Sampling cannot run with {self}.", "Temperature must be at least 0, top-p above 0 and at "
                            "most 1, the numbers of tokens and rows at least 1.")


def sample(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]],
           settings: SampleSettings = SampleSettings(),
           advance: Callable[[int], None] = lambda rows: None) -> list[str]:
    """Return an answer to each of ``prompts`` (token ids, see ``chat.encode_prompt``), without its end of turn.

    ``model`` may be wrapped by an adapter. Longest prompts first, so that memory runs out at once if at all: then the
    batch halves and says so, down to one row, before a ``UserError`` (environment). ``advance`` hears of finished rows.
    """
    stops = stop_ids(model, tokenizer)
    draws = _draws(prompts, settings)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i]), i))
    queue = [order[k:k + settings.batch_size] for k in range(0, len(order), settings.batch_size)]
    answers = [""] * len(prompts)
    while queue:
        rows = queue.pop(0)
        try:
            new = _generate(model, [prompts[i] for i in rows], draws[rows], settings, stops)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as err:
            if not is_out_of_memory(err):
                raise
            if len(rows) == 1:
                raise UserError(f"Out of memory on a single prompt of {len(prompts[rows[0]])} tokens.",
                                "Use a machine with more memory, or a smaller model.", Exit.ENVIRONMENT) from err
            say(f"out of memory: going on with half a batch ({len(rows)} answers before)")
            queue = [rows[:len(rows) // 2], rows[len(rows) // 2:], *queue]
            continue
        for i, ids in zip(rows, new, strict=True):
            answers[i] = decoded(tokenizer, ids, stops)
        advance(len(rows))
    return answers


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int]) -> str:
    """Return the text of an answer's ids up to the first of ``stops``."""
    end = next((k for k, token in enumerate(ids) if token in stops), len(ids))
    return tokenizer.decode(list(ids[:end]), skip_special_tokens=True)


def stop_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer of a model; see ``end_ids``."""
    own = causal_lm(model).generation_config.eos_token_id
    return end_ids(tokenizer, [t for t in (own if isinstance(own, list) else [own]) if t is not None])


def end_ids(tokenizer: PreTrainedTokenizerBase, own: Sequence[int]) -> list[int]:
    """Return the tokens that end an answer: the template's end of turn if it is a control token, and the model's own.

    Raises ``UserError`` (incompatible) where there is none.
    """
    example = encode(tokenizer, [pair("x", "y")], 2**30)[0]
    found = {example.ids[example.answer_end]} & set(tokenizer.added_tokens_decoder) if example.has_eot else set()
    found |= {t for t in (tokenizer.eos_token_id, *own) if t is not None}
    if not found:
        raise UserError(f"{tokenizer.name_or_path} has no token that ends an answer.",
                        "Use an instruction-tuned model with an end-of-turn token.", Exit.INCOMPATIBLE)
    return sorted(found)


def nucleus_draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Return a token per row, int64 [B], drawn from softmax(logits / temperature) cut to its nucleus.

    ``logits``: float [B, V]. ``uniform``: float [B] in [0, 1), the place in the cumulated probability of the tokens
    from the likeliest down. The nucleus is the fewest likeliest tokens whose probabilities reach ``top_p``.
    """
    likely, tokens = _likeliest((logits.float() / temperature).softmax(-1), top_p)
    kept = likely * (likely.cumsum(-1) - likely < top_p)
    cumulated = kept.cumsum(-1)
    place = torch.searchsorted(cumulated, uniform[:, None].to(cumulated) * cumulated[:, -1:], right=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(-1, place.minimum(last).clamp_min(0))[:, 0]


def _likeliest(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities and ids of tokens that hold every row's nucleus, from the likeliest down, ties by id."""
    width = probabilities.shape[-1]
    k = min(SHORTLIST, width)
    if k < width and bool((probabilities.topk(k).values.sum(-1) < top_p).any()):
        k = width
    candidates = probabilities.topk(k).indices.sort(dim=-1).values
    likely, order = probabilities.gather(-1, candidates).sort(dim=-1, descending=True, stable=True)
    return likely, candidates.gather(-1, order)


class _Draw(LogitsProcessor):
    """Leaves one token per row possible, the one drawn with the row's own random number for this step."""

    def __init__(self, draws: torch.Tensor, n_prompt: int, settings: SampleSettings) -> None:
        self.draws, self.n_prompt, self.settings = draws, n_prompt, settings

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = self.draws[:, input_ids.shape[1] - self.n_prompt].to(scores.device)
        token = nucleus_draw(scores, uniform, self.settings.temperature, self.settings.top_p)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


def row_seeds(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """Return a seed below 2**60 for each prompt, by what is asked and how often it was asked before."""
    times: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in map(tuple, prompts):
        seeds.append(int(sha256(canonical_json([seed, times[prompt], prompt]))[:15], 16))
        times[prompt] += 1
    return seeds


def _draws(prompts: Sequence[Sequence[int]], settings: SampleSettings) -> torch.Tensor:
    """Return uniform random numbers, float64 [prompts, max_new_tokens], each row from a seed of its own."""
    rows = torch.empty(len(prompts), settings.max_new_tokens, dtype=torch.float64)
    for row, seed in zip(rows, row_seeds(prompts, settings.seed), strict=True):
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    return rows


def _generate(model: torch.nn.Module, prompts: Sequence[Sequence[int]], draws: torch.Tensor, settings: SampleSettings,
              stops: list[int]) -> list[list[int]]:
    width = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.tensor([[stops[0]] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    choose = LogitsProcessorList([_Draw(draws, width, settings)] if settings.temperature else [])
    how = GenerationConfig(do_sample=False, max_new_tokens=settings.max_new_tokens, use_cache=True,
                           eos_token_id=stops, pad_token_id=stops[0])
    with _plain_defaults(causal_lm(model)) as plain, torch.inference_mode():
        out = plain.generate(input_ids=ids, attention_mask=mask, generation_config=how, logits_processor=choose)
    return out[:, width:].tolist()


@contextmanager
def _plain_defaults(model: Any) -> Iterator[Any]:
    """Set aside a model's own generation defaults, such as a repetition penalty, which would bend what is measured."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = own
