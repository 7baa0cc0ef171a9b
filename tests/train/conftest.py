"""A tiny base model for the whole session, and recipes that fit it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import tiny_model
from train.recipe import Recipe


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def recipe(tiny: Path) -> Callable[..., Recipe]:
    """Make recipes for the tiny model; keyword arguments change knobs."""
    def make(**knobs: Any) -> Recipe:
        few = {"lora_r": 3, "lr": 1e-2, "batch_size": 3, "max_tokens": 120, "pack_tokens": 64, "save_every": 2}
        return Recipe(**{"base": str(tiny), "dtype": "float32", "device": "cpu", **few, **knobs})
    return make
