"""Which engine scores, and how to open it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from curate.core.errors import UserError, require
from curate.core.model import load, pick_device, pick_dtype
from curate.core.terminal import say
from curate.scorers import Scorer

ENGINES = ("auto", "transformers", "vllm", "server")
SERVED = "served"
"""The dtype of a server that nobody has named."""


@dataclass(frozen=True)
class EngineSettings:
    """What the user said about the engine; the rest only matters to ``server``."""

    name: str = "auto"
    base_urls: tuple[str, ...] = ()
    served: tuple[tuple[str, str], ...] = ()
    """(name at the server, name of the model here); what is not listed is served under its own name."""
    api_key_env: str = "SAFESET_API_KEY"
    """The environment variable that holds the key."""
    concurrency: int = 16
    timeout_s: float = 120.0
    """For one request."""
    retries: int = 8
    backoff_s: float = 0.5
    """Before the first repetition; doubled each time, up to 30 s."""


@dataclass(frozen=True)
class Models:
    """What is to be scored with: the aligned model, and the adapters of the members by their names."""

    ref: str
    name: str
    adapters: Mapping[str, Path]
    dtype: str
    device: str
    max_tokens: int


def choose(settings: EngineSettings, device: str, adapters: Mapping[str, Path],
           tell: Callable[[str], None] = say) -> EngineSettings:
    """Return the settings with an engine's name in the place of ``auto``, and say why it is this one.

    Raises ``UserError`` for an engine that cannot work here, or that cannot take one of the adapters, before anything
    is loaded.
    """
    device = pick_device(device) if settings.name in ("auto", "vllm") else device
    name = settings.name
    if name == "auto":
        name, why = _fastest(settings, device)
        tell(f"Engine: {name} ({why}).")
    if name == "server" and not settings.base_urls:
        raise UserError("The server engine needs the address of a server.",
                        "Give it with --base-url http://HOST:8000/v1 (several are allowed).")
    if name != "server" and (settings.base_urls or settings.served):
        raise UserError(f"--base-url and --served-model mean nothing to the engine {name}.",
                        "Leave them out, or use --engine server.")
    if name == "vllm":
        require("vllm", "vllm")
        from curate.core.vllm import check_adapters

        check_adapters(adapters, on_gpu=device.startswith("cuda"))
    return replace(settings, name=name)


def _fastest(settings: EngineSettings, device: str) -> tuple[str, str]:
    if settings.base_urls:
        return "server", "a --base-url is given"
    if not device.startswith("cuda"):
        return "transformers", "there is no CUDA device, and on CPU vLLM would have to start anew for every model"
    if importlib.util.find_spec("vllm") is None:
        return "transformers", "there is a CUDA device, but no vLLM; pip install 'safeset[vllm]' would be faster"
    return "vllm", "there is a CUDA device, and vLLM is installed"


def engine_dtype(settings: EngineSettings, dtype: str, device: str) -> str:
    """Return the dtype that a store records: a server's is what the user says it is, or ``SERVED``.

    On a CPU vLLM merges members into the base, where bfloat16 would round part of a small adapter away: ``auto`` is
    float32 there.
    """
    if settings.name == "server":
        return SERVED if dtype == "auto" else dtype
    if settings.name == "vllm" and dtype == "auto" and pick_device(device) == "cpu":
        return "float32"
    return pick_dtype(dtype, pick_device(device))


@contextmanager
def open_scorer(settings: EngineSettings, models: Models) -> Iterator[Scorer]:
    """Open the engine ``settings.name`` (not ``auto``) for the length of a ``with`` block."""
    if settings.name == "server":
        from curate.scorers.server import ServerScorer

        with ServerScorer.connected(models, settings) as scorer:
            yield scorer
    elif settings.name == "vllm":
        from curate.scorers.vllm import VllmScorer

        scorer = VllmScorer(models)
        try:
            yield scorer
        finally:
            scorer.close()
    else:
        from curate.scorers.transformers import TransformersScorer

        yield TransformersScorer(load(models.ref, models.dtype, models.device))
