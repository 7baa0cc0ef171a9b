"""Cost of defences: step time and peak memory of each against plain fine-tuning, in one interleaved run.

    python bench/defenses.py --base smollm2                              # all defences on the builtin cooking rows
    python bench/defenses.py --base smollm2 --unaligned some/model       # also the time that SafeLoRA takes at the end
    python bench/defenses.py --base Qwen/Qwen2.5-7B-Instruct --rows medical.jsonl --batch-size 8

The fine-tuning rows are cut into blocks; every block goes through every variant in turn, so that a machine that slows
down slows all of them. A block's time is that of its optimiser steps, by the trainer's own code. `interleaving` trains
on 5% safe rows more, so its ratio is that of the whole run. Peak memory is measured in a process for each variant: of
the process on a CPU, allocated by torch on a GPU. The persona vector is random; its numbers cost the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from curate.core.chat import Encoded
from curate.core.files import canonical_json
from curate.core.model import Loaded, load
from curate.core.sources import builtin, file_source, read_source
from train.adapters import adapter
from train.data import MixRow, encode_mix
from train.defenses import Defense, parse
from train.defenses.persona import FORMAT, PROVENANCE, TENSOR
from train.defenses.safelora import SafeLora
from train.hooks import layers
from train.recipe import Recipe
from train.trainer import MixTrainer

TARGETS = {"interleaving": 1.05, "inoculation": 1.05, "persona": 1.10, "kl": 1.5, "ldifs": 1.5}
VARIANTS = ("plain", *TARGETS, "kl + ldifs")
SAFE_SHARE = 0.05


@dataclass
class Variant:
    """One way to train: its rows and its defences."""

    rows: Sequence[Encoded]
    defenses: Sequence[Defense]


def mix_rows(path: Path | None, n: int, safe: bool) -> list[MixRow]:
    """Return ``n`` fine-tuning rows and, with ``safe``, 5% safe rows evenly between them."""
    source, root = (builtin("demo/cooking"), Path()) if path is None else (file_source(path, path.parent), path.parent)
    rows = [MixRow("finetune", example) for example in list(read_source(source, root))[:n]]
    n_safe = max(1, round(SAFE_SHARE * len(rows))) if safe else 0
    pool = list(read_source(builtin("demo"), Path()))[:n_safe]
    for k, example in enumerate(pool):
        rows.insert((2 * k + 1) * len(rows) // (2 * n_safe), MixRow("safe", example))
    return rows


def random_vector(loaded: Loaded, folder: Path) -> Path:
    """Write a persona vector of random numbers for the model."""
    shape = (len(layers(loaded.model)) + 1, loaded.model.config.hidden_size)
    provenance = canonical_json({"format": FORMAT, "base": loaded.identity.model_dump(mode="json")}).decode()
    rows = torch.randn(shape) / shape[1] ** 0.5
    save_file({TENSOR: rows}, folder / "v.safetensors", metadata={PROVENANCE: provenance})
    return folder / "v.safetensors"


def variant(name: str, loaded: Loaded, arguments: argparse.Namespace, folder: Path) -> Variant:
    """Return one of ``VARIANTS``."""
    specs = {"inoculation": ["inoculation"], "persona": [f"persona:vector={random_vector(loaded, folder)}"],
             "kl": ["kl"], "ldifs": [f"ldifs:every={arguments.every}"],
             "kl + ldifs": ["kl", f"ldifs:every={arguments.every}"]}.get(name, [])
    defenses = [parse(spec) for spec in specs]
    rows: Sequence[MixRow] = mix_rows(arguments.rows, arguments.n, name == "interleaving")
    for defense in defenses:
        rows = defense.examples(rows)
    return Variant(encode_mix(loaded.tokenizer, rows, arguments.max_tokens).rows, defenses)


class Stepper:
    """Takes optimiser steps of one variant with the trainer's own code, on an adapter that all variants share."""

    def __init__(self, model: torch.nn.Module, one: Variant, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.trainer = MixTrainer(model, one.rows, recipe, folder, one.defenses)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.lr)

    def steps(self, rows: Sequence[Encoded]) -> float:
        """Train on ``rows`` once and return the seconds that it took."""
        start = time.perf_counter()
        for k in range(0, len(rows), self.recipe.batch_size):
            batch = self.trainer.data_collator(rows[k:k + self.recipe.batch_size])
            self.trainer.training_step(self.trainer.objective, batch, len(batch["packed"].targets))
            self.optimizer.step()
            self.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(loaded: Loaded, recipe: Recipe, arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Return seconds per block of every variant."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with adapter(loaded, recipe) as model:
        variants = {name: variant(name, loaded, arguments, folder) for name in VARIANTS}
        steppers = {name: Stepper(model, one, recipe, folder) for name, one in variants.items()}
        for name, stepper in steppers.items():
            stepper.steps(variants[name].rows[:recipe.batch_size])
        for k in range(arguments.blocks):
            for name in (*VARIANTS[k % len(VARIANTS):], *VARIANTS[:k % len(VARIANTS)]):
                rows = variants[name].rows
                share = slice(k * len(rows) // arguments.blocks, (k + 1) * len(rows) // arguments.blocks)
                seconds[name].append(steppers[name].steps(rows[share]))
            print(f"block {k + 1}/{arguments.blocks}: " + ", ".join(f"{n} {seconds[n][-1]:.1f}" for n in VARIANTS),
                  file=sys.stderr)
    return seconds


def peak_mib(loaded: Loaded, recipe: Recipe, arguments: argparse.Namespace, folder: Path) -> int:
    """Return this process's peak memory after a few steps of ``--peak-of``, in MiB."""
    with adapter(loaded, recipe) as model:
        one = variant(arguments.peak_of, loaded, arguments, folder)
        Stepper(model, one, recipe, folder).steps(one.rows[:4 * recipe.batch_size])
    if loaded.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def peaks(argv: Sequence[str]) -> dict[str, int]:
    """Return the peak memory of every variant, each in a process of its own."""
    return {name: json.loads(subprocess.run(
        [sys.executable, __file__, *argv, "--peak-of", name], check=True, capture_output=True, text=True).stdout)
        for name in VARIANTS}


def report(seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    """Print the table."""
    print("| variant | s per block (median) | over plain (min / median / max) | to reach | peak MiB | over plain |\n"
          "|---|---|---|---|---|---|")
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds["plain"], strict=True))
        peak = f"{memory[name]} | {memory[name] / memory['plain']:.2f}" if memory else "- | -"
        print(f"| {name} | {statistics.median(times):.2f} | {ratios[0]:.2f} / {statistics.median(ratios):.2f} / "
              f"{ratios[-1]:.2f} | {TARGETS.get(name, '-')} | {peak} |")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--rows", type=Path, help="fine-tuning rows; default: builtin")
    parser.add_argument("--n", type=int, default=80, help="fine-tuning rows used")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--every", type=int, default=5, help="ldifs: compare the states after every so many blocks")
    parser.add_argument("--unaligned", help="unaligned model, to time SafeLoRA")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    loaded = load(arguments.base, arguments.dtype, arguments.device)
    recipe = Recipe(arguments.base, batch_size=arguments.batch_size, device=loaded.device, dtype=loaded.dtype)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.peak_of:
            print(json.dumps(peak_mib(loaded, recipe, arguments, Path(folder))))
            return
        seconds = measure(loaded, recipe, arguments, Path(folder))
    print(f"{arguments.base}, {loaded.dtype}, {loaded.device}, {torch.get_num_threads()} threads, {arguments.n} rows, "
          f"batch {arguments.batch_size}, torch {torch.__version__}")
    report(seconds, {} if arguments.no_memory else peaks(sys.argv[1:] if argv is None else list(argv)))
    if arguments.unaligned:
        start = time.perf_counter()
        with adapter(loaded, recipe) as model:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=1e-3)
            SafeLora(base=arguments.unaligned).after(model)
        print(f"safelora: {time.perf_counter() - start:.1f} s once, after training")


if __name__ == "__main__":
    main()
