"""Training speed on a CPU: attention by example and logits once, against a mask and logits twice, in one process.

    python bench/training_cpu.py --rows narrow.jsonl --n 40

Steps of four rows go through both in turn: the way of `train run`, and the way it was before, packed into sequences of
256 tokens with a mask, a head whose logits are computed again in the backward pass. Both have the same loss.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from curate.core import nll
from curate.core.chat import Encoded, encode
from curate.core.model import load
from curate.core.sources import file_source, read_source
from train import objective
from train.batches import collate


def logits_twice(project: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return what ``rows_nll`` returns, with nothing but ``hidden`` kept for the backward pass."""
    return torch.cat([checkpoint(nll._piece_nll, project, h, t, use_reentrant=False)
                      for h, t in nll._pieces(hidden, targets)])


WAYS = {"before": (logits_twice, False), "now": (nll.rows_nll, True)}


def step(module: objective.Objective, rows: Sequence[Encoded], way: str) -> tuple[float, float]:
    """Take the gradient of one step; return tokens/s and the loss in nats per target."""
    objective.rows_nll, along_paths = WAYS[way]
    start = time.perf_counter()
    batch = collate(rows, 256, along_paths=along_paths)["packed"]
    loss = module(batch)[0] / len(batch.targets)
    loss.backward()
    module.zero_grad()
    return sum(len(row.ids) for row in rows) / (time.perf_counter() - start), loss.item()


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--n", type=int, default=40)
    parser.add_argument("--aligned", default="smollm2")
    arguments = parser.parse_args()
    loaded = load(arguments.aligned, "float32", "cpu")
    source = file_source(arguments.rows, arguments.rows.parent)
    examples = list(read_source(source, arguments.rows.parent))[:arguments.n]
    rows = [row for row in encode(loaded.tokenizer, examples, 2048) if row.status == "ok"]
    model = get_peft_model(loaded.model, LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear"))
    module = objective.Objective(model.train())
    for way in WAYS:
        step(module, rows[:1], way)
    ratios = []
    for number, start in enumerate(range(0, len(rows), 4)):
        order = list(WAYS) if number % 2 else list(WAYS)[::-1]
        found = {way: step(module, rows[start:start + 4], way) for way in order}
        ratios.append(found["now"][0] / found["before"][0])
        print(f"{found['before'][0]:.0f} tokens/s before, {found['now'][0]:.0f} now: {ratios[-1]:.2f}; losses apart by "
              f"{abs(found['now'][1] - found['before'][1]):.1g}", flush=True)
    print(f"now is faster by (min / median / max) {min(ratios):.2f} / {statistics.median(ratios):.2f} / "
          f"{max(ratios):.2f}")


if __name__ == "__main__":
    main()
