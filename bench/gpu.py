"""The transformers engine on a GPU: tokens/s, MFU and peak memory of a Qwen2.5-7B-shaped model with random weights.

    python bench/gpu.py --rows scale_pool.parquet --n 4096
    python bench/gpu.py --shape toy --rows pool.parquet --n 64 --device cpu --dtype float32      # does it run?

Needs torch, transformers, peft and pyarrow only, and no hub: the shape is built here, and without --tokenizer rows get
random ids, four characters to a token, so that lengths are those of the rows. What is timed is the engine's own
forward pass (curate.core.nll: packing, answer rows only through the head) for the aligned model and three members.

MFU = the floating-point operations that the packed rows need, over seconds, over a matrix-multiply ceiling that is
measured here, in the same dtype. Needed: 2 for each weight of the decoder's linear layers and each position that is no
padding, 2 x hidden x vocabulary for each target, 4 x hidden x (positions before it) for attention in each layer. What
all rows of a sequence share is counted once, as it is computed; adapters are not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow.parquet as pq
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from curate.core.chat import Encoded, encode
from curate.core.decoder import body
from curate.core.example import pair
from curate.core.nll import Budget, answer_nll, default_budget
from curate.core.pack import pack, plan

SHAPES = {
    "qwen2.5-7b": {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
                   "num_attention_heads": 28, "num_key_value_heads": 4},
    "toy": {"vocab_size": 307, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1},
}
MEMBERS = ("one", "two", "three")
PREFIX = 20
"""Ids that all rows share, as a chat template's system prompt is."""


@dataclass(frozen=True)
class Pass:
    """What one model's pass over all rows took."""

    name: str
    seconds: float
    peak_bytes: int | None
    """Beyond the weights; None where it cannot be told."""


def build(shape: str, vocabulary: int | None, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return a model of this shape with random weights, made where it will run."""
    sizes = SHAPES[shape] | ({"vocab_size": vocabulary} if vocabulary else {})
    config = Qwen2Config(**sizes, max_position_embeddings=32_768, tie_word_embeddings=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            return Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def with_members(model: torch.nn.Module) -> PeftModel:
    """Return the model with three random rs-LoRA adapters beside its linear layers, as members are opened in bf16."""
    settings = LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, settings, adapter_name=MEMBERS[0])
        for name in MEMBERS[1:]:
            wrapped.add_adapter(name, settings)
    return wrapped.eval()


def rows(path: Path, n: int, tokenizer: str | None, vocabulary: int, longest: int) -> list[Encoded]:
    """Return ``n`` rows of a Parquet file with the columns prompt and response, evenly taken."""
    table = pq.read_table(path, columns=["prompt", "response"])
    step = max(1, table.num_rows // n)
    taken = table.take(list(range(0, table.num_rows, step))[:n]).to_pylist()
    if tokenizer is not None:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        found = encode(loaded, [pair(row["prompt"], row["response"]) for row in taken], longest)
        if max(max(item.ids) for item in found) >= vocabulary:
            raise SystemExit(f"{tokenizer} has ids beyond the vocabulary of {vocabulary}: leave out --tokenizer.")
        return [item for item in found if item.status == "ok"]
    dice = random.Random(0)
    shared = tuple(dice.choices(range(vocabulary), k=PREFIX))
    found = []
    for row in taken:
        n_prompt, n_answer = (max(1, math.ceil(len(row[name]) / 4)) for name in ("prompt", "response"))
        start = PREFIX + n_prompt
        ids = (*shared, *dice.choices(range(vocabulary), k=n_prompt + n_answer + 1))
        if len(ids) <= longest:
            found.append(Encoded(ids, start, start + n_answer))
    return found


def needed(model: torch.nn.Module, encoded: Sequence[Encoded], capacity: int) -> tuple[float, int]:
    """Return the operations that the packed rows need, and their positions; see the module."""
    weights = sum(p.numel() for name, p in body(model).named_parameters() if p.dim() == 2 and "embed" not in name)
    config = model.config
    operations, positions = 0.0, 0
    for one in plan(encoded, capacity):
        batch = pack(encoded, [one])
        n = int(batch.real.sum())
        seen = n * (n + 1) // 2 if batch.attention_mask is None else int(batch.attention_mask[:, 0][batch.real].sum())
        operations += 2 * weights * n + 4 * config.hidden_size * config.num_hidden_layers * seen
        operations += 2 * config.hidden_size * config.vocab_size * batch.targets.numel()
        positions += n
    return operations, positions


def ceiling(device: str, dtype: torch.dtype, size: int) -> float:
    """Return the operations per second of square matrix products, the best of five rounds."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        wait(device)
        begun = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - begun))
    return best


def wait(device: str) -> None:
    """Wait until the device has done what it was asked to."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(model: torch.nn.Module, encoded: Sequence[Encoded], name: str, device: str, budget: Budget) -> Pass:
    """Score all rows with one model."""
    before = None
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    wait(device)
    begun = time.perf_counter()
    done = [evidence for part in answer_nll(model, encoded, budget) for _, evidence in part]
    wait(device)
    seconds = time.perf_counter() - begun
    if len(done) != len(encoded) or any(one.status != "ok" for one in done):
        raise SystemExit("Not every row got a finite number.")
    return Pass(name, seconds, None if before is None else torch.cuda.max_memory_allocated() - before)


def passes(model: PeftModel, encoded: Sequence[Encoded], device: str, budget: Budget) -> list[Pass]:
    """Score with the aligned model and every member, after a few rows to warm up."""
    found = []
    for name in ("aligned", *MEMBERS):
        member = nullcontext() if name in MEMBERS else model.disable_adapter()
        if name in MEMBERS:
            model.set_adapter(name)
        with member:
            timed(model, encoded[:32], name, device, budget)
            found.append(timed(model, encoded, name, device, budget))
    return found


def by_vocabulary(arguments: argparse.Namespace, dtype: torch.dtype, sizes: Sequence[int]) -> list[dict[str, float]]:
    """Return the peak memory beyond the weights of the aligned model with vocabularies of these sizes."""
    found = []
    for size in sizes:
        model = build(arguments.shape, size, arguments.device, dtype)
        encoded = rows(arguments.rows, min(arguments.n, 512), None, size, arguments.max_tokens)
        peak = timed(model, encoded, "aligned", arguments.device, budget_of(arguments)).peak_bytes
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        found.append({"vocabulary": size, "weights_bytes": weights, "peak_bytes": peak})
        del model
        gc.collect()
    return found


def budget_of(arguments: argparse.Namespace) -> Budget:
    """Return how much goes through the model at once."""
    usual = default_budget(arguments.device)
    return Budget(arguments.capacity or usual.capacity, arguments.batch_tokens or usual.tokens)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Return all figures as plain values."""
    dtype = getattr(torch, arguments.dtype)
    vocabularies = by_vocabulary(arguments, dtype, arguments.vocabularies)
    top = ceiling(arguments.device, dtype, arguments.ceiling_size)
    model = build(arguments.shape, None, arguments.device, dtype)
    encoded = rows(arguments.rows, arguments.n, arguments.tokenizer, model.config.vocab_size, arguments.max_tokens)
    budget = budget_of(arguments)
    operations, positions = needed(model, encoded, budget.capacity)
    tokens = sum(len(item.ids) for item in encoded)
    found = passes(with_members(model), encoded, arguments.device, budget)
    return {"shape": arguments.shape, "dtype": arguments.dtype, "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else arguments.device,
            "rows": len(encoded), "tokens": tokens, "positions": positions, "ceiling": top,
            "vocabularies": vocabularies,
            "passes": [{"name": one.name, "seconds": one.seconds, "tokens_per_s": tokens / one.seconds,
                        "mfu": operations / one.seconds / top, "peak_bytes": one.peak_bytes} for one in found]}


def main(words: Sequence[str] | None = None) -> None:
    """Parse, measure, print one JSON document and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="Parquet with the columns prompt and response")
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--tokenizer", help="a folder whose ids fit the vocabulary; [default: random ids]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longer rows are left out")
    parser.add_argument("--capacity", type=int, help="tokens of a packed sequence; [default: the engine's]")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a forward pass; [default: the engine's]")
    parser.add_argument("--ceiling-size", type=int, default=8192, help="side of the matrices of the ceiling")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[32_000, 152_064])
    found = measure(parser.parse_args(words))
    print(json.dumps(found))
    print("| model | tokens/s | MFU | peak GiB beyond the weights |\n|---|---|---|---|")
    for one in found["passes"]:
        print(f"| {one['name']} | {one['tokens_per_s']:,.0f} | {one['mfu']:.2f} | {gib(one['peak_bytes'])} |")
    for one in found["vocabularies"]:
        print(f"vocabulary {one['vocabulary']:,}: {gib(one['peak_bytes'])} GiB beyond {gib(one['weights_bytes'])} GiB "
              "of weights")


def gib(size: int | None) -> str:
    """Return bytes for people."""
    return "-" if size is None else f"{size / 2**30:.2f}"


if __name__ == "__main__":
    main()
