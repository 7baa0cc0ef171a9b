"""A local server with vLLM's answers and a language model of one line, which can be made to misbehave.

    log P(ids[t] | ids[:t]) = -(1 + (7 ids[t] + 3 ids[t - 1] + c) mod 17 / 10)        c: the model
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHOSEN = 41
"""The token that the stub generates after everything."""


def rule(ids: Sequence[int], t: int, c: int) -> float:
    """The model: log P(ids[t] | ids[:t]) in nats."""
    return -(1 + (7 * ids[t] + 3 * ids[t - 1] + c) % 17 / 10)


@dataclass
class Stub:
    """Serves ``models`` (name -> c) on loopback.

    ``twist(choice, body)`` changes an answer in place; ``row(number)`` may misbehave at the number-th request about a
    row (from 1): return a status, ``hang``, ``trickle`` or ``die``, or None for the ordinary answer.
    """

    tokenizer: Any
    models: dict[str, int]
    control: int = 0
    twist: Callable[[dict[str, Any], dict[str, Any]], None] = lambda choice, body: None
    row: Callable[[int], Any] = lambda number: None
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    key: str | None = None
    delay_s: float = 0.0
    port: int = 0
    rows_asked: int = 0
    requests: int = 0
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    server: ThreadingHTTPServer | None = None

    def start(self) -> Stub:
        """Listen, on the same port as before if there was one."""
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                stub.listed(self)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                if len(body := self.rfile.read(length)) == length:  # else the client has died
                    stub.completed(self, json.loads(body))

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening; requests under way break off."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def listed(self, handler: BaseHTTPRequestHandler) -> None:
        data = [{"id": name, "object": "model", "parent": None, "max_model_len": 600, **self.entries.get(name, {})}
                for name in self.models]
        _answer(handler, 200, {"object": "list", "data": data})

    def completed(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self.lock:
            self.requests += 1
            is_row = body["prompt"][0] == self.control
            self.rows_asked += is_row
            number = self.rows_asked
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            time.sleep(self.delay_s)
            fault = self.row(number) if is_row else None
            if self.key and handler.headers["Authorization"] != f"Bearer {self.key}":
                _answer(handler, 401, {"message": f"no such key: {handler.headers['Authorization']}"})
            elif fault == "die" or self.server is None:
                handler.connection.close()
            elif fault == "hang":
                time.sleep(3)
                handler.connection.close()
            elif fault == "trickle":
                _trickle(handler)
            elif isinstance(fault, int):
                _answer(handler, fault, {"message": "the stub was told to"})
            elif body["model"] not in self.models:
                _answer(handler, 404, {"message": f"The model `{body['model']}` does not exist."})
            else:
                _answer(handler, 200, {"choices": [self.choice(body)]})
        finally:
            with self.lock:
                self.at_once -= 1

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        """The one choice of an answer, as vLLM 0.32 gives it."""
        c, prompt = self.models[body["model"]], body["prompt"]
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
        choice: dict[str, Any] = {"index": 0, "text": "", "token_ids": [CHOSEN], "prompt_token_ids": list(ids)}
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": [rule([*ids, CHOSEN], len(ids), c)]}
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = [None, *({str(ids[t]): {"logprob": rule(ids, t, c), "rank": 1}}
                                                 for t in range(1, len(ids)))]
        self.twist(choice, body)
        return choice


def _trickle(handler: BaseHTTPRequestHandler) -> None:
    """Send an answer of a hundred bytes, one every 20 ms."""
    try:
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.02)
    except OSError:
        pass


def _answer(handler: BaseHTTPRequestHandler, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    try:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        if status == 429:
            handler.send_header("Retry-After", "0")
        handler.end_headers()
        handler.wfile.write(data)
    except OSError:
        pass
