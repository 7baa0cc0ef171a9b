"""Copies of a model's or an adapter's folder in which one thing is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def copied(source: Path, target: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(source, target)
    change(target)
    return target


def edit(name: str, **fields: Any) -> Callable[[Path], object]:
    """Return a change of fields in a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


def as_pickle(weights: str, name: str) -> Callable[[Path], object]:
    """Return a change of safetensors into a pickle."""
    def change(folder: Path) -> None:
        torch.save(load_file(folder / weights), folder / name)
        (folder / weights).unlink()
    return change
