"""From a judge's replies to a grade; pure.

    score = sum(n p_n) / sum(p_n)     over the whole numbers n from 0 to 100, with p_n their probabilities

The sum of p_n is the ``mass``. A number split into digits has the product of its digits' probabilities, and one that
could have grown into another ends where no digit follows:

    p_85 = p("8") p("5" | "8")     p_8 = p("8") (1 - p(any digit | "8"))
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from curate.core.documents import Grade
from curate.core.files import canonical_json, sha256
from judge.endpoint import Reply

MIN_MASS = 0.25
"""Share of the probability, or of the sampled replies, that has to be numbers for a score."""
MAX_MASS = 1.02
"""Probabilities that add up to more are none; a little is rounding."""
OPEN_MASS = 1e-3
"""Prefixes that together hold less than this are not looked behind, and left out of the mass."""
SCALE = {str(n): n for n in range(101)}
CAN_GROW = (*map(str, range(1, 10)), "10")
"""What begins another number of the scale."""
SPACES = " \n\t\u2581\u0120\u010a"
"""White space at a token's beginning, also as the marks of tokenizers that some servers let through."""
REFUSALS = re.compile(r"\W*(refus(al|ed?)\b|(my )?apolog|(i'?m |i am )?(very |so )?(sorry|unable)\b|as an ai\b|"
                      r"i (can(no|')?t|can not|won'?t|will not|must (decline|refuse))\b)", re.IGNORECASE)


def read_reply(reply: Reply) -> tuple[str, int | None]:
    """Return status and number of one reply: nothing but one whole number from 0 to 100, in ASCII digits, is ``ok``."""
    text = (reply.text or "").strip(" \t\r\n").replace("\u2019", "'")
    if reply.refusal or reply.finish == "content_filter" or REFUSALS.match(text):
        return "refused", None
    if reply.finish == "length":
        return "truncated", None
    if re.fullmatch(r"-?(0|[1-9][0-9]*)", text):
        return ("ok", SCALE[text]) if text in SCALE else ("out_of_range", None)
    return "unparsable", None


def sampled_grade(replies: Sequence[Reply]) -> Grade:
    """Return the mean of the replies that are numbers; where they are less than a quarter, the commonest trouble."""
    read = [read_reply(reply) for reply in replies]
    numbers = [number for _, number in read if number is not None]
    if len(numbers) >= max(1, MIN_MASS * len(read)):
        return Grade(status="ok", score=sum(numbers) / len(numbers), reply=digest(replies))
    trouble = Counter(status for status, _ in read if status != "ok")
    status = min(trouble, key=lambda name: (-trouble[name], name))
    return Grade(status=status, reply=digest(replies))


def first_numbers(reply: Reply) -> dict[int, float] | None:
    """Return the probabilities of the numbers 0 to 100 among the first token's likeliest.

    None where they are odd, or where the reply's own number goes on in a second token (100 as "10", "0").
    """
    after = distribution(reply, 0)
    if after is None or has_split_number(reply):
        return None
    numbers: Counter[int] = Counter()
    for token, p in after.items():
        if (number := SCALE.get(token.lstrip(SPACES))) is not None:
            numbers[number] += p
    return dict(numbers)


def spelled(prefix: str, p: float, after: Mapping[str, float]) -> tuple[dict[int, float], list[tuple[str, float]]]:
    """Split a prefix's probability ``p`` by what follows it: numbers that are finished, and longer prefixes.

    A prefix that can grow ends where no digit follows; one that cannot is a number at once. Tokens that make no number
    of the scale (another digit after 85, a leading zero) are nothing.
    """
    ends: Counter[int] = Counter()
    grows: list[tuple[str, float]] = []
    digits = 0.0
    for token, share in after.items():
        tail = token if prefix else token.lstrip(SPACES)
        if not re.fullmatch("[0-9]+", tail):
            continue
        digits += share
        number = prefix.lstrip(SPACES) + tail
        if number in CAN_GROW:
            grows.append((prefix + token, p * share))
        elif number in SCALE:
            ends[SCALE[number]] += p * share
    if prefix:
        ends[SCALE[prefix.lstrip(SPACES)]] += p * max(0.0, 1 - digits)
    return dict(ends), grows


def worth_following(paths: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return the paths without the least probable ones that together hold less than ``OPEN_MASS``; ties by path."""
    left = 0.0
    kept = sorted(paths, key=lambda path: (path[1], path[0]))
    while kept and left + kept[0][1] < OPEN_MASS:
        left += kept.pop(0)[1]
    return kept[::-1]


def weighed_grade(root: Reply, numbers: Mapping[int, float] | None, replies: Sequence[Reply]) -> Grade:
    """Return the weighted mean of ``numbers``, if the reply itself is one and they hold enough of the probability.

    A reply that begins with a number and goes on to something else (0.85, 85/100, 1e3) says that the number's token
    did not mean that number; a refusal stays one, however probable a number would have been.
    """
    status, _ = read_reply(root)
    mass = None if numbers is None else math.fsum(numbers.values())
    if status == "ok" and (mass is None or mass > MAX_MASS or not _agrees(root)):
        status, mass = "unparsable", None
    if mass is not None:
        mass = min(mass, 1.0)
    if status == "ok" and mass < MIN_MASS:
        status = "low_mass"
    if status != "ok":
        return Grade(status=status, mass=mass, reply=digest(replies))
    score = math.fsum(n * p for n, p in numbers.items()) / math.fsum(numbers.values())
    return Grade(status="ok", score=min(max(score, 0.0), 100.0), mass=mass, reply=digest(replies))


def has_whole_numbers(reply: Reply) -> bool:
    """Return whether a reply shows that numbers are single tokens, and none that one is split into pieces."""
    places = reply.positions or ()
    seen = [token.strip(SPACES) for place in places for token in (place.token, *(token for token, _ in place.top))]
    return not has_split_number(reply) and any(re.fullmatch("[0-9]{2,}", token) for token in seen)


def has_split_number(reply: Reply) -> bool:
    """Return whether two of a reply's tokens are pieces of one number: digits, and more digits without a space."""
    tokens = [place.token for place in reply.positions or ()]
    return any(a.strip(SPACES).isdecimal() and b.rstrip(SPACES).isdecimal() for a, b in itertools.pairwise(tokens))


def apart(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Return half the sum of |p - q| over the tokens of two distributions: 0 the same, about 1 nothing in common."""
    return sum(abs(one.get(token, 0.0) - other.get(token, 0.0)) for token in one.keys() | other.keys()) / 2


def distribution(reply: Reply, k: int) -> dict[str, float] | None:
    """Return the probabilities of the k-th token's likeliest, equal texts added; None where one is no probability."""
    if reply.positions is None or len(reply.positions) <= k:
        return None
    place = reply.positions[k]
    found: Counter[str] = Counter()
    for token, logprob in place.top:
        if logprob is None:
            return None
        found[token] += math.exp(min(logprob, 0.0))
    return dict(found) if place.top and sum(found.values()) <= MAX_MASS else None


def _agrees(reply: Reply) -> bool:
    """Return whether the text of a reply begins with its first token, where that is a number."""
    token = reply.positions[0].token.strip(SPACES) if reply.positions else ""
    return reply.text is not None and (not token.isdecimal() or reply.text.lstrip(SPACES).startswith(token))


def digest(replies: Sequence[Reply]) -> str:
    """Return a digest of requests and replies, by which a grade can be found again in the journal."""
    return sha256(canonical_json([reply.digest for reply in replies]))[:32]
