"""Parts and their ledger: the files of a store, each of which counts only when an entry vouches for it.

    parts/<kind>-<digest>.parquet   put whole, named by what is in it
    ledger/<slot>.json              put after its part: size, rows and sha256

The slot of a part of examples or scores is the part's own stem; a corpus has one slot for good and its entry names the
latest part. A crash between the two writes leaves a part without an entry, which counts for nothing. An entry that is
torn, or whose part is missing or changed, is damage: readers refuse it, a writer puts it aside.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from curate.core.documents import Part
from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, file_sha256, sha256, sync_folder, write_atomic

Kind = Literal["examples", "nll", "corpus"]

FOLDERS = ("parts", "ledger", "models", "quarantine")
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
PART = r"(examples|nll|corpus)-[0-9a-f]{24}\.parquet"


@dataclass(frozen=True)
class Finding:
    """Something wrong in a store: which file (relative to the store) and what."""

    path: str
    problem: str


class Entry(Part):
    """What the ledger says of one part."""

    part: str = Field(pattern=f"^{PART}$")
    kind: Kind
    model_id: str | None
    sha256: str
    bytes: int
    rows: int

    def to_bytes(self) -> bytes:
        """Return the entry's file: canonical JSON with a digest over the other fields."""
        fields = self.model_dump(mode="json")
        return canonical_json({**fields, "digest": sha256(canonical_json(fields))}) + b"\n"

    @classmethod
    def from_bytes(cls, slot: str, data: bytes) -> Entry:
        """Read an entry; ``ValueError`` when a single bit differs from what ``to_bytes`` wrote."""
        body = json.loads(data)
        if not isinstance(body, dict):
            raise ValueError("no object")
        entry = cls.model_validate({k: v for k, v in body.items() if k != "digest"})
        stem = entry.part.removesuffix(".parquet")
        if entry.to_bytes() != data or not stem.startswith(entry.kind) or (entry.kind != "corpus" and stem != slot):
            raise ValueError("digest")
        return entry


@dataclass
class Ledger:
    """The entries of a store by slot, and the files whose entries cannot be read."""

    root: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    torn: list[Finding] = field(default_factory=list)

    @classmethod
    def load(cls, root: Path) -> Ledger:
        """Read every entry below ``root``; an unreadable one is kept in ``torn``."""
        ledger = cls(root)
        for path in listed(root / "ledger", ".json"):
            try:
                ledger.entries[path.stem] = Entry.from_bytes(path.stem, path.read_bytes())
            except (ValueError, OSError, RecursionError):
                ledger.torn.append(Finding(f"ledger/{path.name}", "the entry is torn or was changed"))
        return ledger

    def path(self, entry: Entry) -> Path:
        """Return where the part of an entry lies."""
        return self.root / "parts" / entry.part

    def put(self, slot: str, entry: Entry, data: bytes) -> None:
        """Write a part, then the entry that makes it count; a part that the slot named before is removed."""
        before = self.entries.get(slot)
        write_atomic(self.path(entry), data)
        write_atomic(self.root / "ledger" / f"{slot}.json", entry.to_bytes())
        self.entries[slot] = entry
        if before is not None and before.part != entry.part:
            self.path(before).unlink(missing_ok=True)

    def select(self, kind: Kind, model_id: str | None = None) -> list[Entry]:
        """Return the entries of one kind (and model), in an order that depends on their content only."""
        found = (e for e in self.entries.values() if e.kind == kind and model_id in (None, e.model_id))
        return sorted(found, key=lambda e: e.part)

    def damage(self, deep: Kind | bool) -> list[Finding]:
        """Return what is damaged: the size of every part is checked, the sha256 of the kind ``deep`` (True: of all)."""
        found = list(self.torn)
        for entry in sorted(self.entries.values(), key=lambda e: e.part):
            problem = self._problem(entry, deep in (True, entry.kind))
            if problem:
                found.append(Finding(f"parts/{entry.part}", problem))
        return found

    def _problem(self, entry: Entry, deep: bool) -> str | None:
        path = self.path(entry)
        if path.is_symlink() or not path.is_file():
            return "the part is missing"
        state = path.stat()
        if state.st_size != entry.bytes:
            return f"the part has {state.st_size} bytes, the ledger says {entry.bytes}"
        if deep and _sha256_at(str(path), state.st_size, state.st_mtime_ns) != entry.sha256:
            return "the part's sha256 is not the ledger's"
        return None

    def orphans(self) -> list[Path]:
        """Return the parts that no entry names: what a write that was cut off leaves behind."""
        named = {entry.part for entry in self.entries.values()} | {f"{Path(t.path).stem}.parquet" for t in self.torn}
        return [path for path in listed(self.root / "parts", ".parquet") if path.name not in named]

    def mend(self) -> list[str]:
        """Put damaged parts and entries aside and return their names; orphans go too, but are no damage."""
        damage = self.damage(deep=True)
        slots = {f"parts/{entry.part}": slot for slot, entry in self.entries.items()}
        for finding in damage:
            slot = slots.get(finding.path)
            put_aside(self.root, self.root / finding.path)
            if slot is not None:
                put_aside(self.root, self.root / "ledger" / f"{slot}.json")
                del self.entries[slot]
        self.torn.clear()
        for path in self.orphans():
            put_aside(self.root, path)
        return [finding.path for finding in damage]


@cache
def _sha256_at(path: str, size: int, mtime_ns: int) -> str:
    """Return a file's sha256, worked out once per process for each state of the file."""
    return file_sha256(Path(path))


def listed(folder: Path, suffix: str) -> list[Path]:
    """Return the files in ``folder`` that end in ``suffix`` and are no temporaries, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix == suffix and not p.name.startswith("."))


def temporaries(root: Path) -> Iterator[Path]:
    """Yield the temporary files that an interrupted write has left in a store."""
    for folder in (root, *(root / name for name in FOLDERS)):
        if folder.is_dir():
            yield from (path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name))


def put_aside(root: Path, path: Path) -> None:
    """Move a file into the quarantine of its store, if it is there at all."""
    if path.exists() or path.is_symlink():
        aside = root / "quarantine"
        aside.mkdir(exist_ok=True)
        os.replace(path, aside / path.name)
        sync_folder(aside)
        sync_folder(path.parent)


class Lock:
    """One writer at a time: an flock, which the kernel releases with its process, and a note of who holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock; ``UserError`` (locked) names the holder."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(handle, 4096, 0))
            os.close(handle)
            raise UserError(f"The store {self.path.parent} is being written by {holder}.",
                            "Wait for it to end and try again, or use another --store.", Exit.LOCKED) from None
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        os.ftruncate(handle, 0)
        os.pwrite(handle, canonical_json(note) + b"\n", 0)
        self._handle = handle
        _let_go_in_children()
        _HELD.add(handle)

    def release(self) -> None:
        """Give the lock back; the file stays, because removing it would let two writers in."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            _HELD.discard(handle)
            os.ftruncate(handle, 0)
            os.close(handle)


_HELD: set[int] = set()


@cache
def _let_go_in_children() -> None:
    """Close the lock in forked children, so that a worker that outlives its parent does not keep it."""
    def close() -> None:
        for handle in _HELD:
            os.close(handle)
        _HELD.clear()

    os.register_at_fork(after_in_child=close)


def _holder(data: bytes) -> str:
    try:
        note: dict[str, Any] = json.loads(data)
        return f"process {note['pid']} on {note['host']} since {note['since']}"
    except (ValueError, TypeError, KeyError):
        return "another process"
