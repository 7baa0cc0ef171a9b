"""SIGKILL before every write of a graded run, and in the middle of each: the same command goes on and pays for no more.

The run is forked, so that it is killed for good; model and judge are scripted servers, whose counts are the truth.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from judge.banks import BankQuestion
from judge.endpoint import Address
from judge.grading import Grading
from judge.jobs import Settings, Target
from judge.run import judge_models
from tests.judge.makers import make_run
from tests.judge.stub_server import Stub, envelope, served

QUESTION = BankQuestion("general", "q", "general", "", "", "Question?", {})
N = 2
ANSWERS = 2 * N
"""Of the base and one run."""
REQUESTS = 2 + 2
"""Two probes, and two grades of the answer that all of them are; what is equal is paid for once."""


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stub, Stub]]:
    """A server that samples and one that judges, each answering by what it is asked."""
    monkeypatch.setattr("judge.jobs.questions", lambda *words: [QUESTION])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key")
    with ExitStack() as held:
        sampler = held.enter_context(served(Stub(raw=lambda prompt: envelope(f"An answer to {prompt}"))))
        judge = held.enter_context(served(Stub(replies=lambda prompt: {"80": 0.5, "60": 0.5})))
        yield sampler, judge


def judged(servers: tuple[Stub, Stub], run: Path, folder: Path) -> dict[str, bytes]:
    """Judge the base and a run; return the verdicts by name."""
    sampler, judge = servers
    grading = Grading(Address("stub", judge.url, concurrency=1), n=N, answer_tokens=4, cache=folder / "replies",
                      sample_from=Address("", sampler.url, "", concurrency=1))
    settings = Settings(suite=("general",), device="cpu", dtype="float32", grading=grading)
    paths = judge_models([Target(str(run))], settings, folder / "out")
    return {path.name: path.read_bytes() for path in paths}


def struck(work: Callable[[], Any], nth: int) -> bool:
    """Do ``work`` in a child that is killed at its ``nth`` step; return whether it was, or came to its end before.

    A step is an fsync, a rename, or a write to a file of ours: before it, and once more with half of it written.
    """
    child = os.fork()
    if not child:
        _arm(nth)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed instead of being killed"
    return os.WIFSIGNALED(status)


def _arm(nth: int) -> None:
    """Count down over the steps of this process, and end it."""
    left = [nth]

    def step() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    write, fsync, rename = os.write, os.fsync, os.replace

    def torn(handle: int, data: bytes) -> int:
        step()
        if left[0] == 1:
            write(handle, data[:len(data) // 2])
        step()
        return write(handle, data)

    os.write = torn
    os.fsync = lambda handle: (step(), fsync(handle))[1]
    os.replace = lambda old, new: (step(), rename(old, new))[1]


def test_killed_at_every_step_it_goes_on_and_pays_for_no_more(base: Path, tmp_path: Path,
                                                              servers: tuple[Stub, Stub]) -> None:
    sampler, judge = servers
    run = make_run(base, tmp_path / "runs" / "a", "none", 1)
    clean = judged(servers, run, tmp_path / "clean")
    assert len(clean) == 2 and (len(sampler.seen), len(judge.seen)) == (ANSWERS, REQUESTS)
    nth = 0
    while True:
        nth += 1
        folder = tmp_path / str(nth)
        sampler.seen.clear()
        judge.seen.clear()
        was_struck = struck(lambda folder=folder: judged(servers, run, folder), nth)
        before = len(sampler.seen), len(judge.seen)
        assert judged(servers, run, folder) == clean, f"killed at step {nth}"
        assert len(sampler.seen) <= ANSWERS + was_struck, f"an answer was sampled twice after a kill at step {nth}"
        assert len(judge.seen) <= REQUESTS + was_struck, f"a reply was paid for twice after a kill at step {nth}"
        assert len(sampler.seen) + len(judge.seen) <= ANSWERS + REQUESTS + was_struck
        assert not list(folder.rglob("*.tmp")), f"something is left over after a kill at step {nth}"
        if not was_struck:
            assert before == (ANSWERS, REQUESTS)
            break
    print(f"\n{nth - 1} kills")
    assert nth > 3 * (ANSWERS + 2 + REQUESTS + 1), "three steps for every line that is kept, and those of two verdicts"
