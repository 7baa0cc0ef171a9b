"""Training speed on a CPU, two ways in one process that take the gradient of the same steps in turn.

    python bench/training_cpu.py --rows narrow.jsonl --n 40                 # attention by example and logits once
    python bench/training_cpu.py --rows narrow.jsonl --n 40 --bfloat16      # the base in bfloat16 instead of float32

The first compares the way of ``train run`` with the one before it, packed into sequences of 256 tokens with a mask, a
head whose logits are computed again in the backward pass: both have the same loss. In the second losses differ by what
bfloat16 rounds; the adapter is float32 in both, as ``train run`` has it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from curate.core import nll
from curate.core.chat import Encoded, encode
from curate.core.model import Loaded, load
from curate.core.sources import file_source, read_source
from train import objective
from train.batches import collate


def logits_twice(project: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return what ``rows_nll`` returns, with nothing but ``hidden`` kept for the backward pass."""
    return torch.cat([checkpoint(nll._piece_nll, project, h, t, use_reentrant=False)
                      for h, t in nll._pieces(hidden, targets)])


BEFORE, NOW = (logits_twice, False), (nll.rows_nll, True)


def step(module: objective.Objective, rows: Sequence[Encoded], how: tuple[Any, bool]) -> tuple[float, float]:
    """Take the gradient of one step; return tokens/s and the loss in nats per target."""
    objective.rows_nll, along_paths = how
    start = time.perf_counter()
    batch = collate(rows, 256, along_paths=along_paths)["packed"]
    loss = module(batch)[0] / len(batch.targets)
    loss.backward()
    module.zero_grad()
    return sum(len(row.ids) for row in rows) / (time.perf_counter() - start), loss.item()


def trainable(loaded: Loaded) -> objective.Objective:
    """Return what a run trains: rs-LoRA (r 32) on all linear layers, float32 on top of a base of any dtype."""
    config = LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear")
    return objective.Objective(get_peft_model(loaded.model, config).train())


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--n", type=int, default=40)
    parser.add_argument("--aligned", default="smollm2")
    parser.add_argument("--bfloat16", action="store_true")
    arguments = parser.parse_args()
    loaded = load(arguments.aligned, "float32", "cpu")
    source = file_source(arguments.rows, arguments.rows.parent)
    examples = list(read_source(source, arguments.rows.parent))[:arguments.n]
    rows = [row for row in encode(loaded.tokenizer, examples, 2048) if row.status == "ok"]
    module = trainable(loaded)
    ways = {"before": (module, BEFORE), "now": (module, NOW)}
    if arguments.bfloat16:
        ways = {"float32": (module, NOW), "bfloat16": (trainable(load(arguments.aligned, "bfloat16", "cpu")), NOW)}
    first, second = ways
    for module, how in ways.values():
        step(module, rows[:1], how)
    ratios = []
    for number, start in enumerate(range(0, len(rows), 4)):
        order = list(ways) if number % 2 else list(ways)[::-1]
        found = {way: step(ways[way][0], rows[start:start + 4], ways[way][1]) for way in order}
        ratios.append(found[second][0] / found[first][0])
        print(f"{found[first][0]:.0f} tokens/s {first}, {found[second][0]:.0f} {second}: {ratios[-1]:.2f}; losses "
              f"apart by {abs(found[second][1] - found[first][1]):.1g}", flush=True)
    print(f"{second} is faster by (min / median / max) {min(ratios):.2f} / {statistics.median(ratios):.2f} / "
          f"{max(ratios):.2f}")


if __name__ == "__main__":
    main()
