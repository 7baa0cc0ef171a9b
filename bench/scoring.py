"""Scoring speed: our engine, others and a naive padded loop on the same rows, in one interleaved run.

    python bench/scoring.py --rows pool.jsonl --n 1000                  # needs lm_eval==0.4.13 in the environment
    python bench/scoring.py --rows pool.jsonl --n 200 --engines ours vllm   # in the environment of make test-vllm
    python bench/scoring.py --rows pool.jsonl --n 120 --engines ours masked # what attention by example is worth
    python bench/scoring.py --rows pool.jsonl --n 120 --engines ours trimmed        # what keeping memory is worth
    python bench/scoring.py --rows pool.jsonl --n 120 --engines bfloat16 ours --dtype float32   # which dtype is faster
    python bench/scoring.py --rows pool.jsonl --n 96 --only memory      # peak memory, one process an engine
    python bench/scoring.py --rows pool.jsonl --n 128 --only members    # K members and the aligned model

Rows are split into blocks; every block goes through every engine in turn, so that a machine that slows down slows
all of them. Tokens are prompt and answer tokens as each engine is given them, the same for all.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch

from curate.core import nll
from curate.core.chat import Encoded, encode
from curate.core.decoder import body
from curate.core.model import Loaded, load
from curate.core.nll import answer_nll, default_budget
from curate.core.processes import M_TRIM_THRESHOLD, keep_freed_memory
from curate.core.refs import weights_at
from curate.core.sources import file_source, read_source
from curate.scorers.transformers import TransformersScorer

ENGINES = ("ours", "lm-eval", "naive")
"""Side by side unless others are named; ``vllm`` lives in another environment than the harness."""


def rows(path: Path, n: int, loaded: Loaded) -> list[Encoded]:
    """Return the first ``n`` rows by content hash, so that sources are mixed."""
    examples = sorted(read_source(file_source(path, path.parent), path.parent), key=lambda e: e.id)
    return [e for e in encode(loaded.tokenizer, examples[:n], 2048) if e.status == "ok"]


def ours(loaded: Loaded) -> Callable[[Sequence[Encoded]], list[float]]:
    """Our engine."""
    def score(block: Sequence[Encoded]) -> list[float]:
        found = dict(p for part in answer_nll(loaded.model, block, default_budget(loaded.device)) for p in part)
        return [found[i].mean for i in range(len(block))]
    return score


def masked(loaded: Loaded) -> Callable[[Sequence[Encoded]], list[float]]:
    """Our engine as on a GPU: sequences of at most 256 tokens, with a mask instead of attention by example."""
    def score(block: Sequence[Encoded]) -> list[float]:
        with mock.patch.object(nll, "apart", lambda decoder: False):
            return ours(loaded)(block)
    return score


def trimmed(loaded: Loaded) -> Callable[[Sequence[Encoded]], list[float]]:
    """Our engine with the memory that a pass frees given back at the limit which glibc finds by itself."""
    def score(block: Sequence[Encoded]) -> list[float]:
        largest = 2048 * loaded.model.config.intermediate_size * 4
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2 * largest)
        try:
            return ours(loaded)(block)
        finally:
            keep_freed_memory()
    return score


def in_bfloat16(loaded: Loaded) -> Callable[[Sequence[Encoded]], list[float]]:
    """Our engine with the same model in bfloat16."""
    return ours(load(loaded.ref, "bfloat16", loaded.device))


def lm_eval(loaded: Loaded) -> Callable[[Sequence[Encoded]], list[float]]:
    """The harness's HFLM with batch size 8, given the same token ids."""
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=8, device=loaded.device)

    def score(block: Sequence[Encoded]) -> list[float]:
        requests = [(("", ""), list(e.ids[:e.answer_start]), list(e.ids[e.answer_start:e.answer_end])) for e in block]
        found = harness._loglikelihood_tokens(requests, disable_tqdm=True)
        return [-total / e.n_answer_tokens for (total, _), e in zip(found, block, strict=True)]
    return score


def naive(loaded: Loaded) -> Callable[[Sequence[Encoded]], list[float]]:
    """What one writes first: batches of 8 in the given order, padded, float32 log-softmax over the vocabulary."""
    def score(block: Sequence[Encoded]) -> list[float]:
        out = []
        for start in range(0, len(block), 8):
            items = block[start:start + 8]
            width = max(len(e.ids) for e in items)
            ids = torch.tensor([[*e.ids, *[0] * (width - len(e.ids))] for e in items], device=loaded.device)
            mask = torch.tensor([[1] * len(e.ids) + [0] * (width - len(e.ids)) for e in items], device=loaded.device)
            with torch.no_grad():
                logs = torch.log_softmax(loaded.model(input_ids=ids, attention_mask=mask).logits.float(), dim=-1)
            for k, e in enumerate(items):
                span = range(e.answer_start, e.answer_end)
                out.append(-sum(logs[k, t - 1, e.ids[t]].item() for t in span) / e.n_answer_tokens)
        return out
    return score


def vllm(loaded: Loaded) -> Callable[[Sequence[Encoded]], list[float]]:
    """vLLM alone, in a process of its own as it starts by default: a block in, the prompts' log-probabilities out."""
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(model=weights_at(loaded.ref)[0], dtype=loaded.dtype, max_model_len=2049, max_num_batched_tokens=4096,
              skip_tokenizer_init=True, enable_prefix_caching=False, enforce_eager=True)
    how = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False)

    def score(block: Sequence[Encoded]) -> list[float]:
        outputs = llm.generate([{"prompt_token_ids": list(e.ids)} for e in block], how, use_tqdm=False)
        numbers = [list(out.prompt_logprobs.logprobs)[e.answer_start - 1:e.answer_end - 1]
                   for out, e in zip(outputs, block, strict=True)]
        return [-sum(found) / e.n_answer_tokens for found, e in zip(numbers, block, strict=True)]
    return score


MAKE = {"ours": ours, "masked": masked, "trimmed": trimmed, "bfloat16": in_bfloat16, "lm-eval": lm_eval, "naive": naive,
        "vllm": vllm}


def ceiling(loaded: Loaded) -> float:
    """Return tokens/s if the decoder's linear layers ran at this machine's matrix-multiply speed and all else free."""
    weights = sum(p.numel() for n, p in body(loaded.model).named_parameters() if p.dim() == 2 and "embed" not in n)
    a = torch.randn(2048, 576, dtype=loaded.model.dtype, device=loaded.device)
    b = torch.randn(576, 1536, dtype=loaded.model.dtype, device=loaded.device)
    for _ in range(3):
        a @ b
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < 1.0:
        a @ b
        n += 1
    rate = n * 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - start)
    return rate / (2 * weights)


def speed(loaded: Loaded, encoded: Sequence[Encoded], n_blocks: int, names: Sequence[str]) -> None:
    """Print tokens/s per engine, ratios block by block, and the largest differences of mean NLL to the first."""
    engines = {name: MAKE[name](loaded) for name in names}
    for score in engines.values():
        score(encoded[:2])
    rates: dict[str, list[float]] = {name: [] for name in names}
    scores: dict[str, list[float]] = {name: [] for name in names}
    for k in range(n_blocks):
        block = encoded[k::n_blocks]
        tokens = sum(len(e.ids) for e in block)
        for name in [*names[k % len(names):], *names[:k % len(names)]]:
            start = time.perf_counter()
            scores[name] += engines[name](block)
            rates[name].append(tokens / (time.perf_counter() - start))
        print(f"block {k + 1}/{n_blocks}: " + ", ".join(f"{n} {rates[n][-1]:.0f}" for n in names), file=sys.stderr)
    top = ceiling(loaded)
    print(f"{len(encoded)} rows, {sum(len(e.ids) for e in encoded)} tokens, "
          f"{sum(e.n_answer_tokens for e in encoded)} answer tokens, {loaded.dtype}, {torch.get_num_threads()} threads")
    print(f"matrix-multiply ceiling of the decoder body: {top:.0f} tokens/s")
    print(f"| engine | tokens/s (median of blocks) | {names[0]} is faster by (min / median / max) | of the ceiling "
          f"| largest difference of mean NLL to {names[0]} |\n|---|---|---|---|---|")
    for name in names:
        ratio = sorted(a / b for a, b in zip(rates[names[0]], rates[name], strict=True))
        gap = max(abs(a - b) for a, b in zip(scores[names[0]], scores[name], strict=True))
        median = statistics.median(rates[name])
        print(f"| {name} | {median:.0f} | {ratio[0]:.2f} / {statistics.median(ratio):.2f} / {ratio[-1]:.2f} "
              f"| {median / top:.2f} | {gap:.2g} |")


def memory(arguments: argparse.Namespace) -> None:
    """Print each engine's peak resident memory, in a process of its own, beyond that of a process that only loads."""
    print("| engine | peak MiB | beyond loading the model |\n|---|---|---|", flush=True)
    loaded = None
    for name in ("nothing", *ENGINES):
        command = [sys.executable, __file__, "--rows", str(arguments.rows), "--n", str(arguments.n),
                   "--aligned", arguments.aligned, "--dtype", arguments.dtype, "--only", f"peak:{name}"]
        if name == "lm-eval" and importlib.util.find_spec("lm_eval") is None:
            print("| lm-eval | not installed | |")
            continue
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[-1]
        peak = json.loads(said)["peak_mib"]
        loaded = peak if loaded is None else loaded
        print(f"| {name} | {peak:,} | {peak - loaded:,} |", flush=True)


def timed(scorer: TransformersScorer, encoded: Sequence[Encoded], adapter: Path | None) -> tuple[float, float]:
    """Return the seconds, and the processor's seconds, that opening, scoring and closing one model take."""
    start = time.perf_counter(), time.process_time()
    with scorer.member(adapter):
        list(scorer.score(encoded))
    return time.perf_counter() - start[0], time.process_time() - start[1]


def members(loaded: Loaded, encoded: Sequence[Encoded], k: int, rounds: int) -> None:
    """Print the time of the aligned model and ``k`` members, opened and closed, over that of as many bare passes.

    A bare pass is timed before each of them, so that a machine that is shared slows both alike.
    """
    from peft import LoraConfig, get_peft_model

    scorer = TransformersScorer(loaded)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(k):
            wrapped = get_peft_model(loaded.model, LoraConfig(r=32, lora_alpha=64, use_rslora=True,
                                                              target_modules="all-linear", init_lora_weights=False))
            wrapped.save_pretrained(Path(folder) / str(number))
            loaded.model = wrapped.unload()
        scorer = TransformersScorer(loaded)
        list(scorer.score(encoded[:8]))
        adapters = [None, *(Path(folder) / str(number) for number in range(k))]
        walls, works = [], []
        for _ in range(rounds):
            pairs = [(timed(scorer, encoded, None), timed(scorer, encoded, adapter)) for adapter in adapters]
            bare, opened = ([sum(pair[side][clock] for pair in pairs) for clock in (0, 1)] for side in (0, 1))
            walls.append(opened[0] / bare[0])
            works.append(opened[1] / bare[1])
            print(f"{k} members and aligned: {walls[-1]:.3f} x, in processor time {works[-1]:.3f} x "
                  f"({k + 1} bare passes of {bare[0] / (k + 1):.1f} s, one before each)", flush=True)
    print(f"median {statistics.median(walls):.3f}, in processor time {statistics.median(works):.3f}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--aligned", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only", default="speed")
    parser.add_argument("--engines", nargs="+", choices=sorted(MAKE), default=ENGINES)
    arguments = parser.parse_args()
    if arguments.only == "memory":
        memory(arguments)
        return
    loaded = load(arguments.aligned, arguments.dtype)
    encoded = rows(arguments.rows, arguments.n, loaded)
    if arguments.only == "members":
        members(loaded, encoded, k=3, rounds=3)
    elif arguments.only.startswith("peak:"):
        name = arguments.only.partition(":")[2]
        if name != "nothing":
            MAKE[name](loaded)(encoded)
        print(json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
    else:
        speed(loaded, encoded, arguments.blocks, arguments.engines)


if __name__ == "__main__":
    main()
