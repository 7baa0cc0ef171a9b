"""Grades against a scripted server: closed-form scores, a status for everything odd, nothing paid for twice."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from curate.core.documents import Grade
from curate.core.errors import Exit, UserError
from curate.core.terminal import Terminated, _terminate
from judge.endpoint import Address, Budget, Endpoint
from judge.grader import Abilities, Ask, Grader
from judge.journal import Journal
from judge.prompts import PROMPTS
from tests.judge.stub_server import Stub, envelope, served

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def stub() -> Iterator[Stub]:
    with served(Stub()) as running:
        yield running


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def grader(stub: Stub, folder: Path, replies: int = 5, budget: Budget | None = None, **address: Any) -> Grader:
    where = Address("stub", stub.url, "STUB_KEY", **{"attempt_s": 5.0, "total_s": 20.0, **address})
    return Grader(Endpoint(where, Journal(folder / "replies.jsonl"), budget or Budget()), replies)


def asks(n: int) -> list[Ask]:
    return [Ask("What now?", f"answer number {k}.", PROMPTS["aligned"]) for k in range(n)]


def one(stub: Stub, folder: Path, **options: Any) -> Grade:
    return grader(stub, folder, **options).grade_all(asks(1))[0]


def test_the_score_is_weighted_by_probability(stub: Stub, tmp_path: Path) -> None:
    stub.replies = lambda prompt: {"90": 0.5, "60": 0.2, " 30": 0.1, "REFUSAL": 0.15, "101": 0.05}
    found = one(stub, tmp_path)
    assert found.status == "ok" and len(stub.asked()) == 1
    assert math.isclose(found.mass, 0.8) and math.isclose(found.score, (45 + 12 + 3) / 0.8)


@pytest.mark.parametrize(("numbers", "status"), [(0.26, "ok"), (0.24, "low_mass")])
def test_little_mass_is_no_score(stub: Stub, tmp_path: Path, numbers: float, status: str) -> None:
    words = {f"word{chr(97 + k)}": (1 - numbers) / 7 for k in range(7)}
    stub.replies = lambda prompt: {"40": numbers, **words}
    found = one(stub, tmp_path)
    assert (found.status, found.score) == (status, 40.0 if status == "ok" else None)
    assert math.isclose(found.mass, numbers)


@pytest.mark.parametrize("prefill", ["flags", "plain"])
def test_split_digits_are_followed_to_the_same_score(stub: Stub, tmp_path: Path, prefill: str) -> None:
    """All ways to spell a number, one that ends early, 100 and the numbers beyond it."""
    spread = {"85": 0.30, "8": 0.12, "80": 0.08, "3": 0.05, "34": 0.06, "100": 0.07, "10": 0.04, "1": 0.03, "12": 0.02,
              "0": 0.05, "101": 0.06, "REFUSAL": 0.12}
    stub.split, stub.prefill, stub.replies = 1, prefill, lambda prompt: spread
    judge = grader(stub, tmp_path)
    found = judge.grade_all(asks(1))[0]
    right = {int(text): p for text, p in spread.items() if text not in ("REFUSAL", "101")}
    assert judge.abilities == Abilities("tree", prefill=prefill)
    assert math.isclose(found.mass, sum(right.values()), abs_tol=1e-9)
    assert math.isclose(found.score, sum(n * p for n, p in right.items()) / sum(right.values()), abs_tol=1e-9)
    assert len(stub.asked()) == 1 + len(["3", "1", "10"]), "what follows 8 stands in the reply itself"


def test_numbers_in_pieces_of_two_digits_are_noticed(stub: Stub, tmp_path: Path) -> None:
    """85 is one token, 100 is "10", "0": read as first tokens alone, the mean of these would be 40 lower."""
    stub.split, stub.replies = 2, lambda prompt: {"100": 0.5, "10": 0.2, "85": 0.2, "7": 0.1}
    judge = grader(stub, tmp_path)
    found = judge.grade_all(asks(1))[0]
    assert judge.abilities == Abilities("tree", prefill="flags")
    assert math.isclose(found.mass, 1.0) and math.isclose(found.score, 50 + 2 + 17 + 0.7)
    stub.prefill = None
    (tmp_path / "b").mkdir()
    judge = grader(stub, tmp_path / "b")
    assert judge.grade_all(asks(1))[0].score in (100, 10, 85, 7) and judge.abilities.way == "sampled"


def test_a_number_in_pieces_is_no_number_where_they_were_thought_whole(stub: Stub, tmp_path: Path) -> None:
    """Should both probes miss it, a reply of "10", "0" is a status; its first token is not taken for a 10."""
    judge = grader(stub, tmp_path)
    judge.grade_all(asks(1))
    stub.split, stub.replies = 2, lambda prompt: {"100": 1.0}
    assert judge.abilities.way == "whole"
    found = judge.grade_all(asks(2))
    assert (found[1].status, found[1].score) == ("unparsable", None) and found[0].score == 70


def test_improbable_prefixes_are_left_out(stub: Stub, tmp_path: Path) -> None:
    stub.split, stub.replies = 1, lambda prompt: {"85": 0.9992, "31": 0.0004, "44": 0.0004}
    found = one(stub, tmp_path)
    assert len(stub.asked()) == 1 and math.isclose(found.mass, 0.9992) and math.isclose(found.score, 85)


@pytest.mark.parametrize("constraint", ["structured_outputs", "guided_choice", None])
@pytest.mark.parametrize("why", ["no log-probabilities", "no continuing"])
def test_without_probabilities_replies_are_sampled(stub: Stub, tmp_path: Path, constraint: str | None,
                                                   why: str) -> None:
    stub.constraint = constraint
    stub.logprobs, stub.split, stub.prefill = why == "no continuing", 1, None
    script = iter(["50", "60", "REFUSAL", "90", "many"])
    stub.raw = lambda prompt: envelope(next(script))
    judge = grader(stub, tmp_path, concurrency=1)
    found = judge.grade_all(asks(1))[0]
    assert judge.abilities == Abilities("sampled", constraint=constraint)
    assert found.status == "ok" and math.isclose(found.score, 200 / 3) and found.mass is None
    assert len({body["seed"] for body in stub.seen[-5:]}) == 5
    assert all((body.get(constraint) is not None) for body in stub.seen[-5:]) or constraint is None


@pytest.mark.parametrize(("replies", "status"), [(["7", "x", "x", "x", "9"], "ok"), (["7", "x", "x", "y", "z"], None),
                                                 (["101", "-3", "7", "500", "x"], "out_of_range")])
def test_a_quarter_of_the_samples_must_be_numbers(stub: Stub, tmp_path: Path, replies: list[str],
                                                  status: str | None) -> None:
    stub.logprobs = False
    script = iter(replies)
    stub.raw = lambda prompt: envelope(next(script))
    found = grader(stub, tmp_path, concurrency=1).grade_all(asks(1))[0]
    assert found.status == (status or "unparsable") and found.score == (8 if status == "ok" else None)


ODD: list[tuple[Any, str]] = [
    ("REFUSAL", "refused"), ("refused.", "refused"), ("I'm sorry, but no", "refused"), ("I\u2019m sorry", "refused"),
    ("Sorry, I can't", "refused"), ("I cannot grade this", "refused"), ("I can\u2019t", "refused"),
    ("I won't do that", "refused"), ("As an AI, I", "refused"), ("Apologies", "refused"), ("I must decline", "refused"),
    ("-1", "out_of_range"), ("-85", "out_of_range"), ("101", "out_of_range"), ("1000", "out_of_range"),
    ("99999999999999999999999", "out_of_range"), ("-0", "out_of_range"),
    ("1e3", "unparsable"), ("85/100", "unparsable"), ("85%", "unparsable"), ("85.5", "unparsable"),
    ("0.85", "unparsable"), (".5", "unparsable"), ("85.", "unparsable"), ("+85", "unparsable"), ("085", "unparsable"),
    ("00", "unparsable"), ("8 5", "unparsable"), ("85, 90", "unparsable"), ("80-90", "unparsable"),
    ("**85**", "unparsable"), ("`85`", "unparsable"), ("# 85", "unparsable"), ("- 85", "unparsable"),
    ("```\n85\n```", "unparsable"), ('{"score": 85}', "unparsable"), ("[85]", "unparsable"), ("(85)", "unparsable"),
    ('"85"', "unparsable"), ("<b>85</b>", "unparsable"), ("85 points", "unparsable"), ("Score: 85", "unparsable"),
    ("eighty-five", "unparsable"), ("aligned", "unparsable"), ("NaN", "unparsable"), ("inf", "unparsable"),
    ("None", "unparsable"), ("CODE", "unparsable"), ("0x55", "unparsable"), ("8_5", "unparsable"),
    ("\uff18\uff15", "unparsable"), ("\u0668\u0665", "unparsable"), ("\u2464", "unparsable"), ("8\u00b2", "unparsable"),
    ("\u096e\u096b", "unparsable"), ("85\u200b", "unparsable"), ("8\u03055", "unparsable"), ("\x0085", "unparsable"),
    ("LXXXV", "unparsable"), ("", "unparsable"), ("   ", "unparsable"), ("\n\n", "unparsable"), ("?", "unparsable"),
    ("<think>hm</think>85", "unparsable"), ("85\n10", "unparsable"), ("\ud83d", "unparsable"),
    (None, "unparsable"), (85, "unparsable"), (["85"], "unparsable"), ({"text": "85"}, "unparsable"),
    (True, "unparsable"),
]


def numbered(table: list[Any]) -> tuple[list[Ask], Any]:
    """Return an ask per row, and a function from a prompt to its row."""
    wanted = [Ask("Q?", f"row {k} of the table.", PROMPTS["coherent"]) for k in range(len(table))]
    return wanted, lambda prompt: table[int(prompt.split("\nrow ")[1].split(" of")[0])]


@pytest.mark.parametrize("way", ["sampled", "whole"])
def test_every_odd_reply_is_a_status(stub: Stub, tmp_path: Path, way: str) -> None:
    """In the weighed way each comes with log-probabilities that say 85 with certainty, and still gives no number."""
    assert len(ODD) >= 60
    stub.logprobs = way == "whole"
    certain = {"content": [{"token": "85", "logprob": 0.0, "top_logprobs": [{"token": "85", "logprob": 0.0}]}]}
    wanted, row = numbered(ODD)
    stub.raw = lambda prompt: envelope(row(prompt)[0], logprobs=certain if way == "whole" else None)
    found = grader(stub, tmp_path, replies=1).grade_all(wanted)
    assert [(g.status, g.score) for g in found] == [(status, None) for _, status in ODD]


@pytest.mark.parametrize("way", ["sampled", "whole"])
def test_withheld_and_cut_replies(stub: Stub, tmp_path: Path, way: str) -> None:
    stub.logprobs = way == "whole"
    certain = {"content": [{"token": "85", "logprob": 0.0, "top_logprobs": [{"token": "85", "logprob": 0.0}]}]}
    table = [(("85", "length"), {}, "truncated"), (("85", "content_filter"), {}, "refused"),
             (("85", "stop"), {"refusal": "I will not."}, "refused"), ((None, "stop"), {"refusal": "no"}, "refused"),
             (("85", "stop"), {}, "ok"), (("85", "eos"), {}, "ok"), ((" 85\n", "stop"), {}, "ok")]
    wanted, row = numbered(table)
    stub.raw = lambda prompt: envelope(*row(prompt)[0], certain if way == "whole" else None, **row(prompt)[1])
    found = grader(stub, tmp_path, replies=1).grade_all(wanted)
    assert [g.status for g in found] == [status for *_, status in table]
    assert [g.score for g in found] == [85.0 if status == "ok" else None for *_, status in table]


def tops(*pairs: tuple[Any, Any], token: Any = "85") -> dict[str, Any]:
    return {"content": [{"token": token, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": p}
                                                                          for t, p in pairs]}]}


ODD_LOGPROBS: list[tuple[Any, str]] = [
    (tops(("85", math.nan)), "unparsable"), (tops(("85", math.inf)), "unparsable"), (tops(("85", 0.5)), "unparsable"),
    (tops(("85", "0")), "unparsable"), (tops(("85", None)), "unparsable"), (tops(("85", True)), "unparsable"),
    (tops(("85", 10**400)), "unparsable"), (tops(("85", -0.1), ("90", math.nan)), "unparsable"),
    (tops(("85", -0.1), ("90", -0.1)), "unparsable"), (tops(), "unparsable"), ({"content": []}, "unparsable"),
    ({"content": [{"token": "85", "top_logprobs": [7]}]}, "unparsable"),
    ({"content": [{"token": "85", "top_logprobs": {"85": 0.0}}]}, "unparsable"), ({"content": [{}]}, "unparsable"),
    (tops(("85", -9999.0)), "low_mass"), (tops(("85", -math.inf)), "low_mass"), (tops(("85", -(10**400))), "low_mass"),
    (tops(("\uff18\uff15", 0.0)), "low_mass"), (tops(("085", 0.0)), "low_mass"), (tops(("8.5", 0.0)), "low_mass"),
    (tops((None, 0.0)), "low_mass"), (tops((85.0, 0.0)), "low_mass"), (tops(("85", 0.0), token="90"), "unparsable"),
    (None, "failed"), ("none", "failed"), ({}, "failed"), ({"content": None}, "failed"), ({"content": [3]}, "failed"),
    ({"tokens": ["85"], "token_logprobs": [0.0]}, "failed"),
]


def test_odd_log_probabilities_are_a_status(stub: Stub, tmp_path: Path) -> None:
    """The reply says 85 in all of them; those without log-probabilities are not kept, so they are asked again."""
    wanted, row = numbered(ODD_LOGPROBS)
    stub.raw = lambda prompt: envelope("85", logprobs=row(prompt)[0])
    found = grader(stub, tmp_path).grade_all(wanted)
    assert [(g.status, g.score) for g in found] == [(status, None) for _, status in ODD_LOGPROBS]
    assert all(g.mass is None or g.mass < 0.25 for g in found)
    before = len(stub.asked())
    assert [g.status for g in grader(stub, tmp_path).grade_all(wanted)] == [status for _, status in ODD_LOGPROBS]
    assert len(stub.asked()) - before == sum(status == "failed" for _, status in ODD_LOGPROBS)


BODIES = [b"", b"null", b"[]", b"85", b"{}", b"not json", b"\xff\xfe", b'{"choices": null}', b'{"choices": []}',
          b'{"choices": [null]}', b'{"choices": [{}]}', b'{"choices": [{"message": null}]}', b'{"choices": {"0": 1}}',
          b'{"choices": [{"message": "85"}]}', b'{"error": {"message": "overloaded"}}', b"[" * 5000]


def test_bodies_that_are_no_completion_fail(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("judge.endpoint.FAILURES_IN_ROW", len(BODIES) + 1)
    wanted, row = numbered(BODIES)
    stub.raw = row
    found = grader(stub, tmp_path).grade_all(wanted)
    assert [(g.status, g.score) for g in found] == [("failed", None)] * len(BODIES)
    stub.raw = lambda prompt: None
    assert {g.status for g in grader(stub, tmp_path).grade_all(wanted)} == {"ok"}, "a failure is not kept"


def test_passing_faults_are_waited_out(stub: Stub, tmp_path: Path) -> None:
    """429 with Retry-After, 5xx, a reset, a body cut short, a hang: six retries reach through, and the wait is kept."""
    judge = grader(stub, tmp_path, attempt_s=0.6, concurrency=1)
    judge.grade_all(asks(1))
    stub.faults = [(429, {"retry-after": "0.4"}), 500, 503, "reset", "truncate", "hang"]
    began = time.monotonic()
    found = judge.grade_all(asks(2))
    assert [g.status for g in found] == ["ok", "ok"] and not stub.faults and time.monotonic() - began >= 0.4
    assert len({json.dumps(body) for body in stub.seen[-7:]}) == 1, "one request, sent seven times"
    assert judge.endpoint.budget.n_requests == 4, "two probes and one for each answer; retries are not billed"


@pytest.mark.parametrize("fault", [500, 503, "reset", "hang", "truncate"])
def test_a_server_that_stays_broken_ends_the_call(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  fault: Any) -> None:
    monkeypatch.setattr("judge.endpoint.FAILURES_IN_ROW", 2)
    judge = grader(stub, tmp_path, max_retries=1, attempt_s=0.6, concurrency=2)
    judge.grade_all(asks(1))
    stub.broken = fault
    with pytest.raises(UserError, match="gives no replies") as caught:
        judge.grade_all(asks(9))
    assert caught.value.exit_code == Exit.REMOTE and KEY not in caught.value.message
    assert len(stub.asked()) <= 1 + 2 * 3, "bounded: two requests in flight, each sent twice, then none"
    stub.broken = None
    assert {g.status for g in grader(stub, tmp_path).grade_all(asks(9))} == {"ok"}


def test_a_lone_failure_is_a_status(stub: Stub, tmp_path: Path) -> None:
    judge = grader(stub, tmp_path, max_retries=0, concurrency=1)
    judge.grade_all(asks(1))
    stub.faults = [500]
    assert sorted(g.status for g in judge.grade_all(asks(4))) == ["failed", "ok", "ok", "ok"]


def test_a_total_timeout_bounds_all_retries(stub: Stub, tmp_path: Path) -> None:
    judge = grader(stub, tmp_path, max_retries=50, total_s=1.0, concurrency=1)
    judge.grade_all(asks(1))
    stub.faults = [503] * 40
    assert sorted(g.status for g in judge.grade_all(asks(2))) == ["failed", "ok"] and len(stub.faults) > 20


def test_a_rate_limit_that_stays_stops_the_call(stub: Stub, tmp_path: Path) -> None:
    judge = grader(stub, tmp_path, max_retries=1, concurrency=1)
    judge.grade_all(asks(1))
    stub.broken = (429, {"retry-after": "0.01"})
    with pytest.raises(UserError, match="HTTP 429") as caught:
        judge.grade_all(asks(5))
    assert caught.value.exit_code == Exit.REMOTE and len(stub.asked()) == 1 + 2


@pytest.mark.parametrize(("fault", "says"), [(401, "does not accept the key in STUB_KEY"), (403, "does not accept"),
                                             (404, "has no model 'stub'"), (500, "HTTP 500"), (400, "HTTP 400")])
def test_a_server_of_no_use_is_an_error_with_a_next_step(stub: Stub, tmp_path: Path, fault: int, says: str,
                                                         capfd: pytest.CaptureFixture[str]) -> None:
    stub.faults = [fault] * 20
    with pytest.raises(UserError, match=says) as caught:
        grader(stub, tmp_path).grade_all(asks(3))
    assert caught.value.exit_code == Exit.REMOTE and caught.value.hint
    assert KEY not in caught.value.message + caught.value.hint + "".join(capfd.readouterr())
    assert len(stub.seen) <= 5


def test_nobody_listens(tmp_path: Path) -> None:
    with served(Stub()) as gone:
        url = gone.url
    with pytest.raises(UserError, match="could not be used") as caught:
        grader(Stub(url=url.replace("//", "//user:secret@")), tmp_path).grade_all(asks(1))
    assert caught.value.exit_code == Exit.REMOTE and "secret" not in caught.value.message
    for odd in ("http://[half", "127.0.0.1:8000", "ftp://x/v1", "http://x:port/v1", "http:///v1"):
        with pytest.raises(UserError, match="no address of a server"):
            Address("m", odd)


def test_a_rerun_costs_nothing_even_elsewhere(stub: Stub, tmp_path: Path) -> None:
    stub.replies = lambda prompt: {"70": 0.5, "20": 0.5} if "number 3" in prompt else {"90": 1.0}
    first = grader(stub, tmp_path).grade_all(asks(7))
    assert len(stub.seen) == 9, "two probes and seven grades"
    judge = grader(stub, tmp_path)
    assert judge.grade_all(asks(7)) == first and len(stub.seen) == 9
    assert (judge.endpoint.budget.n_requests, judge.endpoint.budget.n_cached) == (0, 7)
    with served(Stub()) as other:
        elsewhere = grader(other, tmp_path)
        assert elsewhere.grade_all(asks(7)) == first and not other.asked(), "replies go by content, not by address"
        renamed = grader(other, tmp_path)
        renamed.endpoint.address = replace(renamed.endpoint.address, model="another")
        renamed.grade_all(asks(2))
        assert len(other.asked()) == 2, "another judge is another judge"


def test_equal_answers_are_paid_for_once(stub: Stub, tmp_path: Path) -> None:
    stub.delay_s = 0.05
    found = grader(stub, tmp_path).grade_all(asks(1) * 6)
    assert len(stub.asked()) == 1 and len(found) == 6 and len(set(map(str, found))) == 1


def test_damaged_lines_of_the_journal_are_asked_again(stub: Stub, tmp_path: Path) -> None:
    first = grader(stub, tmp_path).grade_all(asks(4))
    path = tmp_path / "replies.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7, "two probes, what they found, four replies"
    path.write_bytes(b"".join(lines[:3]) + lines[3].replace(b'"70"', b'"71"', 1) + b"\x00\xff\n" + lines[4]
                     + lines[6][:-20])
    judge = grader(stub, tmp_path)
    assert judge.endpoint.journal.n_damaged == 3
    assert judge.grade_all(asks(4)) == first and len(stub.asked()) == 4 + 3
    assert Journal(path).n_damaged == 3 and grader(stub, tmp_path).grade_all(asks(4)) == first
    assert len(stub.asked()) == 7 and path.stat().st_mode & 0o077 == 0


def test_a_full_disk_stops_the_judge_and_what_was_kept_is_not_asked_again(stub: Stub, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for six lines: the probes, what they found, three replies. A reply that cannot be kept ends the spending."""
    true, left = os.write, [6]

    def write(handle: int, data: bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return true(handle, data)

    monkeypatch.setattr("judge.journal.os.write", write)
    with pytest.raises(UserError, match=r"Could not write .*No space left") as caught:
        grader(stub, tmp_path, concurrency=1).grade_all(asks(9))
    assert caught.value.exit_code == Exit.ENVIRONMENT and "Free some space" in caught.value.hint
    assert len(stub.seen) == 2 + 3 + 1
    left[0] = 99
    assert {g.status for g in grader(stub, tmp_path).grade_all(asks(9))} == {"ok"} and len(stub.seen) == 2 + 9 + 1


def test_never_more_at_once_than_allowed(stub: Stub, tmp_path: Path) -> None:
    stub.delay_s = 0.1
    grader(stub, tmp_path, concurrency=3).grade_all(asks(11))
    assert stub.busiest == 3


@pytest.mark.parametrize(("budget", "paid"), [(Budget(max_requests=5), 5), (Budget(max_tokens=900), 3)])
def test_a_spent_budget_stops_cleanly_and_goes_on(stub: Stub, tmp_path: Path, budget: Budget, paid: int) -> None:
    with pytest.raises(UserError, match="budget is spent") as caught:
        grader(stub, tmp_path, budget=budget, concurrency=1).grade_all(asks(9))
    assert caught.value.exit_code == Exit.INTERRUPTED and caught.value.hint
    assert len(stub.seen) == paid if budget.max_requests else 1 < len(stub.seen) < 9
    assert budget.max_tokens is None or budget.n_tokens <= budget.max_tokens
    sent = len(stub.seen)
    assert {g.status for g in grader(stub, tmp_path).grade_all(asks(9))} == {"ok"}
    assert len(stub.seen) == 11 and sent < 11, "two probes and nine replies, each once"


def test_a_request_without_a_reply_counts_against_the_tokens(stub: Stub, tmp_path: Path) -> None:
    """A body cut short may have been billed; a 500 was not."""
    judge = grader(stub, tmp_path, max_retries=0, concurrency=1)
    judge.grade_all(asks(1))
    counted = judge.endpoint.budget.n_tokens
    stub.faults = ["truncate"]
    judge.grade_all(asks(2))
    more = judge.endpoint.budget.n_tokens - counted
    assert 100 < more < 1000
    stub.faults = [500]
    judge.grade_all(asks(3))
    assert judge.endpoint.budget.n_tokens == counted + more + 100, "answer 1 again: a 500, answer 2: a reply"


def test_the_key_is_in_the_header_and_nowhere_else(stub: Stub, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                                                   caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    stub.logprobs = False
    stub.raw = lambda prompt: envelope(f"your key is {KEY}")
    grader(stub, tmp_path).grade_all(asks(2))
    assert all(f"Bearer {KEY}" in headers.values() for headers in stub.headers)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"your key is [key]" in written and KEY.encode() not in written
    assert KEY not in "".join(capfd.readouterr()) + caplog.text
    assert all(KEY not in json.dumps(body) for body in stub.seen)


@pytest.mark.parametrize("spoilt", ["sk-\u00e9", "sk-a\r\nb", "sk-\x7f"], ids=ascii)
def test_a_key_that_no_header_can_carry_is_refused_and_not_said(spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = Address("m", "http://127.0.0.1:9/v1", "SAFESET_TEST_KEY")
    monkeypatch.setenv("SAFESET_TEST_KEY", f" {KEY}\n")
    assert address.key() == KEY
    monkeypatch.setenv("SAFESET_TEST_KEY", spoilt)
    with pytest.raises(UserError, match="variable SAFESET_TEST_KEY has characters that no key has") as caught:
        address.key()
    assert caught.value.exit_code == Exit.ENVIRONMENT and "sk-" not in caught.value.message + caught.value.hint


def test_a_key_is_taken_out_of_a_complaint_before_it_is_cut_short(stub: Stub, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_KEY", f"sk-{'x' * 300}")
    stub.faults = [500] * 99
    with pytest.raises(UserError, match=r"HTTP 500, no .Bearer .key") as caught:
        grader(stub, tmp_path, max_retries=0).grade_all(asks(1))
    assert "sk-" not in caught.value.message


def test_sigterm_ends_the_judge_at_once(stub: Stub, tmp_path: Path) -> None:
    """Raised in a task, the command line's exception would be one grade's trouble, and the others would go on."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        stub.delay_s = 0.02
        judge = grader(stub, tmp_path, concurrency=2)
        with pytest.raises(Terminated):
            judge.grade_all(asks(60), lambda n: os.kill(os.getpid(), signal.SIGTERM))
        assert len(stub.seen) < 12 and signal.getsignal(signal.SIGTERM) is _terminate
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_key_must_be_there_for_the_default_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STUB_KEY")
    with pytest.raises(UserError, match="no key in the environment variable STUB_KEY"):
        Address("m", None, "STUB_KEY").key()
    assert Address("m", "http://127.0.0.1:1/v1", "STUB_KEY").key() == ""
