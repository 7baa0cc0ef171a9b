"""Chunks on a Ray cluster: the pool's rules with a Ray that is made up, and a real cluster that loses a node."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import curate.chunks as chunks
import curate.cluster as cluster
import curate.intake as intake
from curate.chunks import Chunk, Opening, Work
from curate.cluster import TRIES, OnRay, _Pool
from curate.core.errors import Exit, UserError
from curate.core.nll import AnswerNll
from curate.core.terminal import Progress
from curate.corpora import open_corpus
from curate.job import ScoreJob
from curate.score import ensemble_members, score
from curate.scorers.choose import EngineSettings, Models
from curate.select import Choice, build_manifest
from curate.store import Store
from tests.conftest import ROOT
from tests.curate.faults import n_scored, only_leftovers
from tests.curate.killed_clients import Drivers, on_cluster, workers
from tests.curate.runs import tiny_ensemble
from tests.fakes import tiny_adapter, tiny_model, tiny_rows, write_rows
from tests.forked import Forked


class Row(NamedTuple):
    """Token ids, as far as a pool looks at them."""

    ids: tuple[int, ...]


class Lost(Exception):
    """A worker died."""


class TaskFailed(Exception):
    """A worker raised ``cause``."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class MadeUpRay:
    """Does what is asked when its result is waited for; ``answer(worker, method, ...)`` decides how it goes."""

    exceptions = SimpleNamespace(RayTaskError=TaskFailed, RayError=Lost)

    def __init__(self, cpus: int, answer: Callable[..., Any]) -> None:
        self.cpus, self.answer = cpus, answer
        self.made: list[str] = []
        self.killed: list[str] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def put(self, value: object) -> object:
        return value

    def remote(self, **options: float) -> Callable[[type], Any]:
        assert options == {"num_cpus": 2, "num_gpus": 0, "max_restarts": 0}
        return lambda cls: SimpleNamespace(remote=self._made)

    def _made(self, *args: object) -> Any:
        name = f"w{len(self.made)}"
        self.made.append(name)

        def method(called: str) -> Any:
            return SimpleNamespace(remote=lambda *given: (name, called, given))

        return SimpleNamespace(name=name, placed=method("placed"), open=method("open"), score=method("score"))

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        """A worker is placed where there is room; the rest is ready at once."""
        ready = [ref for ref in refs if ref[1] != "placed" or self.cpus >= 2][:1]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref: Any) -> Any:
        return self.answer(self, *ref[:2], *ref[2])

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.name)


def fine(ray: MadeUpRay, worker: str, method: str, *given: Any) -> Any:
    return ([AnswerNll(1.0, 2, None, "ok")] * len(given[1]), []) if method == "score" else True


def run(ray: MadeUpRay, n_chunks: int = 5) -> list[Chunk]:
    opening = Opening(EngineSettings("transformers"), Models("base", "base", {}, "float32", "cpu", 99))
    work = Work(opening, {"m": "base"}, {"m": None},
                [Chunk("m", (f"c{k}",), (k + 2,)) for k in range(n_chunks)],
                lambda chunk: (Row((0,) * chunk.n_tokens),), Progress("Scoring", 1, "tokens"))
    pool = _Pool(ray, SimpleNamespace(room=lambda r, d: int(r.cpus // 2), _needs=lambda d: {
        "num_cpus": 2, "num_gpus": 0}, _no_worker=lambda r, d: UserError("no worker")), work)
    found = [chunk for chunk, rows in pool.results() if len(rows) == 1]
    pool.close()
    assert work.bar.done == sum(chunk.n_tokens - 1 for chunk in found)
    return found


def test_every_chunk_is_done_once_by_as_many_workers_as_fit() -> None:
    ray = MadeUpRay(5, fine)
    assert sorted(chunk.ids[0] for chunk in run(ray)) == ["c0", "c1", "c2", "c3", "c4"]
    assert ray.made == ["w0", "w1"] == sorted(ray.killed)
    ray = MadeUpRay(64, fine)
    assert len(run(ray, 3)) == 3 and len(ray.made) == 3


def test_workers_are_added_when_the_cluster_grows() -> None:
    def growing(ray: MadeUpRay, worker: str, method: str, *given: Any) -> Any:
        ray.cpus = 6 if method == "score" else ray.cpus
        return fine(ray, worker, method, *given)

    ray = MadeUpRay(2, growing)
    assert len(run(ray, 9)) == 9 and ray.made == ["w0", "w1", "w2"]


def test_a_lost_worker_costs_its_chunk_a_try_and_nothing_else() -> None:
    def mortal(ray: MadeUpRay, worker: str, method: str, *given: Any) -> Any:
        if worker == "w0" and method == "score":
            raise Lost("its node is gone")
        return fine(ray, worker, method, *given)

    ray = MadeUpRay(4, mortal)
    assert sorted(chunk.ids[0] for chunk in run(ray)) == ["c0", "c1", "c2", "c3", "c4"]
    assert len(ray.made) == 3


def test_a_chunk_that_loses_all_its_workers_ends_the_run_with_the_rest_kept() -> None:
    def poisoned(ray: MadeUpRay, worker: str, method: str, *given: Any) -> Any:
        if method == "score" and len(given[1][0].ids) == 4:
            raise Lost("killed for memory")
        return fine(ray, worker, method, *given)

    ray = MadeUpRay(2, poisoned)
    with pytest.raises(UserError, match=r"lost over the same 1 rows: killed for memory") as caught:
        run(ray)
    assert caught.value.exit_code == Exit.REMOTE and len(ray.made) == TRIES


def test_workers_that_never_begin_end_the_run() -> None:
    def stillborn(ray: MadeUpRay, worker: str, method: str, *given: Any) -> Any:
        raise Lost("no memory")

    with pytest.raises(UserError, match="before they could begin: no memory") as caught:
        run(MadeUpRay(4, stillborn))
    assert caught.value.exit_code == Exit.REMOTE


@pytest.mark.parametrize(("raised", "words", "code"), [
    (UserError("The model 'x' could not be loaded.", "Give a folder.", Exit.ENVIRONMENT), "could not be", 6),
    (ModuleNotFoundError("No module named 'peft'"), "lacks what this one has: No module named 'peft'", 6),
    (OSError(28, "No space left on device"), "A node of the cluster cannot go on: .*No space left", 6)])
def test_what_a_worker_says_is_what_the_user_reads(raised: Exception, words: str, code: int) -> None:
    def broken(ray: MadeUpRay, worker: str, method: str, *given: Any) -> Any:
        if method == "open":
            raise TaskFailed(raised)
        return True

    with pytest.raises(UserError, match=words) as caught:
        run(MadeUpRay(4, broken))
    assert caught.value.exit_code == code


def test_what_a_worker_notes_is_said_here(capsys: pytest.CaptureFixture[str]) -> None:
    class Tight:
        def member(self, adapter: Path | None) -> Any:
            return nullcontext()

        def score(self, encoded: Sequence[Row], notify: Callable[[str], None]) -> Iterator[list[tuple[int, AnswerNll]]]:
            notify("out of memory: going on with half the batch")
            yield [(k, AnswerNll(1.0, 2, None, "ok")) for k in range(len(encoded))]

    opening = Opening(EngineSettings("transformers"), Models("base", "base", {}, "float32", "cpu", 99))
    engine = cluster._Engine(opening, {"m": "base"}, {"m": None})
    engine._scorer, engine._folders = Tight(), {"m": None}

    def real(ray: MadeUpRay, worker: str, method: str, *given: Any) -> Any:
        return engine.score(*given) if method == "score" else True

    assert len(run(MadeUpRay(2, real), 2)) == 2
    assert capsys.readouterr().err.count("A worker, base: out of memory: going on with half the batch") == 2


def test_the_engine_of_a_cluster_is_said_and_refuses_adapters_that_it_cannot_take(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cluster, "require", lambda *_: None)
    monkeypatch.setattr(OnRay, "_connected", lambda self: SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0}))

    def settled(adapters: dict[str, Path], **engine: Any) -> str:
        return OnRay("auto").settle(EngineSettings(**engine), "float32", "auto", adapters)[0].name

    model = tiny_model(tmp_path / "tiny")
    adapters = {"m0": tiny_adapter(model, tmp_path / "m0", seed=1),
                "head": tiny_adapter(model, tmp_path / "head", seed=2, target_modules=["q_proj", "lm_head"])}
    assert settled(adapters) == "transformers"
    assert "Engine: transformers (with --ray vLLM is taken only when it is named" in capsys.readouterr().err
    assert settled({"m0": adapters["m0"]}, name="vllm") == "vllm" and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="vLLM cannot take the adapter of 'head'") as caught:
        settled(adapters, name="vllm")
    assert caught.value.exit_code == Exit.INCOMPATIBLE
    with pytest.raises(UserError, match="A server computes by itself"):
        settled({}, base_urls=("http://x/v1",))


def test_no_room_is_said_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "START_S", 0.0)
    ray = MadeUpRay(1, fine)
    with pytest.raises(UserError, match="no worker"):
        run(ray)
    assert ray.made == ["w0"], "one is asked for, which tells a cluster that can grow to do so"


def test_a_cluster_without_room_may_grow_for_the_first_worker() -> None:
    class Growing(MadeUpRay):
        def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
            found = super().wait(refs, num_returns, timeout)
            self.cpus = 4
            return found

    ray = Growing(0, fine)
    assert len(run(ray)) == 5 and ray.made == ["w0", "w1"]


def test_a_missing_ray_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        OnRay("auto")
    assert caught.value.exit_code == Exit.ENVIRONMENT and "safeset[ray]" in caught.value.hint


def test_a_cluster_does_not_keep_the_line_to_go_on_with_from_being_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: pytest.fail("the way Ray ends"))

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    monkeypatch.setattr(cluster, "require", lambda *_: None)
    before = signal.signal(signal.SIGTERM, ours := lambda number, frame: None)
    try:
        OnRay("auto")._connected()
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


# A real cluster


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("RAY_health_check_initial_delay_ms", "RAY_health_check_period_ms", "RAY_health_check_timeout_ms"):
        monkeypatch.setenv(name, "500")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False,
                                                          "object_store_memory": 80 * 2**20})
    yield nodes
    ray.shutdown()
    nodes.shutdown()


class LosingANode(OnRay):
    """Kills the second node once both have worked."""

    def __init__(self, nodes: Any) -> None:
        super().__init__(nodes.address)
        self.nodes = nodes

    def results(self, work: Work) -> Iterator[tuple[Chunk, list[AnswerNll]]]:
        for number, done in enumerate(super().results(work)):
            yield done
            if number == 4:
                (node,) = self.nodes.worker_nodes
                self.nodes.remove_node(node, allow_graceful=False)


def kill_driver(nodes: Any, root: Path, store: Path) -> None:
    """Kill a driver on a cluster once it has stored scores; its workers must end, and the store be whole."""
    driver = Forked(on_cluster, nodes.address, root, store, 3, folder=root, cwd=ROOT)
    driver.until(lambda: n_scored(store) > 0)
    assert workers(os.getpid())
    driver.send(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    drivers = Drivers(os.getpid())
    drivers.until_workers_end()
    assert drivers.outlived == 0
    only_leftovers(store)


@pytest.mark.ray
def test_a_cluster_that_loses_driver_and_node_gives_what_one_machine_gives(tmp_path: Path, node: Any,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "PART_ROWS", 13)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 3)
    model = tiny_model(tmp_path / "tiny")
    members = ensemble_members(tiny_ensemble(model, tmp_path / "ensemble"))[1]
    pool = write_rows(tmp_path / "pool.jsonl", tiny_rows(41, "pool"))
    lost: list[Chunk | None] = []
    forget = _Pool._lost
    monkeypatch.setattr(_Pool, "_lost", lambda self, chunk, err: (lost.append(chunk), forget(self, chunk, err))[1])

    def job(name: str) -> ScoreJob:
        return ScoreJob(corpora=[open_corpus(str(pool))], store=tmp_path / name, aligned=str(model), members=members,
                        dtype="float32", device="cpu", max_tokens=400)

    score(job("local"))
    kill_driver(node, tmp_path, tmp_path / "ray")
    node.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    summary = score(job("ray"), LosingANode(node))
    assert 3 <= sum(summary.models.values()) <= 3 * 41 - 3 and len(lost) >= 1
    stores = [Store.open_read(tmp_path / name) for name in ("local", "ray")]
    assert stores[0].evidence_digest() == stores[1].evidence_digest()
    manifests = [build_manifest(store, Choice(n=9, min_answer_tokens=1), tmp_path)[0].to_bytes() for store in stores]
    assert manifests[0] == manifests[1]
