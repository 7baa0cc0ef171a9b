"""Scoring on vLLM servers that speak the OpenAI protocol.

    /v1/models        who is served: the aligned model, and members as adapters or at addresses of their own
    /v1/completions   token ids in, ``prompt_logprobs: 0`` and ``return_token_ids: true``: their log-probabilities out

A server is believed nothing. Before work, a known string must come back with exactly its token ids and with numbers
that could be, and are, this model's log-probabilities of it (``_Probe``). Every answer names the ids that it is about.
After a failed request, and at the end of every chunk, the same model must still be there; else the chunk is not kept.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.chat import Encoded
from curate.core.errors import Exit, UserError
from curate.core.keys import key_in
from curate.core.nll import TOLERANCE_NATS, AnswerNll
from curate.core.refs import load_tokenizer
from curate.core.terminal import PLAIN_EVERY_S, say
from curate.scorers import evidence, is_logprob
from curate.scorers.wire import Endpoint, Passing, Wrong, generated, models_at, numbers_of, patiently

if TYPE_CHECKING:
    from curate.scorers.choose import EngineSettings, Models

PROBE = ("Seven grey herons stood in the shallow water below the mill, and none of them was fishing. "
         "In 1987 the bridge was closed for 14 days; def add(a, b): return a + b\n")
DRIFT_NATS = {**TOLERANCE_NATS, "served": TOLERANCE_NATS["bfloat16"]}
"""How far the same model's log-probabilities of the probe may move at most, on average over its tokens; at one token
ten times as far."""
LEAST_DRIFT_NATS = {"float32": 1e-3, "float16": 0.01}
"""How far they may move where they were seen to stand still; in other dtypes 0.03, because in bfloat16 a row moves by
hundredths of a nat with the company it has in a batch."""
NOISES = 4.0
"""How far they may move, in multiples of how far they were seen to."""
TOGETHER = 16
"""How many times at once, at most, the probe is sent to see how far they move."""
DIALECT = "Use a vLLM server (docs/engines.md); other servers accept such requests and answer something else."


@dataclass
class _Served:
    """A model as it is served: its name there, where, and how it answered the probe."""

    name: str
    at: list[Endpoint]
    fingerprint: list[float] = field(default_factory=list)
    drift: float = math.inf
    """How far these numbers may move."""


class ServerScorer:
    """See ``Scorer``."""

    engine = "server"

    def __init__(self, settings: EngineSettings, dtype: str, served: Mapping[Path | None, _Served]) -> None:
        self.settings = settings
        self.dtype = dtype
        self._served = dict(served)
        self._now = served[None]
        self._probe: list[int] = []
        self._notify: Callable[[str], None] = say
        self._quiet_until = -math.inf
        self._telling = threading.Lock()
        self.checked_s = 0.0
        """How long the looks at the ends of chunks took."""

    @classmethod
    @contextmanager
    def connected(cls, models: Models, settings: EngineSettings) -> Iterator[ServerScorer]:
        """Connect, find out who is served where, and probe every model there; ``UserError`` where it is not right."""
        key = _key(settings)
        endpoints = [Endpoint.at(url, key, settings.timeout_s) for url in settings.base_urls]
        try:
            served = _matched(models, settings, [(e, _introduced(e, settings)) for e in endpoints])
            scorer = cls(settings, models.dtype, served)
            scorer._check_all(load_tokenizer(models.ref))
            yield scorer
        finally:
            for endpoint in endpoints:
                endpoint.client.close()

    @contextmanager
    def member(self, adapter: Path | None) -> Iterator[None]:
        """See ``Scorer.member``."""
        self._now = self._served[adapter]
        try:
            yield
        finally:
            self._now = self._served[None]

    def score(self, encoded: Sequence[Encoded],
              notify: Callable[[str], None] = lambda text: None) -> Iterator[list[tuple[int, AnswerNll]]]:
        """See ``Scorer.score``. Ends with a look whether the same model is still there; ``UserError`` (remote) if not.

        Workers are daemons: whoever stops reading leaves them to end by themselves.
        """
        served, self._notify = self._now, notify
        for pair in self._together(served, len(encoded),
                                   lambda index, stop: self._row(served, encoded[index], stop, index)):
            yield [pair]
        begun = time.monotonic()
        for endpoint in served.at:
            self._retrying(served, [endpoint], threading.Event(), lambda e: self._same(e, served))
        self.checked_s += time.monotonic() - begun

    def _together(self, served: _Served, n: int, ask: Callable[[int, threading.Event], Any]
                  ) -> Iterator[tuple[int, Any]]:
        """Yield ``(index, ask(index, stop))`` for ``n`` indices as they come, ``concurrency`` of them at once."""
        stop = threading.Event()
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Any] | BaseException] = queue.SimpleQueue()
        for index in range(n):
            todo.put(index)
        for _ in range(min(self.settings.concurrency, n)):
            threading.Thread(target=self._work, args=(served, ask, todo, done, stop), daemon=True).start()
        try:
            for _ in range(n):
                result = done.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            stop.set()

    def _work(self, served: _Served, ask: Callable[[int, threading.Event], Any], todo: queue.SimpleQueue[int],
              done: queue.SimpleQueue[Any], stop: threading.Event) -> None:
        """Ask until there is nothing left or someone says stop; what goes wrong is handed over like a result."""
        while not stop.is_set():
            try:
                index = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, ask(index, stop)))
            except Wrong as err:
                done.put(_refused(served.at[0], str(err), Exit.REMOTE))
                return
            except BaseException as err:  # raised again by the reader, who would wait for this answer for ever
                done.put(err)
                return

    def _row(self, served: _Served, item: Encoded, stop: threading.Event, start: int) -> AnswerNll:
        numbers = self._retrying(served, served.at, stop, lambda e: numbers_of(e, served.name, item.ids), start)
        return evidence(item, None if numbers is None else numbers[item.answer_start:])

    def _retrying(self, served: _Served, places: Sequence[Endpoint], stop: threading.Event,
                  ask: Callable[[Endpoint], Any], start: int = 0) -> Any:
        """Return ``ask(endpoint)``, going on to the next of ``places`` after a failure, with growing pauses."""

        def attempt(number: int) -> Any:
            endpoint = places[(start + number) % len(places)]
            try:
                endpoint.cleared(lambda: self._same(endpoint, served))
                return ask(endpoint)
            except Passing as err:
                endpoint.failed(err)
                raise

        return patiently(self.settings, stop, attempt, self._tell)

    def _tell(self, text: str) -> None:
        """Say that a request is repeated, once in a while: when a server is away, all of them are."""
        with self._telling:
            if time.monotonic() < self._quiet_until:
                return
            self._quiet_until = time.monotonic() + PLAIN_EVERY_S
        self._notify(text)

    def _same(self, endpoint: Endpoint, served: _Served) -> None:
        """Raise ``UserError`` (remote) unless the model behind a name is the one that was probed before work."""
        try:
            names = [str(m["id"]) for m in models_at(endpoint)]
            if served.name not in names:
                raise Wrong(f"it serves {_list(names)} now, and no longer '{served.name}'")
            numbers = numbers_of(endpoint, served.name, self._probe)
        except Wrong as err:
            raise _refused(endpoint, str(err), Exit.REMOTE) from None
        moved = _moved(served.fingerprint, _plausible(numbers) or [])
        if not moved <= served.drift:
            raise UserError(f"Another model than before answers as '{served.name}' at {endpoint}: the known string's "
                            f"log-probabilities moved by {moved:.3g} nats per token, and {served.drift:.2g} were "
                            "allowed for.",
                            "What was finished is kept. Start the server with the same model again and repeat the "
                            "command.", Exit.REMOTE)

    def _check_all(self, tokenizer: Any) -> None:
        """Probe every model at every one of its endpoints, and see that no two models are the same one."""
        self._probe = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
        for served in self._served.values():
            noises: list[float] = []
            for endpoint in served.at:
                probe = _Probe(endpoint, served.name, self._probe, len(tokenizer), self.dtype)
                try:
                    numbers, noise = patiently(self.settings, threading.Event(), lambda _, probe=probe: probe.run())
                except Wrong as err:
                    raise _refused(endpoint, f"asked for '{served.name}', {err}", Exit.INCOMPATIBLE) from None
                served.fingerprint = served.fingerprint or numbers
                apart = _moved(served.fingerprint, numbers)
                if not apart <= DRIFT_NATS[self.dtype]:
                    raise UserError(f"Different models answer as '{served.name}' at {served.at[0]} and {endpoint}.",
                                    "Start the servers with names of their own (vLLM: --served-model-name).",
                                    Exit.INCOMPATIBLE)
                noises.append(max(noise, apart, self._noise(served, endpoint)))
            served.drift = drift_allowed(self.dtype, max(noises))
        models = list(self._served.values())
        for k, one in enumerate(models):
            for other in models[:k]:
                if _gap(one.fingerprint, other.fingerprint)[1] < 1e-6:
                    raise UserError(f"'{one.name}' and '{other.name}' answer with the very same numbers: the server "
                                    "does not tell its models apart.",
                                    "Serve members as adapters (vLLM: --enable-lora --lora-modules NAME=FOLDER) or at "
                                    "addresses of their own.", Exit.INCOMPATIBLE)

    def _noise(self, served: _Served, endpoint: Endpoint) -> float:
        """Return how far the probe's numbers move when it is sent many times at once, in nats per token.

        A server computes these in one batch or a few, in which the same model does not give quite the same numbers.
        """
        def ask(_: int, stop: threading.Event) -> float:
            again = self._retrying(served, [endpoint], stop, lambda e: numbers_of(e, served.name, self._probe))
            return _moved(served.fingerprint, _plausible(again) or [])

        return max(noise for _, noise in self._together(served, min(TOGETHER, self.settings.concurrency), ask))


def drift_allowed(dtype: str, noise: float) -> float:
    """Return how far a model's log-probabilities of the probe may move later, in nats per token.

    ``noise`` is how far they were seen to move.
    """
    return min(DRIFT_NATS[dtype], max(NOISES * noise, LEAST_DRIFT_NATS.get(dtype, 0.03)))


@dataclass
class _Probe:
    """Whether an endpoint scores what it is given: three requests about a known string.

    1. As text, it comes back with exactly the local tokenizer's ids, and one log-probability for each but the first.
    2. As ids, with the same log-probabilities.
    3. The token that the model itself puts after it has, as part of the prompt, the log-probability that the model
       gave it. So the numbers are log P(token | what is before), and not those of the next or the previous one.
    """

    endpoint: Endpoint
    name: str
    ids: list[int]
    vocabulary: int
    dtype: str

    def run(self) -> tuple[list[float], float]:
        """Return the log-probabilities of ``ids[1:]`` and how far they have moved between 1 and 2; raises ``Wrong``."""
        first = self._scored(PROBE, self.ids)
        again = self._scored(self.ids, self.ids)
        noise = _moved(first, again)
        if not noise <= DRIFT_NATS[self.dtype]:
            raise Wrong("it gave other numbers for the same string sent as text and as token ids")
        token, own = generated(self.endpoint, self.name, self.ids)
        scored = self._scored([*self.ids, token], [*self.ids, token])[-1]
        if not abs(scored - own) <= max(0.01, 3 * DRIFT_NATS[self.dtype]):
            raise Wrong(f"it gave the token it chose itself {own:.3f} nats, and the same token in a prompt "
                         f"{scored:.3f}: these are not the log-probabilities of prompt tokens")
        return again, noise

    def _scored(self, prompt: str | list[int], ids: list[int]) -> list[float]:
        numbers = _plausible(numbers_of(self.endpoint, self.name, ids, prompt))
        if numbers is None:
            raise Wrong(f"it did not give one finite log-probability for each of {len(ids) - 1} prompt tokens")
        mean = -math.fsum(numbers) / len(numbers)
        if len(set(numbers)) == 1 or mean > 2 + math.log(self.vocabulary):
            raise Wrong(f"it gave {len(set(numbers))} different log-probabilities with a mean of {-mean:.3g} for "
                         f"{len(numbers)} tokens of plain English, which is no language model")
        return numbers


def _plausible(numbers: list[Any] | None) -> list[float] | None:
    """Return the numbers after the first position, if every one can be a log-probability."""
    return numbers[1:] if numbers and len(numbers) > 1 and all(map(is_logprob, numbers[1:])) else None


def _gap(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the largest absolute difference; infinite for other lengths."""
    if len(one) != len(other) or not one:
        return math.inf, math.inf
    gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return math.fsum(gaps) / len(gaps), max(gaps)


def _moved(one: Sequence[float], other: Sequence[float]) -> float:
    """Return by how many nats per token numbers differ: on average, or a tenth of the largest difference if more."""
    mean, largest = _gap(one, other)
    return max(mean, largest / 10)


def _introduced(endpoint: Endpoint, settings: EngineSettings) -> list[dict[str, Any]]:
    """Return what an endpoint serves, asked for the first time."""
    try:
        return patiently(settings, threading.Event(), lambda _: models_at(endpoint))
    except Wrong as err:
        raise _refused(endpoint, str(err), Exit.INCOMPATIBLE) from None


def _matched(models: Models, settings: EngineSettings, listed: Sequence[tuple[Endpoint, list[dict[str, Any]]]]
             ) -> dict[Path | None, _Served]:
    """Return where each model is served, by its adapter; ``UserError`` where one is nowhere, or too short."""
    names = {here: there for there, here in settings.served}
    unknown = sorted(set(names) - {models.name, *models.adapters})
    if unknown:
        raise UserError(f"--served-model names '{unknown[0]}', which is no model of this run.",
                        f"Possible: {_list([models.name, *models.adapters])}.")
    bases = sorted({str(m["id"]) for _, entries in listed for m in entries if not m.get("parent")})
    wanted: dict[Path | None, str] = {None: names.get(models.name, models.name)}
    if models.name not in names and models.name not in bases:
        named = [b for b in bases if b not in {names.get(n, n) for n in models.adapters}]
        wanted[None] = named[0] if len(named) == 1 else models.name
    wanted |= {adapter: names.get(name, name) for name, adapter in models.adapters.items()}
    return {adapter: _found(name, models, listed) for adapter, name in wanted.items()}


def _found(name: str, models: Models, listed: Sequence[tuple[Endpoint, list[dict[str, Any]]]]) -> _Served:
    at = [(e, m) for e, entries in listed for m in entries if m["id"] == name]
    if not at:
        everything = [str(m["id"]) for _, entries in listed for m in entries]
        raise UserError(f"No server serves '{name}'; there are {listed[0][0].cleaned(_list(everything))}.",
                        "Say which is which with --served-model NAME=MEMBER, once for each model.", Exit.INCOMPATIBLE)
    for endpoint, entry in at:
        longest = entry.get("max_model_len")
        if isinstance(longest, int) and longest < models.max_tokens + 1:
            raise UserError(f"'{name}' at {endpoint} takes {longest} tokens, one of them for an answer, and rows may "
                            f"have {models.max_tokens}.", f"Give --max-tokens {longest - 1}, or start the server with "
                            f"--max-model-len {models.max_tokens + 1}.", Exit.INCOMPATIBLE)
    return _Served(name, [endpoint for endpoint, _ in at])


def _refused(endpoint: Endpoint, what: str, code: Exit) -> UserError:
    hint = "What was finished is kept. Start the server as it was and repeat the command."
    return UserError(f"The server {endpoint} cannot be used: {endpoint.cleaned(what)}.",
                     DIALECT if code == Exit.INCOMPATIBLE else hint, code)


def _list(names: Sequence[str]) -> str:
    return ", ".join(f"'{n}'" for n in names[:8]) + (" ..." if len(names) > 8 else "")


def _key(settings: EngineSettings) -> str:
    from curate.scorers.choose import EngineSettings as Defaults

    key = key_in(settings.api_key_env)
    if not key and settings.api_key_env != Defaults.api_key_env:
        raise UserError(f"The environment variable {settings.api_key_env} holds no key.",
                        f"Set it: export {settings.api_key_env}=...", Exit.ENVIRONMENT)
    return key or "no-key-was-given"
