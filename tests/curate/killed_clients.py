"""``curate score`` killed while others work for it: as the client of a server, and as the driver of a Ray cluster.

Server and cluster outlive it. The commands are the real ones, in forked processes, so that nothing is imported again.
"""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil

import curate.chunks as chunks
import curate.intake as intake
from curate.cli import main
from tests.curate.faults import Moment, Outcome, at_any_time, killed_group, prepare, random_kills, while_scoring
from tests.curate.killed_store import in_child, started
from tests.curate.services import beside, cluster, models_served

WORKERS_END_S = 10.0
"""How long the workers of a killed driver may go on."""


def command(root: Path, store: Path, *more: str, chunk_rows: int = 5) -> None:
    """Run ``curate score`` on the pool, in parts and chunks of a few rows, without a word."""
    intake.PART_ROWS, chunks.CHUNK_ROWS = 13, chunk_rows
    words = ["--corpus", root / "pool.jsonl", "--ensemble", root / "ensemble" / "ensemble.json", "--store", store,
             "--max-tokens", 400, *more]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        main(["score", *map(str, words)], standalone_mode=False)


# The client of a server


def on_server(url: str, root: Path, store: Path) -> None:
    """Score on the server at ``url``."""
    command(root, store, "--engine", "server", "--base-url", url)


def client_kills(root: Path, n: int, wait: Moment = at_any_time) -> Outcome:
    """Kill the client of a model server at ``n`` random moments; see ``random_kills``."""
    assert in_child(partial(prepare, root)) == 0
    importlib.import_module("curate.scorers.server")  # here, and not again in every child
    with beside(partial(models_served, root)) as (url, _):
        return random_kills(root, n, partial(on_server, url), wait=wait)


# The driver of a cluster


def on_cluster(address: str, root: Path, store: Path, chunk_rows: int = 1) -> None:
    """Score on the Ray cluster at ``address``."""
    command(root, store, "--engine", "transformers", "--dtype", "float32", "--device", "cpu", "--ray", address,
            chunk_rows=chunk_rows)


def workers(nodes: int) -> list[psutil.Process]:
    """Return the processes of a cluster, whose first process is ``nodes``, that hold an engine."""
    found = []
    for process in psutil.Process(nodes).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith("ray::_Engine"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@dataclass
class Drivers:
    """Kills drivers of a cluster, in turn with their process group and alone, and sees that their workers end.

    Most of a short run is the start of its workers; so of every four moments two are counted from the first new scores.
    """

    nodes: int
    inflicted: int = 0
    left_behind: int = 0
    """Kills after which workers were still running."""
    outlived: int = 0
    """Workers that were running long after."""
    longest_s: float = 0.0

    def strike(self, work: Callable[[], object], wait: Callable[[], object]) -> bool:
        """See ``killed_group``; waits for the workers."""
        hit = (killed_process if self.inflicted % 2 else killed_group)(work, wait)
        self.inflicted += 1
        left = hit and bool(workers(self.nodes))
        took_s = self.until_workers_end()
        if left:
            self.left_behind += 1
            self.longest_s = max(self.longest_s, took_s)
        return hit

    def wait(self, store: Path, after_s: float) -> None:
        """Wait for a moment of the whole run or, in half of all kills, of scoring."""
        (at_any_time if self.inflicted % 4 < 2 else while_scoring)(store, after_s)

    def until_workers_end(self) -> float:
        """Return how many seconds it took until no worker was left; those that stay too long are counted."""
        begun = time.monotonic()
        while left := workers(self.nodes):
            if time.monotonic() - begun > WORKERS_END_S:
                self.outlived += len(left)
                break
            time.sleep(0.05)
        return time.monotonic() - begun


def killed_process(work: Callable[[], object], wait: Callable[[], object]) -> bool:
    """Run ``work`` in a process and ``wait``; then kill that one alone. Returns whether it was running."""
    process = started(work)
    wait()
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def driver_kills(root: Path, n: int) -> Outcome:
    """Kill the driver of a Ray cluster at ``n`` random moments; see ``random_kills``. Its workers must end, too."""
    assert in_child(partial(prepare, root)) == 0
    with beside(cluster) as (address, nodes):
        drivers = Drivers(nodes)
        found = random_kills(root, n, partial(on_cluster, address), drivers.strike, drivers.wait)
        drivers.until_workers_end()
    return replace(found, wrong=found.wrong + drivers.outlived,
                   note=f"{found.note}; {drivers.left_behind} kills left workers behind, which ended within "
                        f"{drivers.longest_s:.1f} s")

