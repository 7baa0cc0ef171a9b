"""The real vLLM, in process and over HTTP, on SmolLM2 with members, against the transformers engine in float32.

Run by ``make test-vllm``; the CPU build of vLLM needs an environment of its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.parity import compare, table
from curate.core.errors import Exit, UserError
from curate.core.example import pair
from curate.core.smollm2 import smollm2_folder
from curate.core.vllm import merged
from curate.corpora import open_corpus
from curate.job import ScoreJob, Summary
from curate.query import connect
from curate.score import score
from curate.scorers.choose import EngineSettings
from curate.store import Store
from tests.conftest import ROOT
from tests.curate.runs import tiny_run
from tests.fakes import write_rows
from tests.real_vllm import BASE, Served

pytestmark = pytest.mark.vllm

N_ROWS = 24
MAX_TOKENS = 300
NATS = 1e-3
"""Two float32 engines may differ so far in a row's mean NLL; an adapter that is missing or merged wrongly differs by
hundreds of times as much."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def members(folder: Path) -> list[Path]:
    return [tiny_run(smollm2_folder(), folder / f"m{k}", f"m{k}", seed=k + 1, scale=0.08) for k in range(2)]


@pytest.fixture(scope="module")
def bad_server(aligned_server: Served, members: list[Path]) -> Iterator[Served]:
    """The member m0, merged, at a server of its own as ``bad``; both servers start while others work."""
    with merged(str(smollm2_folder()), members[0].parent / "adapter") as (weights, _):
        server = Served(weights, ("bad",)).start()
        yield server
        server.kill()


@pytest.fixture(scope="module")
def reference(folder: Path, members: list[Path], bad_server: Served) -> Path:
    """The transformers engine's store; computed while the servers start."""
    run(folder, "transformers", members, name="transformers")
    return folder / "transformers"


def pool(folder: Path, n: int = N_ROWS) -> Path:
    """Write the ``n`` shortest rows of the demo's pool that are no one-liners."""
    path = folder / f"pool-{n}.jsonl"
    if not path.exists():
        lines = (ROOT / "curate" / "data" / "safe_pool.jsonl").read_text().splitlines()
        rows = [pair(row["prompt"], row["response"]) for row in map(json.loads, lines)]
        rows = sorted((row for row in rows if len(row.answer) > 60), key=lambda e: (len(e.prompt + e.answer), e.id))
        write_rows(path, rows[:n])
    return path


def run(folder: Path, out: str, members: list[Path], n: int = N_ROWS, **engine: object) -> Summary:
    """Score ``n`` rows into the store ``out``."""
    return score(ScoreJob([open_corpus(str(pool(folder, n)))], folder / out, str(smollm2_folder()), members,
                          dtype="float32", device="cpu", max_tokens=MAX_TOKENS, engine=EngineSettings(**engine)))


def assert_agrees(reference: Path, store: Path, models: set[str]) -> None:
    members = sorted(models - {BASE})
    found = compare(reference, store, members=members)
    print("\n" + table([reference, store], 0.1, members))
    assert set(found.gaps) == models
    assert all(n == N_ROWS and largest < NATS for n, largest, _ in found.gaps.values())
    assert found.n_rows == N_ROWS and found.spearman is not None and found.spearman >= 0.995
    assert found.overlap == found.n_top == 1
    eots = compare_eots(reference, store)
    assert len(eots) == N_ROWS * len(models) and max(eots) < 10 * NATS


def compare_eots(reference: Path, store: Path) -> list[float]:
    frames = [connect(Store.open_read(path), 0.1, None).sql(
        "SELECT name, example_id, eot_nll FROM nll JOIN models USING (model_id)").pl() for path in (reference, store)]
    both = frames[0].join(frames[1], on=["name", "example_id"])
    return (both["eot_nll"] - both["eot_nll_right"]).abs().to_list()


def kept(store: Path) -> dict[str, int]:
    """Return how many rows of each model are in a store, none of them twice."""
    found = connect(Store.open_read(store), 0.1, None).execute(
        "SELECT name, count(*), count(DISTINCT example_id) FROM nll JOIN models USING (model_id) GROUP BY 1").fetchall()
    assert all(n == different for _, n, different in found)
    return {name: n for name, n, _ in found}


def test_the_members_move_the_scores(reference: Path) -> None:
    moved = connect(Store.open_read(reference), 0.1, None).execute(
        "SELECT m.name, avg(abs(n.nll_sum - a.nll_sum) / n.n_tokens) FROM nll n JOIN models m USING (model_id) "
        "JOIN nll a USING (example_id) JOIN models b ON b.model_id = a.model_id WHERE b.role = 'aligned' "
        "AND m.role = 'member' GROUP BY 1").fetchall()
    assert len(moved) == 2 and all(gap > 100 * NATS for _, gap in moved), moved


def test_a_server_is_killed_at_work_and_comes_back(folder: Path, reference: Path, members: list[Path],
                                                   aligned_server: Served, bad_server: Served) -> None:
    """What was finished is kept; the same command ends with the transformers engine's numbers; a swap is noticed."""
    servers = {"base_urls": (aligned_server.ready().url, bad_server.ready().url), "retries": 2, "concurrency": 4}
    engine = {"served": (("aligned", BASE), ("bad", "m0")), **servers}
    killer = threading.Thread(target=kill_at_work, args=(bad_server, 8))
    killer.start()
    with pytest.raises(UserError, match="given up after 3 tries: no connection") as err:
        run(folder, "server", members[:1], **engine)
    killer.join()
    assert err.value.exit_code == Exit.REMOTE and kept(folder / "server") == {BASE: N_ROWS}
    bad_server.start().ready()
    assert run(folder, "server", members[:1], **engine).models == {"m0": N_ROWS}
    assert Store.open_read(folder / "server").header.engine == "server"
    assert_agrees(reference, folder / "server", {BASE, "m0"})
    swapped = {"served": (("bad", BASE), ("aligned", "m0")), **servers}
    with pytest.raises(UserError, match="the numbers it gave before") as err:
        run(folder, "server", members[:1], n=N_ROWS + 1, **swapped)
    assert err.value.exit_code == Exit.REMOTE and kept(folder / "server") == {BASE: N_ROWS, "m0": N_ROWS}
    bad_server.kill()


def kill_at_work(server: Served, after: int) -> None:
    """Kill a server that has finished so many of its requests; others are in flight then, several at a time."""
    while server.n_finished() < after:
        time.sleep(0.05)
    server.kill()


def test_the_engine_in_process_gives_the_same_numbers_also_when_killed(folder: Path, reference: Path,
                                                                       members: list[Path]) -> None:
    """SIGKILL to the process group while the first member is computed, then at a random moment, then to the end."""
    store = folder / "vllm"
    words = ["--corpus", pool(folder), "--store", store, "--aligned", smollm2_folder(), "--dtype", "float32",
             "--device", "cpu", "--max-tokens", MAX_TOKENS, "--engine", "vllm",
             *(word for member in members for word in ("--member", member))]
    dice = random.Random(0)
    for models, seconds in ((1, 0.0), (0, dice.uniform(0, 20))):
        child = subprocess.Popen([sys.executable, "-m", "curate", "score", *map(str, words)], cwd=ROOT,
                                 start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        until = time.monotonic() + 400
        while child.poll() is None and len(list(store.glob("ledger/nll-*"))) < models and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(seconds)
        assert child.poll() is None, child.stderr.read().decode()
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        assert set(kept(store)) <= {BASE, "m0"} and kept(store)[BASE] == N_ROWS
    left = {"m0", "m1"} - set(kept(store))
    assert run(folder, "vllm", members, name="vllm").models == {name: N_ROWS for name in left}
    assert Store.open_read(store).header.engine == "vllm" and Store.audit(store)[0] == []
    assert_agrees(reference, store, {BASE, "m0", "m1"})
