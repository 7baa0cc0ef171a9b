"""Files that exist whole or not at all, digests, and paths that stay inside their folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from curate.core.errors import Exit, UserError

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
"""The name of a file while it is written; a process that is killed then leaves it behind."""


def canonical_json(value: Any) -> bytes:
    """Return ``value`` as JSON bytes that depend on nothing but its content."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write that takes its place at ``path`` when the ``with`` block ends well, and is gone otherwise.

    After any crash ``path`` is the old file or the new one, never a mixture. Raises ``UserError`` (environment) when
    the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as err:
        raise UserError(f"Could not write {path}: {err.strerror or err}.",
                        "Free some space or choose another place; what was finished before is kept, so run it again.",
                        Exit.ENVIRONMENT) from err
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``; see ``atomic``."""
    with atomic(path) as handle:
        handle.write(data)


def remove_unfinished(path: Path) -> None:
    """Delete what killed processes left of ``path``; only while nobody writes it."""
    for entry in path.parent.iterdir():
        if TEMPORARY.fullmatch(entry.name) and entry.name.startswith(f".{path.name}."):
            entry.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def inside(root: Path, relative: str) -> Path:
    """Return ``root / relative`` if it exists below ``root`` and is reached through no link and no ``..``.

    Raises ``UserError`` (integrity) otherwise: a document from someone else must not reach other files.
    """
    pure = PurePosixPath(relative)
    if pure.is_absolute() or ".." in pure.parts or "\\" in relative or not pure.parts:
        raise UserError(f"The path '{relative}' leaves the folder of the document that names it.",
                        "Documents may only name files below their root folder.", Exit.INTEGRITY)
    path = root
    for part in pure.parts:
        path = path / part
        if os.path.islink(path):
            raise UserError(f"The path '{relative}' goes through a symbolic link ({path}).",
                            "Put a real file there.", Exit.INTEGRITY)
    if not os.path.exists(path):
        raise UserError(f"The file '{relative}' is missing from {root}.",
                        "Put it back, or give the folder it is relative to with --root.", Exit.INTEGRITY)
    return path


def relative_to_root(path: Path, root: Path) -> str:
    """Return ``path`` relative to ``root`` with forward slashes; ``UserError`` when it lies outside."""
    try:
        return path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        raise UserError(f"{path} is not below {root.resolve()}, so a document there cannot name it.",
                        "Write the document in a folder above its data, or pass --root with such a folder.") from None
