"""Answers of a judged model sampled with vLLM in this process."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

from curate.core.chat import encode_prompt
from curate.core.model import load_tokenizer
from curate.core.vllm import Engine, VllmSampler, check_adapters
from judge.grading import Sampler, Subject, conversation


def vllm_sampler(held: ExitStack, ref: str, adapter: Path | None, asked: Subject) -> Sampler:
    """Return a sampler of the base ``ref`` with an adapter; its engine starts when first asked and ends with ``held``.

    Raises ``UserError`` where vLLM is missing or cannot take the adapter, before anything is sampled.
    """
    tokenizer = load_tokenizer(ref)
    longest = max(len(encode_prompt(tokenizer, conversation(question))) for question in asked.questions)
    adapters = [adapter] if adapter else []
    engine = Engine(ref, asked.where["dtype"], asked.where["device"], adapters)
    check_adapters({asked.label: adapter} if adapter else {}, engine.on_gpu)
    found = VllmSampler(engine, tokenizer, asked.sampling)

    @cache
    def running() -> VllmSampler:
        held.callback(engine.close)
        held.enter_context(engine.member(adapter, partial(found.start, longest)))
        return found

    return lambda conversations: running().sample([encode_prompt(tokenizer, messages) for messages in conversations])
