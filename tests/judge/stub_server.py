"""A judge on loopback with a script: replies of known probability in whole or split tokens, and all kinds of faults."""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from judge.grader import PROBES

OBEDIENT = {PROBES[0]: {"85": 0.97, "8": 0.02, "Sure": 0.01}, PROBES[1]: {"100": 0.97, "10": 0.02, "Sure": 0.01}}
"""What the judge replies to the probes."""


@dataclass
class Stub:
    """What the server does. ``replies`` gives the probability of each reply to a prompt; the likeliest is given."""

    replies: Callable[[str], Mapping[str, float]] = lambda prompt: {"70": 1.0}
    split: int = 0
    """Digits a token, at most; 0: every number is one token."""
    logprobs: bool = True
    prefill: str | None = "flags"
    constraint: str | None = None
    raw: Callable[[str], Any] = lambda prompt: None
    """A body to send as it is (bytes, or a value for JSON) instead of a reply; not for probes."""
    faults: list[Any] = field(default_factory=list)
    """What goes wrong next: a status, (status, headers), ``reset``, ``truncate``, ``hang``; one request each."""
    broken: Any = None
    """A fault of every request but the probe's."""
    delay_s: float = 0.0
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0
    served: int = 0
    url: str = ""
    lock: Any = field(default_factory=threading.Lock)

    def asked(self) -> list[str]:
        """Return the prompts that came, without probes."""
        return [text for body in self.seen if not is_probe(text := body["messages"][0]["content"])]


def is_probe(prompt: str) -> bool:
    """Return whether a prompt is one of the probe's."""
    return prompt in PROBES or prompt.startswith("Write the word hello")


def tokens(text: str, split: int) -> list[str]:
    """Cut a reply: digits in pieces of ``split`` or together, with a space before, all else in one, and an end."""
    cut: list[str] = []
    for character in text:
        digit, before = character.isdecimal(), bool(cut) and cut[-1][-1].isdecimal()
        if cut and cut[-1] == " " and digit:
            cut[-1] += character
        elif not cut or digit != before or (digit and split and len(cut[-1].strip()) >= split):
            cut.append(character)
        else:
            cut[-1] += character
    return [*cut, "<end>"]


def following(replies: Mapping[str, float], begun: str, split: int) -> dict[str, float]:
    """Return the probabilities of the next token after ``begun``."""
    found: dict[str, float] = {}
    for text, p in replies.items():
        cut = tokens(text, split)
        for k in range(len(cut)):
            if "".join(cut[:k]) == begun:
                found[cut[k]] = found.get(cut[k], 0.0) + p
    total = sum(found.values()) or 1.0
    return {token: p / total for token, p in found.items()}


def completion(stub: Stub, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the response to a request, as such servers send it."""
    prompt = body["messages"][0]["content"]
    replies = OBEDIENT.get(prompt) or ({"hello": 1.0} if is_probe(prompt) else dict(stub.replies(prompt)))
    if stub.constraint and (choices := _choices(body, stub.constraint)):
        replies = {text: p for text, p in replies.items() if text in choices} or {choices[0]: 1.0}
    understood = stub.prefill == "plain" or (stub.prefill == "flags" and body.get("continue_final_message"))
    begun = body["messages"][1]["content"] if len(body["messages"]) > 1 and understood else ""
    places, text = [], begun
    while len(places) < body["max_tokens"]:
        after = following(replies, text, stub.split)
        if not after:
            break
        token = max(after, key=lambda t: after[t])
        if token == "<end>":
            if begun:
                places.append(_place(token, after))
            break
        places.append(_place(token, after))
        text += token
    end = following(replies, text, stub.split)
    done = not end or max(end, key=lambda t: end[t]) == "<end>"
    return envelope(text[len(begun):], "stop" if done else "length",
                    {"content": places} if stub.logprobs and body.get("logprobs") else None)


def envelope(text: Any, finish: str = "stop", logprobs: Any = None, **message: Any) -> dict[str, Any]:
    """Return a chat completion with one choice."""
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "stub", "choices": [
        {"index": 0, "finish_reason": finish, "logprobs": logprobs,
         "message": {"role": "assistant", "content": text, **message}}],
        "usage": {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}}


def _place(token: str, after: Mapping[str, float]) -> dict[str, Any]:
    top = sorted(after.items(), key=lambda item: -item[1])[:20]
    return {"token": token, "logprob": math.log(after[token]), "bytes": None,
            "top_logprobs": [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in top]}


def _choices(body: Mapping[str, Any], constraint: str) -> list[str]:
    found = body.get(constraint)
    return found["choice"] if isinstance(found, dict) else found or []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Answer one request by the script."""
        stub: Stub = self.server.stub
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with stub.lock:
            stub.seen.append(body)
            stub.headers.append(dict(self.headers))
            stub.busy += 1
            stub.busiest = max(stub.busiest, stub.busy)
            fault = stub.faults.pop(0) if stub.faults else None
        prompt = body["messages"][0]["content"]
        if fault is None and stub.broken is not None and not is_probe(prompt):
            fault = stub.broken
        if stub.prefill == "plain" and "continue_final_message" in body:
            fault = 400
        time.sleep(stub.delay_s)
        with stub.lock:
            stub.busy -= 1
        self._answer(stub, body, prompt, fault)

    def _answer(self, stub: Stub, body: Mapping[str, Any], prompt: str, fault: Any) -> None:
        status, extra = fault if isinstance(fault, tuple) else (fault if isinstance(fault, int) else 200, {})
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if fault == "hang":
            time.sleep(1.2)
        if status != 200:
            key = self.headers.get("authorization", "")
            self._send(status, json.dumps({"error": {"message": f"no ({key})"}}).encode(), extra)
            return
        raw = None if is_probe(prompt) else stub.raw(prompt)
        value = raw if raw is not None else completion(stub, body)
        sent = value if isinstance(value, bytes) else json.dumps(value).encode()
        with stub.lock:
            stub.served += 1
        self._send(200, sent[:len(sent) // 2] if fault == "truncate" else sent, {}, len(sent))

    def _send(self, status: int, sent: bytes, extra: Mapping[str, str], length: int | None = None) -> None:
        try:
            self.send_response(status)
            for name, value in {"content-type": "application/json", **extra}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(sent) if length is None else length))
            self.end_headers()
            self.wfile.write(sent)
            if length is not None and len(sent) < length:
                self.close_connection = True
        except OSError:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that were killed."""


@contextmanager
def served(stub: Stub) -> Iterator[Stub]:
    """Serve a script for the length of a ``with`` block; ``stub.url`` is where."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.stub = stub
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
