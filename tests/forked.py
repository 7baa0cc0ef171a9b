"""Processes of a test's own, forked from one that has imported everything and done nothing.

A test that kills, stops or fills up a process needs a real one, and one without the threads of earlier tests. Started
from nothing, each would import torch, transformers and peft again, which takes longer than most tests. Each process of
pytest's has one to fork from (``multiprocessing``'s fork server), which its first use starts, or ``begin``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["curate.score", "curate.commands.scoring", "curate.scorers.transformers", "judge.cli",
                              "judge.run", "train.cli", "train.runs", "tests.frozen"])


def begin() -> None:
    """Start the process that is forked from, which then imports while other tests run."""
    forkserver.ensure_running()


class Forked:
    """A running call of ``work(*args)``, as a process that is started here would run it.

    What it prints goes to two files in ``folder``, which must be there; ``environment`` is added to that of the test.
    """

    def __init__(self, work: Callable[..., object], *args: Any, folder: Path, cwd: Path | None = None,
                 environment: Mapping[str, str] = {}) -> None:
        number = len(list(folder.glob("*.stdout")))
        self._said = {1: folder / f"{number}.stdout", 2: folder / f"{number}.stderr"}
        for path in self._said.values():
            path.touch()
        self._process = FORKS.Process(target=_begin, args=(
            self._said, cwd or Path.cwd(), {**os.environ, **environment}, work, args))
        self._process.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def out(self) -> str:
        """What it has printed so far."""
        return self._said[1].read_text()

    @property
    def err(self) -> str:
        """What it has said on standard error so far."""
        return self._said[2].read_text()

    def poll(self) -> int | None:
        """Return its exit code or minus its signal, or None while it runs."""
        return self._process.exitcode

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 120) -> int:
        """Return how it ended; an error if it does not within ``timeout_s``."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"still running after {timeout_s} s: {self.err[-2000:]}")
        return self._process.exitcode

    def until(self, ready: Callable[[], bool], timeout_s: float = 120, every_s: float = 0.002) -> None:
        """Wait until ``ready()``, asked every so often; an error if it ends before, or after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert self.poll() is None and time.monotonic() < deadline, self.err[-2000:] or "it ended too early"
            time.sleep(every_s)


def _begin(said: Mapping[int, Path], cwd: Path, environment: Mapping[str, str], work: Callable[..., object],
           args: tuple[Any, ...]) -> None:
    """Be a process like one that was just started: its own output, folder, environment and signals."""
    for number, path in said.items():
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may start with it ignored
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    work(*args)


def command(room: str, *words: str) -> None:
    """Be ``room WORDS``, as typed: curate, train or judge."""
    sys.argv = [room, *words]
    if room == "curate":
        from curate.cli import main
    elif room == "train":
        from train.cli import main
    else:
        from judge.cli import main
    main()
