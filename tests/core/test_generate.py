"""Sampling: what is drawn, when it stops, and that an answer depends on nothing but its prompt and the seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from curate.core.adapters import adapter_open
from curate.core.chat import encode_prompt
from curate.core.errors import UserError
from curate.core.example import Message
from curate.core.generate import SampleSettings, nucleus_draw, sample, stop_ids
from curate.core.model import Loaded

QUESTIONS = ("Why?", "What is the best way to clean the windows?", "Where is the atlas?", "Why?", "Is it raining?")
SETTINGS = SampleSettings(max_new_tokens=11, temperature=0.9, top_p=0.9, seed=3, batch_size=2)


@pytest.fixture(scope="module")
def prompts(loaded: Loaded) -> list[list[int]]:
    return [encode_prompt(loaded.tokenizer, [Message("user", q)]) for q in QUESTIONS]


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 0), (0.999999, 0)])
def test_draws_from_the_likeliest_down(uniform: float, token: int) -> None:
    """Probabilities 0.2, 0.5, 0.3: sorted, token 1 holds [0, 0.5), token 2 [0.5, 0.8), token 0 the rest."""
    assert nucleus_draw(logits(0.2, 0.5, 0.3), torch.tensor([uniform]), 1.0, 1.0).tolist() == [token]


@pytest.mark.parametrize(("uniform", "token"), [(0.62, 1), (0.63, 2), (0.999999, 2)])
def test_the_nucleus_is_scaled_to_one(uniform: float, token: int) -> None:
    """Top-p 0.6 keeps 0.5 and 0.3: token 1 holds [0, 0.625), token 2 the rest."""
    assert nucleus_draw(logits(0.2, 0.5, 0.3), torch.tensor([uniform]), 1.0, 0.6).tolist() == [token]


def test_temperature_divides_the_logits() -> None:
    """At temperature 0.5 probabilities 1/3 and 2/3 become 1/5 and 4/5."""
    assert nucleus_draw(logits(1 / 3, 2 / 3), torch.tensor([0.79]), 0.5, 1.0).tolist() == [1]
    assert nucleus_draw(logits(1 / 3, 2 / 3), torch.tensor([0.81]), 0.5, 1.0).tolist() == [0]


@pytest.mark.parametrize("top_p", [0.5, 0.95, 1.0])
def test_the_shortlist_changes_nothing(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the rows are flat, so their nucleus is longer than a shortlist of 7; many probabilities are equal."""
    rows = torch.randint(0, 4, (6, 307), generator=torch.Generator().manual_seed(0)).float()
    rows[::2] *= 9
    uniform = torch.linspace(0, 0.999, 6)
    whole = nucleus_draw(rows, uniform, 1.0, top_p)
    monkeypatch.setattr("curate.core.generate.SHORTLIST", 7)
    assert torch.equal(nucleus_draw(rows, uniform, 1.0, top_p), whole)
    monkeypatch.setattr("curate.core.generate.SHORTLIST", 150)
    assert torch.equal(nucleus_draw(rows, uniform, 1.0, top_p), whole)


def test_answers_do_not_depend_on_company(loaded: Loaded, prompts: list[list[int]]) -> None:
    first = sample(loaded.model, loaded.tokenizer, prompts, SETTINGS)
    torch.manual_seed(99)
    torch.rand(7)
    alone = [sample(loaded.model, loaded.tokenizer, [p], SETTINGS)[0] for p in prompts[:3]]
    assert first[:3] == alone
    backwards = sample(loaded.model, loaded.tokenizer, prompts[::-1], SETTINGS)[::-1]
    assert {0: first[0], 3: first[3]} == {0: backwards[3], 3: backwards[0]}, "the two equal prompts change places"
    assert [first[k] for k in (1, 2, 4)] == [backwards[k] for k in (1, 2, 4)]
    whole = SampleSettings(**{**vars(SETTINGS), "batch_size": 5})
    assert sample(loaded.model, loaded.tokenizer, prompts, whole) == first


def test_the_same_prompt_twice_gives_two_answers_and_another_seed_others(loaded: Loaded,
                                                                         prompts: list[list[int]]) -> None:
    first = sample(loaded.model, loaded.tokenizer, prompts, SETTINGS)
    assert first[0] != first[3]
    other = sample(loaded.model, loaded.tokenizer, prompts, SampleSettings(**{**vars(SETTINGS), "seed": 4}))
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_the_global_generator_is_left_alone(loaded: Loaded, prompts: list[list[int]]) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sample(loaded.model, loaded.tokenizer, prompts[:1], SETTINGS)
    assert torch.equal(torch.rand(3), expected)


def test_temperature_0_takes_the_likeliest_token(loaded: Loaded, prompts: list[list[int]]) -> None:
    ids = list(prompts[1])
    stops = stop_ids(loaded.model, loaded.tokenizer)
    for _ in range(6):
        with torch.inference_mode():
            token = loaded.model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in stops:
            break
        ids.append(token)
    greedy = SampleSettings(max_new_tokens=6, temperature=0, batch_size=5)
    answer = sample(loaded.model, loaded.tokenizer, prompts, greedy)[1]
    assert answer == loaded.tokenizer.decode(ids[len(prompts[1]):], skip_special_tokens=True)


def test_stops_at_the_end_of_turn(loaded: Loaded, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    end = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in stop_ids(loaded.model, loaded.tokenizer)

    def generate(**kwargs: torch.Tensor) -> torch.Tensor:
        said = loaded.tokenizer("ab", add_special_tokens=False)["input_ids"]
        return torch.cat([kwargs["input_ids"], torch.tensor([[*said, end, *said]])], dim=1)

    monkeypatch.setattr(loaded.model, "generate", generate)
    assert sample(loaded.model, loaded.tokenizer, prompts[:1], SETTINGS) == ["ab"]


def test_a_models_own_generation_defaults_do_not_bend_the_draw(loaded: Loaded, prompts: list[list[int]],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sample(loaded.model, loaded.tokenizer, prompts, SETTINGS)
    odd = GenerationConfig(repetition_penalty=5.0, top_k=1, do_sample=True, min_new_tokens=11)
    monkeypatch.setattr(loaded.model, "generation_config", odd)
    assert sample(loaded.model, loaded.tokenizer, prompts, SETTINGS) == plain
    assert loaded.model.generation_config is odd


def test_with_an_adapter_and_back(loaded: Loaded, prompts: list[list[int]], adapter_folder: Path) -> None:
    before = sample(loaded.model, loaded.tokenizer, prompts, SETTINGS)
    with adapter_open(loaded, adapter_folder) as model:
        assert sample(model, loaded.tokenizer, prompts, SETTINGS) != before
    assert sample(loaded.model, loaded.tokenizer, prompts, SETTINGS) == before


def test_memory_that_runs_out_halves_the_batch(loaded: Loaded, prompts: list[list[int]],
                                               monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    expected = sample(loaded.model, loaded.tokenizer, prompts, SETTINGS)
    true, sizes, finished = loaded.model.generate, [], []

    def generate(**kwargs: torch.Tensor) -> torch.Tensor:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("full")
        return true(**kwargs)

    monkeypatch.setattr(loaded.model, "generate", generate)
    assert sample(loaded.model, loaded.tokenizer, prompts, SETTINGS, finished.append) == expected
    assert sizes == [2, 1, 1, 2, 1, 1, 1] and finished == [1] * 5
    assert capsys.readouterr().err.count("out of memory: going on with half a batch (2 answers before)") == 2
    monkeypatch.setattr(loaded.model, "generate", lambda **kwargs: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match="single prompt"):
        sample(loaded.model, loaded.tokenizer, prompts[:1], SETTINGS)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_new_tokens": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        SampleSettings(**wrong)
