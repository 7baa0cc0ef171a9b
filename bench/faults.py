"""Faults on purpose, by the hundred: what docs/reliability.md reports.

    python -m bench.faults                      # all of it; some need root (a file system of their own), moto or Ray
    python -m bench.faults --only kills --n 100

Run it from the repository. Everything happens on a tiny random model or on invented numbers: what is tested is the way
from a finished chunk to a selection, not the model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.curate.faults import Outcome, damaged, full_disk, out_of_memory, random_kills, small_disk
from tests.curate.killed_clients import client_kills, driver_kills


def steps(root: Path, n: int) -> Outcome:
    """SIGKILL before the first, second, ... call to the disk until the run passes."""
    done = subprocess.run([sys.executable, "-m", "tests.curate.killed_store", str(root)], capture_output=True,
                          text=True, check=False)
    counts = [int(word) for word in done.stdout.split()]
    return Outcome(sum(counts), sum(counts), done.returncode,
                   ", ".join(f"{n} steps of {what}" for n, what in
                             zip(counts, ("filling a new store", "mending a damaged one", "compacting one"))))


def kills(root: Path, n: int) -> Outcome:
    """SIGKILL to the process group of a scoring run at random moments."""
    return random_kills(root, n)


def server(root: Path, n: int) -> Outcome:
    """SIGKILL to the process group of a model server's client at random moments."""
    return client_kills(root, n)


def ray(root: Path, n: int) -> Outcome:
    """SIGKILL to the driver of a Ray cluster at random moments, in turn with its process group and alone."""
    return driver_kills(root, n)


def objects(root: Path, n: int) -> Outcome:
    """SIGKILL before the first, second, ... request that changes an S3 bucket until the run passes."""
    from tests.curate.killed_objects import request_kills

    return request_kills(root)


def disk(root: Path, n: int) -> Outcome:
    """A file system in memory that is full one page later each time."""
    with small_disk(root / "disk") as place:
        return full_disk(root, place) if place else Outcome(0, 0, 0, "not measured: mounting is not allowed here")


def cuts(root: Path, n: int) -> Outcome:
    """Parts and ledger entries cut short."""
    return damaged(root, "cut", 2 * n)


def flips(root: Path, n: int) -> Outcome:
    """One bit flipped in a part or a ledger entry."""
    return damaged(root, "flip", 4 * n)


def memory(root: Path, n: int) -> Outcome:
    """The forward pass runs out of memory above so many targets."""
    return out_of_memory(root, (27, 31, 35, 40, 47, 55))


def workers(root: Path, n: int) -> Outcome:
    """Three writers on one S3 endpoint (moto on loopback), one of them killed."""
    rounds, command = max(1, n // 25), [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/curate",
                                        "-k", "several_writers_and_a_killed_one"]
    wrong = sum(subprocess.run(command, capture_output=True, check=False).returncode != 0 for _ in range(rounds))
    return Outcome(rounds, rounds, wrong, "rounds of 34 slots each; digests and selections equal a folder's")


FAULTS: dict[str, Callable[[Path, int], Outcome]] = {
    "steps": steps, "kills": kills, "server": server, "ray": ray, "objects": objects, "disk": disk, "cuts": cuts,
    "flips": flips, "memory": memory, "workers": workers}


def main() -> None:
    """Parse, inflict, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(FAULTS), nargs="+", default=list(FAULTS), help="which faults")
    parser.add_argument("--n", type=int, default=100, help="kills; twice as many cuts and four times as many flips")
    arguments = parser.parse_args()
    os.fsync = lambda handle: None  # a kill, unlike a power cut, loses no written page
    print("| fault | inflicted | struck | lost, doubled or unnoticed | seconds | |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    failed = False
    for name in arguments.only:
        with ExitStack() as held:
            root = Path(held.enter_context(tempfile.TemporaryDirectory()))
            begun = time.monotonic()
            found = partial(FAULTS[name], root, arguments.n)()
        print(f"| {(FAULTS[name].__doc__ or '').rstrip('.')} | {found.inflicted} | {found.struck} | {found.wrong} | "
              f"{time.monotonic() - begun:.0f} | {found.note} |", flush=True)
        failed |= found.wrong > 0
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
