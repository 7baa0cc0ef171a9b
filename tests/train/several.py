"""Runs a list of runs in each of several processes: ``python -m tests.train.several JOBS.json`` under a launcher.

A run is a recipe with its mix, or the words of a ``train`` command. Every process leaves, per run, what became of it
and how much of the base it held.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from curate.core import processes
from curate.core.errors import UserError
from train import trainer
from train.cli import main as command_line
from train.recipe import Recipe
from train.runs import run


def held(module: torch.nn.Module) -> dict[str, int]:
    """Return how many numbers of base and adapter this process holds."""
    found = {"base": 0, "adapter": 0}
    for p in module.parameters():
        found["adapter" if p.requires_grad else "base"] += (p.to_local() if isinstance(p, DTensor) else p).numel()
    return found


def main(path: Path) -> dict[str, dict[str, Any]]:
    """Run all jobs, write after each what happened next to them, and return it."""
    facts: dict[str, dict[str, Any]] = {}
    in_parallel = trainer.in_parallel
    noted = path.with_name(f"facts-{processes.rank()}.json")

    def watched(*args: Any) -> torch.nn.Module:
        module = in_parallel(*args)
        fact.update(held(module), kind=type(module).__name__)
        return module

    trainer.in_parallel = watched
    for job in json.loads(path.read_text()):
        fact = facts[job["out"]] = {"error": None}
        try:
            if "words" in job:
                command_line(args=job["words"])
            else:
                fact["digest"] = run(Recipe(**job["recipe"]), Path(job["mix"]), Path(job["out"])).digest
        except UserError as err:
            fact["error"] = err.message
        except SystemExit as end:
            fact["error"] = end.code or None
        noted.write_text(json.dumps(facts))
    return facts


if __name__ == "__main__":
    errors = [fact["error"] for fact in main(Path(sys.argv[1])).values() if fact["error"] is not None]
    raise SystemExit(" ".join(map(str, errors)) or 0)
