"""Plain fine-tuning here against trl's SFTTrainer: tokens/s, share of the matrix-multiply ceiling, peak memory.

    python bench/training_gpu.py --shape 0.5B                     # Qwen2.5-0.5B's shape, random weights
    python bench/training_gpu.py --shape 7B --rows 512 --batch-size 8
    python bench/training_gpu.py --shape 7B --gradient-checkpointing

Both train the same rank-stabilised LoRA (r=32, every linear layer) on the same rows of random ids in the same order, in
bfloat16 on a GPU; loss on answers only, nothing packed by trl, padding not counted as tokens. The two take turns, each
turn in a process of its own, and the first steps of a turn are left out.

    MFU = tokens/s * model FLOPs per token / FLOP/s of an 8192 x 8192 matrix product measured in the same process

Model FLOPs: forward and backward pass of the frozen matrices (2 + 2 per weight and token; there is no gradient for a
frozen weight), 6 per weight of the adapter, the head on targets only, attention from each row's own length; nothing
that is computed a second time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, TrainerCallback

from curate.core.chat import Encoded
from curate.core.documents import ModelIdentity
from curate.core.model import Loaded
from train.adapters import adapter
from train.recipe import Recipe
from train.trainer import MixTrainer

SHAPES: dict[str, dict[str, Any]] = {
    "toy": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": 307, "tie_word_embeddings": True},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
ENGINES = ("safeset", "trl")
WARM_UP = 2
"""Steps of a turn that are not timed."""


def rows_of(n: int, longest: int, vocabulary: int) -> list[Encoded]:
    """Return ``n`` rows of random ids, of lengths from an eighth of ``longest`` to ``longest``; half is the answer."""
    source = random.Random(0)
    lengths = [source.randint(max(4, longest // 8), longest) for _ in range(n)]
    return [Encoded(tuple(source.randrange(3, vocabulary) for _ in range(length)), length // 2, length - 1, "ok")
            for length in lengths]


def model_flops(config: Qwen2Config, rank: int, lengths: Sequence[int], targets: int) -> float:
    """Return the FLOPs that one forward and backward pass over rows of these lengths needs; see the module's text."""
    h, wide = config.hidden_size, config.intermediate_size
    key_value = h * config.num_key_value_heads // config.num_attention_heads
    matrices = [(h, h), (h, key_value), (h, key_value), (h, h), (h, wide), (h, wide), (wide, h)]
    frozen = config.num_hidden_layers * sum(a * b for a, b in matrices)
    adapted = config.num_hidden_layers * sum(rank * (a + b) for a, b in matrices)
    attention = config.num_hidden_layers * sum(3 * 2 * 2 * h * length**2 / 2 for length in lengths)
    return sum(lengths) * (4 * frozen + 6 * adapted) + targets * 4 * h * config.vocab_size + attention


def ceiling(device: str, dtype: torch.dtype, size: int) -> float:
    """Return the FLOP/s of a ``size`` x ``size`` matrix product: the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(10):
        seconds = clock(device)
        a @ b
        best = max(best, 2 * size**3 / (clock(device) - seconds))
    return best


def clock(device: str) -> float:
    """Return the time, with all work on a GPU done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


class Watch(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self.times.append(clock(self.device))


def ours(model: torch.nn.Module, rows: Sequence[Encoded], recipe: Recipe, watch: Watch, folder: Path) -> None:
    """Train with this project's trainer."""
    identity = ModelIdentity(name="random", weights="random", tokenizer="random")
    with adapter(Loaded(model, None, identity, "random", recipe.dtype, recipe.device), recipe) as adapted:
        trainer = MixTrainer(adapted, rows, recipe, folder)
        trainer.add_callback(watch)
        trainer.train()


def theirs(model: torch.nn.Module, rows: Sequence[Encoded], recipe: Recipe, watch: Watch, folder: Path) -> None:
    """Train with trl's."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    data = Dataset.from_list([{"input_ids": list(row.ids), "labels": [-100] * row.answer_start
                               + list(row.ids[row.answer_start:])} for row in rows])
    lora = LoraConfig(r=recipe.lora_r, lora_alpha=recipe.lora_alpha, use_rslora=True, target_modules="all-linear",
                      task_type="CAUSAL_LM")
    arguments = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=recipe.batch_size, max_steps=recipe.limit_steps,
        learning_rate=recipe.lr, max_length=None, packing=False, bf16=recipe.dtype == "bfloat16",
        use_cpu=recipe.device == "cpu", gradient_checkpointing=recipe.gradient_checkpointing, report_to="none",
        save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True})
    SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora,
               callbacks=[watch]).train()


def turn(engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with one engine in this process and return what was measured."""
    config = Qwen2Config(**SHAPES[arguments.shape])
    dtype = "float32" if arguments.device == "cpu" else "bfloat16"
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    rows = rows_of(arguments.rows, arguments.longest, config.vocab_size)
    steps = len(rows) // arguments.batch_size
    recipe = Recipe("random", batch_size=arguments.batch_size, limit_steps=steps, save_every=0, dtype=dtype,
                    device=arguments.device, gradient_checkpointing=arguments.gradient_checkpointing,
                    pack_tokens=max(256, arguments.longest))
    watch = Watch(arguments.device)
    train: Callable[..., None] = {"safeset": ours, "trl": theirs}[engine]
    with tempfile.TemporaryDirectory() as folder:
        train(model, rows, recipe, watch, Path(folder))
    timed = rows[WARM_UP * arguments.batch_size:steps * arguments.batch_size]
    lengths = [len(row.ids) for row in timed]
    seconds = watch.times[-1] - watch.times[WARM_UP - 1]
    flops = model_flops(config, recipe.lora_r, lengths, sum(len(row.ids) - row.answer_start for row in timed))
    best = ceiling(arguments.device, getattr(torch, dtype), 8192 if arguments.device != "cpu" else 256)
    peak = None if arguments.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    return {"tokens_per_s": sum(lengths) / seconds, "mfu": flops / seconds / best, "ceiling": best, "peak_mib": peak}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5B")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--longest", type=int, default=1024, help="tokens of the longest rows")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.engine:
        print(json.dumps(turn(arguments.engine, arguments)))
        return
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
    for _ in range(arguments.turns):
        for engine in ENGINES:
            done = subprocess.run([*command, "--engine", engine], check=True, capture_output=True, text=True)
            found[engine].append(json.loads(done.stdout.splitlines()[-1]))
    report(arguments, found)


def report(arguments: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table."""
    best = max(one["ceiling"] for turns in found.values() for one in turns)
    print(f"{arguments.shape}, {arguments.device}, batch {arguments.batch_size}, rows up to {arguments.longest} "
          f"tokens, torch {torch.__version__}, ceiling {best / 1e12:.1f} TFLOP/s\n\n"
          "| trainer | tokens/s (min / median / max) | MFU | peak MiB |\n|---|---|---|---|")
    for engine, turns in found.items():
        low, middle, high = (f(one["tokens_per_s"] for one in turns) for f in (min, statistics.median, max))
        mfu = statistics.median(one["mfu"] for one in turns)
        peaks = [one["peak_mib"] for one in turns if one["peak_mib"] is not None]
        peak = f"{max(peaks):,.0f}" if peaks else "-"
        print(f"| {engine} | {low:,.0f} / {middle:,.0f} / {high:,.0f} | {mfu:.0%} | {peak} |")


if __name__ == "__main__":
    main()
