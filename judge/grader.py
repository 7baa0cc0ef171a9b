"""From one answer to a grade: an integer from 0 to 100 weighted by the judge's own probabilities, or why there is none.

Three ways, found out once per server (``Grader.probe``):

    whole    every number is one token: the 20 likeliest first tokens say all
    tree     numbers may be split into digits ("85" is "8", "5"): the distribution after a prefix is asked for by
             letting the server continue a reply that begins with it
    sampled  no log-probabilities, or no way to continue a split number: the mean of a few sampled replies

Only the prefixes 1 to 9 and 10 can grow into another number of the scale, so a tree takes at most 11 requests;
prefixes that together hold less than 0.001 are left out of it. See ``judge.replies`` for the formula.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any, Literal

from curate.core.documents import Grade
from curate.core.files import canonical_json, sha256
from judge.endpoint import Endpoint, NoReply, Reply, Stopped, run_to_end
from judge.prompts import request_text
from judge.replies import (
    CAN_GROW,
    apart,
    digest,
    distribution,
    first_numbers,
    has_split_number,
    has_whole_numbers,
    sampled_grade,
    spelled,
    weighed_grade,
    worth_following,
)

GRADER = "grader-2"
"""Changes whenever the same replies would give other grades, or the same answers other requests."""
TOP = 20
REPLY_TOKENS = 6
"""Enough for a number, its end and a look at what else was begun."""
CHOICES = (*map(str, range(101)), "REFUSAL", "CODE")
"""What a constrained reply may be: a number, or a word by which judge prompts let a judge decline."""
MAX_FOLLOWED = len(CAN_GROW)
"""Prefixes that are looked behind, at most; all there are, unless a tokenizer spells one in several ways."""
PREFILLS = {"flags": {"continue_final_message": True, "add_generation_prompt": False}, "plain": {}}
"""Ways of asking a server to go on with a reply: flags that vLLM and SGLang know, or the unfinished turn alone."""
CONSTRAINTS = ("structured_outputs", "guided_choice")
PROBE_RETRIES = 2
"""A server that is not there is noticed soon; one that was there is waited for (``Address.max_retries``)."""
PROBES = ("Reply with the number 85 and nothing else.", "Reply with the number 100 and nothing else.")
"""The second only where 85 is one token: some tokenizers have pieces of two digits, and 100 would be read as 10."""

Way = Literal["whole", "tree", "sampled"]


@dataclass(frozen=True)
class Abilities:
    """What a server can do for a judge, as the probe found."""

    way: Way
    prefill: str | None = None
    constraint: str | None = None

    def requests(self, replies: int) -> tuple[int, int]:
        """Return how many requests a grade takes, at least and at most."""
        return {"whole": (1, 1), "tree": (1, 1 + MAX_FOLLOWED), "sampled": (replies, replies)}[self.way]


@dataclass(frozen=True)
class Ask:
    """One answer to grade in one respect."""

    question: str
    answer: str
    template: str


class Grader:
    """Grades answers through an ``Endpoint``; every grade is a function of the replies and nothing else."""

    def __init__(self, endpoint: Endpoint, replies: int = 5) -> None:
        """Take an endpoint that is or will be open; ``replies`` is how many are sampled where nothing better works."""
        self.endpoint = endpoint
        self.replies = replies
        self.abilities = self.known()

    def ready(self) -> None:
        """Find out what the server can do, unless that is known: one of no use is noticed before answers are sampled.

        Raises ``UserError`` as ``probe`` does, and where there is no key.
        """
        self.endpoint.address.key()
        if self.abilities is None:
            run_to_end(self._ready())

    async def _ready(self) -> None:
        async with self.endpoint.open():
            self.abilities = await self.probe()

    def grade_all(self, asks: Sequence[Ask], advance: Callable[[int], None] = lambda n: None) -> list[Grade]:
        """Return one grade per ask, in order.

        The server is probed first, if it has not been before and a reply is missing. Raises ``UserError``: remote
        where the server cannot be used, interrupted where the budget is spent; every reply is kept.
        """
        return run_to_end(self._grade_all(asks, advance)) if asks else []

    async def _grade_all(self, asks: Sequence[Ask], advance: Callable[[int], None]) -> list[Grade]:
        async with self.endpoint.open():
            if self.abilities is None:
                self.abilities = await self.probe()
            tasks = [asyncio.create_task(self._told(ask, advance)) for ask in asks]
            try:
                found = await asyncio.gather(*tasks, return_exceptions=True)
            finally:
                for task in tasks:
                    task.cancel()
        if self.endpoint.stop is not None:
            raise self.endpoint.stop
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return [grade for grade in found if isinstance(grade, Grade)]

    async def _told(self, ask: Ask, advance: Callable[[int], None]) -> Grade:
        grade = await self.grade(ask)
        advance(1)
        return grade

    async def grade(self, ask: Ask) -> Grade:
        """Return the grade of one answer. Raises ``Stopped``.

        A request without a reply gives ``failed``, and so does a reply without the log-probabilities that the probe
        found: such replies are not kept, and the next call probes again.
        """
        text = request_text(ask.template, ask.question, ask.answer)
        assert self.abilities is not None
        try:
            if self.abilities.way == "sampled":
                bodies = [sampled_body(text, seed, self.abilities.constraint) for seed in range(self.replies)]
                return sampled_grade(await _all([self.endpoint.ask(body) for body in bodies]))
            root = await self.endpoint.ask(weighed_body(text))
            if root.positions is None:
                self._forget()
                return Grade(status="failed")
            if self.abilities.way == "whole":
                return weighed_grade(root, first_numbers(root), (root,))
            return await self._tree_grade(text, root)
        except NoReply:
            return Grade(status="failed")

    async def _tree_grade(self, text: str, root: Reply) -> Grade:
        """Follow the digits of the first token's numbers, most probable first, and weigh what they spell."""
        numbers: Counter[int] = Counter()
        replies = [root]
        layer = [("", 1.0, distribution(root, 0))]
        left = MAX_FOLLOWED
        while layer:
            grown: list[tuple[str, float]] = []
            for prefix, p, after in layer:
                if after is None:
                    return Grade(status="unparsable", reply=digest(replies))
                ends, grows = spelled(prefix, p, after)
                numbers.update(ends)
                grown += grows
            paths = worth_following(grown)[:left]
            left -= len(paths)
            followed = await _all([self._after(text, path, root) for path, _ in paths])
            replies += [reply for reply, _ in followed if reply is not root]
            layer = [(path, p, after) for (path, p), (_, after) in zip(paths, followed, strict=True)]
        return weighed_grade(root, numbers, replies)

    async def _after(self, text: str, path: str, root: Reply) -> tuple[Reply, dict[str, float] | None]:
        """Return what may follow ``path``: from the reply itself where that begins so, else from a continued one."""
        spelled_out = ""
        for k, place in enumerate(root.positions or ()):
            if spelled_out == path:
                return root, distribution(root, k)
            spelled_out += place.token
        assert self.abilities is not None
        reply = await self.endpoint.ask(weighed_body(text, path, self.abilities.prefill))
        return reply, distribution(reply, 0)

    def to_come(self, asks: Sequence[Ask | None]) -> list[tuple[int, int]]:
        """Return how many requests each grade still takes, at least and at most, by the replies that are kept.

        None stands for an answer that is not there yet. Where the server was never probed, the numbers lie between
        those of its best and its worst way.
        """
        way = self.abilities
        least, most = way.requests(self.replies) if way else (1, max(1 + MAX_FOLLOWED, self.replies))
        if way is None:
            there = [ask is not None and self.endpoint.cached(self.first_body(
                request_text(ask.template, ask.question, ask.answer))) is not None for ask in asks]
            return [(0 if found else least, most) for found in there]
        return run_to_end(self._to_come(asks, (least, most)))

    async def _to_come(self, asks: Sequence[Ask | None], whole: tuple[int, int]) -> list[tuple[int, int]]:
        found = []
        for ask in asks:
            kept = _Kept(self.endpoint)
            if ask is not None:
                again = copy(self)
                again.endpoint = kept
                await again.grade(ask)
            missing = kept.n_missing if ask is not None else whole[0]
            found.append((missing, max(missing, whole[1] - kept.n_found) if missing else 0))
        return found

    def _forget(self) -> None:
        """Have the next call probe the server again."""
        if self.known() is not None:
            self.endpoint.journal.put(self._probe_key(), None)

    def known(self) -> Abilities | None:
        """Return what an earlier probe of this server found."""
        found = self.endpoint.journal.get(self._probe_key())
        return Abilities(**found) if found else None

    async def probe(self) -> Abilities:
        """Find out what the server can do, at most eight requests, and remember it.

        Raises ``UserError`` (remote) where it cannot be reached, refuses the key, has no such model or answers in no
        known form; interrupted where the budget is too small for it.
        """
        self.endpoint.retries = min(PROBE_RETRIES, self.endpoint.address.max_retries)
        try:
            found = await self._probed()
        except (NoReply, Stopped) as err:
            raise self.endpoint.stop or self.endpoint.refused(err) from None
        finally:
            self.endpoint.retries = None
        self.endpoint.journal.put(self._probe_key(), asdict(found))
        return found

    async def _probed(self) -> Abilities:
        text, reply = PROBES[0], await self._weighed(PROBES[0])
        if reply is not None and len(distribution(reply, 0) or ()) > 1:
            if has_whole_numbers(reply):
                text, reply = PROBES[1], await self._weighed(PROBES[1])
                if reply is None or not has_split_number(reply):
                    return Abilities("whole")
            for prefill in PREFILLS:
                if await self._continues(text, reply, prefill):
                    return Abilities("tree", prefill=prefill)
        for constraint in CONSTRAINTS:
            if await self._constrains(constraint):
                return Abilities("sampled", constraint=constraint)
        await self.endpoint.ask(sampled_body(PROBES[0], 0, None))
        return Abilities("sampled")

    async def _weighed(self, text: str) -> Reply | None:
        """Return a reply that was asked for with log-probabilities; None where the server does not take that."""
        try:
            return await self.endpoint.ask(weighed_body(text))
        except NoReply as err:
            if err.status not in (400, 422, 501):
                raise
            return None

    async def _continues(self, text: str, reply: Reply, prefill: str) -> bool:
        """Return whether a reply can be continued: after its first token comes what came there in the reply itself.

        A server that begins anew instead gives the distribution of the first token, which has to be another one.
        """
        places = reply.positions or ()
        first, second = (distribution(reply, k) for k in (0, 1))
        if len(places) < 2 or first is None or second is None or apart(first, second) < 0.5:
            return False
        try:
            again = await self.endpoint.ask(weighed_body(text, places[0].token, prefill))
        except NoReply as err:
            if err.status in (400, 422, 501):
                return False
            raise
        after = distribution(again, 0)
        return after is not None and apart(after, second) < 0.1

    async def _constrains(self, constraint: str) -> bool:
        """Return whether a reply can be held to a list: here to one that nobody would choose from."""
        choices = ("37", "41")
        try:
            reply = await self.endpoint.ask(sampled_body("Write the word hello.", 0, constraint, choices))
        except NoReply as err:
            if err.status in (400, 422, 501):
                return False
            raise
        return reply.text in choices

    def first_body(self, text: str) -> dict[str, Any]:
        """Return the first request of a grade, as far as is known how this server is asked."""
        if self.abilities is not None and self.abilities.way == "sampled":
            return sampled_body(text, 0, self.abilities.constraint)
        return weighed_body(text)

    def _probe_key(self) -> str:
        return sha256(canonical_json(["probe", GRADER, self.endpoint.address.model, self.endpoint.address.base_url]))


class _Kept:
    """An endpoint that has the replies that were paid for before, asks nobody, and counts."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.n_found, self.n_missing = endpoint, 0, 0

    async def ask(self, body: Mapping[str, Any]) -> Reply:
        reply = self.endpoint.cached(body)
        if reply is None:
            self.n_missing += 1
            raise NoReply("no reply is kept")
        self.n_found += 1
        return reply


def weighed_body(text: str, begun: str = "", prefill: str | None = None) -> dict[str, Any]:
    """Return a request for one short reply with the log-probabilities of its tokens, or for what follows ``begun``."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": REPLY_TOKENS, "temperature": 0, "seed": 0,
            "stop": ["\n"], "logprobs": True, "top_logprobs": TOP}
    if not begun:
        return body
    messages = [*body["messages"], {"role": "assistant", "content": begun}]
    return body | {"messages": messages, "max_tokens": 1} | PREFILLS[prefill or "plain"]


def sampled_body(text: str, seed: int, constraint: str | None, choices: Sequence[str] = CHOICES) -> dict[str, Any]:
    """Return a request for one short reply at temperature 1, held to ``choices`` where the server can do that."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": REPLY_TOKENS, "temperature": 1,
            "seed": seed, "stop": ["\n"]}
    limits: Mapping[str | None, dict[str, Any]] = {
        "structured_outputs": {"structured_outputs": {"choice": list(choices)}},
        "guided_choice": {"guided_choice": list(choices)}}
    return body | limits.get(constraint, {})


async def _all(coroutines: Sequence[Any]) -> list[Any]:
    """Await all, to the end, then raise the first trouble: a reply in flight is paid for, so it is waited for."""
    found = await asyncio.gather(*coroutines, return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found
