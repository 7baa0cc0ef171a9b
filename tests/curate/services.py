"""Services that outlive their clients, each in a process of its own: a model server, an S3 endpoint, a Ray cluster."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NoReturn

from curate.core.refs import load_tokenizer
from tests.curate.stub_server import Stub

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def beside(service: Callable[[], AbstractContextManager[str]]) -> Iterator[tuple[str, int]]:
    """Keep a service in a forked process; give what it says when it is ready and its process, which ends with us.

    Raises ``RuntimeError`` where it does not begin. Nothing of it runs here, so that one may go on forking.
    """
    said, held = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        os.close(held[1])
        _serve(service, said[1], held[0])
    os.close(said[1])
    os.close(held[0])
    try:
        with os.fdopen(said[0]) as words:
            ready = words.readline().strip()
        if not ready:
            raise RuntimeError(f"{service} did not begin")
        yield ready, process
    finally:
        os.close(held[1])
        os.waitpid(process, 0)


def _serve(service: Callable[[], AbstractContextManager[str]], say: int, held: int) -> NoReturn:
    """Serve until the other end of ``held`` is closed, in a process group of its own."""
    code = 1
    try:
        os.setsid()
        with service() as ready:
            os.write(say, f"{ready}\n".encode())
            os.close(say)
            os.read(held, 1)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@contextmanager
def models_served(root: Path, delay_s: float = 0.01) -> Iterator[str]:
    """Serve the tiny model of ``root`` and its two members, made-up ones, and give the address."""
    tokenizer = load_tokenizer(str(root / "tiny"))
    stub = Stub(tokenizer, {"tiny": 3, "m0": 8, "m1": 11}, tokenizer.convert_tokens_to_ids("<|im_start|>"),
                entries={name: {"parent": "tiny"} for name in ("m0", "m1")}, delay_s=delay_s).start()
    try:
        yield stub.url
    finally:
        stub.stop()


@contextmanager
def objects_served() -> Iterator[str]:
    """Serve S3 on loopback and give its URL; it forgets everything at the end, and takes pieces of any size."""
    os.environ["S3_UPLOAD_PART_MIN_SIZE"] = "1"
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@contextmanager
def cluster(n_cpus: int = 2) -> Iterator[str]:
    """Start a Ray cluster of one node and give its address."""
    os.environ.update(PYTHONPATH=str(ROOT), RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": n_cpus, "include_dashboard": False,
                                                          "object_store_memory": 80 * 2**20})
    try:
        yield nodes.address
    finally:
        nodes.shutdown()
