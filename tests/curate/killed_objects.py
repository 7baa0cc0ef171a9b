"""SIGKILL before the first, second, ... request that changes a bucket; the endpoint is that of the environment.

The process that counts never speaks to the endpoint itself, so that its children fork from a state without threads.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
from aiobotocore.httpsession import AIOHTTPSession
from s3fs import S3FileSystem

from curate.core.objects import Objects
from curate.storage import LocalStorage
from curate.store import Store
from tests.curate.evidence import SCORED, fill, header, scatter
from tests.curate.faults import Outcome
from tests.curate.killed_store import (
    check_after_kill,
    check_merged,
    check_whole,
    compact_twice,
    damage,
    in_child,
)
from tests.curate.services import beside, objects_served

CHANGING = ("PUT", "POST", "DELETE")
"""Puts, conditional or not; removals; the steps of an upload in pieces."""
BUCKET = "s3://killed"
PIECE = 1024
"""Bytes of a piece where objects go up in pieces; one of less than two goes up whole."""


@dataclass(frozen=True)
class Sweep:
    """Work on stores of objects that is killed at every step: what is there before, and what must be so afterwards."""

    what: str
    begin: Callable[[str], object]
    work: Callable[[str], object]
    check: Callable[[str, str], object]
    pieces: bool = False


def sweeps(root: Path) -> list[Sweep]:
    """Return what is killed; ``root`` holds the undisturbed stores."""
    new = Sweep("filling a new store", lambda place: None, partial(fill, models=SCORED), check_new)
    return [new, Sweep("mending a damaged one", partial(begin_damaged, root / "clean"), open_to_write, check_whole),
            replace(new, what="filling one in pieces", pieces=True),
            Sweep("compacting one", partial(copy, root / "scattered"), compact_twice, check_merged)]


def open_to_write(place: str) -> None:
    """Open a store, which mends it."""
    Store.create_or_open(place, header()).close()


def begin_damaged(source: Path, place: str) -> None:
    """Put a damaged copy of a store."""
    copy(source, place)
    damage(place)


def check_new(place: str, digest: str) -> None:
    """What is left is whole as far as it goes; the same work again ends in the same digest."""
    if "store.json" in Objects(place).listed():
        check_after_kill(place)
    check_whole(place, digest)


def copy(source: Path, target: str) -> None:
    """Put a folder's store where objects are."""
    files, objects = LocalStorage(source), Objects(target)
    names = [f"{folder}/{name}" for folder in ("parts", "ledger", "models") for name in files.listed(folder)]
    for name, data in files.get_many(["store.json", "plan.json", *names]):
        objects.put(name, data)


def undisturbed(root: Path) -> None:
    """Make the bucket, an undisturbed store and one of many parts, and note their digests.

    They are copies of folders, in which the evidence must be the same.
    """
    fsspec.filesystem("s3", use_listings_cache=False).makedirs(BUCKET.removeprefix("s3://"), exist_ok=True)
    for name, make in (("clean", partial(fill, models=SCORED)), ("scattered", scatter)):
        make(root / name)
        copy(root / name, f"{BUCKET}/{name}")
        (root / f"{name}.digest").write_text(Store.open_read(root / name).evidence_digest())


def killed_at(count: int, sweep: Sweep, place: str) -> None:
    """Do the work of a sweep at ``place``; this process dies before its ``count``-th request that changes anything."""
    if sweep.pieces:
        in_pieces()
    sweep.begin(place)
    left, send = itertools.count(count - 1, -1), AIOHTTPSession.send

    async def counted(self: AIOHTTPSession, request: Any) -> Any:
        if request.method in CHANGING and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return await send(self, request)

    AIOHTTPSession.send = counted
    sweep.work(place)


def in_pieces() -> None:
    """Let every object of two pieces or more go up in pieces."""
    whole = S3FileSystem._pipe_file

    @functools.wraps(whole)
    async def pipe(self: S3FileSystem, path: str, data: bytes, **more: Any) -> Any:
        return await whole(self, path, data, **{**more, "chunksize": PIECE})

    S3FileSystem._pipe_file = pipe


def checked(root: Path, sweep: Sweep, places: Sequence[tuple[str, Path]]) -> None:
    """Check every place with its local copies; count in a file those that are not as they must be."""
    digest = (root / ("scattered" if sweep.check is check_merged else "clean")).with_suffix(".digest").read_text()
    wrong = []
    for place, copies in places:
        os.environ["XDG_CACHE_HOME"] = str(copies)
        try:
            sweep.check(place, digest)
        except Exception as err:
            wrong.append(f"{place}: {err!r}\n")
    (root / "wrong").write_text("".join(wrong))


def killed_everywhere(root: Path, sweep: Sweep, counts: Iterable[int]) -> tuple[int, int]:
    """Kill the work at the steps ``counts`` until it passes; return how often, and how many stores are not whole.

    Every other store is gone on with by what could be another machine: without the local copies of the killed one.
    """
    places = []
    for count in counts:
        place, copies = f"{BUCKET}/{sweep.what.replace(' ', '-')}-{count}", root / f"{sweep.what}-{count}"
        os.environ["XDG_CACHE_HOME"] = str(copies)
        ended = in_child(partial(killed_at, count, sweep, place))
        assert ended in (0, -signal.SIGKILL), (sweep.what, count, ended)
        if ended == 0:
            break
        places.append((place, copies if len(places) % 2 else root / f"another-{sweep.what}-{count}"))
    assert in_child(partial(checked, root, sweep, places)) == 0
    wrong = (root / "wrong").read_text()
    sys.stderr.write(wrong)
    return len(places), wrong.count("\n")


def swept(root: Path, at: Sequence[Iterable[int]] = (range(1, 1000),) * 4) -> Outcome:
    """Kill each sweep at every step, or the first sweeps at the steps ``at``, on the endpoint of the environment."""
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    assert in_child(partial(undisturbed, root)) == 0
    found = {sweep.what: killed_everywhere(root, sweep, counts) for sweep, counts in zip(sweeps(root), at)}
    struck = sum(kills for kills, _ in found.values())
    return Outcome(struck, struck, sum(wrong for _, wrong in found.values()),
                   ", ".join(f"{kills} requests of {what}" for what, (kills, _) in found.items()))


def request_kills(root: Path) -> Outcome:
    """Kill all sweeps at every step, on an endpoint of our own."""
    with beside(objects_served) as (url, _), patch.dict(
            os.environ, AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test",
            AWS_DEFAULT_REGION="us-east-1"):
        return swept(root)
