"""A real S3 endpoint on loopback, for tests of shared storage."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.curate.services import objects_served

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """The URL of an S3 server that forgets everything at the end; tests skip where moto is not installed."""
    for name in ("moto", "s3fs"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    with objects_served() as url:
        yield url


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new, empty place on it, in the environment that its users need; local copies go to ``tmp_path``."""
    for name, value in {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_DEFAULT_REGION": "us-east-1", "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    import fsspec

    files = fsspec.filesystem("s3", use_listings_cache=False)
    if not files.exists("evidence"):
        files.mkdir("evidence")
    return f"s3://evidence/run-{next(NUMBERS)}"
