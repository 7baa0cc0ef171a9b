"""One request to a vLLM server: sent, understood or refused, and tried again where that may help."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import openai

from curate.core.errors import Exit, UserError
from curate.core.keys import without_key
from curate.core.terminal import say
from curate.scorers import is_logprob

if TYPE_CHECKING:
    from curate.scorers.choose import EngineSettings

TIMEOUTS = 3
"""A server that hangs so often in one request is given up."""
LONGEST_WAIT_S = 30.0


class Passing(Exception):
    """A failure that another try may mend."""

    def __init__(self, what: str, wait_s: float | None = None, hung: bool = False) -> None:
        super().__init__(what)
        self.wait_s = wait_s
        self.hung = hung


class _Late(BaseException):
    """An answer has not ended in time. Not an ``Exception``, so that no version of the client makes it into another."""


class Wrong(Exception):
    """The server answered, but not what was asked."""


@dataclass
class Endpoint:
    """One address. ``suspect`` after a failure, until the same model was seen there again by one worker for all."""

    url: str
    client: openai.OpenAI
    suspect: bool = False
    failures: int = 0
    last: Passing | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def failed(self, err: Passing) -> None:
        """Remember a failure; being asked to wait is none."""
        if err.wait_s is None:
            self.suspect, self.last = True, err
            self.failures += 1

    def cleared(self, look: Callable[[], None]) -> None:
        """Do nothing, or ``look`` whether all is well after a failure; whoever waited for a failed look fails too."""
        if not self.suspect:
            return
        before = self.failures
        with self.lock:
            if self.failures != before and self.last is not None:
                raise Passing(str(self.last), hung=self.last.hung)
            if not self.suspect:
                return
            try:
                look()
            except Passing as err:
                self.failed(err)
                raise
            self.suspect = False

    @classmethod
    def at(cls, url: str, key: str, timeout_s: float) -> Endpoint:
        """Return an address with a client that tries nothing twice: ``patiently`` is the one that repeats.

        ``timeout_s`` is for connecting, for every piece of an answer, and from the request to the answer's end.
        """
        def begun(request: Any) -> None:
            request.extensions["ends"] = time.monotonic() + timeout_s

        url = address(url)
        client = openai.DefaultHttpxClient(event_hooks={"request": [begun], "response": [_bounded]})
        return cls(url, openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=timeout_s, http_client=client))

    def __str__(self) -> str:
        return self.url

    def cleaned(self, text: str) -> str:
        """Return what was said here in one line, without the key, should it be among it."""
        return " ".join(without_key(text, self.client.api_key).split())


def _bounded(response: Any) -> None:
    """Let the reading of an answer end at its deadline, however slowly it trickles in."""
    read, ends = response.iter_raw, response.request.extensions["ends"]

    def pieces(chunk_size: int | None = None) -> Iterator[bytes]:
        for piece in read(chunk_size):
            if time.monotonic() > ends:
                raise _Late
            yield piece

    response.iter_raw = pieces


def numbers_of(endpoint: Endpoint, name: str, ids: Sequence[int], prompt: str | list[int] | None = None
             ) -> list[Any] | None:
    """Return log P(ids[t] | ids[:t]) by position, None at the first; None for a wrong count.

    Raises ``Passing``, ``Wrong`` when the answer is about other ids or has no log-probabilities, and ``UserError``.
    """
    body = {"prompt_logprobs": 0, "return_token_ids": True} | ({"add_special_tokens": False} if prompt else {})
    choice = _choice(_post(endpoint, name, list(ids) if prompt is None else prompt, body))
    scored = choice.get("prompt_token_ids")
    if scored is None:
        raise Wrong("it did not say which token ids it scored")
    if scored != list(ids):
        raise Wrong(f"it scored other token ids: {str(scored)[:60]} ... instead of {str(list(ids))[:60]} ...")
    found = choice.get("prompt_logprobs")
    if not isinstance(found, list):
        raise Wrong("it gave no log-probabilities of the prompt's tokens" +
                     (", only of those it generated" if choice.get("logprobs") else ""))
    return _by_position(found, ids)


def _by_position(found: list[Any], ids: Sequence[int]) -> list[Any] | None:
    """Return the number of each position's own token out of ``[null, {"id": {"logprob": x}}, ...]``."""
    if len(found) != len(ids) or found[0] is not None:
        return None
    entries = [(entry if isinstance(entry, dict) else {}).get(str(token))
               for entry, token in zip(found[1:], ids[1:], strict=True)]
    return [None, *((entry if isinstance(entry, dict) else {}).get("logprob") for entry in entries)]


def generated(endpoint: Endpoint, name: str, ids: Sequence[int]) -> tuple[int, float]:
    """Return the token that a model puts after ``ids`` and the log-probability that it says it gave it."""
    body = {"logprobs": 1, "repetition_penalty": 1.0, "return_token_ids": True}
    choice = _choice(_post(endpoint, name, list(ids), body))
    try:
        token, own = choice["token_ids"][0], choice["logprobs"]["token_logprobs"][0]
    except (KeyError, TypeError, IndexError):
        raise Wrong("it does not say which token it generates and with which log-probability") from None
    if not (isinstance(token, int) and is_logprob(own)):
        raise Wrong(f"it generates the token {token!r} with log-probability {own!r}")
    return token, float(own)


def _choice(body: Any) -> dict[str, Any]:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        raise Wrong(f"it answered one request with {len(choices) if isinstance(choices, list) else 'no'} choices")
    return choices[0]


def _post(endpoint: Endpoint, name: str, prompt: str | list[int], more: Mapping[str, Any]) -> Any:
    """Return the parsed answer of /v1/completions; NaN and Infinity are read as such, to be noticed later."""
    def request() -> Any:
        return endpoint.client.completions.with_raw_response.create(
            model=name, prompt=prompt, max_tokens=1, temperature=0.0, extra_body=dict(more)).text

    return _readable(_sent(endpoint, request))


def models_at(endpoint: Endpoint) -> list[dict[str, Any]]:
    """Return the entries of /v1/models."""
    body = _readable(_sent(endpoint, lambda: endpoint.client.models.with_raw_response.list().text))
    data = body.get("data") if isinstance(body, dict) else None
    if not isinstance(data, list) or not data or not all(isinstance(m, dict) and "id" in m for m in data):
        raise Wrong("it lists no models")
    return data


def _readable(text: Any) -> Any:
    try:
        return json.loads(text() if callable(text) else text)
    except (ValueError, RecursionError):
        raise Passing("an answer that is no JSON") from None


def _sent(endpoint: Endpoint, request: Callable[[], Any]) -> Any:
    """Return what a request gives; its failures become ``Passing`` or a ``UserError`` that says what to do."""
    try:
        return request()
    except _Late:
        raise Passing(f"no whole answer from {endpoint} in time", hung=True) from None
    except openai.APITimeoutError:
        raise Passing(f"no answer from {endpoint} in time", hung=True) from None
    except openai.APIConnectionError as err:
        raise Passing(f"no connection to {endpoint}: {endpoint.cleaned(str(err.__cause__ or err))}") from None
    except openai.APIStatusError as err:
        status, said = err.status_code, endpoint.cleaned(str(err.message))[:200].rstrip(".")
        if status in (408, 409, 429) or status >= 500:
            raise Passing(f"{endpoint} answered {status}: {said}", _retry_after(err)) from None
        if status in (401, 403):
            raise UserError(f"{endpoint} refuses the key ({status}): {said}.",
                            "Put the server's key into the variable that --api-key-env names.", Exit.REMOTE) from None
        if status == 404:
            raise UserError(f"{endpoint} does not know what is asked for (404): {said}.",
                            "See that the address ends in /v1 and that the model is still served there.",
                            Exit.REMOTE) from None
        raise UserError(f"{endpoint} refuses a request ({status}): {said}.",
                        "If rows are too long for the server, score with a smaller --max-tokens into another --store.",
                        Exit.INCOMPATIBLE) from None


def _retry_after(err: openai.APIStatusError) -> float | None:
    """Return the seconds that the server asks to wait, where it does."""
    try:
        return max(0.0, min(60.0, float(err.response.headers["retry-after"])))
    except (KeyError, ValueError):
        return None


def patiently(settings: EngineSettings, stop: threading.Event, attempt: Callable[[int], Any],
              tell: Callable[[str], None] = say) -> Any:
    """Return ``attempt(0)``, or of later numbers after failures that pass; then ``UserError`` (remote).

    The first repetition is told.
    """
    hung, number, last = 0, 0, Passing("nothing was tried")
    for number in range(settings.retries + 1):
        try:
            return attempt(number)
        except Passing as err:
            hung += err.hung
            last = err
        if hung >= TIMEOUTS or number == settings.retries:
            break
        if number == 0:
            tell(f"{last}; trying again, up to {settings.retries} times.")
        pause = min(LONGEST_WAIT_S, settings.backoff_s * 2**number) * random.uniform(0.75, 1.25)
        if stop.wait(pause if last.wait_s is None else last.wait_s):
            break
    raise UserError(f"The server was given up after {number + 1} tries: {last}.",
                    "What was finished is kept. See that it runs, and type the command again.", Exit.REMOTE)


def address(url: str) -> str:
    """Return a base URL that the client can use: http or https, without credentials, with a path."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise UserError("A --base-url must look like http://HOST:8000/v1, without user or password in it.",
                        "Keys go into an environment variable (--api-key-env).")
    return url.rstrip("/") if parts.path.strip("/") else url.rstrip("/") + "/v1"
