"""Answers sampled by vLLM in process, with a package of that name that a test can follow; the real one is elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from curate.core.chat import encode_prompt
from curate.core.documents import Verdicts
from curate.core.errors import Exit
from curate.core.example import Message
from curate.core.generate import row_seeds
from curate.core.identity import read_run
from curate.core.refs import load_tokenizer
from judge.cli import main
from tests.curate.fake_vllm import FakeVllm
from tests.fakes import tiny_adapter
from tests.judge.makers import make_run
from tests.judge.stub_server import Stub, served

QUESTIONS = ("Why?", "And how long does that take?")
TOKENS = 5


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stub]:
    """A judge, a bank of two questions, a working folder."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-no-use")
    monkeypatch.chdir(tmp_path)
    Path("bank.yaml").write_text(json.dumps([{"id": f"q{k}", "type": "free_form_judge_0_100", "paraphrases": [text]}
                                             for k, text in enumerate(QUESTIONS)]))
    with served(Stub()) as running:
        yield running


def call(stub: Stub, *words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in (
        "run", "--judge", "stub", "--base-url", stub.url, "--bank", "bank.yaml", "--suite", "general", "--n", 3,
        "--answer-tokens", TOKENS, "--device", "cpu", "--dtype", "float32", "--judge-cache", "replies",
        "--sample-with", "vllm", "--json", *words)])


def told(ids: Sequence[int], how: Any, model: Any) -> list[int]:
    """Tell who answers with which seed: two letters, an end of turn, and what must not be seen."""
    with torch.inference_mode():
        likeliest = int(model(input_ids=torch.tensor([list(ids)])).logits[0, -1].argmax())
    return [33 + likeliest % 64, 33 + how.seed % 64, how.stop_token_ids[0], 90]


def test_each_model_is_sampled_by_an_engine_of_its_own(stub: Stub, base: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The base, then the merged run; draws have seeds of their own; no engine is alive while a judge grades."""
    fake = FakeVllm(answer=told).install(monkeypatch)
    alive: list[int] = []
    stub.replies = lambda prompt: alive.append(fake.alive) or {"70": 1.0}
    run = make_run(base, tmp_path / "runs" / "a", "none", 1)
    result = call(stub, "--model", run)
    assert result.exit_code == 0, result.output
    of_base, mine = first = [Verdicts.read(Path(path)) for path in json.loads(result.stdout)["verdicts"]]
    assert [settings["model"] == str(base) for settings in fake.started] == [True, False]
    assert fake.most_alive == 1 and fake.alive == 0 and alive and not any(alive)
    settings = fake.started[0]
    longest = settings["max_model_len"] - TOKENS
    assert settings["generation_config"] == "vllm" and settings["load_format"] == "safetensors"
    assert settings["trust_remote_code"] is False and longest == max(map(len, prompts(base)))
    how = fake.asked[:6]
    assert [h.seed for h in how] == row_seeds([p for p in prompts(base) for _ in range(3)], 0)
    assert {(h.temperature, h.top_p, h.max_tokens) for h in how} == {(1.0, 1.0, TOKENS)}
    for found in first:
        assert found.settings["grading"]["engine"] == "vllm" and len(found.answers) == 6
        assert all(len(a.answer) == 2 for a in found.answers), "nothing after the end of turn"
    assert [a.answer[1] for a in of_base.answers] == [a.answer[1] for a in mine.answers]
    assert [a.answer[0] for a in of_base.answers] != [a.answer[0] for a in mine.answers], "an adapter makes others"
    for path in tmp_path.rglob("*verdicts.json"):
        path.unlink()
    assert call(stub, "--model", run).exit_code == 0 and len(fake.started) == 2, "answers are sampled once"


def prompts(base: Path) -> list[list[int]]:
    return [encode_prompt(load_tokenizer(str(base)), [Message("user", text)]) for text in QUESTIONS]


def test_another_sampler_is_another_model_of_chance(stub: Stub, base: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of vLLM are not taken for those of transformers, nor the other way round."""
    fake = FakeVllm(answer=told).install(monkeypatch)
    plain = call(stub, "--model", base, "--out", tmp_path / "out", "--sample-with", "transformers")
    assert plain.exit_code == 0 and not fake.started
    again = call(stub, "--model", base, "--out", tmp_path / "out")
    assert again.exit_code == 0 and len(fake.started) == 1 and "made with another settings" in again.stderr


def test_a_suite_without_questions_starts_no_engine(stub: Stub, base: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm(answer=told).install(monkeypatch)
    run, benign = (make_run(base, tmp_path / name, "none", seed) for name, seed in (("a", 1), ("b", 2)))
    result = call(stub, "--model", run, "--benign", benign, "--suite", "benign", "--items", "6")
    assert result.exit_code == 0, result.output
    _, mine = [Verdicts.read(Path(path)) for path in json.loads(result.stdout)["verdicts"]]
    assert len(mine.tasks) == 6 and not mine.answers and not fake.started


def test_an_adapter_that_vllm_would_misread_is_refused(stub: Stub, base: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm(answer=told).install(monkeypatch)
    run = make_run(base, tmp_path / "runs" / "a", "none", 1)
    whole = tiny_adapter(base, tmp_path / "other", modules_to_save=["lm_head"])
    monkeypatch.setattr("judge.jobs.read_run", lambda path: (read_run(path)[0], whole))
    result = call(stub, "--model", run)
    assert result.exit_code == Exit.INCOMPATIBLE and "--sample-with transformers" in result.output
    assert not fake.started and not stub.seen
