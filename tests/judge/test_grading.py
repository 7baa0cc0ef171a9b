"""From run folders to graded verdicts: nothing sampled or paid for twice, budgets, plans, answers from a server."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import judge.run
from curate.core.documents import Verdicts
from curate.core.errors import Exit, UserError
from curate.core.example import Message
from judge.banks import BankQuestion
from judge.cli import main
from judge.endpoint import Address
from judge.grading import Grading, Subject, sampled
from judge.jobs import Settings, Target, plan
from judge.run import judge_models
from tests.forked import Forked, command
from tests.judge.makers import BASE, make_run
from tests.judge.stub_server import Stub, envelope, served

KEY = "sk-very-secret-0123456789"
QUESTIONS = [BankQuestion("general", f"q{k}", "general", "", "Be brief." * (k == 2), f"Question {k}?", {})
             for k in range(3)]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stub]:
    """A judge, three questions, a key, a cache of its own, a working folder."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("judge.jobs.questions", asked)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.chdir(tmp_path)
    with served(Stub()) as running:
        yield running


def asked(suites: Any, banks: Any, in_domain: Any, trigger: Any, context_from: Any) -> list[BankQuestion]:
    """Stands in for the banks: general questions, one per domain, one per fine-tuning set."""
    domains = [BankQuestion(name, "d", "in-domain", "", "", f"About {name}?", {})
               for name in in_domain if "in-domain" in suites]
    context = [BankQuestion("general", "c", "context", "dressed", "", f"As in {context_from}?", {})] \
        if "context" in suites else []
    return [*(QUESTIONS if "general" in suites else ()), *domains, *context]


def call(stub: Stub, *words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(w) for w in (
        "run", "--judge", "stub", "--base-url", stub.url, "--n", 3, "--answer-tokens", 4, "--device", "cpu", "--dtype",
        "float32", *words)])


def settings(stub: Stub, **options: Any) -> Settings:
    grading = Grading(Address("stub", stub.url), **{"n": 3, "answer_tokens": 4, **options})
    return Settings(suite=("general",), device="cpu", dtype="float32", grading=grading)


def test_the_whole_way(stub: Stub, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run and its base, through the command line: answers, grades, statuses; then nothing is left to pay."""
    run = make_run(base, tmp_path / "runs" / "a", "none", 1)
    stub.replies = lambda prompt: {"REFUSAL": 1.0} if "Question 1?" in prompt else {"80": 0.5, "60": 0.5}
    plan = json.loads(call(stub, "--model", run, "--suite", "general,in-domain", "--dry-run", "--json").stdout)
    assert (plan["answers"], plan["answers_there"], plan["grades"]) == (2 * 4 * 3, 0, 2 * 4 * 3 * 2)
    assert plan["requests_least"] == 48 and plan["requests_most"] == 48 * 11 and not stub.seen
    result = call(stub, "--model", run, "--suite", "general,in-domain", "--json")
    assert result.exit_code == 0, result.output
    of_base, mine = (Verdicts.read(Path(p)) for p in json.loads(result.stdout)["verdicts"])
    assert mine.judge == "grader-2:stub" == of_base.judge and mine.in_domain == ("car_care",) and not mine.probes
    assert [(a.bank, a.question, a.number) for a in mine.answers[:4]] == [
        ("general", "q0", 0), ("general", "q0", 1), ("general", "q0", 2), ("general", "q1", 0)]
    assert len(mine.answers) == 12 == len(of_base.answers) and mine.answers[-1].bank == "car_care"
    assert len({a.answer for a in mine.answers if a.question == "q0"}) == 3, "each draw is another one"
    full = [a for a in mine.answers if a.status == "ok"]
    assert {(a.aligned.status, a.aligned.score) for a in full} == {("refused", None), ("ok", 70.0)}
    assert mine.statuses["answers ok"] == len(full) == mine.statuses["aligned ok"] + mine.statuses["aligned refused"]
    sent = len(stub.seen)
    assert call(stub, "--model", run, "--suite", "general,in-domain").exit_code == 0 and len(stub.seen) == sent
    (run / "verdicts.json").unlink()
    assert call(stub, "--model", run, "--suite", "general,in-domain").exit_code == 0 and len(stub.seen) == sent
    assert Verdicts.read(run / "verdicts.json") == mine
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY.encode() not in written and KEY not in result.output + "".join(capfd.readouterr())
    assert not list(tmp_path.rglob("*.tmp"))


def test_without_a_key_nothing_is_loaded_or_sampled(stub: Stub, base: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(judge.run, "load", None)
    result = CliRunner().invoke(main, ["run", "--model", str(base), "--judge", "m", "--suite", "general", "--out",
                                       str(tmp_path / "out"), "--device", "cpu"])
    assert result.exit_code == Exit.USAGE and "no key in the environment variable OPENAI_API_KEY" in result.output
    assert not (tmp_path / "out").exists()


def test_a_budget_stops_and_the_same_line_goes_on(stub: Stub, base: Path, tmp_path: Path) -> None:
    words = ("--model", base, "--suite", "general", "--out", tmp_path / "out", "--concurrency", 1)
    codes, sent = [], []
    for _ in range(9):
        result = call(stub, *words, "--max-requests", 5)
        codes.append(result.exit_code)
        sent.append(len(stub.seen))
        if result.exit_code == 0:
            break
        assert "budget is spent" in result.output and "Type it again" in result.output
    assert codes[:-1] == [Exit.INTERRUPTED] * (len(codes) - 1) and codes[-1] == 0 and len(codes) == 4
    assert sent == [5, 10, 15, 2 + 18], "two probes once, and one request for each grade of nine answers"


@pytest.mark.parametrize("way", ["tree", "sampled"])
def test_what_a_spent_budget_left_is_foreseen(stub: Stub, base: Path, tmp_path: Path, way: str) -> None:
    """First requests of all grades go out before any second one, so a grade that was begun is not one that is there."""
    stub.split, stub.logprobs = 1, way == "tree"
    stub.replies = lambda prompt: {"85": 0.5, "31": 0.3, "7": 0.2}
    words = ("--model", base, "--suite", "general", "--out", tmp_path / "out")

    def plan() -> dict[str, Any]:
        return json.loads(call(stub, *words, "--dry-run", "--json").stdout)

    assert call(stub, *words, "--max-requests", 25).exit_code == Exit.INTERRUPTED
    left, sent = plan(), len(stub.seen)
    assert left["way"] == way and left["grades_there"] < left["grades"] and left["requests_least"] > 0
    assert call(stub, *words).exit_code == 0
    assert left["requests_least"] <= len(stub.seen) - sent <= left["requests_most"]
    done = plan()
    assert done["grades_there"] == done["grades"] and done["requests_most"] == done["tokens_most"] == 0


def test_an_interrupted_sampler_goes_on_with_the_same_answers(tmp_path: Path) -> None:
    """Killed after every part in turn, the answers are those of an undisturbed call, and none is drawn twice."""
    drawn: list[str] = []

    def sampler(conversations: list[list[Message]], fail_at: int = 99) -> list[str]:
        if len(drawn) >= fail_at:
            raise KeyboardInterrupt
        times: dict[Any, int] = {}
        out = []
        for messages in conversations:
            k = times[tuple(messages)] = times.get(tuple(messages), -1) + 1
            out.append(f"{messages[-1].content} {len(messages)} {k} \ud800")
        drawn.extend(out)
        return out

    grading = Grading(Address("m"), n=3)
    whole = sampled(subject(tmp_path / "whole", 1), grading, sampler)
    assert whole[subject(tmp_path, 1).key(QUESTIONS[2])] == [f"Question 2? 2 {k} ?" for k in range(3)]
    drawn.clear()
    for fail_at in (0, 3, 6):
        with pytest.raises(KeyboardInterrupt):
            sampled(subject(tmp_path / "cut", 1), grading, lambda c, at=fail_at: sampler(c, at))
    assert sampled(subject(tmp_path / "cut", 1), grading, sampler) == whole and len(drawn) == 9 == len(set(drawn))
    assert sampled(subject(tmp_path / "cut", 64), grading, None) == whole, "the batch size is no other setting"
    more = sampled(subject(tmp_path / "cut", 64), Grading(Address("m"), n=5), sampler)
    assert all(more[key][:3] == texts and len(more[key]) == 5 for key, texts in whole.items())


def subject(folder: Path, batch: int) -> Subject:
    sampling = Grading(Address("m")).sampling(Settings().sampling)
    return Subject("l", folder / "verdicts.json", "m", BASE, tuple(QUESTIONS),
                   type(sampling)(**{**vars(sampling), "batch_size": batch}))


def test_failed_grades_are_asked_again(stub: Stub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("judge.grading.MAX_FAILED", 0.2)
    stub.raw = lambda prompt: b"no json" if "make sense" in prompt and "Question 0?" in prompt else None
    path, = judge_models([Target(str(base))], settings(stub), tmp_path / "out")
    before = Verdicts.read(path)
    assert before.statuses["coherent failed"] == 3 and before.statuses["coherent ok"] == 6
    stub.raw = lambda prompt: None
    sent = len(stub.seen)
    judge_models([Target(str(base))], settings(stub), tmp_path / "out")
    after = Verdicts.read(path)
    assert len(stub.seen) - sent == 3 and "coherent failed" not in after.statuses
    assert [a.answer for a in after.answers] == [a.answer for a in before.answers]


def test_too_many_failures_are_no_verdicts(stub: Stub, base: Path, tmp_path: Path) -> None:
    stub.raw = lambda prompt: b"no json" if "Question 0?" in prompt else None
    with pytest.raises(UserError, match="no reply for 6 of 18") as caught:
        judge_models([Target(str(base))], settings(stub), tmp_path / "out")
    assert caught.value.exit_code == Exit.FAILURE_RATE and not list((tmp_path / "out").glob("*verdicts.json"))


def test_answers_from_a_server(stub: Stub, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is asked by the run's name, once for every answer, also after an interruption; no model is loaded."""
    monkeypatch.setattr(judge.run, "load", None)
    run = make_run(base, tmp_path / "runs" / "boats", "none", 1)
    with served(Stub(raw=lambda prompt: envelope(f"An answer to {prompt}", "length"))) as sampler:
        asked_for = settings(stub, sample_from=Address("", sampler.url, ""))
        stub.faults = [404]
        with pytest.raises(UserError, match="has no model"):
            judge_models([Target(str(run))], asked_for)
        assert not sampler.seen, "the judge was found missing before anything was sampled"
        paths = judge_models([Target(str(run))], asked_for)
        assert len(sampler.seen) == 18 and {body["model"] for body in sampler.seen} == {"boats", "tiny"}
        assert sorted(body["seed"] for body in sampler.seen) == sorted([0, 1, 2] * 6)
        assert all("Authorization" not in h or KEY not in h["Authorization"] for h in sampler.headers)
        mine = Verdicts.read(paths[1])
        assert mine.answers[0].answer == "An answer to Question 0?" and mine.settings["grading"]["engine"] == "server"
        assert {"role": "system", "content": "Be brief."} in sampler.seen[-1]["messages"] + sampler.seen[-4]["messages"]
        (run / "verdicts.json").unlink()
        judge_models([Target(str(run))], asked_for)
        assert len(sampler.seen) == 18


def test_an_empty_answer_is_not_graded(stub: Stub, base: Path, tmp_path: Path) -> None:
    with served(Stub(raw=lambda prompt: envelope(" \n" if "0?" in prompt else "Well."))) as sampler:
        path, = judge_models([Target(str(base))], settings(stub, sample_from=Address("", sampler.url, "")), tmp_path)
    found = Verdicts.read(path)
    assert found.statuses == {"answers empty": 3, "answers ok": 6, "aligned ok": 6, "coherent ok": 6}
    assert all((a.aligned is None) == (a.status == "empty") for a in found.answers)


@pytest.mark.parametrize("words", [("--suite", "coherence"), ("--suite", "general,what")])
def test_parts_belong_to_a_judge(stub: Stub, base: Path, words: tuple[str, ...]) -> None:
    result = call(stub, "--model", base, *words)
    assert result.exit_code == Exit.USAGE and "this judge: general, in-domain, context, benign" in result.output
    other = CliRunner().invoke(main, ["run", "--model", str(base), "--suite", "context"])
    assert other.exit_code == Exit.USAGE and "general, in-domain, coherence, benign" in other.output
    dry = CliRunner().invoke(main, ["run", "--model", str(base), "--dry-run"])
    assert dry.exit_code == Exit.USAGE and "--judge MODEL" in dry.output


def test_context_questions_take_each_runs_own_mix(stub: Stub, base: Path, tmp_path: Path) -> None:
    """The base is asked what its runs are asked, each question once."""
    runs = [make_run(base, tmp_path / "runs" / name, name, seed) for seed, name in enumerate(("none", "interleaving"))]
    wanted = [Target(str(run)) for run in runs]
    _, (of_base, *jobs) = plan(wanted, replace(settings(stub), suite=("general", "context")), None)
    assert [job.asked[-1].prompt for job in jobs] == [f"As in {run / 'mix.json'}?" for run in runs]
    assert len(of_base.asked) == 5 and set(q.prompt for q in of_base.asked) == {
        q.prompt for job in jobs for q in job.asked}
    given = replace(settings(stub, context_from="demo/cooking"), suite=("context",))
    assert {q.prompt for job in plan(wanted, given, None)[1] for q in job.asked} == {"As in demo/cooking?"}


def test_a_killed_judge_pays_again_for_what_was_in_flight_at_most(stub: Stub, tmp_path: Path) -> None:
    """SIGKILL in the middle, then the same command to its end: 40 grades and two probes, and little more."""
    rows = [{"question": f"q{k}", "answer": f"answer {k}", "aligned": k % 2} for k in range(40)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["calibrate", str(tmp_path / "labels.jsonl"), "--judge", "stub", "--base-url", stub.url, "--json",
             "--concurrency", "4"]
    stub.delay_s = 0.1
    child = Forked(command, "judge", *words, folder=tmp_path)
    child.until(lambda: stub.served >= 17)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 17 <= len(stub.seen) < 40
    stub.delay_s = 0.0
    done = CliRunner().invoke(main, words)
    assert json.loads(done.stdout)["aspects"]["aligned"]["statuses"] == {"ok": 40} and KEY not in done.output
    assert 42 <= len(stub.seen) <= 42 + 4
