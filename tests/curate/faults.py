"""Faults on purpose: how often each was inflicted, and what it cost. Tests do a few, ``bench/faults.py`` does many.

Work that must not see threads of an earlier run, or must be killed, happens in forked children; the process that
forks them never opens a store.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import curate.chunks as chunks
import curate.core.nll as nll
import curate.intake as intake
from curate.core.errors import Exit, UserError
from curate.corpora import open_corpus
from curate.job import ScoreJob
from curate.query import connect
from curate.score import ensemble_members, score
from curate.select import Choice, build_manifest
from curate.store import Store
from tests.curate.evidence import SCORED, fill
from tests.curate.killed_store import in_child
from tests.curate.runs import tiny_ensemble
from tests.fakes import tiny_model, tiny_rows, write_rows

N_ROWS = 37
PAGE = 4096
Run = Callable[[Path, Path], object]
"""Scores the pool of a folder into a store, to the end."""
Strike = Callable[[Callable[[], object], Callable[[], object]], bool]
"""Runs the first, waits as the second does, then kills; returns whether it was running."""
Moment = Callable[[Path, float], object]
"""Waits until it is time to kill what fills a store: so many seconds, or what it makes of them."""


@dataclass(frozen=True)
class Outcome:
    """How often a fault was inflicted and struck, and how often something was lost, doubled, other or unnoticed."""

    inflicted: int
    struck: int
    wrong: int
    note: str = ""


# Killed while scoring


def prepare(root: Path) -> None:
    """Make a tiny model, two members and a pool, where they are not there."""
    if (root / "pool.jsonl").exists():
        return
    model = tiny_model(root / "tiny")
    tiny_ensemble(model, root / "ensemble")
    write_rows(root / "pool.jsonl", tiny_rows(N_ROWS, "pool"))


def job(root: Path, store: Path) -> ScoreJob:
    """Return the scoring of the pool into ``store``, in parts and chunks of a few rows."""
    intake.PART_ROWS, chunks.CHUNK_ROWS = 13, 5
    return ScoreJob(corpora=[open_corpus(str(root / "pool.jsonl"))], store=store, aligned=str(root / "tiny"),
                    members=ensemble_members(root / "ensemble" / "ensemble.json")[1], dtype="float32", device="cpu",
                    max_tokens=400)


def by_itself(root: Path, store: Path) -> None:
    """Score the pool into ``store`` in this process."""
    score(job(root, store))


def finish(root: Path, store: Path, to: Path, run: Run = by_itself) -> None:
    """Score to the end, count every row once, and write the selection's bytes."""
    run(root, store)
    opened = Store.open_read(store)
    counted = connect(opened, 0.1, None).execute(
        "SELECT count(*), count(DISTINCT (example_id, model_id)) FROM nll").fetchone()
    assert counted == (3 * N_ROWS, 3 * N_ROWS), counted
    assert Store.audit(store)[0] == []
    to.write_bytes(build_manifest(opened, Choice(n=7, min_answer_tokens=1), root)[0].to_bytes())


def only_leftovers(store: Path) -> None:
    """Check that a store that was cut off is whole but for what was being written."""
    if (store / "store.json").exists():
        assert all("left behind" in finding.problem for finding in Store.audit(store)[0])


def killed_group(work: Callable[[], object], wait: Callable[[], object]) -> bool:
    """Run ``work`` in a worker of a process group and ``wait``; then kill the whole group with SIGKILL.

    Returns whether it was running.
    """
    leader = os.fork()
    if leader == 0:
        os.setsid()
        os._exit(0 if in_child(work) == 0 else 1)
    wait()
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1]) == -signal.SIGKILL


def at_any_time(store: Path, after_s: float) -> None:
    """Wait for a moment of the whole run."""
    time.sleep(after_s)


def while_scoring(store: Path, after_s: float) -> None:
    """Wait for new scores, a minute at most, then for a quarter of the moment: most of a short run is its start."""
    before, begun = n_scored(store), time.monotonic()
    while n_scored(store) == before and time.monotonic() - begun < 60:
        time.sleep(0.01)
    time.sleep(after_s / 4)


def random_kills(root: Path, n: int, run: Run = by_itself, strike: Strike = killed_group,
                 wait: Moment = at_any_time, seed: int = 0) -> Outcome:
    """Kill scoring at ``n`` random moments; a store is killed a few times, then finished and compared."""
    dice = random.Random(seed)
    assert in_child(partial(prepare, root)) == 0
    begun = time.monotonic()
    assert in_child(partial(finish, root, root / "clean", root / "clean.json", run)) == 0
    length = time.monotonic() - begun
    struck = wrong = finished = midway = 0
    for number in range(n):
        store = root / f"killed-{finished}"
        new, after = not store.exists(), dice.uniform(0, length)
        hit = strike(partial(run, root, store), partial(wait, store, after))
        midway += hit and 0 < n_scored(store) < n_scored(root / "clean")
        length = after if new and not hit else length  # it had ended by then: the first run of all is the slowest
        struck += hit
        wrong += in_child(partial(only_leftovers, store)) != 0
        if not hit or number == n - 1 or dice.random() < 0.25:
            made = root / f"killed-{finished}.json"
            ended = in_child(partial(finish, root, store, made, run))
            wrong += ended != 0 or made.read_bytes() != (root / "clean.json").read_bytes()
            finished += 1
    return Outcome(n, struck, wrong, f"{midway} kills with some of the scores stored; {finished} stores finished, "
                                     "selections equal the undisturbed one's bytes")


def n_scored(store: Path) -> int:
    """Return how many parts of scores count."""
    return len(list((store / "ledger").glob("nll-*")))


# Disk full


@contextmanager
def small_disk(folder: Path, size: str = "1m") -> Iterator[Path | None]:
    """Give a file system of its own in memory, or None where that is not allowed."""
    folder.mkdir()
    mounted = shutil.which("mount") is not None and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "safeset", str(folder)], capture_output=True,
        check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def leave(filler: Path, pages: int) -> None:
    """Fill a disk but for so many pages."""
    with open(filler, "wb", buffering=0) as handle:
        try:
            while handle.write(bytes(PAGE)):
                pass
        except OSError:
            pass
        handle.truncate(max(0, handle.tell() // PAGE - pages) * PAGE)


def expect_full(store: Path) -> None:
    """Fill a store; a full disk must be a sentence with exit code 6."""
    try:
        fill(store, SCORED)
    except UserError as err:
        os._exit(6 if err.exit_code == Exit.ENVIRONMENT and err.hint else 1)


def check_equal(store: Path, digest: Path) -> None:
    """Do the same work again and compare."""
    fill(store, SCORED)
    assert Store.audit(store)[0] == []
    assert Store.open_read(store).evidence_digest() == digest.read_text()


def note_digest(store: Path, to: Path) -> None:
    """Fill an undisturbed store and note its digest."""
    fill(store, SCORED)
    to.write_text(Store.open_read(store).evidence_digest())


def full_disk(root: Path, disk: Path, step: int = 1) -> Outcome:
    """Fill stores with 0, ``step``, 2 ``step`` ... free pages until one fits; free the disk, go on and compare."""
    assert in_child(partial(note_digest, root / "whole", root / "digest")) == 0
    struck = wrong = 0
    for number in range(1000):
        leave(disk / "filler", number * step)
        ended = in_child(partial(expect_full, disk / "s"))
        wrong += ended not in (0, 6)
        struck += ended == 6
        wrong += in_child(partial(only_leftovers, disk / "s")) != 0
        (disk / "filler").unlink()
        wrong += in_child(partial(check_equal, disk / "s", root / "digest")) != 0
        shutil.rmtree(disk / "s")
        if ended == 0:
            return Outcome(number + 1, struck, wrong, "one step more of free space each time, until the store fitted")
    raise AssertionError


# Damaged files


def damage_one(target: Path, how: str, dice: random.Random) -> None:
    """Cut at least two bytes off a file (the last may be a line's end), or flip one of its bits."""
    data = bytearray(target.read_bytes())
    if how == "flip":
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    else:
        del data[dice.randrange(len(data) - 1):]
    target.write_bytes(data)


def damaged(root: Path, how: str, n: int) -> Outcome:
    """Damage one file of a store ``n`` times; readers must refuse, and the same work must make it whole again."""
    dice = random.Random(how)
    note_digest(root / "whole", root / "digest")
    noticed = wrong = 0
    targets = [p.relative_to(root / "whole") for folder in ("parts", "ledger")
               for p in sorted((root / "whole" / folder).iterdir())]
    targets += [p.relative_to(root / "whole") for p in sorted((root / "whole").rglob("*.json")) if
                p.parent.name != "ledger"]
    for number in range(n):
        store = root / f"{how}-{number}"
        shutil.copytree(root / "whole", store)
        damage_one(store / dice.choice(targets), how, dice)
        try:
            opened = Store.open_read(store)
            connect(opened, 0.1, None)
            assert opened.plan
        except UserError as err:
            noticed += err.exit_code == Exit.INTEGRITY
        check_equal(store, root / "digest")
        shutil.rmtree(store)
    return Outcome(n, noticed, wrong + n - noticed, "readers refuse, a writer puts aside and scores again")


# Out of memory


def out_of_memory(root: Path, limits: Sequence[int]) -> Outcome:
    """Let the forward pass fail above so many targets; the scores must be those of an undisturbed run."""
    prepare(root)
    calm = numbers(root, root / "calm")
    plain, counts = nll.token_nll, Counter[int]()
    worst, wrong = 0.0, 0
    for limit in limits:
        def tight(body: torch.nn.Module, batch: nll.Packed, limit: int = limit) -> torch.Tensor:
            if batch.targets.numel() > limit:
                counts[limit] += 1
                raise torch.OutOfMemoryError("not enough memory")
            return plain(body, batch)

        nll.token_nll = tight
        try:
            pressed = numbers(root, root / f"limit-{limit}")
        finally:
            nll.token_nll = plain
        wrong += [row[:2] for row in calm] != [row[:2] for row in pressed]
        worst = max(worst, *(abs(a[2] - b[2]) for a, b in zip(calm, pressed, strict=True)))
    return Outcome(len(limits), sum(count > 0 for count in counts.values()), wrong + (worst > 1e-3),
                   f"{sum(counts.values())} failed passes; sums differ by {worst:.1e} nats at most")


def numbers(root: Path, store: Path) -> list[tuple[str, str, float]]:
    """Score and return all sums."""
    score(job(root, store))
    return connect(Store.open_read(store), 0.1, None).execute(
        "SELECT example_id, model_id, nll_sum FROM nll ORDER BY 1, 2").fetchall()
