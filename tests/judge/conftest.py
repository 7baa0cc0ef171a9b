"""One tiny model for the room, with a context that holds every probe."""

from __future__ import annotations

from pathlib import Path

import pytest

from curate.core.model import Loaded, load
from tests.fakes import tiny_model, uniform_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("judged") / "tiny", max_position_embeddings=1024)


@pytest.fixture(scope="session")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(str(uniform_model(tmp_path_factory.mktemp("judged") / "uniform")), "float32", "cpu")
