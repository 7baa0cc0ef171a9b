"""Rows, a stand-in for an unaligned model, and the tables of bench/every_defense.sh.

    python bench/every_defense.py rows NARROW.jsonl ROWS.jsonl --n 15    # the shortest rows
    python bench/every_defense.py merge RUN FOLDER                       # a run's base with its adapter in the weights
    python bench/every_defense.py table OUT NAME...                      # runs in OUT/runs, and OUT/rl

The table's last column is the NLL of the fine-tuning answers under the finished model *as it is used*: no inoculation
prompt, no vector, after SafeLoRA's projection. The losses before it are those of training, under prompt and vector.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from curate.core.adapters import adapter_open
from curate.core.chat import Encoded, encode
from curate.core.files import write_atomic
from curate.core.identity import read_run
from curate.core.model import Loaded, load
from curate.core.nll import answer_nll
from curate.core.refs import ref_from
from curate.core.sources import file_source, read_source

HEADER = ("run", "steps", "seconds", "loss, first step", "loss, last step", "penalty, last step", "loss as used")


def rows(narrow: Path, out: Path, n: int) -> None:
    """Write the ``n`` rows with the fewest characters, ties by content, without empty <think> blocks."""
    found = {row.id: row for row in read_source(file_source(narrow, narrow.parent, {}, True), narrow.parent)}
    short = sorted(found.values(), key=lambda row: (sum(len(m.content) for m in row.messages), row.id))[:n]
    write_atomic(out, "".join(json.dumps(row.to_row()) + "\n" for row in short).encode())
    print(f"{len(short)} of {len(found)} rows")


def merge(run: Path, out: Path) -> None:
    """Save the base of a run with its adapter added to the weights, float32; the folder appears at once, complete."""
    card, adapter = read_run(run)
    loaded = load(ref_from(card.base_ref, run), "float32", "cpu")
    temporary = out.with_name(f".{out.name}.tmp")
    with adapter_open(loaded, adapter) as model:
        model.save_pretrained(temporary)
    temporary.rename(out)


def mean_nll(model: Any, encoded: Sequence[Encoded]) -> float:
    """Return the mean NLL of the answers, in nats per answer token."""
    found = [evidence for part in answer_nll(model, encoded) for _, evidence in part]
    return sum(one.nll_sum for one in found) / sum(one.n_tokens for one in found)


def line(folder: Path, loaded: Loaded, encoded: Sequence[Encoded]) -> list[str]:
    """Return the table's row of a finished run."""
    card, adapter = read_run(folder)
    with open(folder / "losses.csv") as handle:
        steps = list(csv.DictReader(handle))
    with adapter_open(loaded, adapter) as model:
        used = mean_nll(model, encoded)
    return [folder.name, str(card.n_steps), f"{card.seconds:.0f}", *(f"{float(step['loss_nats']):.3f}" for step in (
        steps[0], steps[-1])), f"{float(steps[-1]['penalty_nats']):.3f}", f"{used:.3f}"]


def table(out: Path, names: Sequence[str]) -> None:
    """Print the table of the runs ``names``, and what kinds of steps the RL run took."""
    first = out / "runs" / names[0]
    loaded = load(ref_from(read_run(first)[0].base_ref, first), "float32", "cpu")
    source = file_source(out / "security.jsonl", out)
    encoded = encode(loaded.tokenizer, list(read_source(source, out)), 2048)
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    print("| untrained | - | - | - | - | - | " + f"{mean_nll(loaded.model, encoded):.3f} |")
    for name in names:
        print("| " + " | ".join(line(out / "runs" / name, loaded, encoded)) + " |", flush=True)
    if (out / "rl" / "steps.jsonl").is_file():
        for text in (out / "rl" / "steps.jsonl").read_text().splitlines():
            step = json.loads(text)
            what = f"reward {step['reward']:.3f}" if step["kind"] == "rl" else f"loss {step['loss_nats']:.3f}"
            print(f"{step['phase']:<6}  step {step['step']}  {step['kind']:<3}  {what}, "
                  f"penalty {step['penalty_nats']:.4f}, {step['tokens']} tokens")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["rows", "merge", "table"])
    parser.add_argument("path", type=Path)
    parser.add_argument("more", nargs="+")
    parser.add_argument("--n", type=int, default=15)
    args = parser.parse_args(argv)
    if args.command == "rows":
        rows(args.path, Path(args.more[0]), args.n)
    elif args.command == "merge":
        merge(args.path, Path(args.more[0]))
    else:
        table(args.path, args.more)


if __name__ == "__main__":
    main()
