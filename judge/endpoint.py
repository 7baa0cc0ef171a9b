"""An OpenAI-compatible server that judges: bounded, retried, paid once; the only file that knows the client.

Retries are the client's own (408, 409, 429 and 5xx, broken connections; Retry-After is honoured), so there is one
layer of them. Replies are kept by the content of the request, not by the server's address. The key comes from the
environment, and nothing that a server sends back is looked at before the key is taken out of it.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from curate.core.errors import Exit, UserError
from curate.core.files import canonical_json, sha256
from curate.core.keys import key_in, without_key
from curate.core.terminal import Terminated, interrupt
from judge.journal import Journal
from judge.prompts import carried

CACHE_VERSION = "judge-reply-1"
"""Changes whenever the same request would be answered by another kind of record."""
FAILURES_IN_ROW = 10
"""So many requests without a reply, one after the other, and the server counts as down."""
BYTES_PER_TOKEN = 3.5
"""A guess for budgets and plans, before a server has counted; the bill is the server's own count."""
NO_LOGPROB = -9999.0

T = TypeVar("T")


@dataclass(frozen=True)
class Address:
    """Where a judge is and how it is spoken to; nothing here decides a number."""

    model: str
    base_url: str | None = None
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    max_retries: int = 6
    attempt_s: float = 60.0
    """Longest wait for one attempt."""
    total_s: float = 600.0
    """Longest wait for a request with all its retries."""

    def __post_init__(self) -> None:
        """Raise ``UserError`` for what is no address."""
        try:
            parts = urlsplit(self.base_url or "http://x")
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UserError("--base-url is no address of a server.", "Give one such as http://127.0.0.1:8000/v1.")

    def shown(self) -> str:
        """Return the address without user, password and query, for people."""
        parts = urlsplit(self.base_url or "https://api.openai.com/v1")
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"

    def key(self) -> str:
        """Return the key from the environment; ``UserError`` where there is none and no other server was named.

        Also for one that no header can carry.
        """
        found = key_in(self.key_env) if self.key_env else ""
        if not found and self.base_url is None:
            raise UserError(f"There is no key in the environment variable {self.key_env}.",
                            f"Set {self.key_env}, or name a server of your own with --base-url.")
        return found


@dataclass
class Budget:
    """What may still be spent on a judge, over all models of a call; None: as much as it takes."""

    max_requests: int | None = None
    max_tokens: int | None = None
    n_requests: int = 0
    n_tokens: int = 0
    n_cached: int = 0
    reserved: int = 0

    def admits(self, tokens: int) -> bool:
        """Return whether one more request of about so many tokens fits beside those in flight."""
        fits = self.max_tokens is None or self.n_tokens + self.reserved + tokens <= self.max_tokens
        return fits and (self.max_requests is None or self.n_requests < self.max_requests)


class NoReply(Exception):
    """A request that got no reply after all retries; the text says why. ``status`` is the server's, where it spoke."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class Stopped(Exception):
    """Nothing more is sent: the budget is spent or the server is of no use (see ``Endpoint.stop``)."""


@dataclass(frozen=True)
class Position:
    """One token of a reply: which it was, and the likeliest ones with their log-probabilities (None: not a number)."""

    token: str
    top: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True)
class Reply:
    """What came back: the text (None: no text), why it ended, whether it was withheld, and its tokens if given."""

    text: str | None
    finish: str
    refusal: bool
    positions: tuple[Position, ...] | None
    digest: str = ""


@dataclass
class Endpoint:
    """A judge's server, with the journal of its replies and what may be spent."""

    address: Address
    journal: Journal
    budget: Budget = field(default_factory=Budget)
    scope: str = ""
    """What else replies are kept under than model and request."""
    stop: UserError | None = None
    failures: int = 0
    retries: int | None = None
    """Retries instead of the address' own, while the server is probed."""
    _client: Any = None
    _gate: Any = None
    _flying: dict[str, asyncio.Task[Reply]] = field(default_factory=dict)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Endpoint]:
        """Hold a connection for the length of an ``async with`` block."""
        import openai

        key = self.address.key()
        self._client = openai.AsyncOpenAI(api_key=key or "none", base_url=self.address.base_url,
                                          max_retries=self.address.max_retries, timeout=self.address.attempt_s)
        self._gate = asyncio.Semaphore(self.address.concurrency)
        try:
            yield self
        finally:
            for task in self._flying.values():
                task.cancel()
            self._flying.clear()
            await self._client.close()

    def cached(self, body: Mapping[str, Any]) -> Reply | None:
        """Return the reply that was paid for before."""
        found = self.journal.get(self._key(body))
        return None if found is None else _from_record(found, self._key(body))

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        """Return the reply to a request: from the journal, from the same request in flight, or from the server.

        Raises ``NoReply`` and ``Stopped``.
        """
        reply = self.cached(body)
        if reply is not None:
            self.budget.n_cached += 1
            return reply
        key = self._key(body)
        if key not in self._flying:
            self._flying[key] = asyncio.create_task(self._send(key, body))
        task = self._flying[key]
        try:
            return await asyncio.shield(task)
        finally:
            if task.done():
                self._flying.pop(key, None)

    def _key(self, body: Mapping[str, Any]) -> str:
        return sha256(canonical_json([CACHE_VERSION, self.scope, self.address.model, body]))

    async def _send(self, key: str, body: Mapping[str, Any]) -> Reply:
        async with self._gate:
            about = tokens_about(body)
            if self.stop is None and not self.budget.admits(about):
                self.stop = _spent(self.budget)
            if self.stop is not None:
                raise Stopped
            self.budget.n_requests += 1
            self.budget.reserved += about
            try:
                record, n_tokens = _record(await self._post(body))
            except NoReply as err:
                self._count(err)
                self.budget.n_tokens += about if err.status is None else 0
                raise
            finally:
                self.budget.reserved -= about
            self.failures = 0
            self.budget.n_tokens += about if n_tokens is None else n_tokens
            if record["positions"] is not None or not body.get("logprobs"):
                self._keep(key, record)
            return _from_record(record, key)

    def _keep(self, key: str, record: dict[str, Any]) -> None:
        """Put a reply into the journal; where that cannot be done, nothing more is asked for."""
        try:
            self.journal.put(key, record)
        except UserError as err:
            self.stop = err
            raise Stopped from err

    def _count(self, err: NoReply) -> None:
        """Decide what a request without a reply means for the others."""
        self.failures += 1
        if err.status in (401, 403, 404):
            self.stop = self.refused(err)
        elif err.status == 429 or self.failures >= FAILURES_IN_ROW:
            self.stop = UserError(f"{self.address.shown()} gives no replies: {err}.", "Replies that were paid for are "
                                  "kept. Wait or mend the server, then type it again; a smaller --concurrency helps "
                                  "against rate limits.", Exit.REMOTE)

    def refused(self, err: NoReply | Stopped) -> UserError:
        """Return the error for a server that will not be spoken to like this."""
        where = self.address.shown()
        status = getattr(err, "status", None)
        if status in (401, 403):
            return UserError(f"{where} does not accept the key in {self.address.key_env} (HTTP {status}).",
                             f"Set {self.address.key_env} to a key of this server, or name another variable with "
                             "--api-key-env.", Exit.REMOTE)
        if status == 404:
            return UserError(f"{where} has no model '{self.address.model}', or is no OpenAI-compatible server "
                             "(HTTP 404).", "Check --judge and --base-url; the latter usually ends in /v1.",
                             Exit.REMOTE)
        return UserError(f"{where} could not be used as a judge: {err}.",
                         "Check --base-url and that the server runs, then type it again.", Exit.REMOTE)

    async def _post(self, body: Mapping[str, Any]) -> str:
        """Return the raw body of a response with status 200, without the key in it."""
        import openai

        rest = {k: v for k, v in body.items() if k != "messages"}
        try:
            async with asyncio.timeout(self.address.total_s):
                client = self._client.with_options(max_retries=self.retries) if self.retries is not None \
                    else self._client
                raw = await client.chat.completions.with_raw_response.create(
                    model=self.address.model, messages=body["messages"], extra_body=rest)
                return self._clean(raw.text if isinstance(raw.text, str) else raw.text())
        except openai.APIStatusError as err:
            raise NoReply(f"HTTP {err.status_code}, {self._clean(_words(err.body))[:200]}", err.status_code) from None
        except (TimeoutError, openai.APITimeoutError):
            raise NoReply("no reply in time") from None
        except openai.APIConnectionError as err:
            raise NoReply(self._clean(f"the connection failed ({type(err.__cause__ or err).__name__})")) from None
        except (openai.OpenAIError, ValueError) as err:
            raise NoReply(f"the response cannot be read ({type(err).__name__})") from None

    def _clean(self, text: str) -> str:
        key = self.address.key()
        return without_key(text, key) if len(key) >= 6 else text


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` in an event loop that SIGTERM ends as promptly as Ctrl-C does.

    An exception that a signal handler raises lands in whichever task is at work, which keeps it to itself; so where
    the command line handles SIGTERM, the loop does it meanwhile.
    """
    before = signal.getsignal(signal.SIGTERM)

    async def main() -> T:
        task, loop, ended = asyncio.current_task(), asyncio.get_running_loop(), []
        assert task is not None
        loop.add_signal_handler(signal.SIGTERM, lambda: (ended.append(True), task.cancel()))
        try:
            return await work
        except asyncio.CancelledError:
            if ended:
                raise Terminated from None
            raise
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, before)

    ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        if ctrl_c is interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the one that asyncio replaces by its own
        return asyncio.run(main() if callable(before) else work)
    finally:
        if ctrl_c is interrupt:
            signal.signal(signal.SIGINT, ctrl_c)


def tokens_about(body: Mapping[str, Any]) -> int:
    """Return roughly how many tokens a request and its reply take."""
    text = "".join(str(message["content"]) for message in body["messages"])
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) + 8 + int(body.get("max_tokens", 0))


def _spent(budget: Budget) -> UserError:
    what = [f"{budget.n_requests:,} of {budget.max_requests:,} requests" if budget.max_requests is not None else "",
            f"{budget.n_tokens:,} of {budget.max_tokens:,} tokens" if budget.max_tokens is not None else ""]
    return UserError(f"The judge's budget is spent: {' and '.join(filter(None, what))}.", "Every reply is kept. Type "
                     "it again, with a larger budget or as it is, to go on.", Exit.INTERRUPTED)


def _record(raw: str) -> tuple[dict[str, Any], int | None]:
    """Return what is kept of a response body, and its number of tokens; ``NoReply`` where it is no chat completion."""
    try:
        body = json.loads(raw)
        choice = body["choices"][0]
        message = choice["message"]
        if not isinstance(message, dict):
            raise TypeError
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise NoReply("the response is no chat completion") from None
    text = message.get("content")
    record = {"text": carried(text) if isinstance(text, str) else None, "finish": str(choice.get("finish_reason")),
              "refusal": bool(message.get("refusal")), "positions": _positions(choice.get("logprobs"))}
    usage = body.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return record, total if isinstance(total, int) and not isinstance(total, bool) and total >= 0 else None


def _positions(logprobs: Any) -> list[Any] | None:
    """Return ``[[token, [[token, log-probability], ...]], ...]``; what is odd inside becomes None, nothing a number."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not all(isinstance(place, dict) for place in content):
        return None
    return [[carried(str(place.get("token"))), _tops(place.get("top_logprobs"))] for place in content]


def _tops(tops: Any) -> list[list[Any]]:
    if not isinstance(tops, list):
        return []
    return [[carried(str(top.get("token"))), _logprob(top.get("logprob"))] if isinstance(top, dict) else ["", None]
            for top in tops]


def _logprob(value: Any) -> float | None:
    """Return a log-probability; minus infinity is -9999, as servers send it; None for NaN, positive or no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value <= 1e-3:
        return None
    return float(max(value, NO_LOGPROB))


def _from_record(record: dict[str, Any], key: str) -> Reply:
    positions = record["positions"]
    return Reply(record["text"], record["finish"], record["refusal"], None if positions is None else tuple(
        Position(token, tuple((t, p) for t, p in top)) for token, top in positions),
        sha256(canonical_json([key, record])))


def _words(body: Any) -> str:
    """Return a server's complaint in one line."""
    inner = body.get("error", body) if isinstance(body, dict) else body
    text = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(text or "no reason given").split())


def journal_path(folder: Path | None, model: str) -> Path:
    """Return where a judge's replies are kept: in ``folder``, or in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "safeset" / "judge"
    return (folder or home) / f"replies-{sha256(model.encode())[:16]}.jsonl"
