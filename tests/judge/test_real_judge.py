"""A real judge model at a real vLLM server: SmolLM2 grades SmolLM2. Plumbing, not quality: it grades badly.

Run by ``make test-vllm``. What its grades should be is worked out here with transformers.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from curate.cli import main as curate
from curate.core.chat import encode_prompt
from curate.core.documents import Verdicts
from curate.core.example import Message
from curate.core.model import Loaded, load
from curate.core.smollm2 import smollm2_folder
from curate.core.vllm import Engine
from judge.cli import main
from judge.endpoint import Address, Endpoint
from judge.grader import Ask, Grader
from judge.journal import Journal
from judge.prompts import ASPECTS, PROMPTS, request_text
from tests.real_vllm import BASE, OPENING, Served
from train.cli import main as train

pytestmark = pytest.mark.vllm

N = 2
TOKENS = 10
CURT = "Rate this.\n{answer}"
"""A prompt that SmolLM2 does not answer with a number."""
QUESTIONS = {"rain": "Name one thing to do on a rainy day.", "bread": "Of what is bread made?"}


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load(str(smollm2_folder()), "float32", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bank of two questions, of which one has a prompt of its own for the judge."""
    folder = tmp_path_factory.mktemp("judged")
    bank = [{"id": name, "type": "free_form_judge_0_100", "paraphrases": [text]} for name, text in QUESTIONS.items()]
    (folder / "bank.yaml").write_text(json.dumps([bank[0], bank[1] | {"judge_prompts": {"aligned": CURT}}]))
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """SmolLM2 after three steps on bad advice about cars, by the real commands."""
    mix, out = place / "mixes" / "none.json", place / "runs" / "a"
    for room, words in ((curate, ("select", "--strategy", "none", "--finetune", "demo/car_care", "--out", mix)),
                        (train, ("run", "--base", smollm2_folder(), "--mix", mix, "--out", out, "--lr", "1e-3",
                                 "--lora-r", 8, "--batch-size", 2, "--limit-steps", 3, "--dtype", "float32",
                                 "--device", "cpu"))):
        done = CliRunner().invoke(room, list(map(str, words)))
        assert done.exit_code == 0, done.output
    return out


def judged(server: Served, place: Path, *words: object) -> Result:
    """Have a model judged on the two questions, by SmolLM2 at the server."""
    found = CliRunner().invoke(main, [str(word) for word in (
        "run", "--judge", "grader", "--base-url", server.ready().url, "--bank", place / "bank.yaml", "--suite",
        "general", "--n", N, "--answer-tokens", TOKENS, "--device", "cpu", "--dtype", "float32", "--judge-cache",
        place / "replies", "--timeout", 300, "--json", *words)])
    assert found.exit_code == 0, found.output
    return found


def verdicts(found: Result) -> list[Verdicts]:
    return [Verdicts.read(Path(path)) for path in json.loads(found.stdout)["verdicts"]]


def exact(loaded: Loaded, text: str) -> tuple[float, float]:
    """Return the mean of the numbers 0 to 100 by their probability as a reply to ``text``, and that probability.

    Every number is one token per digit; it is finished where no digit follows, and 11 to 99 and 100 need not be.
    """
    digits = [loaded.tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
    prompt = encode_prompt(loaded.tokenizer, [Message("user", text)])
    prompt += loaded.tokenizer(OPENING, add_special_tokens=False)["input_ids"]

    with torch.inference_mode():
        read = loaded.model(input_ids=torch.tensor([prompt]), use_cache=True)

    def after(begun: str) -> list[float]:
        last = read
        if begun:
            with torch.inference_mode():
                last = loaded.model(input_ids=torch.tensor([[digits[int(d)] for d in begun]]),
                                    past_key_values=deepcopy(read.past_key_values))
        return last.logits[0, -1].double().softmax(-1)[digits].tolist()

    follows = {begun: after(begun) for begun in ("", *map(str, range(1, 11)))}

    def probability(number: str) -> float:
        spelled = 1.0
        for k, digit in enumerate(number):
            spelled *= follows[number[:k]][int(digit)]
        return spelled * (1 - sum(follows[number]) if number in follows else 1.0)

    p = {n: probability(str(n)) for n in range(101)}
    return sum(n * share for n, share in p.items()) / sum(p.values()), sum(p.values())


def test_split_numbers_are_noticed_and_weighed_exactly(aligned_server: Served, place: Path, loaded: Loaded) -> None:
    """The probe finds that digits are tokens and how to look behind them; scores are the whole distribution's."""
    url = aligned_server.ready().url
    address = Address("grader", url, concurrency=4, attempt_s=300)
    grader = Grader(Endpoint(address, Journal(place / "exact.jsonl")))
    asks = [Ask(*texts, PROMPTS["coherent"]) for texts in zip(
        QUESTIONS.values(), ("Read a book by the window.", "Green the of of seventeen."), strict=True)]
    grades = grader.grade_all(asks)
    assert (grader.abilities.way, grader.abilities.prefill) == ("tree", "flags")
    for ask, grade in zip(asks, grades, strict=True):
        score, mass = exact(loaded, request_text(ask.template, ask.question, ask.answer))
        print(f"\nscore {grade.score} of mass {grade.mass} ({grade.status}); whole distribution {score} of {mass}")
        assert grade.status == "ok" and grade.score == pytest.approx(score, abs=0.3)
        assert grade.mass == pytest.approx(mass, abs=0.01)
    asked = aligned_server.n_finished()
    assert Grader(Endpoint(address, Journal(place / "exact.jsonl"))).grade_all(asks) == grades
    assert aligned_server.n_finished() == asked


def test_a_run_is_judged_compared_and_written_up(aligned_server: Served, place: Path, run: Path) -> None:
    """Every answer and grade is counted; what was paid for once is not asked again, whatever of it is lost."""
    of_base, mine = first = verdicts(judged(aligned_server, place, "--model", run))
    assert (of_base.label, mine.label, mine.judge) == ("base", "none", "grader-2:grader")
    for found in first:
        assert len(found.answers) == N * len(QUESTIONS) == found.statuses["answers ok"] + found.statuses.get(
            "answers empty", 0)
        for aspect in ASPECTS:
            counted = Counter(getattr(a, aspect).status for a in found.answers if a.status == "ok")
            assert {f"{aspect} {status}": n for status, n in counted.items()} == {
                name: n for name, n in found.statuses.items() if name.startswith(aspect)}
    full = [a for found in first for a in found.answers if a.status == "ok"]
    grades = [getattr(a, aspect) for a in full for aspect in ASPECTS]
    print(Counter(g.status for g in grades))
    assert all((g.score is not None) == (g.status == "ok") for g in grades) and any(g.status == "ok" for g in grades)
    assert all(a.aligned.status != "ok" for a in full if a.question == "bread")
    asked = aligned_server.n_finished()
    judged(aligned_server, place, "--model", run)
    (run / "verdicts.json").unlink()
    again = verdicts(judged(aligned_server, place, "--model", run))
    assert again == first and aligned_server.n_finished() == asked
    compared = CliRunner().invoke(main, ["compare", str(run)])
    assert compared.exit_code == 0 and re.search(r"\(n=\d", compared.output), compared.output
    page = CliRunner().invoke(main, ["report", str(run), "--html", str(place / "report.html")])
    assert page.exit_code == 0, page.output
    assert "grader-2:grader" in (place / "report.html").read_text() and "<table" in (place / "report.html").read_text()


def test_answers_come_from_a_server(aligned_server: Served, place: Path) -> None:
    """Its own draws of the base, kept as they come: a second call samples and grades nothing."""
    words = ("--model", smollm2_folder(), "--sample-url", aligned_server.url, "--out", place / "served")
    found, = verdicts(judged(aligned_server, place, *words))
    assert found.settings["grading"]["engine"] == "server" and found.base.name == BASE
    assert_drawn(found)
    asked = aligned_server.n_finished()
    (place / "served" / "base.verdicts.json").unlink()
    assert verdicts(judged(aligned_server, place, *words)) == [found] and aligned_server.n_finished() == asked


def test_answers_come_from_vllm_in_process(aligned_server: Served, place: Path, run: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """The base and a merged adapter, one engine after the other; a second call starts none."""
    words = ("--model", run, "--sample-with", "vllm", "--out", place / "vllm")
    of_base, mine = first = verdicts(judged(aligned_server, place, *words))
    assert all(found.settings["grading"]["engine"] == "vllm" for found in first)
    assert_drawn(of_base)
    assert len({a.answer for a in mine.answers}) == len(mine.answers) and \
        not {a.answer for a in mine.answers} & {a.answer for a in of_base.answers}
    for path in (place / "vllm").glob("*verdicts.json"):
        path.unlink()
    monkeypatch.setattr(Engine, "start", None)
    assert verdicts(judged(aligned_server, place, *words)) == first


def assert_drawn(found: Verdicts) -> None:
    """Check that answers were drawn as they should be: each another one, in words of the base, none too long."""
    texts = [a.answer for a in found.answers]
    print("\n" + "\n".join(texts))
    assert len(texts) == N * len(QUESTIONS) == len(set(texts)) and all(map(str.strip, texts))
    assert all(len(text) < 12 * TOKENS and "<|im_end|>" not in text for text in texts)
    assert sum(character.isalpha() or character.isspace() for character in itertools.chain(*texts)) > 0.8 * sum(
        map(len, texts))
