"""One tiny model for the whole floor; tests that change something make their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from curate.core.model import Loaded, load
from tests.fakes import tiny_adapter, tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def adapter_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(model_folder, tmp_path_factory.mktemp("adapter") / "narrow")


@pytest.fixture(scope="session")
def loaded(model_folder: Path) -> Loaded:
    return load(str(model_folder), "float32", "cpu")
