"""A few of the faults that ``bench/faults.py`` inflicts by the hundred; see docs/reliability.md."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curate.core.refs import load_tokenizer
from curate.storage import Lock
from curate.store import Store
from tests.conftest import ROOT
from tests.curate.faults import N_ROWS, prepare, small_disk
from tests.curate.stub_server import Stub
from tests.fakes import tiny_model, tiny_rows, write_rows

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


ALONE = """
import sys
from dataclasses import astuple
from pathlib import Path
from tests.curate.faults import full_disk, out_of_memory, random_kills, small_disk
root = Path(sys.argv[1])
found = {call}
print(*astuple(found)[:3])
"""


def alone(root: Path, call: str) -> tuple[int, int, int]:
    """Return how often a fault was inflicted, struck and did harm, found in a process of its own.

    Faults fork, and a child of a process with threads, such as this one after other tests, may wait for ever.
    """
    done = subprocess.run([sys.executable, "-c", ALONE.format(call=call), str(root)], env=ENVIRONMENT, cwd=ROOT,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    inflicted, struck, wrong = map(int, done.stdout.split()[-3:])
    return inflicted, struck, wrong


def test_process_groups_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    inflicted, struck, wrong = alone(tmp_path, "random_kills(root, 6)")
    assert wrong == 0 and inflicted == 6 and struck >= 1


def test_a_disk_that_is_full_for_real_costs_only_time(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        if disk is None:
            pytest.skip("mounting a file system is not allowed here")
        inflicted, struck, wrong = alone(tmp_path, 'full_disk(root, root / "disk", step=5)')
    assert wrong == 0 and struck == inflicted - 1 >= 3


def test_out_of_memory_at_several_sizes_changes_nothing(tmp_path: Path) -> None:
    inflicted, struck, wrong = alone(tmp_path, "out_of_memory(root, (27, 40, 50))")
    assert wrong == 0 and inflicted == struck == 3


SCORE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may start with it ignored
import curate.chunks
from curate.core.terminal import say
plain = curate.chunks.score_rows

def slow(*args):
    found = plain(*args)
    say("computed")
    time.sleep(30)
    return found

curate.chunks.score_rows = slow
sys.argv[0] = "curate"
from curate.cli import main
main()
"""


@pytest.mark.parametrize(("number", "times", "code"), [(signal.SIGINT, 2, 130), (signal.SIGTERM, 1, 143)],
                         ids=["Ctrl-C twice", "SIGTERM"])
def test_scoring_that_is_stopped_says_how_to_go_on(tmp_path: Path, number: int, times: int, code: int) -> None:
    prepare(tmp_path)
    words = ["score", "--corpus", "pool.jsonl", "--aligned", "tiny", "--store", "a store", "--dtype", "float32"]
    child = subprocess.Popen([sys.executable, "-c", SCORE, *words], cwd=tmp_path, env=ENVIRONMENT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said = iter(child.stderr.readline, "")
    assert any("computed" in line for line in said)
    for _ in range(times):
        child.send_signal(number)
        time.sleep(0.02)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code and "Traceback" not in err
    assert f"Go on with: curate {' '.join(words).replace('a store', repr('a store'))}" in err
    lock = Lock(tmp_path / "a store" / "lock")
    lock.acquire()
    lock.release()


PLAIN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "curate"
from curate.cli import main
main()
"""


def test_scoring_on_a_server_that_hangs_can_be_stopped_and_says_how_to_go_on(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model(tmp_path / "tiny")))
    write_rows(tmp_path / "pool.jsonl", tiny_rows(N_ROWS, "pool"))
    stub = Stub(tokenizer, {"tiny": 3}, tokenizer.convert_tokens_to_ids("<|im_start|>"),
                row=lambda number: "hang" if number > 7 else None).start()
    words = ["score", "--corpus", "pool.jsonl", "--aligned", "tiny", "--store", "s", "--base-url", stub.url,
             "--max-tokens", "400"]
    child = subprocess.Popen([sys.executable, "-c", PLAIN, *words], cwd=tmp_path, env=ENVIRONMENT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        while stub.rows_asked <= 7:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        begun = time.monotonic()
        _, err = child.communicate(timeout=60)
    finally:
        stub.stop()
    assert child.returncode == 130 and "Traceback" not in err and time.monotonic() - begun < 20
    assert f"Go on with: curate {' '.join(words)}" in err
    assert Store.audit(tmp_path / "s")[0] == []
