"""The same chunks on a Ray cluster: each worker holds one engine, and this process alone reads and writes the store.

A worker is an actor. It gets token ids and hands back evidence, so that it needs neither the store nor the corpus;
adapters are sent to it, and the aligned model must be one that every node can load. A chunk whose worker dies with its
process or its node goes back to the queue. The pool of workers grows with the cluster.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from curate.chunks import Chunk, Opening, Work, score_rows
from curate.core.adapters import ADAPTER_FILES
from curate.core.chat import Encoded
from curate.core.errors import Exit, UserError, require
from curate.core.model import pick_dtype
from curate.core.nll import AnswerNll
from curate.core.terminal import say
from curate.core.vllm import check_adapters
from curate.scorers.choose import EngineSettings, open_scorer

TRIES = 3
"""How many workers a chunk may lose before the run ends; what is finished is kept."""
START_S = 300.0
"""How long to wait for a first worker."""
LOOK_EVERY_S = 2.0
"""How often to look whether the cluster has grown."""


class OnRay:
    """Computes chunks on a cluster; see ``curate.chunks.Compute``."""

    def __init__(self, address: str, cpus: int = 1) -> None:
        require("ray", "ray")
        self.address = address
        self.cpus = cpus

    def settle(self, engine: EngineSettings, dtype: str, device: str,
               adapters: Mapping[str, Path]) -> tuple[EngineSettings, str, str]:
        """Return engine, dtype and device of the workers; ``auto`` is decided there, and the engine is transformers.

        Raises ``UserError`` for a server, and for an adapter that the engine cannot take.
        """
        if engine.name == "server" or engine.base_urls:
            raise UserError("A server computes by itself, so it needs no Ray cluster.",
                            "Leave out --ray, or use --engine transformers or vllm.")
        ray = self._connected()
        if device == "auto":
            device = "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
        if engine.name == "vllm":
            check_adapters(adapters, on_gpu=device.startswith("cuda"))
        elif engine.name == "auto":
            engine = replace(engine, name="transformers")
            say("Engine: transformers (with --ray vLLM is taken only when it is named: --engine vllm).")
        if dtype == "auto":
            asked = ray.remote(**self._needs(device))(pick_dtype).remote(dtype, device)
            try:
                dtype = ray.get(asked, timeout=START_S)
            except ray.exceptions.GetTimeoutError as err:
                raise self._no_worker(ray, device) from err
            except ray.exceptions.RayTaskError as err:
                raise _readable(err) from err
        return engine, dtype, device

    def results(self, work: Work) -> Iterator[tuple[Chunk, list[AnswerNll]]]:
        """Yield chunks as they are finished, in whatever order."""
        ray = self._connected()
        pool = _Pool(ray, self, work)
        try:
            yield from pool.results()
        finally:
            pool.close()

    def _connected(self) -> Any:
        import ray

        if not ray.is_initialized():
            stop = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(address=self.address, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as err:
                raise UserError(f"No Ray cluster answers at '{self.address}': {str(err).strip().splitlines()[0]}",
                                "Start one with `ray start --head`, or give its address: --ray HOST:PORT.",
                                Exit.REMOTE) from err
            finally:  # Ray puts a handler of its own in place, which ends without a word
                if stop is not None and threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, stop)
        return ray

    def _needs(self, device: str) -> dict[str, float]:
        return {"num_cpus": self.cpus, "num_gpus": 1 if device.startswith("cuda") else 0}

    def room(self, ray: Any, device: str) -> int:
        """Return how many workers fit into the cluster as it is now."""
        has, needs = ray.cluster_resources(), self._needs(device)
        fit = has.get("CPU", 0) // max(needs["num_cpus"], 1)
        return int(min(fit, has.get("GPU", 0)) if needs["num_gpus"] else fit)

    def _no_worker(self, ray: Any, device: str) -> UserError:
        has = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
        return UserError(f"No worker could start within {START_S:g} s; one needs {self._needs(device)}, the cluster "
                         f"has {has}.", "Add nodes, end other work there, or lower --ray-cpus.", Exit.REMOTE)


class _Engine:
    """A worker: one engine with the aligned model, and at most one member open."""

    def __init__(self, opening: Opening, names: Mapping[str, str], adapters: Mapping[str, Any]) -> None:
        self._opening = opening
        self._names = names
        self._adapters = adapters
        self._folders: dict[str, Path | None] = {}
        self._scorer: Any = None
        self._member: str | None = None
        self._engine, self._held = ExitStack(), ExitStack()

    def placed(self) -> bool:
        """Answer as soon as this process is there."""
        return True

    def open(self) -> bool:
        """Put the adapters on this node's disk and load the aligned model."""
        folder = Path(self._engine.enter_context(tempfile.TemporaryDirectory()))
        self._folders = {model_id: self._fetched(folder / model_id, ref) for model_id, ref in self._adapters.items()}
        adapters = {self._names[model_id]: path for model_id, path in self._folders.items() if path is not None}
        models = replace(self._opening.models, adapters=adapters)
        self._scorer = self._engine.enter_context(open_scorer(self._opening.engine, models))
        return True

    def score(self, model_id: str, encoded: Sequence[Encoded]) -> tuple[list[AnswerNll], list[str]]:
        """Return the evidence about the rows of a chunk, and what there was to say."""
        if model_id != self._member:
            self._member = None
            self._held.close()
            self._held.enter_context(self._scorer.member(self._folders[model_id]))
            self._member = model_id
        notes: list[str] = []
        return score_rows(self._scorer, encoded, notes.append), notes

    def _fetched(self, folder: Path, ref: Any) -> Path | None:
        import ray

        if ref is None:
            return None
        folder.mkdir()
        for name, data in ray.get(ref).items():
            (folder / name).write_bytes(data)
        return folder


class _Pool:
    """The workers that there are, and who does what."""

    def __init__(self, ray: Any, cluster: OnRay, work: Work) -> None:
        self.ray, self.cluster, self.work = ray, cluster, work
        self.waiting = deque(work.chunks)
        self.losses: Counter[Chunk] = Counter()
        self.placing: dict[Any, Any] = {}
        self.opening: dict[Any, Any] = {}
        self.running: dict[Any, tuple[Any, Chunk, list[Encoded]]] = {}
        self.idle: list[Any] = []
        self.asked: dict[Any, Any] = {}
        """Workers that had nothing to do when another was lost, and may be lost with it."""
        self.failed_starts = 0
        self.label = work.bar.label
        self.last_sign = time.monotonic()
        self._adapters = {model_id: None if folder is None else
                          ray.put({name: (folder / name).read_bytes() for name in ADAPTER_FILES})
                          for model_id, folder in work.adapters.items()}

    def results(self) -> Iterator[tuple[Chunk, list[AnswerNll]]]:
        while self.waiting or self.running:
            self._grow()
            while self.idle and self.waiting:
                self._start(self.idle.pop(), self.waiting.popleft())
            pending = [*self.running, *self.asked, *self.opening, *self.placing]
            done, _ = self.ray.wait(pending, num_returns=1, timeout=LOOK_EVERY_S) if pending else ([], [])
            for ref in done:
                yield from self._ended(ref)
            if done or self.running or self.opening:
                self.last_sign = time.monotonic()
            elif time.monotonic() - self.last_sign > START_S:
                raise self.cluster._no_worker(self.ray, self.work.opening.models.device)

    def close(self) -> None:
        """End all workers."""
        busy = [actor for actor, _, _ in self.running.values()]
        for actor in [*self.idle, *self.asked.values(), *self.placing.values(), *self.opening.values(), *busy]:
            self.ray.kill(actor)

    def _n_workers(self) -> int:
        return sum(map(len, (self.idle, self.asked, self.placing, self.opening, self.running)))

    def _grow(self) -> None:
        """Start workers while there is room for them and work; one in any case, for which a cluster may grow."""
        device = self.work.opening.models.device
        wanted = min(max(1, self.cluster.room(self.ray, device)), len(self.waiting) + len(self.running))
        for _ in range(wanted - self._n_workers()):
            options = {**self.cluster._needs(device), "max_restarts": 0}
            actor = self.ray.remote(**options)(_Engine).remote(
                self.work.opening, self.work.names, self._adapters)
            self.placing[actor.placed.remote()] = actor

    def _start(self, actor: Any, chunk: Chunk) -> None:
        encoded = self.work.encoded(chunk)
        self.running[actor.score.remote(chunk.model_id, encoded)] = (actor, chunk, encoded)
        self.work.bar.label = f"{self.label}, {self.work.names[chunk.model_id]}, {self._n_workers()} workers"

    def _ended(self, ref: Any) -> Iterator[tuple[Chunk, list[AnswerNll]]]:
        """Take what a worker has answered, or note that it is lost."""
        actor, chunk, encoded = self.running.pop(ref, (None, None, None))
        placed, asked = ref in self.placing, ref in self.asked
        for workers in (self.placing, self.opening, self.asked):
            actor = actor or workers.pop(ref, None)
        try:
            answer = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as err:
            raise _readable(err) from err
        except self.ray.exceptions.RayError as err:
            if not asked:
                self._lost(chunk, err)
            return
        if placed:
            self.opening[actor.open.remote()] = actor
            return
        self.idle.append(actor)
        self.failed_starts = 0
        if chunk is not None:
            rows, notes = answer
            for note in notes:
                say(f"A worker, {self.work.names[chunk.model_id]}: {note}")
            self.work.finished(encoded, rows)
            yield chunk, rows

    def _lost(self, chunk: Chunk | None, err: Exception) -> None:
        why = str(err).strip().partition("\n")[0] or type(err).__name__
        if chunk is None:
            self.failed_starts += 1
            if self.failed_starts >= TRIES:
                raise UserError(f"{TRIES} workers were lost one after another before they could begin: {why}",
                                "Look at the cluster with `ray status`; nodes may have too little memory.", Exit.REMOTE)
            return
        self.losses[chunk] += 1
        if self.losses[chunk] >= TRIES:
            raise UserError(f"{TRIES} workers were lost over the same {len(chunk.ids)} rows: {why}",
                            "What was finished is kept. Look at the cluster with `ray status`; then run this again.",
                            Exit.REMOTE)
        say(f"A worker was lost; its {len(chunk.ids)} rows go to another.")
        self.waiting.appendleft(chunk)
        self.asked.update((actor.placed.remote(), actor) for actor in self.idle)
        self.idle.clear()


def _readable(err: Any) -> Exception:
    """Return what a worker raised; a package that its node lacks is no bug, and neither is its full disk."""
    cause = err.cause
    if isinstance(cause, OSError):
        return UserError(f"A node of the cluster cannot go on: {str(cause) or type(cause).__name__}.",
                         "See to its disk and network (`ray status` names the nodes); then run this again: what was "
                         "finished is kept.", Exit.ENVIRONMENT)
    if isinstance(cause, ImportError):
        return UserError(f"A node of the cluster lacks what this one has: {cause}.",
                         "Install the same safeset, with the same packages, on every node.", Exit.ENVIRONMENT)
    return cause if isinstance(cause, UserError) else err
