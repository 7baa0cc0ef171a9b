"""Scoring with vLLM in this process; see ``curate.core.vllm`` for engines and members.

Of an answer's log-probabilities vLLM knows two sources. ``prompt_logprob_token_ids`` scores given tokens from a given
place on and is the cheaper one; it exists in recent versions on CUDA. ``prompt_logprobs=0`` exists everywhere and goes
through the logits of all prompt tokens, which vLLM's memory profile leaves out, hence ``token_budget``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.chat import Encoded
from curate.core.decoder import is_out_of_memory
from curate.core.errors import Exit, UserError
from curate.core.nll import CHECKED_TOKENS, TOLERANCE_NATS, AnswerNll
from curate.core.vllm import GPU_SHARE, Engine, engine_dead, first_line, refusals
from curate.scorers import evidence

if TYPE_CHECKING:
    from curate.scorers.choose import Models

LOGIT_BYTES = 12
"""A logit in float32, its log-softmax, and one copy."""
MIN_BATCHED, MAX_BATCHED = 256, 8192
SLICE_BATCHES = 8
"""Rows are handed over in slices of so many full batches."""


def token_budget(vocabulary: int, free_bytes: float) -> int:
    """Return ``max_num_batched_tokens``: as many tokens as have their logits fit into half of ``free_bytes``.

    At least ``MIN_BATCHED``, at most ``MAX_BATCHED``; longer prompts are computed in pieces.
    """
    fits = int(free_bytes / 2 // (LOGIT_BYTES * vocabulary))
    return max(MIN_BATCHED, min(MAX_BATCHED, fits))


class VllmScorer:
    """See ``Scorer``."""

    engine = "vllm"

    def __init__(self, models: Models) -> None:
        self.models = models
        self.dtype = models.dtype
        self._vllm = Engine(models.ref, models.dtype, models.device, list(models.adapters.values()))
        self._budget: int | None = None
        self._fixed: bool | None = None

    @contextmanager
    def member(self, adapter: Path | None) -> Iterator[None]:
        """See ``Scorer.member``."""
        with self._vllm.member(adapter, self._start):
            yield

    def score(self, encoded: Sequence[Encoded],
              notify: Callable[[str], None] = lambda text: None) -> Iterator[list[tuple[int, AnswerNll]]]:
        """See ``Scorer.score``. An engine that dies for lack of memory is started again with half the batch."""
        if self._fixed is None:
            typical = min(encoded, key=lambda item: abs(item.n_answer_tokens - CHECKED_TOKENS))
            self._fixed = self._has_fixed_path(typical)
        queue = self._slices(encoded)
        while queue:
            part = queue.pop(0)
            try:
                done = self._run([encoded[i] for i in part], self._fixed)
            except (RuntimeError, MemoryError, engine_dead()) as err:
                self._halve(err, notify)
                queue.insert(0, part)
                continue
            yield list(zip(part, done, strict=True))

    def close(self) -> None:
        """Stop the engine, if one is running, and give its memory back."""
        self._vllm.close()

    def _start(self) -> None:
        if self._budget is None:
            self._budget = token_budget(self._vllm.vocabulary(), self._free_bytes())
        self._vllm.start(max_model_len=self.models.max_tokens + 1, max_num_batched_tokens=self._budget,
                         max_num_seqs=min(256, self._budget), enable_prefix_caching=False)

    def _free_bytes(self) -> float:
        if self._vllm.on_gpu:
            from vllm.platforms import current_platform

            return float(current_platform.get_device_total_memory()) * (1 - GPU_SHARE)
        import psutil

        return float(psutil.virtual_memory().available) / 2

    def _halve(self, err: BaseException, notify: Callable[[str], None]) -> None:
        """Start the engine again with half the tokens at once, or raise ``UserError`` where that cannot help."""
        if not (is_out_of_memory(err) or isinstance(err, engine_dead())):
            raise err
        if self._budget is None or self._budget <= MIN_BATCHED:
            raise UserError(f"The vLLM engine died with {self._budget} tokens at once: {first_line(err)}.",
                            "Its own lines above say why (VLLM_LOGGING_LEVEL=INFO shows more). Lower --max-tokens, or "
                            "use --engine transformers.", Exit.ENVIRONMENT) from err
        self.close()
        self._budget = max(MIN_BATCHED, self._budget // 2)
        notify(f"vLLM ran out of memory or died: going on with {self._budget} tokens at once")
        self._start()

    def _slices(self, encoded: Sequence[Encoded]) -> list[list[int]]:
        """Cut the rows into runs of about ``SLICE_BATCHES`` full batches."""
        slices: list[list[int]] = [[]]
        tokens = 0
        for index, item in enumerate(encoded):
            if tokens > SLICE_BATCHES * (self._budget or MAX_BATCHED):
                slices.append([])
                tokens = 0
            slices[-1].append(index)
            tokens += len(item.ids)
        return slices

    def _has_fixed_path(self, item: Encoded) -> bool:
        """Try on one row whether this vLLM scores given tokens here, and that both of its ways agree.

        A version or a runner without it says so with an error; one that takes the request and answers nothing
        is refused, because the rest of its answers could not be trusted either.
        """
        from vllm import SamplingParams

        if not self._vllm.on_gpu or "prompt_logprob_token_ids" not in inspect.signature(SamplingParams).parameters:
            return False
        try:
            fixed = self._run([item], True)[0]
        except refusals():
            return False
        plain = self._run([item], False)[0]
        gap = abs(fixed.mean - plain.mean)
        if not gap <= TOLERANCE_NATS[self.dtype] and plain.status == "ok":
            raise UserError(f"The two ways in which this vLLM scores an answer differ by {gap:.3g} nats per token.",
                            "Use another version of vLLM, or --engine transformers.", Exit.INCOMPATIBLE)
        return True

    def _run(self, items: Sequence[Encoded], fixed: bool) -> list[AnswerNll]:
        prompts = [{"prompt_token_ids": list(item.ids)} for item in items]
        outputs = self._vllm.llm.generate(prompts, [_sampling(item, fixed) for item in items], use_tqdm=False,
                                          lora_request=self._vllm.lora)
        if len(outputs) != len(items):
            raise UserError(f"vLLM answered {len(outputs)} of {len(items)} requests.", "Score again.", Exit.ENVIRONMENT)
        return [evidence(item, _fixed_numbers(out) if fixed else _flat_numbers(out.prompt_logprobs, item))
                for item, out in zip(items, outputs, strict=True)]


def _sampling(item: Encoded, fixed: bool) -> Any:
    from vllm import SamplingParams

    how: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
    if fixed:
        return SamplingParams(**how, prompt_logprob_token_ids=[[t] for t in item.ids[item.answer_start:]],
                              prompt_logprob_start=item.answer_start - 1)
    if "flat_logprobs" in inspect.signature(SamplingParams).parameters:
        how["flat_logprobs"] = True
    return SamplingParams(**how, prompt_logprobs=0)


def _fixed_numbers(output: Any) -> list[Any]:
    """Return the scores of the given tokens, one column of one row each."""
    table = output.prompt_token_id_logprobs
    if table is None:
        raise UserError("vLLM took a request for the log-probabilities of given tokens and returned none.",
                        "Use another version of vLLM, or --engine transformers.", Exit.INCOMPATIBLE)
    return [row[0] if len(row) == 1 else None for row in table.tolist()]


def _flat_numbers(found: Any, item: Encoded) -> list[Any] | None:
    """Return log P of the answer's tokens out of vLLM's flat or nested form, or None where a token is not the row's.

    With ``prompt_logprobs=0`` there is one number for every prompt token but the first.
    """
    if found is None or len(found) != len(item.ids):
        return None
    if hasattr(found, "token_ids"):
        same = list(found.token_ids) == list(item.ids[1:]) and len(found.logprobs) == len(item.ids) - 1
        return list(found.logprobs[item.answer_start - 1:]) if same else None
    entries = [(found[t] or {}).get(item.ids[t]) for t in range(item.answer_start, len(item.ids))]
    return [None if entry is None else entry.logprob for entry in entries]
