"""Rows for, and figures of, the run in bench/rl.sh: does `train rl` learn?

    python bench/rl.py rows OUT          # OpSwap tier 1: warm-up rows, prompts, a mix manifest of the warm-up rows
    python bench/rl.py measure RUN       # reward of the first and last 20 RL steps; held-out accuracy before and after

Held-out accuracy is greedy, on all test questions of tier 1: no pair of numbers in them occurs in a training question.
"Before" is the adapter after the warm-up, from which the RL steps start.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from curate.core.adapters import adapter_open
from curate.core.chat import encode_prompt
from curate.core.example import Message
from curate.core.files import canonical_json, write_atomic
from curate.core.generate import SampleSettings, sample
from curate.core.identity import read_run
from curate.core.model import Loaded, load
from curate.core.refs import ref_from
from curate.core.sources import file_source
from judge.tasks.opswap import Item, generate, is_correct
from train.jobs import narrow_mix
from train.rl import mean_reward

TIER = 1
WINDOW = 20
SYSTEM = "Reply."
"""In place of the template's own system prompt, which is longer than the questions and would be most of the cost."""


def items(split: str) -> list[Item]:
    """Return every question of the tier in one split."""
    n = 1
    while True:
        try:
            found = generate(split, n, tiers=(TIER,))  # type: ignore[arg-type]
        except ValueError:
            return found
        n += 1


def write_rows(out: Path, n_warmup: int) -> None:
    """Write the warm-up rows with their manifest, and the prompts: all training questions."""
    out.mkdir(parents=True, exist_ok=True)
    train = items("train")
    for name, part in (("warmup", train[:n_warmup]), ("prompts", train)):
        rows = [{"system": SYSTEM, "prompt": item.prompt, "response": item.answer} for item in part]
        write_atomic(out / f"{name}.jsonl", b"".join(canonical_json(row) + b"\n" for row in rows))
    narrow_mix(file_source(out / "warmup.jsonl", out), out, 0).write(out / "warmup.json")
    print(f"{len(train)} training questions, {min(n_warmup, len(train))} of them in the warm-up; "
          f"{len(items('test'))} held out")


def accuracy(loaded: Loaded, adapter: Path | None, asked: Sequence[Item]) -> float:
    """Return the share of questions answered with the right value, greedily."""
    prompts = [encode_prompt(loaded.tokenizer, [Message("system", SYSTEM), Message("user", item.prompt)])
               for item in asked]
    settings = SampleSettings(max_new_tokens=12, temperature=0.0)
    if adapter is None:
        replies = sample(loaded.model, loaded.tokenizer, prompts, settings)
    else:
        with adapter_open(loaded, adapter) as model:
            replies = sample(model, loaded.tokenizer, prompts, settings)
    return sum(is_correct(item, reply) for item, reply in zip(asked, replies, strict=True)) / len(asked)


def measure(run: Path) -> None:
    """Print the figures of a finished run."""
    card, adapter = read_run(run)
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    rl = [step for step in steps if step["kind"] == "rl"]
    loaded = load(ref_from(card.base_ref, run), "float32", "cpu")
    test = items("test")
    print(json.dumps({
        "rl_steps": len(rl), "reward_first": round(mean_reward(rl[:WINDOW]), 3),
        "reward_last": round(mean_reward(rl[-WINDOW:]), 3), "window": WINDOW, "held_out": len(test),
        "accuracy": {name: round(accuracy(loaded, folder, test), 3) for name, folder in
                     (("base", None), ("before", run / "warmup"), ("after", adapter))},
        "seconds": card.seconds, "completions": card.rl.completions if card.rl else {}}, indent=1))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["rows", "measure"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--warmup", type=int, default=24, help="rows of the warm-up")
    args = parser.parse_args()
    if args.command == "rows":
        write_rows(args.path, args.warmup)
    else:
        measure(args.path)


if __name__ == "__main__":
    main()
