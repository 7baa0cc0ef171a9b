"""A package called vllm that takes what the real one takes and computes with something that a test can follow."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

Numbers = Callable[[Sequence[int]], list[float]]
"""ids -> log P(ids[t] | ids[:t]) for t from 1."""


class EngineDeadError(Exception):
    """What the real package raises when its engine's process has ended."""


@dataclass
class Flat:
    """Log-probabilities as one list per kind, the first position empty."""

    token_ids: list[int]
    logprobs: list[float]

    def __len__(self) -> int:
        return len(self.token_ids) + 1


@dataclass
class FakeVllm:
    """What the engines were asked, and how they behave.

    ``numbers(ids, lora id)`` is the model; without it the engine loads its folder with transformers. ``change`` may
    alter an output. An engine whose ``max_num_batched_tokens`` is above ``fits`` dies with ``dies_of``.
    """

    on_cpu: bool = True
    fixed: str = "absent"
    """absent, works, refused, ignored (accepted, but no numbers come back), or wrong."""
    flat: bool = True
    numbers: Callable[[Sequence[int], int], list[float]] | None = None
    change: Callable[[Any], None] = lambda output: None
    answer: Callable[[Sequence[int], Any, Any], list[int]] = lambda ids, how, model: [how.stop_token_ids[0]]
    """ids, sampling parameters, model -> the ids of a sampled answer."""
    fits: int = 10**9
    dies_of: BaseException = field(default_factory=lambda: EngineDeadError("the engine died"))
    start_error: BaseException | None = None
    started: list[dict[str, Any]] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)
    loras: list[Any] = field(default_factory=list)
    alive: int = 0
    most_alive: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
        """Put the package where imports find it, until the test ends."""
        modules = {name: ModuleType(name) for name in (
            "vllm", "vllm.platforms", "vllm.lora", "vllm.lora.request", "vllm.v1", "vllm.v1.engine",
            "vllm.v1.engine.exceptions")}
        modules["vllm"].__spec__ = ModuleSpec("vllm", None)
        modules["vllm"].LLM = self._engine
        modules["vllm"].SamplingParams = self._sampling()
        modules["vllm.platforms"].current_platform = SimpleNamespace(
            is_cpu=lambda: self.on_cpu, get_device_total_memory=lambda: 80 * 2**30)
        modules["vllm.lora.request"].LoRARequest = lambda name, number, path: SimpleNamespace(number=number, path=path)
        modules["vllm.v1.engine.exceptions"].EngineDeadError = EngineDeadError
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return self

    def _sampling(self) -> type:
        @dataclass
        class Old:
            max_tokens: int
            temperature: float
            detokenize: bool
            prompt_logprobs: int | None = None
            top_p: float = 1.0
            seed: int | None = None
            stop_token_ids: list[int] | None = None

        @dataclass
        class Flattening(Old):
            flat_logprobs: bool = False

        @dataclass
        class New(Flattening):
            prompt_logprob_token_ids: list[list[int]] | None = None
            prompt_logprob_start: int | None = None

        return New if self.fixed != "absent" else Flattening if self.flat else Old

    def _engine(self, **settings: Any) -> Any:
        if self.start_error is not None:
            raise self.start_error
        self.started.append(settings)
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        model = None if self.numbers else AutoModelForCausalLM.from_pretrained(settings["model"]).eval()

        def shutdown() -> None:
            self.alive -= 1

        def generate(prompts: list[dict[str, Any]], params: list[Any], use_tqdm: bool, lora_request: Any) -> list[Any]:
            self.loras.append(lora_request)
            if settings.get("max_num_batched_tokens", 0) > self.fits:
                raise self.dies_of
            return [self._output(p["prompt_token_ids"], how, lora_request, model)
                    for p, how in zip(prompts, params, strict=True)]

        return SimpleNamespace(generate=generate,
                               llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=shutdown)))

    def _output(self, ids: list[int], how: Any, lora: Any, model: Any) -> Any:
        self.asked.append(how)
        if how.stop_token_ids:
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.answer(ids, how, model))])
        numbers = self.numbers(ids, lora.number if lora else 0) if self.numbers else forward(model, ids)
        output = SimpleNamespace(prompt_logprobs=None, prompt_token_id_logprobs=None)
        wanted = getattr(how, "prompt_logprob_token_ids", None)
        if wanted is not None:
            if self.fixed == "refused":
                raise ValueError("prompt_logprob_token_ids requires the V2 model runner")
            start = how.prompt_logprob_start
            assert [[t] for t in ids[start + 1:]] == wanted
            if self.fixed != "ignored":
                output.prompt_token_id_logprobs = np.array(numbers[start:])[:, None] - (self.fixed == "wrong")
        elif getattr(how, "flat_logprobs", False):
            output.prompt_logprobs = Flat(list(ids[1:]), list(numbers))
        else:
            output.prompt_logprobs = [None, *({t: SimpleNamespace(logprob=n)} for t, n in
                                              zip(ids[1:], numbers, strict=True))]
        self.change(output)
        return output


def forward(model: Any, ids: Sequence[int]) -> list[float]:
    """Return log P(ids[t] | ids[:t]) for t from 1, by a plain pass."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids)])).logits[0, :-1].double().log_softmax(-1)
    return logits.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].tolist()
