"""Checkpoints that count only when they are complete.

``transformers`` writes a checkpoint file by file, so a killed process can leave a torn one that looks whole. Here the
files are made durable first and a marker is written last; a folder without the marker is as good as none.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, sync_folder, write_atomic

MARKER = "complete.json"
NAME = re.compile(r"checkpoint-(\d+)")
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream", "No space left")


def seal(folder: Path, seconds: float) -> None:
    """Make the checkpoint in ``folder`` durable and mark it complete; ``seconds`` is the training time so far."""
    sync_tree(folder)
    write_atomic(folder / MARKER, canonical_json({"seconds": round(seconds, 3)}))


def newest(folder: Path) -> tuple[Path, float] | None:
    """Return the newest complete checkpoint in ``folder`` with its training time, or None; delete torn ones.

    What has another name is somebody else's and left alone.
    """
    complete = []
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        match = NAME.fullmatch(path.name)
        if not match or not path.is_dir():
            continue
        if (path / MARKER).is_file():
            complete.append((int(match[1]), path))
        else:
            shutil.rmtree(path)
    if not complete:
        return None
    path = max(complete)[1]
    return path, float(json.loads((path / MARKER).read_bytes())["seconds"])


def sync_tree(folder: Path) -> None:
    """Make every file of ``folder`` durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    sync_folder(folder)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Turn a failure to write (full or read-only disk), in whatever library, into a ``UserError`` (environment)."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as err:
        if isinstance(err, RuntimeError) and not any(text in str(err) for text in TORCH_WRITE_ERRORS):
            raise
        reason = getattr(err, "strerror", None) or str(err).strip().splitlines()[0]
        raise UserError(f"Could not write {what}: {reason}.",
                        "Free some space or choose another --out; the same command goes on from the last checkpoint.",
                        Exit.ENVIRONMENT) from err
