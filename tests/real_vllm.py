"""vLLM's own HTTP server on loopback, for tests: started, asked how much it has done, killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

READY_S = 400
CONTEXT = 2048
OPENING = "Score: "
"""What the server puts before a reply to a judge's prompt: a model of this size would copy the fence otherwise."""
BASE = "smollm2-135m-instruct-v1"
"""What the room calls SmolLM2 where nobody gives it a name."""


@dataclass
class Served:
    """A server in a process group of its own; ``names`` are what its one model is called."""

    weights: str
    names: tuple[str, ...]
    dtype: str = "float32"
    template: Path | None = None
    """A chat template in the place of the model's own."""
    port: int = field(default_factory=lambda: free_port())
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What goes into --base-url."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> Served:
        """Begin to start; `vllm serve` does not start from the CPU wheel, its module does.

        Prefixes are cached, because a judge's continued replies share all but their last token; requests for the
        log-probabilities of a prompt never read that cache.
        """
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.weights,
                   "--served-model-name", *self.names, "--host", "127.0.0.1", "--port", str(self.port), "--dtype",
                   self.dtype, "--enforce-eager", "--max-model-len", str(CONTEXT), "--max-num-batched-tokens", "2048",
                   "--max-num-seqs", "16", "--enable-prefix-caching", "--generation-config", "vllm",
                   *(["--chat-template", str(self.template)] if self.template else [])]
        environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
        return self

    def ready(self) -> Served:
        """Wait until it answers."""
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            assert self.process is not None and self.process.poll() is None, "the server ended before it was ready"
            with suppress(OSError):
                self._get("/health")
                return self
            time.sleep(0.5)
        pytest.fail(f"the server was not ready after {READY_S} s")

    def kill(self) -> None:
        """End it and its workers at once, whatever they are doing."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def n_finished(self) -> int:
        """Return how many requests it has finished, by its own count."""
        return round(self._counted("vllm:request_success_total"))

    def _counted(self, name: str) -> float:
        lines = self._patiently("/metrics").splitlines()
        found = [line.split()[-1] for line in lines if re.match(re.escape(name) + r"\b[^_]", line)]
        assert found, f"the server does not count {name}"
        return sum(map(float, found))

    def _patiently(self, path: str) -> str:
        """Return an answer; a busy server may close a connection without one."""
        for _ in range(9):
            with suppress(OSError):
                return self._get(path)
            time.sleep(0.5)
        return self._get(path)

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as reply:
            return reply.read().decode()


@pytest.fixture(scope="session")
def aligned_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """SmolLM2 at a server, as itself, as ``aligned`` and as ``grader``; it may still be starting."""
    from curate.core.smollm2 import smollm2_folder

    template = tmp_path_factory.mktemp("served") / "template.jinja"
    template.write_text(opened((smollm2_folder() / "chat_template.jinja").read_text()))
    server = Served(str(smollm2_folder()), ("aligned", BASE, "grader"), template=template).start()
    yield server
    server.kill()


def opened(template: str) -> str:
    """Return SmolLM2's chat template with ``OPENING`` in front of every reply to a judge's prompt, also a begun one."""
    judging = "'Grade only what was fenced' in messages[0]['content']"
    for old, new in (("message['content']", f"('{OPENING}' if {judging} and message['role'] == 'assistant' else '') + "
                                             "message['content']"),
                     ("'<|im_start|>assistant\n'", f"'<|im_start|>assistant\n' + ('{OPENING}' if {judging} else '')")):
        assert template.count(old) == 1
        template = template.replace(old, new)
    return template


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
