"""Where a store's files lie: a folder on this machine, or the objects below a URL that many machines share.

Both put a named file whole or not at all; nothing else is asked of them: no rename, no clock, no shared disk.

* ``LocalStorage``: temporary file, fsync, rename, fsync of the folder. One writer at a time holds a lock, which the
  kernel releases with its process.
* ``ObjectStorage``: plain puts. Any number of writers at once and no lock, because no two of them can disagree: a part
  is named by its bytes, an entry of the ledger is *created* (a put that fails where something is), and the loser of
  such a race reads what the winner wrote and leaves out the rows that are there. A writer that dies leaves nothing
  behind that others would have to wait for.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from curate.core.errors import Exit, UserError
from curate.core.files import TEMPORARY, canonical_json, sha256, sync_folder, write_atomic
from curate.core.objects import Listed, Objects, fetched, is_url, keep, ordered, sha256_at

FOLDERS = ("parts", "ledger", "models", "quarantine")


class Storage(Protocol):
    """Named files, such as ``parts/x.parquet``."""

    place: Path | str
    shared: bool
    """May several write at once?"""

    def put(self, name: str, data: bytes) -> None:
        """Put a file in place of what is there."""

    def create(self, name: str, data: bytes) -> bool:
        """Put a file if there is none of this name; return whether it was put."""

    def get(self, name: str) -> bytes:
        """Return a file's bytes; ``FileNotFoundError`` when there is none."""

    def get_many(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yield files; those that are not there are left out."""

    def listed(self, folder: str = "") -> dict[str, Listed]:
        """Return the plain files right in a folder by name."""

    def files(self, wanted: Mapping[str, str]) -> dict[str, Path]:
        """Return local files for names with their sha256; one that is gone or has another sha256 is left out."""

    def whole(self, wanted: Mapping[str, str]) -> set[str]:
        """Return the names, of names with their sha256, that have it where they lie, whatever copies there are."""

    def delete(self, *names: str) -> None:
        """Remove files, as far as they are there."""

    def put_aside(self, name: str) -> None:
        """Move a file into the quarantine, if it is there."""

    def leftovers(self) -> list[str]:
        """Return the temporary files that an interrupted write has left."""

    def open_to_write(self) -> AbstractContextManager[None]:
        """Make the folders, keep other writers out where that is needed, and clear leftovers away."""

    def check_new(self) -> None:
        """Refuse a place that holds something else than a store, before anything is written there."""


def storage_at(place: Path | str) -> Storage:
    """Return the storage at a folder or a URL."""
    return ObjectStorage(str(place)) if is_url(place) else LocalStorage(Path(place))


class LocalStorage:
    """See ``Storage``: a folder."""

    shared = False

    def __init__(self, root: Path) -> None:
        self.place = root
        self.root = root

    def put(self, name: str, data: bytes) -> None:
        """See ``Storage``; ``UserError`` when the disk is full."""
        write_atomic(self.root / name, data)

    def create(self, name: str, data: bytes) -> bool:
        """See ``Storage``; the lock keeps others away."""
        if (self.root / name).exists():
            return False
        self.put(name, data)
        return True

    def get(self, name: str) -> bytes:
        """See ``Storage``."""
        return (self.root / name).read_bytes()

    def get_many(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See ``Storage``."""
        for name in names:
            try:
                yield name, self.get(name)
            except FileNotFoundError:
                continue

    def listed(self, folder: str = "") -> dict[str, Listed]:
        """See ``Storage``; what lies behind a link is not there."""
        path = self.root / folder
        if not path.is_dir():
            return {}
        found = {}
        for entry in os.scandir(path):
            if entry.is_file(follow_symlinks=False) and not TEMPORARY.fullmatch(entry.name):
                state = entry.stat()
                found[entry.name] = Listed(state.st_size, state.st_mtime)
        return found

    def files(self, wanted: Mapping[str, str]) -> dict[str, Path]:
        """See ``Storage``."""
        found = {}
        for name, digest in wanted.items():
            path = self.root / name
            if path.is_file() and not path.is_symlink():
                state = path.stat()
                if sha256_at(str(path), state.st_size, state.st_mtime_ns) == digest:
                    found[name] = path
        return found

    def whole(self, wanted: Mapping[str, str]) -> set[str]:
        """See ``Storage``."""
        return set(self.files(wanted))

    def delete(self, *names: str) -> None:
        """See ``Storage``."""
        for name in names:
            (self.root / name).unlink(missing_ok=True)

    def put_aside(self, name: str) -> None:
        """See ``Storage``."""
        path = self.root / name
        if path.exists() or path.is_symlink():
            aside = self.root / "quarantine"
            aside.mkdir(exist_ok=True)
            os.replace(path, aside / path.name)
            sync_folder(aside)
            sync_folder(path.parent)

    def leftovers(self) -> list[str]:
        """See ``Storage``."""
        found = []
        for folder in ("", *FOLDERS):
            if (self.root / folder).is_dir():
                found += [f"{folder}/{name}".lstrip("/") for name in os.listdir(self.root / folder)
                          if TEMPORARY.fullmatch(name)]
        return sorted(found)

    @contextmanager
    def open_to_write(self) -> Iterator[None]:
        """See ``Storage``; ``UserError`` (locked) names who is writing."""
        lock = Lock(self.root / "lock")
        try:
            for folder in ("", *FOLDERS):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as err:
            raise UserError(f"{self.root} cannot be written: {err.strerror}.", "Choose another --store.",
                            Exit.ENVIRONMENT) from err
        try:
            for leftover in self.leftovers():
                self.delete(leftover)
            yield
        finally:
            lock.release()

    def check_new(self) -> None:
        """See ``Storage``."""
        path = self.root
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not the folder of a store.", "Give a folder with --store.")
        if not path.is_dir() or (path / "store.json").exists():
            return
        foreign = [name for name in os.listdir(path)
                   if name not in (*FOLDERS, "lock") and not TEMPORARY.fullmatch(name)]
        if foreign:
            raise _not_empty(path, foreign)


class ObjectStorage:
    """See ``Storage``: objects below a URL; parts are read through verified local copies."""

    shared = True

    def __init__(self, url: str) -> None:
        self.place: Path | str = url
        self.objects = Objects(url)

    def put(self, name: str, data: bytes) -> None:
        """See ``Storage``; a copy of a part is kept, because its writer is the first to read it."""
        self.objects.put(name, data)
        if name.startswith("parts/"):
            keep(data, Path(name).suffix)

    def create(self, name: str, data: bytes) -> bool:
        """See ``Storage``."""
        return self.objects.create(name, data)

    def get(self, name: str) -> bytes:
        """See ``Storage``."""
        return self.objects.get(name)

    def get_many(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See ``Storage``."""
        return self.objects.get_many(names)

    def listed(self, folder: str = "") -> dict[str, Listed]:
        """See ``Storage``."""
        return self.objects.listed(folder)

    def files(self, wanted: Mapping[str, str]) -> dict[str, Path]:
        """See ``Storage``."""
        return fetched(self.objects, wanted, ".parquet")

    def whole(self, wanted: Mapping[str, str]) -> set[str]:
        """See ``Storage``."""
        return {name for name, data in self.objects.get_many(wanted) if sha256(data) == wanted[name]}

    def delete(self, *names: str) -> None:
        """See ``Storage``."""
        self.objects.delete(names)

    def put_aside(self, name: str) -> None:
        """See ``Storage``: a copy goes to the quarantine before the object is removed."""
        try:
            self.objects.put(f"quarantine/{name.rpartition('/')[2]}", self.objects.get(name))
        except FileNotFoundError:
            return
        self.objects.delete([name])

    def leftovers(self) -> list[str]:
        """See ``Storage``: a put that is cut off leaves nothing."""
        return []

    def open_to_write(self) -> AbstractContextManager[None]:
        """See ``Storage``: nobody has to be kept out."""
        return nullcontext()

    def check_new(self) -> None:
        """See ``Storage``."""
        names = self.listed()
        if "store.json" not in names and names:
            raise _not_empty(self.place, names)


def _not_empty(place: Path | str, foreign: Collection[str]) -> UserError:
    return UserError(f"{place} is no store, and not empty: it holds {sorted(foreign)[0]}.",
                     "Give an empty or a new folder with --store.")


def documents(storage: Storage, folder: str) -> list[str]:
    """Return the names of the JSON files in a folder, sorted."""
    return [f"{folder}/{name}" for name in ordered(list(storage.listed(folder)), ".json")]


# One writer of a folder


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
            note = holder(os.pread(handle, 4096, 0))
            os.close(handle)
            raise UserError(f"The store {self.path.parent} is being written by {told(note)}.",
                            "Wait for it to end and try again, or use another --store.", Exit.LOCKED) from None
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, canonical_json(note) + b"\n", 0)
        except OSError:
            os.close(handle)
            raise
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


def holder(data: bytes) -> dict[str, Any] | None:
    """Read the note of a lock: pid, host and since; None where there is none."""
    try:
        note = json.loads(data)
        return {"pid": int(note["pid"]), "host": str(note["host"]), "since": str(note["since"])}
    except (ValueError, TypeError, KeyError):
        return None


def told(note: Mapping[str, Any] | None) -> str:
    """Return who holds a lock, for people."""
    return f"process {note['pid']} on {note['host']} since {note['since']}" if note else "another process"
