"""Answers of a judged model sampled with vLLM in this process."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path

from curate.core.chat import encode_prompt
from curate.core.errors import require
from curate.core.refs import load_tokenizer
from curate.core.vllm import Engine, VllmSampler, check_adapters
from judge.grading import Sampler, Subject, conversation


def check_vllm(adapters: Mapping[str, Path], device: str) -> None:
    """Raise ``UserError`` where vLLM is missing or cannot take one of the adapters, before anything is sampled."""
    require("vllm", "vllm")
    check_adapters(adapters, device.startswith("cuda"))


def vllm_sampler(held: ExitStack, ref: str, adapter: Path | None, asked: Subject) -> Sampler:
    """Return a sampler of the base ``ref`` with an adapter; its engine starts when first asked, ends with ``held``."""
    tokenizer = load_tokenizer(ref)
    longest = max((len(encode_prompt(tokenizer, conversation(question))) for question in asked.questions), default=0)
    engine = Engine(ref, asked.where["dtype"], asked.where["device"], [adapter] if adapter else [])
    found = VllmSampler(engine, tokenizer, asked.sampling)

    @cache
    def running() -> VllmSampler:
        held.callback(engine.close)
        held.enter_context(engine.member(adapter, partial(found.start, longest)))
        return found

    return lambda conversations: running().sample([encode_prompt(tokenizer, messages) for messages in conversations])
