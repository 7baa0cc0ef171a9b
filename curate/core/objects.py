"""Objects at URLs such as ``s3://bucket/prefix``, through fsspec, and verified local copies of them.

An object is put whole or not at all, and never renamed. ``create`` is a put on the condition that nothing is there yet
(``If-None-Match``): of several writers one wins, and no clock decides which. fsspec and its drivers are loaded only
when a URL is met.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from curate.core.errors import Exit, UserError, require, unknown
from curate.core.files import file_sha256, sha256, write_atomic

DRIVERS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", None), "gcs": ("gcsfs", None), "az": ("adlfs", None),
           "abfs": ("adlfs", None)}
"""The driver of each kind of URL, and the extra of safeset that installs it."""

AT_ONCE = 64
"""How many objects are fetched at the same time."""
DELETED_AT_ONCE = 1000
"""How many objects are removed with one request, where the service can do that."""


LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE)
"""Errors that only this machine has, and no service."""
CONFLICTS = 5
"""How often an object is tried to be created while others are doing the same; S3 answers 409 to one of them."""


class Listed(NamedTuple):
    """What a listing says of a file or object: its size in bytes and when it was written (seconds, if known)."""

    size: int
    modified: float | None


def is_url(place: Path | str) -> bool:
    """Is this the URL of an object, and no path?"""
    return isinstance(place, str) and "://" in place


def read_place(text: str) -> Path | str:
    """Read a command line's folder: a URL of a known kind stays a text, everything else is a path."""
    return text.rstrip("/") if is_url(text) else Path(text)


class Objects:
    """The objects below one URL, by their names relative to it."""

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        if scheme not in DRIVERS:
            raise unknown("kind of URL", f"{scheme}://", [f"{name}://" for name in DRIVERS])
        require(*DRIVERS[scheme])
        import fsspec

        self.url = url.rstrip("/")
        self.root = rest.strip("/")
        self._errors = _errors(scheme)
        # s3fs asks for an object's size before it fetches one in pieces; ours are small, and fetched many at a time.
        whole = {"max_concurrency": 1} if scheme == "s3" else {}
        self._files: Any = fsspec.filesystem(scheme, use_listings_cache=False, **whole)

    def get(self, name: str) -> bytes:
        """Return an object's bytes; ``FileNotFoundError`` when there is none."""
        with self._readable(name):
            return self._files.cat_file(self._path(name))

    def get_many(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Yield the objects of ``names``, many at a time; those that are not there are left out."""
        ordered = list(names)
        for start in range(0, len(ordered), AT_ONCE):
            some = ordered[start:start + AT_ONCE]
            with self._readable(some[0]):
                found = self._files.cat([self._path(name) for name in some], on_error="return")
            for name in some:
                data = found[self._path(name)]
                if isinstance(data, FileNotFoundError):
                    continue
                with self._readable(name):
                    if isinstance(data, BaseException):
                        raise data
                yield name, data

    def put(self, name: str, data: bytes) -> None:
        """Put an object, in place of what is there."""
        with self._readable(name):
            self._files.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Put an object if there is none of this name; return whether it was put."""
        with self._readable(name):
            for _ in range(CONFLICTS - 1):
                try:
                    return self._create(name, data)
                except OSError as err:
                    if _refusal(err) not in ("ConditionalRequestConflict", "409"):
                        raise
            return self._create(name, data)

    def _create(self, name: str, data: bytes) -> bool:
        try:
            self._files.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        except OSError as err:
            if _refusal(err) not in ("PreconditionFailed", "412"):
                raise
            return False
        return True

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects, many at a time; one that is not there is gone already."""
        for start in range(0, len(names), DELETED_AT_ONCE):
            some = names[start:start + DELETED_AT_ONCE]
            with self._readable(some[0]):
                try:
                    self._files.rm([self._path(name) for name in some])
                except FileNotFoundError:
                    if len(some) > 1:
                        for name in some:
                            self.delete([name])

    def listed(self, folder: str = "") -> dict[str, Listed]:
        """Return the names right below ``folder`` that are objects."""
        with self._readable(folder):
            try:
                found = self._files.ls(self._path(folder), detail=True, refresh=True)
            except FileNotFoundError:
                return {}
        return {info["name"].rpartition("/")[2]: Listed(info["size"], _seconds(info)) for info in found
                if info["type"] == "file" and info["name"].strip("/") != self._path(folder)}

    def download(self, name: str, to: Path) -> None:
        """Write an object into a local file, piece by piece; ``FileNotFoundError`` when there is none."""
        with self._readable(name):
            self._files.get_file(self._path(name), str(to))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        """Turn what a driver raises, after its own retries, into a sentence; a missing object stays what it is."""
        try:
            yield
        except FileNotFoundError as err:
            if "bucket" in str(err).lower():
                raise UserError(f"The bucket of {self.url} does not exist.", "Make it, or check the URL.",
                                Exit.REMOTE) from err
            raise
        except PermissionError as err:
            raise UserError(f"No access to {self.url}/{name}: {err}.",
                            "Check the credentials in the environment and the rights on the bucket.",
                            Exit.REMOTE) from err
        except self._errors as err:
            if isinstance(err, OSError) and err.errno in LOCAL:
                raise
            raise UserError(f"{self.url}/{name} could not be reached: {str(err) or type(err).__name__}.",
                            "Check network, endpoint and credentials; what was finished before is kept, so run it "
                            "again.", Exit.REMOTE) from err


def _errors(scheme: str) -> tuple[type[BaseException], ...]:
    """Return what a driver raises when its service cannot be reached."""
    errors: tuple[type[BaseException], ...] = (OSError,)
    if importlib.util.find_spec("aiohttp"):
        from aiohttp import ClientError

        errors += (ClientError,)
    if scheme == "s3":
        from botocore.exceptions import BotoCoreError
        from botocore.exceptions import ClientError as Refused

        errors += (BotoCoreError, Refused)
    return errors


def _refusal(err: OSError) -> str:
    """Return the code with which an S3 endpoint refused, where there is one."""
    response = getattr(err.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _seconds(info: Mapping[str, Any]) -> float | None:
    found = next((info[key] for key in ("LastModified", "mtime", "updated", "last_modified") if key in info), None)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    return found.timestamp() if isinstance(found, datetime) else None


# Local copies


def cache_folder() -> Path:
    """Return where copies of objects are kept, each named by its sha256; it may be removed at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "safeset" / "objects"


@contextmanager
def _on_this_disk() -> Iterator[None]:
    """Turn what this machine's disk refuses into a sentence."""
    try:
        yield
    except OSError as err:
        raise UserError(f"No copies of objects can be kept in {cache_folder()}: {err.strerror or err}.",
                        "Free some space there, or name another folder with XDG_CACHE_HOME; what was finished before "
                        "is kept, so run it again.", Exit.ENVIRONMENT) from err


def kept(digest: str, suffix: str = "") -> Path | None:
    """Return the local copy with this sha256 if there is one that is whole."""
    path = _copy(digest, suffix)
    with _on_this_disk():
        if not path.is_file():
            return None
        state = path.stat()
        return path if sha256_at(str(path), state.st_size, state.st_mtime_ns) == digest else None


def keep(data: bytes, suffix: str = "") -> Path:
    """Keep a local copy under its sha256 and return its path."""
    digest = sha256(data)
    path = kept(digest, suffix)
    if path is None:
        path = _copy(digest, suffix)
        write_atomic(path, data)
    return path


def fetched(objects: Objects, wanted: Mapping[str, str], suffix: str) -> dict[str, Path]:
    """Return verified local copies of objects, given their sha256 by name; what is gone or changed is left out."""
    found = {name: path for name, digest in wanted.items() if (path := kept(digest, suffix)) is not None}
    absent = [name for name in wanted if name not in found]
    for name, data in objects.get_many(absent):
        if sha256(data) == wanted[name]:
            found[name] = keep(data, suffix)
    return found


def fetch(url: str, digest: str | None = None) -> tuple[Path, str]:
    """Return a local copy of the object at ``url`` and its sha256; ``UserError`` if that is not ``digest``."""
    folder, _, name = url.rpartition("/")
    suffix = Path(name).suffix
    path = kept(digest, suffix) if digest else None
    if path is not None:
        return path, str(digest)
    objects = Objects(folder)
    with _on_this_disk():
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as temporary:
            copy = Path(temporary) / name
            try:
                objects.download(name, copy)
            except FileNotFoundError:
                raise UserError(f"There is no object {url}.", "Check the URL.") from None
            found = file_sha256(copy)
            if digest is not None and found != digest:
                raise UserError(f"{url} has changed: sha256 {found[:12]}, the document says {digest[:12]}.",
                                "Restore the object, or make the document anew from the object as it is.",
                                Exit.INTEGRITY)
            _copy(found, suffix).parent.mkdir(parents=True, exist_ok=True)
            os.replace(copy, _copy(found, suffix))
    return _copy(found, suffix), found


def _copy(digest: str, suffix: str) -> Path:
    return cache_folder() / digest[:2] / f"{digest}{suffix}"


@cache
def sha256_at(path: str, size: int, mtime_ns: int) -> str:
    """Return a file's sha256, worked out once per process for each state of the file."""
    return file_sha256(Path(path))


def ordered(names: Sequence[str], suffix: str) -> list[str]:
    """Return the names that end in ``suffix`` and are no temporaries, sorted."""
    return sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))
