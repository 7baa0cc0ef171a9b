"""A few of the faults that ``bench/faults.py`` inflicts by the hundred; see docs/reliability.md."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from curate.core.refs import load_tokenizer
from curate.storage import Lock
from curate.store import Store
from tests.conftest import ROOT
from tests.curate.faults import N_ROWS, Outcome, full_disk, out_of_memory, prepare, random_kills, small_disk
from tests.curate.stub_server import Stub
from tests.fakes import tiny_model, tiny_rows, write_rows
from tests.forked import Forked, command


def alone(root: Path, fault: Callable[..., Outcome], *args: Any, **how: Any) -> tuple[int, int, int]:
    """Return how often a fault was inflicted, struck and did harm, found in a process of its own.

    Faults fork, and a child of a process with threads, such as this one after other tests, may wait for ever.
    """
    child = Forked(_tell, fault, root, args, how, folder=root, cwd=ROOT)
    assert child.wait(240) == 0, child.err[-3000:]
    inflicted, struck, wrong = map(int, child.out.split()[-3:])
    return inflicted, struck, wrong


def _tell(fault: Callable[..., Outcome], root: Path, args: tuple[Any, ...], how: dict[str, Any]) -> None:
    print(*astuple(fault(root, *args, **how))[:3], flush=True)


def test_process_groups_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    inflicted, struck, wrong = alone(tmp_path, random_kills, 6)
    assert wrong == 0 and inflicted == 6 and struck >= 1


def test_a_disk_that_is_full_for_real_costs_only_time(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("mounting a file system is not allowed here")
        inflicted, struck, wrong = alone(tmp_path, full_disk, disk, step=5)
    assert wrong == 0 and struck == inflicted - 1 >= 3


def test_out_of_memory_at_several_sizes_changes_nothing(tmp_path: Path) -> None:
    inflicted, struck, wrong = alone(tmp_path, out_of_memory, (27, 40, 50))
    assert wrong == 0 and inflicted == struck == 3


def slow_score(*words: str) -> None:
    """Be ``curate WORDS``, with scoring that stays where it is once it has computed."""
    import curate.chunks
    from curate.core.terminal import say

    plain = curate.chunks.score_rows

    def slow(*args: Any) -> Any:
        found = plain(*args)
        say("computed")
        time.sleep(30)
        return found

    curate.chunks.score_rows = slow
    command("curate", *words)


@pytest.mark.parametrize(("number", "times", "code"), [(signal.SIGINT, 2, 130), (signal.SIGTERM, 1, 143)],
                         ids=["Ctrl-C twice", "SIGTERM"])
def test_scoring_that_is_stopped_says_how_to_go_on(tmp_path: Path, number: int, times: int, code: int) -> None:
    prepare(tmp_path)
    words = ["score", "--corpus", "pool.jsonl", "--aligned", "tiny", "--store", "a store", "--dtype", "float32"]
    child = Forked(slow_score, *words, folder=tmp_path, cwd=tmp_path)
    child.until(lambda: "computed" in child.err)
    for _ in range(times):
        with suppress(ProcessLookupError):    # the first was enough, within 20 ms
            child.send(number)
        time.sleep(0.02)
    assert child.wait(60) == code and "Traceback" not in child.err
    assert f"Go on with: curate {' '.join(words).replace('a store', repr('a store'))}" in child.err
    lock = Lock(tmp_path / "a store" / "lock")
    lock.acquire()
    lock.release()


def test_scoring_on_a_server_that_hangs_can_be_stopped_and_says_how_to_go_on(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model(tmp_path / "tiny")))
    write_rows(tmp_path / "pool.jsonl", tiny_rows(N_ROWS, "pool"))
    stub = Stub(tokenizer, {"tiny": 3}, tokenizer.convert_tokens_to_ids("<|im_start|>"),
                row=lambda number: "hang" if number > 7 else None).start()
    words = ["score", "--corpus", "pool.jsonl", "--aligned", "tiny", "--store", "s", "--base-url", stub.url,
             "--max-tokens", "400"]
    child = Forked(command, "curate", *words, folder=tmp_path, cwd=tmp_path)
    try:
        child.until(lambda: stub.rows_asked > 7)
        child.send(signal.SIGINT)
        begun = time.monotonic()
        code = child.wait(60)
    finally:
        stub.stop()
    assert code == 130 and "Traceback" not in child.err and time.monotonic() - begun < 20
    assert f"Go on with: curate {' '.join(words)}" in child.err
    assert Store.audit(tmp_path / "s")[0] == []
