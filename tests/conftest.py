"""What all tests share: no network, one thread (tiny models are faster so), and the real data of others, if here."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.environ.pop("SSL_CERT_FILE", None)  # no test speaks TLS, and reading all certificates takes 60 ms a client
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)

import pytest

from tests import forked, frozen
from tests.real_vllm import aligned_server  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Have the process to fork from ready when the first test wants it; a few tests by hand may not want it at all."""
    if hasattr(config, "workerinput") and config.getoption("markexpr") != "vllm":
        forked.begin()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no process waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_several.py")


def pytest_collection_finish() -> None:
    """Leave what the tests' files have imported alone."""
    frozen.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """After each file, leave also what it has imported alone."""
    yield
    if nextitem is None or nextitem.path != item.path:
        frozen.freeze()


def pytest_unconfigure() -> None:
    """Let the end of the process clear away everything, or nanobind complains of leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data next to the repository; tests that read it skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data is not here: ../shared/data, relative to the repository")
    return folder
