"""Run as a program: kill a writer at its first, second, third ... call to the disk and check the store each time.

The process that counts never opens a store itself, so that its children fork from a state without threads. It does
make one table, after which all is imported, and turns fsync off: a kill, unlike a power cut, loses no written page.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import curate.compact as compaction
from curate.storage import storage_at
from curate.store import Store
from tests.curate.evidence import SCORED, WANTED, examples, fill, header, scatter

CALLS = ("fsync", "replace")
"""Between two of these the disk does not change in a way that matters: every state is that before one of them."""


def started(work: Callable[[], object]) -> int:
    """Begin ``work`` in a forked child and return its process."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked child and return how it ended: 0, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(started(work), 0)[1])


def killed_at(count: int, work: Callable[[], object], calls: Sequence[str] = CALLS) -> Callable[[], object]:
    """Return ``work`` such that its process dies before the ``count``-th of ``calls``."""
    left = itertools.count(count - 1, -1)

    def counted(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    def run() -> object:
        for name in calls:
            setattr(os, name, counted(name))
        return work()

    return run


def check_after_kill(path: Path | str) -> None:
    """What is left is readable and undamaged: only leftovers, no row twice."""
    for finding in Store.audit(path)[0]:
        assert "left behind" in finding.problem, finding
    store = Store.open_read(path)
    assert store.example_ids() <= WANTED
    for model in store.models():
        assert store.scored_ids(model.identity.id) <= WANTED


def check_whole(path: Path | str, digest: str) -> None:
    """After another run everything is there once and nothing is left over; ``digest`` is an undisturbed run's."""
    fill(path, SCORED)
    assert Store.audit(path)[0] == []
    store = Store.open_read(path)
    assert store.example_ids() == WANTED and len(store.example_index()) == len(WANTED)
    assert [m.identity for m in store.models()] == list(SCORED)
    assert all(store.scored_ids(who.id) == WANTED for who in SCORED)
    assert store.evidence_digest() == digest


def damage(path: Path | str) -> None:
    """Change a part of examples, cut one of scores short, tear an entry, spoil the plan."""
    files = storage_at(path)
    parts, entries = (sorted(f"{folder}/{name}" for name in files.listed(folder)) for folder in ("parts", "ledger"))
    files.put(parts[0], files.get(parts[0])[:-1] + b"?")
    files.put(parts[-1], files.get(parts[-1])[:-1])
    files.put(entries[-2], files.get(entries[-2])[:20])
    files.put("plan.json", b"{")


def check(root: Path, digest: str, damaged: bool) -> None:
    """Check every store that a kill has left; nothing was damaged unless on purpose."""
    for path in root.glob("damaged-*" if damaged else "new-*"):
        if not damaged and (path / "store.json").exists():
            check_after_kill(path)
        check_whole(path, digest)


def loop(root: Path, digest: str, damaged: bool) -> int:
    """Fail the i-th call for i = 1, 2, ... until the run passes; return how many there were.

    A new store is filled; a damaged one is only opened, which mends it.
    """
    for count in itertools.count(1):
        path = root / f"{'damaged' if damaged else 'new'}-{count}"
        if damaged:
            shutil.copytree(root / "clean", path)
            damage(path)
        work = (lambda at=path: Store.create_or_open(at, header()).close()) if damaged else partial(fill, path, SCORED)
        ended = in_child(killed_at(count, work))
        assert ended in (0, -signal.SIGKILL), (count, ended)
        if ended == 0:
            assert in_child(partial(check, root, digest, damaged)) == 0
            return count - 1
    raise AssertionError


def compact_twice(path: Path | str) -> None:
    """Merge parts of one row into parts of two or three, and remove what they replace."""
    compaction.FEWEST, compaction.PART_ROWS = 2, 3
    compaction.compact(path)
    compaction.compact(path)


def check_compacted(root: Path, digest: str) -> None:
    """Whatever step a kill came before: every row is there once, and another run ends with four parts of scores."""
    for path in root.glob("compacted-*"):
        check_merged(path, digest)


def check_merged(path: Path | str, digest: str) -> None:
    """What one killed compaction has left holds every row once, before it is finished and after."""
    check_after_kill(path)
    for finish in (lambda: None, partial(compact_twice, path)):
        finish()
        store = Store.open_read(path)
        assert [store.n_scored(who.id) for who in SCORED] == [len(WANTED)] * 2
        assert all(store.scored_ids(who.id) == WANTED for who in SCORED)
        assert store.evidence_digest() == digest
    assert Store.audit(path)[0] == []
    for folder in ("parts", "ledger"):
        assert sum(name.startswith("nll-") for name in store.storage.listed(folder)) == 4


def compacted(root: Path) -> int:
    """Kill a compaction before its first, second, ... step until it passes; return how many there were."""
    assert in_child(partial(scatter, root / "scattered", root / "digest")) == 0
    for count in itertools.count(1):
        path = root / f"compacted-{count}"
        shutil.copytree(root / "scattered", path)
        ended = in_child(killed_at(count, partial(compact_twice, path), (*CALLS, "unlink")))
        assert ended in (0, -signal.SIGKILL), (count, ended)
        if ended == 0:
            assert in_child(partial(check_compacted, root, (root / "digest").read_text())) == 0
            return count - 1
    raise AssertionError


def clean(root: Path) -> None:
    """Make the undisturbed store and note its digest."""
    fill(root / "clean", SCORED)
    (root / "digest").write_text(Store.open_read(root / "clean").evidence_digest())


def main(root: Path) -> None:
    """Print how many steps were killed: of filling a new store, of mending a damaged one, of compacting one."""
    os.fsync = lambda handle: None
    examples("a")
    assert in_child(partial(clean, root)) == 0
    digest = (root / "digest").read_text()
    (root / "compact").mkdir()
    print(loop(root, digest, False), loop(root, digest, True), compacted(root / "compact"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
